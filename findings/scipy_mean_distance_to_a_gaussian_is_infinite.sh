#!/usr/bin/env bash
# SciPy 1.17.1, CPU.
#
# One expects: sqrt(2) Gamma((D+1)/2) / Gamma(D/2) hyp1f1(-1/2, D/2, -r^2/2), the mean distance from a point at radius r to a
# standard Gaussian in D dimensions (energy distances, mean distances of noise, Rice's mean for D = 2), is finite for any r.
# What happens: from D = 256 on scipy.special.hyp1f1 returns inf, without a warning, at the radius that samples of that Gaussian
# have (r^2 = D), where the value is 1.414; for D = 128 at r = 10, where samples have 11.3.
# With a = +1/2, which the sliced Epps-Pulley statistic needs, the same arguments are right. Very large arguments being
# wrong is scipy#5349; these are not large.
# Remedy: an integral that converges quickly, such as that of the Laplace transform of a noncentral chi-square, or mpmath.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scipy==1.17.1 mpmath==1.3.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import math
import sys

import mpmath
from scipy.special import hyp1f1

infinite = 0
for width in (32, 64, 128, 256, 512, 1024):
  for a in (0.5, -0.5):
    b, x = width / 2, -width / 2  # r^2 = D, the typical radius of a sample
    exact, found = float(mpmath.hyp1f1(a, b, x)), float(hyp1f1(a, b, x))
    infinite += math.isinf(found)
    print(f"D = {width:5d}: 1F1({a:4.1f}, {b:5.0f}, {x:6.0f}) = {exact:.6f}, SciPy: {found:.6f}", flush=True)
sys.exit(0 if infinite else 1)
PY
