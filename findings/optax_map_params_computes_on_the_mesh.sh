#!/usr/bin/env bash
# optax 0.2.8, jax 0.10.2, libtpu 0.0.42.1 (Python 3.11, Linux x86-64; no TPU is needed).
#
# One expects: optax.tree.map_params, given a tree of ShapeDtypeStructs, only maps over a tree: it says which leaves of an
# optimiser's state are moments of a parameter. So it should work for devices that exist on paper only.
# What happens: it calls the optimiser's init on placeholders, and what init makes that is no moment (a step counter, a
# learning rate as an array) is made eagerly; and eager arrays made inside jax.set_mesh(mesh) are put on ALL devices of
# the mesh. With a mesh of jax.experimental.topologies.get_topology_desc devices this raises AttributeError:
# 'Executable' object has no attribute 'local_devices'.
# Remedy: call map_params outside of set_mesh; or inside jax.eval_shape.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
"$folder/venv/bin/pip" install -q --no-deps libtpu==0.0.42.1
cd "$folder"
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_MIN_LOG_LEVEL=3
export TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost
XLA_FLAGS=--xla_force_host_platform_device_count=4 "$folder/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
params = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
state = jax.eval_shape(optimiser.init, params)


def moments():
  return optax.tree.map_params(optimiser, lambda x: "moment", state, transform_non_params=lambda x: "other")


def mesh_of(devices):
  return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


with jax.set_mesh(mesh_of(jax.devices()[2:])):
  where = sorted(d.id for d in jnp.zeros(3).devices())
print("eager zeros inside a mesh of devices 2 and 3 are on", where)

outside = moments()
chips = topologies.get_topology_desc("v5e:2x2", "tpu", chip_config_name="default", chips_per_host_bounds=(2, 2, 1)).devices
with jax.set_mesh(mesh_of(chips)):
  try:
    inside = moments()
    seen = "no error"
  except AttributeError as error:
    seen = f"AttributeError: {error}"
print("map_params inside a mesh of chips that are not here:", seen)
print("outside of it:", jax.tree.leaves(outside))
sys.exit(0 if where == [2, 3] and "local_devices" in seen and "moment" in jax.tree.leaves(outside) else 1)
PY
