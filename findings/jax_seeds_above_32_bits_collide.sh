#!/usr/bin/env bash
# jax 0.10.2, 64-bit types off (the default).
#
# One expects: jax.random.key(2**32 + 7) is another key than key(7), or an error; numpy's generators take any seed.
# What happens: only the lower 32 bits count, without a word: seeds made of a time in milliseconds, or of a hash, collide.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax
import numpy as np

draw = lambda seed: float(jax.random.normal(jax.random.key(seed)))
numpy_draw = lambda seed: float(np.random.default_rng(seed).standard_normal())
for seed in (7, 2**32 + 7, 2**40 + 7):
  print(f"seed {seed}: jax {draw(seed):.6f}, numpy {numpy_draw(seed):.6f}")
same = draw(7) == draw(2**32 + 7) == draw(2**40 + 7)
sys.exit(0 if same and numpy_draw(7) != numpy_draw(2**32 + 7) else 1)
PY
