"""Settings small enough to compile in seconds, and a batch to go with them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from jepa_jax.config import Config, build_config
from jepa_jax.experiment import Experiment, make_experiment
from jepa_jax.optim import make_optimiser
from jepa_jax.sharding import MeshConfig, batch_sharding, make_mesh
from jepa_jax.step import TrainState, numbers

VIT = {"name": "vit", "image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2}
MLP = {"name": "mlp", "image_size": 16, "widths": (32, 16)}

TINY: dict[str, Any] = {
  "name": "tiny",
  "total": "6steps",
  "batch_size": 16,
  "data": {"source": "synthetic", "canvas_px": 16, "channels": 1, "mean": (0.5,), "std": (0.5,), "max_train": 64},
  "encoder": VIT,
  "objective": {
    "name": "lejepa",
    "num_slices": 16,
    "projector": {"hidden": (32,), "out": 8},
    "views": {
      "global_crops": {"num": 2, "size_px": 16, "scale": (0.3, 1.0)},
      "local_crops": {"num": 2, "size_px": 8, "scale": (0.05, 0.3)},
    },
  },
  "optim": {"lr": 1e-2, "warmup": "2steps"},
  "probe": {"spectrum_every": 0},  # a quarter of what there is to trace; tests of what it measures turn it on
  "evals": {"linear": {"epochs": 2, "min_steps": 0, "learning_rates": (1e-3, 1e-2)}},
  "checkpoint": {"every": "2steps"},
  "log": {"every": "1steps", "tensorboard": False, "views": 0},
}


def tiny_values(**changes: Any) -> dict[str, Any]:
  """Returns TINY with dotted settings changed, "." written as "__": tiny_values(optim__lr=1)."""
  values = copy.deepcopy(TINY)
  for key, value in changes.items():
    node = values
    *parents, leaf = key.split("__")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return values


def tiny_config(**changes: Any) -> Config:
  return build_config(tiny_values(**changes))


def tiny_experiment(mesh: MeshConfig | None = None, num_devices: int = 1, **changes: Any) -> Experiment:
  cfg = tiny_config(**changes)
  return make_experiment(cfg, make_mesh(mesh or MeshConfig(), jax.devices()[:num_devices]), 64, 10)


def tiny_batch(run: Experiment, step: int = 0) -> dict[str, jax.Array]:
  """Returns the same images whatever the mesh, laid out for it."""
  rng = np.random.default_rng(step)
  num, size = run.cfg.batch_size, run.cfg.data.canvas_px
  batch = {
    "canvas": rng.integers(0, 256, (num, size, size, run.cfg.data.channels), np.uint8),
    "height": np.full(num, size, np.int32),
    "width": np.full(num, size, np.int32),
    "label": rng.integers(0, 10, num).astype(np.int32),
    "index": np.arange(num, dtype=np.int32),
  }
  if run.cfg.data.captions.train:  # of different lengths, some images with one less
    shape = run.abstract_batch["caption"].shape
    ids = rng.integers(3, 260, shape).astype(np.int32)
    ids[np.arange(shape[2]) >= rng.integers(2, shape[2] + 1, shape[:2])[..., None]] = -1
    ids[::3, -1] = -1
    batch["caption"] = ids
  return jax.device_put(batch, batch_sharding(run.mesh))


def optimiser_of(run: Experiment) -> optax.GradientTransformation:
  """Returns the optimiser that the experiment's step has, for a step built by hand."""
  return make_optimiser(run.cfg.optim, run.lr, run.total_steps, run.objective.rules)


_starts: dict[str, TrainState] = {}  # config -> its state at step 0, on the host


def start_of(run: Experiment) -> TrainState:
  """Returns the state at step 0 on the run's mesh; made once for all meshes and numbers of microbatches."""
  same = repr(dataclasses.replace(run.cfg, mesh=MeshConfig(), microbatch=1))
  if same not in _starts:
    _starts[same] = jax.device_get(run.init())
  return jax.device_put(jax.tree.map(np.copy, _starts[same]), run.shardings)  # a step may write into what it is given


def run_steps(run: Experiment, num_steps: int, compiled=None):
  """Returns (final state, list of metrics) after num_steps."""
  compiled = compiled or run.compile()
  state, history = start_of(run), []
  for step in range(num_steps):
    state, metrics = compiled(state, tiny_batch(run, step), run.key)
    history.append(numbers(metrics))
  return state, history
