#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, jax 0.10.2, CPU with eight devices.
#
# One expects: saving arrays that all devices hold copies of moves bytes, and compiles nothing.
# What happens: each device saves an eighth of every array whose first divisible axis allows it ("replica-parallel"), and
# cuts it with a jitted slice whose place is a constant: one program per array shape and device. 40 arrays of different
# shapes compile 320 programs at the first save, which takes seconds; on an accelerator each costs more.
# Remedy: context.array.saving.min_slice_bytes_for_replica_parallel (v1), the same argument of ArrayHandler (v0).
# Orbax leaves it off by itself only where the environment variable JAX_PLATFORMS names a GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
cd "$folder"
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" - <<'PY'
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

compiled = [0]


def count(event, *_, **__):
  compiled[0] += "backend_compile" in event


jax.monitoring.register_event_duration_secs_listener(count)
copies = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
state = {f"w{i:02d}": jax.device_put(np.ones((8 * (i + 1), 16), np.float32), copies) for i in range(40)}


def save(name, least_bytes):
  context = ocp.Context()
  context.array.saving.min_slice_bytes_for_replica_parallel = least_bytes
  compiled[0], began = 0, time.monotonic()
  with context:
    ocp.save(name, state)
  print(f"{name}: {compiled[0]} programs compiled, {time.monotonic() - began:.1f} s", flush=True)
  return compiled[0]


import os

first, whole = save(os.path.abspath("default"), None), save(os.path.abspath("whole"), 2**22)
sys.exit(0 if first == 320 and whole == 0 else 1)
PY
