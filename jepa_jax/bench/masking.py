"""What an I-JEPA step costs by the share of patches that its context encoder sees, and beside it PyTorch's.

ViT-S/16 at 224 px, predictor 384 wide, 6 blocks. Shares are `random` masks, whose target is all other patches, so the
predictor has one sequence of all 196 patches whatever the share; `official` is the method itself: 51 patches and four
blocks, a sequence each. All steps take turns on one state, PyTorch's on another that starts with the same weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.bench.timing import alternating_ms, need_torch, num_threads
from jepa_jax.config import Config, build_config, without_recomputation
from jepa_jax.flops import matrix_flops, matrix_peak
from jepa_jax.objectives.ijepa import IJEPA
from jepa_jax.objectives.masked import MaskedViews
from jepa_jax.optim import learning_rate, make_optimiser
from jepa_jax.step import init_state, make_step
from jepa_jax.views import Pixels, example_keys
from jepa_jax.weights.convert import encoder_to, predictor_size, predictor_to

DESCRIPTION = "An I-JEPA step's cost by the share of patches kept, and against PyTorch's step where torch is installed."
TOTAL, CLASSES = 1000, 10
OFFICIAL = "official"
KINDS = ("torch", "torch, compiled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("--batch-size", type=int, default=16, help="images in a batch")
  parser.add_argument("--steps", type=int, default=5, help="timed steps of each variant, after one to warm up")
  parser.add_argument("--keep", default="0.1,0.25,0.5,0.75", help="shares of patches kept (default: %(default)s)")
  parser.add_argument("--compile", action="store_true", help="PyTorch also compiled, by torch.compile")
  parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out, though it is installed")


def run(
  batch_size: int = 16,
  steps: int = 5,
  keep: str = "0.1,0.25,0.5,0.75",
  no_torch: bool = False,
  compile: bool = False,
  **size,
) -> dict:
  """Returns a row per share of patches kept, for JSON: median step time in ms, images/s, FLOPs, share of the peak, and
  PyTorch's time, the ratio of turns (median, quartiles) and the losses' largest relative difference over all steps.

  What is timed: target encoder, context encoder, predictor, loss, gradient, AdamW, moving average, on one batch of
  views drawn before; ours includes the online probe and the metrics. float32 on CPU, else bfloat16.

  Args:
    size: other settings of the encoder (of ViT-S/16) and `predictor`, those of the predictor.

  Raises:
    ValueError: a share that is none, or counts below 1.
  """
  if min(batch_size, steps) < 1:
    raise ValueError(f"batch_size={batch_size} and steps={steps} must be at least 1")
  configs = {name: masked_config(name, batch_size, **size) for name in (*_variants(keep), OFFICIAL)}
  flops = {name: step_flops(cfg) for name, cfg in configs.items()}
  batches = {name: _batch(cfg) for name, cfg in configs.items()}
  steps_of_ours = {name: _step(cfg) for name, cfg in configs.items()}
  cfg, batch = configs[OFFICIAL], batches[OFFICIAL]
  state = jax.jit(lambda key: _init(key, batch, cfg))(jax.random.key(0))
  with_torch = not no_torch and importlib.util.find_spec("torch") is not None
  torch_calls, about = _torch_calls(cfg, state, batches, compile) if with_torch else ({}, None)
  calls, losses = _our_calls(steps_of_ours, state, batches), {}
  turns, peak = {}, matrix_peak()
  for name in configs:
    turns[name] = _recorded(calls[name], losses.setdefault(name, []))
    for kind, their_calls in torch_calls.items():
      turns[f"{kind} {name}"] = _recorded(their_calls[name], losses.setdefault(f"{kind} {name}", []))
  times_ms = alternating_ms(turns, (), steps, untimed=1)
  peak = max(peak, matrix_peak()) / jax.device_count()  # of the one that works
  device = jax.devices()[0]
  return {
    "batch_size": batch_size,
    "rows": [_row(name, batches[name], flops[name], times_ms, losses, peak) for name in configs],
    "measured_peak_tflop_per_s": round(peak / 1e12, 3),
    "device": f"{device.device_kind}, {num_threads()} CPU threads",
    "jax": jax.__version__,
    "torch": about,
  }


def step_flops(cfg: Config) -> int:
  """Returns the matrix FLOPs of the step that is timed, less what it does twice; nothing is compiled."""
  cfg = without_recomputation(cfg)
  batch, key = jax.eval_shape(lambda: _batch(cfg)), jax.random.key(0)
  state = jax.eval_shape(lambda key, batch: _init(key, batch, cfg), key, batch)
  return matrix_flops(_step(cfg), state, batch, key)


def _row(name: str, batch, flops: int, times_ms, losses, peak: float) -> dict[str, Any]:
  masks = batch["views"].masks
  (num_images, num_context), (_, num_blocks, num_slots) = masks.context_BxK.shape, masks.targets_BxMxT.shape
  step_ms = statistics.median(times_ms[name])
  row = {
    "masks": name,
    "context_patches": num_context,
    "predictor": f"{num_blocks} x {num_context + num_slots} tokens",
    "step_ms": round(step_ms, 1),
    "images_per_s": round(1e3 * num_images / step_ms, 2),
    "matrix_flops": flops,
    "share_of_peak": round(1e3 * flops / step_ms / peak, 4),
  }
  if f"torch {name}" in times_ms:
    difference = max(abs(a / b - 1) for a, b in zip(losses[name], losses[f"torch {name}"], strict=True))
    kinds = [kind for kind in KINDS if f"{kind} {name}" in times_ms]
    row |= compared({kind: times_ms[f"{kind} {name}"] for kind in kinds} | {name: times_ms[name]}, name, kinds)
    row["loss_difference"] = float(f"{difference:.1e}")
  return row


def compared(times_ms: dict[str, list[float]], ours: str, theirs: list[str]) -> dict[str, Any]:
  """Returns median times of theirs, and of the ratios theirs / ours of all turns the median and the quartiles."""
  row = {}
  for kind in theirs:
    name = kind.replace(", ", "_")
    ratios = [b / a for a, b in zip(times_ms[ours], times_ms[kind], strict=True)]
    row[f"{name}_ms"] = round(statistics.median(times_ms[kind]), 1)
    row[f"{name}_over_ours"] = round(statistics.median(ratios), 3)
    row[f"{name}_quartiles"] = [round(float(q), 3) for q in np.quantile(ratios, (0.25, 0.75))]
  return row


def _variants(keep: str) -> list[str]:
  try:
    shares = [float(share) for share in keep.split(",") if keep]
  except ValueError:
    shares = [0.0]
  if not all(0 < share < 1 for share in shares):
    raise ValueError(f"keep={keep!r} must be shares between 0 and 1 with commas between, as in 0.1,0.25")
  return [f"random {share:g}" for share in shares]


def masked_config(name: str, batch_size: int, predictor: dict | None = None, **size) -> Config:
  """Returns ViT-S/16 with the masks "official" or "random SHARE"; its data are not read."""
  encoder = {"name": "vit", "variant": "small", "image_size": 224, "patch_size": 16, "pos_embed": "sincos"} | size
  kind, _, share = name.partition(" ")
  num_patches = (encoder["image_size"] // encoder["patch_size"]) ** 2
  masks = {"kind": kind, "num_context_patches": max(1, round(float(share) * num_patches)) if share else 0}
  crops = {"num": 1, "size_px": encoder["image_size"], "scale": (0.3, 1.0)}
  objective = {"name": "ijepa", "views": {"global_crops": crops}, "masks": masks, "ema": (0.996, 0.996)}
  objective["predictor"] = {"width": 384, "depth": 6} | (predictor or {})
  optim = {"lr": 1e-4, "schedule": "constant", "start_lr": 1.0, "warmup": "0steps"}
  return build_config(
    {
      "name": "masking",
      "total": f"{TOTAL}steps",
      "batch_size": batch_size,
      "data": {"source": "synthetic", "canvas_px": encoder["image_size"]},
      "encoder": encoder,
      "objective": objective,
      "optim": optim,
      "probe": {"spectrum_every": 0},
    }
  )


def of_given_views(objective: type) -> type:
  """Returns the method on views that were drawn before, the batch's column "views"."""

  class Given(objective):
    def views(self, keys_B, batch):
      return batch["views"]

  return Given


