"""The train step of every method on one encoder, and how much of it the loss itself takes.

ViT-Ti/4 at 32 px; two views, or the one crop of MAE; DINO has four small ones, too. The step is that of training on
views drawn before: encoders, heads, loss, gradient, AdamW, teacher and probe. The loss alone is its value and gradient
on random embeddings of the same shapes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import losses
from jepa_jax.bench.against import given_views
from jepa_jax.bench.timing import alternating_ms, num_threads
from jepa_jax.config import build_config
from jepa_jax.experiment import make_experiment, random_batch
from jepa_jax.sharding import make_mesh
from jepa_jax.views import example_keys

DESCRIPTION = "ms per step of every method on the same encoder, and the share of it that the loss takes."
OUT = 256
_TWO = {"global_crops": {"num": 2, "size_px": 32, "scale": (0.3, 1.0)}}
_SMALL = {"local_crops": {"num": 4, "size_px": 16, "scale": (0.05, 0.3)}}
_HEAD = {"hidden": (2048,), "out": OUT}
_PREDICTED = {"projector": _HEAD, "predictor": {"hidden": (2048,), "out": OUT}}
METHODS: dict[str, dict[str, Any]] = {
  "lejepa": {"num_slices": 256},
  "mmcr": {},
  "vicreg": {},
  "barlow": {},
  "mcr2": {},
  "simclr": {},
  "byol": _PREDICTED,
  "mocov3": _PREDICTED,
  "dino": {"views": _TWO | _SMALL, "prototypes": 4096},
  "mae": {"views": {"global_crops": {"num": 1, "size_px": 32, "scale": (0.2, 1.0)}}},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("--methods", default=",".join(METHODS), help="which (default: %(default)s)")
  parser.add_argument("--batch-size", type=int, default=64, help="images in a step (default: %(default)s)")
  parser.add_argument("--steps", type=int, default=7, help="timed steps of each, after one to warm up")
  parser.add_argument("--prototypes", type=int, default=4096, help="of DINO (default: %(default)s)")


def run(methods: str = ",".join(METHODS), batch_size: int = 64, steps: int = 7, prototypes: int = 4096, **size) -> dict:
  """Returns a row per method: median ms of the step and of its loss alone, and the share of it. For JSON.

  size: other settings of the encoder. ValueError for an unknown method and counts that cannot be.
  """
  names = methods.split(",")
  if unknown := [name for name in names if name not in METHODS]:
    raise ValueError(f"--methods={methods}: no {unknown[0]!r} here; there are {', '.join(METHODS)}")
  if batch_size < 2 or steps < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 2 and steps={steps} at least 1")
  device = jax.devices()[0]
  rows = [_row(name, batch_size, steps, prototypes, size) for name in names]
  about = {"device": f"{device.device_kind}, {num_threads()} CPU threads", "jax": jax.__version__}
  return {"batch_size": batch_size, "rows": rows, **about}


def _row(name: str, batch_size: int, steps: int, prototypes: int, size: dict) -> dict[str, Any]:
  own = {"projector": _HEAD, "views": _TWO} | METHODS[name]
  own |= {"prototypes": prototypes} if name == "dino" else {}
  if name == "mae":
    own = {"predictor": {"depth": 2, "width": 96, "num_heads": 3}} | METHODS[name]
  cfg = build_config(
    {
      "name": name,
      "total": "100steps",
      "batch_size": batch_size,
      "data": {"source": "synthetic", "canvas_px": 32},
      "encoder": {"name": "vit", "variant": "tiny", "image_size": 32, "patch_size": 4} | size,
      "objective": {"name": name} | own,
      "optim": {"lr": 1e-4},
      "probe": {"spectrum_every": 0},
    }
  )
  run = make_experiment(cfg, make_mesh(cfg.mesh, jax.devices()[:1]), 100 * batch_size, 10)
  batch = random_batch(run)
  views = jax.jit(run.objective.views)(example_keys(jax.random.key(1), jnp.arange(batch_size)), batch)
  step, box = given_views(run, views), {"state": run.init()}

  def ours() -> None:
    box["state"], metrics = step(box["state"], batch, run.key)
    jax.block_until_ready(metrics)

  loss = loss_alone(name, run.objective, batch_size)
  times_ms = alternating_ms({"step": ours, "loss": loss}, (), steps)
  step_ms, loss_ms = (statistics.median(times_ms[kind]) for kind in ("step", "loss"))
  share = statistics.median(b / a for a, b in zip(times_ms["step"], times_ms["loss"]))
  return {"method": name, "step_ms": round(step_ms, 1), "loss_ms": round(loss_ms, 2), "share": round(share, 4)}


def loss_alone(name: str, objective: Any, batch_size: int) -> Callable:
  """Returns a call without arguments: value and gradient of the method's loss on random embeddings of its shapes."""
  rng, cfg = np.random.default_rng(0), objective.cfg
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  z_BxVxD = normal(batch_size, 2, OUT)
  fixed = normal(batch_size, 2, OUT)
  losses_of: dict[str, Callable] = {
    "lejepa": lambda z: losses.lejepa(
      z.swapaxes(0, 1), losses.slice_directions(jax.random.key(0), OUT, cfg.num_slices), num_global=2, lam=cfg.lam
    ),
    "mmcr": losses.mmcr,
    "vicreg": losses.vicreg,
    "barlow": losses.barlow_twins,
    "mcr2": losses.mcr2,
    "simclr": losses.nt_xent,
    "byol": lambda z: losses.byol(z, fixed),
    "mocov3": lambda z: losses.moco_v3(z, fixed),
  }
  if name == "dino":
    z_BxVxD = normal(batch_size, cfg.views.num_views, cfg.prototypes)
    teacher, centre = normal(batch_size, 2, cfg.prototypes), normal(cfg.prototypes)
    losses_of["dino"] = lambda z: losses.dino(z, teacher, centre)
  if name == "mae":
    removed = objective.num_patches - objective.num_context
    z_BxVxD = normal(batch_size, removed, objective.answer_width)
    target, masked = normal(*z_BxVxD.shape), jnp.ones(z_BxVxD.shape[:2])
    losses_of["mae"] = lambda z: losses.mae(z, losses.patch_targets(target), masked)
  program = jax.jit(jax.value_and_grad(lambda z: losses_of[name](z)[0]))
  return lambda: jax.block_until_ready(program(z_BxVxD))
