"""Train steps beside the same steps in PyTorch, in turns: same weights, same images, each library as it is best.

- `ijepa`: I-JEPA, ViT-S/16 at 224 px, official masks (`bench masking` has more of them).
- `lejepa`: LeJEPA, ViT-Ti/16 at 224 px, 2 views of 224 px and 6 of 96. `lejepa_resnet18`: 4 views of 32 px, CIFAR stem.
- `mmcr`: MMCR, ResNet-18 with CIFAR stem, 16 views of 32 px.

Ours is the step of training with views drawn before: encoder, projector or predictor, loss, gradient, AdamW, and,
which PyTorch has not, the online probe and the metrics. float32 on a CPU, else bfloat16 products.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.bench import masking
from jepa_jax.bench.timing import alternating_ms, need_torch, num_threads
from jepa_jax.config import Config, build_config
from jepa_jax.experiment import make_experiment, random_batch
from jepa_jax.losses import slice_directions
from jepa_jax.models.position import resize_position_embedding
from jepa_jax.models.resnet import STAGES
from jepa_jax.optim import make_optimiser
from jepa_jax.sharding import make_mesh
from jepa_jax.step import make_step
from jepa_jax.views import example_keys
from jepa_jax.weights.convert import encoder_to, flatten

DESCRIPTION = "Train steps of our methods beside the same steps in PyTorch: median times, their ratio, the losses."
VIEWS = {
  "lejepa": {
    "global_crops": {"num": 2, "size_px": 224, "scale": (0.3, 1.0)},
    "local_crops": {"num": 6, "size_px": 96, "scale": (0.05, 0.3)},
  },
  "lejepa_resnet18": {"global_crops": {"num": 4, "size_px": 32, "scale": (0.2, 1.0)}},
  "mmcr": {"global_crops": {"num": 16, "size_px": 32, "scale": (0.2, 1.0)}},
}
PROJECTORS = {
  "lejepa": {"hidden": (2048, 2048), "out": 512},
  "lejepa_resnet18": {"hidden": (2048, 2048), "out": 128},
  "mmcr": {"hidden": (512,), "out": 128},
}
METHODS = ("ijepa", *VIEWS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("--methods", default=",".join(METHODS), help="which steps (default: %(default)s)")
  parser.add_argument("--batch-size", type=int, default=16, help="images in a batch (default: %(default)s)")
  parser.add_argument("--steps", type=int, default=7, help="timed steps of each, after one to warm up")
  parser.add_argument("--compile", action="store_true", help="PyTorch also compiled, by torch.compile")


def run(methods: str = ",".join(METHODS), batch_size: int = 16, steps: int = 7, compile: bool = False, **size) -> dict:
  """Returns a row per method, for JSON: median times in ms, the ratio PyTorch / ours of each turn (median, quartiles),
  and how far the losses of the same weights, images and directions lie apart.

  Args:
    size: other settings of the encoder, for all methods but I-JEPA.

  Raises:
    ValueError: an unknown method, a count below 1, or no PyTorch.
  """
  names = methods.split(",")
  if unknown := [name for name in names if name not in METHODS]:
    raise ValueError(f"--methods={methods}: no {unknown[0]!r} here; there are {', '.join(METHODS)}")
  if batch_size < 2 or steps < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 2 and steps={steps} at least 1")
  torch_step = need_torch("bench against")
  rows = [
    _ijepa(batch_size, steps, compile) if n == "ijepa" else _row(n, batch_size, steps, compile, size) for n in names
  ]
  device = jax.devices()[0]
  return {
    "batch_size": batch_size,
    "rows": rows,
    "products": _products(batch_size),
    "device": f"{device.device_kind}, {num_threads()} CPU threads",
    "jax": jax.__version__,
    "torch": torch_step.versions(),
  }


def _products(batch_size: int, turns: int = 20) -> dict[str, Any]:
  """Returns the rates of both libraries' matrix products, GFLOP/s, in a ViT-S's MLP: forward, and its two gradients.

  What of the steps' ratio is the libraries' and not ours.
  """
  import torch

  from jepa_jax.bench import torch_step

  num, width, hidden = batch_size * 196, 384, 1536
  ours, theirs = (jnp.float32, torch.float32) if jax.default_backend() == "cpu" else (jnp.bfloat16, torch.bfloat16)
  rng = np.random.default_rng(0)
  arrays = [rng.standard_normal(shape, np.float32) for shape in ((num, width), (width, hidden), (num, hidden))]
  x, kernel, grad = (jnp.asarray(a, ours) for a in arrays)
  tx, tkernel, tgrad = (torch.from_numpy(a).to(torch_step.device_name(), theirs) for a in arrays)

  def rates(product: Callable, mine: tuple, his: tuple) -> dict[str, int]:
    jitted = jax.jit(product)
    calls = {"ours": lambda: jitted(*mine), "torch": lambda: torch_step.wait(product(*his))}
    times_ms = {who: statistics.median(times) for who, times in alternating_ms(calls, (), turns).items()}
    return {who: round(2e-6 * num * width * hidden / ms) for who, ms in times_ms.items()}

  return {
    "forward": rates(lambda a, b: a @ b, (x, kernel), (tx, tkernel)),
    "input": rates(lambda a, b: a @ b.T, (grad, kernel), (tgrad, tkernel)),
    "weights": rates(lambda a, b: a.T @ b, (x, grad), (tx, tgrad)),
  }


def _ijepa(batch_size: int, steps: int, compile: bool) -> dict[str, Any]:
  result = masking.run(batch_size, steps, keep="", compile=compile)
  (row,) = result["rows"]
  return {"method": "ijepa", **{k: v for k, v in row.items() if k not in ("masks", "context_patches", "predictor")}}


def config_of(name: str, batch_size: int, **size) -> Config:
  """Returns what is timed; its data are not read."""
  resnet = {"name": "resnet", "variant": "18", "stem": "cifar", "image_size": 32}
  vit = {"name": "vit", "variant": "tiny", "image_size": 224, "patch_size": 16}
  encoder = (vit if name == "lejepa" else resnet) | size
  return build_config(
    {
      "name": name,
      "total": f"{masking.TOTAL}steps",
      "batch_size": batch_size,
      "data": {"source": "synthetic", "canvas_px": encoder["image_size"]},
      "encoder": encoder,
      "objective": {"name": name.split("_")[0], "projector": PROJECTORS[name], "views": VIEWS[name]},
      "optim": {"lr": 1e-4, "schedule": "constant", "start_lr": 1.0, "warmup": "0steps"},
      "probe": {"spectrum_every": 0},
    }
  )


def _row(name: str, batch_size: int, steps: int, compile: bool, size: dict) -> dict[str, Any]:
  cfg = config_of(name, batch_size, **size)
  run = make_experiment(cfg, make_mesh(cfg.mesh, jax.devices()[:1]), 100 * batch_size, masking.CLASSES)
  canvases = random_batch(run)
  views = jax.jit(run.objective.views)(example_keys(jax.random.key(1), jnp.arange(batch_size)), canvases)
  state, box = run.init(), {}
  eager, compiled = masking.KINDS
  torch_steps = {kind: _torch_step(cfg, run, state, views) for kind in masking.KINDS[: 1 + compile]}
  if compile:
    torch_steps[compiled].compile()
  images = [np.asarray(x) for x in views.groups]
  inputs = {name: step.put(images) for name, step in torch_steps.items()}
  difference = _loss_difference(cfg, run, state, views, torch_steps[eager], inputs[eager])
  step, box["state"] = given_views(run, views), state

  def ours() -> None:
    box["state"], metrics = step(box["state"], canvases, run.key)
    jax.block_until_ready((box["state"], metrics))

  turns: dict[str, Callable] = {"ours": ours}
  turns |= {name: lambda name=name: torch_steps[name](inputs[name]) for name in torch_steps}
  times_ms = alternating_ms(turns, (), steps, untimed=1)
  row = {"method": name, "step_ms": round(statistics.median(times_ms["ours"]), 1)}
  return row | masking.compared(times_ms, "ours", list(torch_steps)) | {"loss_difference": difference}


def given_views(run, views, *more: Any) -> Callable:
  """Returns the step of training, jitted, on views drawn before; more: what the method is made with besides."""
  cfg, old = run.cfg, run.objective
  objective = masking.of_given_views(type(old))(cfg.objective, old.encoder, old.pixels, *more)
  later = getattr(old, "still", {})
  optimiser = make_optimiser(cfg.optim, run.lr, run.total_steps, objective.rules, objective.lr_scales, later)
  step = jax.jit(make_step(objective, optimiser, cfg.probe, run.lr), donate_argnums=0)
  return lambda state, batch, key: step(state, batch | {"views": views}, key)


def _torch_step(cfg: Config, run, state, views):
  """Returns PyTorch's step from these weights."""
  from jepa_jax.bench import torch_multiview, torch_step

  params, channels = jax.device_get(state.params), run.objective.pixels.channels
  if cfg.encoder.name == "vit":
    grid, patch_size = cfg.encoder.image_size // cfg.encoder.patch_size, cfg.encoder.patch_size
    network = torch_step.Encoder(cfg.encoder.size, patch_size, channels, grid**2)
    torch_step.load(network, encoder_to(params["encoder"], cfg.encoder, "meta", channels))
    grids = {x.shape[2] // patch_size for x in views.groups} - {grid}
    encoder = torch_multiview.ViT(network, {g * g: _resizing(grid, g) for g in grids})
  else:
    encoder = torch_multiview.ResNet(STAGES[cfg.encoder.variant], cfg.encoder.width, cfg.encoder.stem, channels)
    torch_multiview.load_flax(encoder, flatten(params["encoder"]))
  projector = torch_multiview.Projector(
    (cfg.encoder.output_dim, *cfg.objective.projector.hidden, cfg.objective.projector.out)
  )
  torch_multiview.load_flax(projector, flatten(params["projector"]))
  objective = cfg.objective
  if objective.name == "mmcr":
    loss = torch_multiview.mmcr
  else:
    num_global = objective.views.global_crops.num
    loss = torch_multiview.lejepa(num_global, objective.lam, objective.num_slices, objective.t_max, objective.num_knots)
  return torch_multiview.MultiViewStep(encoder, projector, loss, cfg.optim.lr, cfg.optim.weight_decay)


def _resizing(native: int, grid: int) -> np.ndarray:
  """Returns the matrix that takes a position embedding from one grid to another, as our network does."""
  basis_1xPxP = jnp.eye(native**2)[None]
  return np.asarray(resize_position_embedding(basis_1xPxP, (native, native), (grid, grid))[0])


def _loss_difference(cfg: Config, run, state, views, torch_step, images) -> float:
  """Returns |a / b - 1| of the two losses of the weights that both start with, along the same directions."""
  import torch

  key, given = jax.random.key(2), ()
  if cfg.objective.name == "lejepa":
    directions = slice_directions(key, cfg.objective.projector.out, cfg.objective.num_slices, cfg.objective.directions)
    given = (torch.from_numpy(np.array(directions)).to(torch_step.device),)
  with torch.no_grad():
    theirs = float(torch_step.loss(images, *given))
  return distance(our_loss(run, state, views, key), theirs)


def our_loss(run, state, views, key: jax.Array) -> float:
  """Returns the loss of a state's weights on views that were drawn before; key is that of the loss."""
  keys_B = example_keys(key, jnp.arange(run.cfg.batch_size))

  @jax.jit
  def loss(params):
    encoded, model_state = run.objective.encode(params, state.model_state, None, views, keys_B)
    return run.objective.loss(params, model_state, None, encoded, key, jnp.float32(0))[0]

  return float(loss(state.params))


def distance(ours: float, theirs: float) -> float:
  """Returns |ours / theirs - 1| with two digits."""
  return float(f"{abs(ours / theirs - 1):.1e}")