def _parts(cfg: Config):
  lr, pixels = learning_rate(cfg.optim, cfg.batch_size, TOTAL, TOTAL), Pixels(cfg.data.mean, cfg.data.std)
  objective = of_given_views(IJEPA)(cfg.objective, cfg.encoder.make(pixels.channels), pixels)
  return objective, make_optimiser(cfg.optim, lr, TOTAL, objective.rules)


def _step(cfg: Config) -> Callable:
  lr = learning_rate(cfg.optim, cfg.batch_size, TOTAL, TOTAL)
  return jax.jit(make_step(*_parts(cfg), cfg.probe, lr), donate_argnums=0)


def _init(key, batch, cfg: Config):
  return init_state(key, batch, *_parts(cfg), cfg.probe, CLASSES)


def _batch(cfg: Config) -> dict[str, Any]:
  """Returns images of normal noise, as normalised as real ones, and masks."""
  rng, num, size = np.random.default_rng(0), cfg.batch_size, cfg.encoder.image_size
  keys_B = example_keys(jax.random.key(1), jnp.arange(num))
  images = rng.standard_normal((num, size, size, cfg.data.channels), np.float32)
  return {
    "views": MaskedViews(jnp.asarray(images), jax.jit(_parts(cfg)[0].masks)(keys_B)),
    "label": jnp.asarray(rng.integers(0, CLASSES, num), jnp.int32),
  }


def _our_calls(steps: dict[str, Callable], state, batches) -> dict[str, Callable]:
  """Returns functions that each make a step on the one state and give its loss."""
  box, key = {"state": state}, jax.random.key(2)

  def call(name):
    box["state"], metrics = steps[name](box["state"], batches[name], key)
    jax.block_until_ready(box["state"])
    return float(metrics["loss"])

  return {name: lambda name=name: call(name) for name in steps}


def _torch_calls(cfg: Config, state, batches, compile: bool) -> tuple[dict[str, dict[str, Callable]], str]:
  """Returns the same for PyTorch, from the same weights, eager and if asked for compiled, and its version."""
  torch_step = need_torch("bench masking")
  params = jax.device_get(state.params)
  encoder = cfg.encoder.size, encoder_to(params["encoder"], cfg.encoder, "meta")
  predictor = predictor_size(params["predictor"]), predictor_to(params["predictor"], cfg.encoder)
  calls = {}
  for kind in KINDS[: 1 + compile]:
    step = torch_step.TorchStep(encoder, predictor, cfg.optim.lr, cfg.optim.weight_decay, cfg.objective.ema[0])
    if kind != "torch":
      step.compile()
    inputs = {name: step.put(b["views"].images_BxHxWxC, b["views"].masks) for name, b in batches.items()}
    calls[kind] = {name: lambda name=name, step=step, inputs=inputs: step(*inputs[name]) for name in batches}
  return calls, torch_step.versions()


def _recorded(call: Callable, losses: list[float]) -> Callable:
  return lambda: losses.append(call())
