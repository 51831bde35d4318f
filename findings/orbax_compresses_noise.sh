#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 (v1), CPU.
#
# One expects: a save of float32 weights costs about what writing their bytes costs.
# What happens: arrays are compressed by zstd unless one says otherwise (context.array.saving.use_compression), and the
# digits of weights are noise: the files are some 8 % smaller, and the save takes several times the time of a core that a
# plain one takes (without that of the kernel, which is the disk's). numpy arrays are also copied first
# (context.memory.deepcopy_host_arrays), which doubles the memory.
# Remedy: context.array.saving.use_compression = False; checkpoints that are compressed are read as ever.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PY' 2>/dev/null
import os
import pathlib
import statistics
import sys

import numpy as np
from orbax.checkpoint import v1 as ocp

arrays = {f"w{i}": np.random.default_rng(i).standard_normal((4096, 4096), np.float32) for i in range(6)}
found = {True: [], False: []}
for turn in range(3):
  for compress in found:
    context = ocp.Context()
    context.array.saving.use_compression = compress
    path = pathlib.Path.cwd() / f"{turn}{compress}"
    began = os.times().user
    with context:
      ocp.save(path, arrays)
    seconds = os.times().user - began  # not the kernel's, which is the disk's
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    found[compress].append((seconds, size))
(slow, small), (fast, large) = (map(statistics.median, zip(*found[kind])) for kind in (True, False))
print(f"compressed: {slow:.2f} s of a core outside of the kernel, {small / 1e6:.0f} MB; plain: {fast:.2f} s, {large / 1e6:.0f} MB")
sys.exit(0 if slow > 2 * fast and small > 0.88 * large else 1)
PY
