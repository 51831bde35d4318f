#!/usr/bin/env bash
# scipy 1.17.0, scipy.stats.qmc.Sobol(scramble=True).
#
# One expects: after scrambling, 1,024 points in 512 dimensions are spread evenly in every pair of coordinates, at least
# as evenly as random ones; people take them for directions of projections (sliced losses, random features).
# What happens: some pairs of coordinates are almost the same: the largest correlation is .6 to .9, that of random points
# .15 to .2, and it stays for any seed. In few dimensions Sobol is far better than random, as one thinks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scipy==1.17.0 numpy==2.4.0
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc


def largest(x):
  c = np.corrcoef(x.T)
  return np.abs(c - np.eye(len(c))).max()


seen = {}
for dim in (8, 64, 512, 2048):
  for seed in (0, 1):
    sobol = largest(ndtri(np.clip(qmc.Sobol(dim, scramble=True, rng=seed).random(1024), 1e-9, 1 - 1e-9)))
    random = largest(np.random.default_rng(seed).standard_normal((1024, dim)))
    seen[dim, seed] = sobol, random
    print(f"1024 points, {dim:4d} dimensions, seed {seed}: largest correlation Sobol {sobol:.2f}, random {random:.2f}")
worse = all(seen[512, seed][0] > 0.5 > 0.25 > seen[512, seed][1] for seed in (0, 1))
better = all(seen[8, seed][0] < seen[8, seed][1] for seed in (0, 1))
sys.exit(0 if worse and better else 1)
PY
