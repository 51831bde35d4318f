"""CLIP: the train step beside the same step in PyTorch, in turns; and the losses in chunks against the whole.

ViT-S/16 at 112 px and a text tower of 4 x 256, as `configs/clip_flickr8k.py:vits`. Ours is the step of training with
view and captions drawn before: both towers, loss, gradient, AdamW, and, which PyTorch has not, the online probe and
the metrics. float32 on a CPU, else bfloat16 products.
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
from jepa_jax.bench import against, masking
from jepa_jax.bench.timing import alternating_ms, need_torch, num_threads
from jepa_jax.config import Config, build_config
from jepa_jax.experiment import make_experiment, random_batch
from jepa_jax.objectives.image_text import Pairs
from jepa_jax.sharding import make_mesh
from jepa_jax.views import example_keys
from jepa_jax.weights.convert import encoder_to, flatten

DESCRIPTION = "CLIP's step beside PyTorch's; CLIP's and SigLIP's losses in chunks: time and memory against the whole."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("--batch-size", type=int, default=256, help="pairs in a step (default: %(default)s)")
  parser.add_argument("--steps", type=int, default=5, help="timed steps of each, after one to warm up; 0: no step")
  parser.add_argument("--pairs", type=int, default=8192, help="pairs of the losses alone (default: %(default)s)")
  parser.add_argument("--dim", type=int, default=512, help="of their embeddings (default: %(default)s)")
  parser.add_argument("--chunk", type=int, default=512, help="images at a time (default: %(default)s)")
  parser.add_argument("--repeats", type=int, default=5, help="timed calls of each loss (default: %(default)s)")


def run(
  batch_size: int = 256,
  steps: int = 5,
  pairs: int = 8192,
  dim: int = 512,
  chunk: int = 512,
  repeats: int = 5,
  **size: Any,
) -> dict[str, Any]:
  """Returns the step's median times in ms, the ratio PyTorch / ours and the difference of the losses; and of each loss
  with its gradient the time and the memory in chunks over those of the whole. For JSON.

  size: other settings of the encoder. ValueError for counts that cannot be, and for a step without PyTorch.
  """
  if batch_size < 2 or steps < 0 or repeats < 1:
    raise ValueError(f"batch_size={batch_size} is at least 2, steps={steps} 0 or more, repeats={repeats} at least 1")
  device = jax.devices()[0]
  result: dict[str, Any] = {"device": f"{device.device_kind}, {num_threads()} CPU threads", "jax": jax.__version__}
  result["losses"] = [_loss_row(name, pairs, dim, chunk, repeats) for name in ("clip", "siglip")]
  if steps:
    result["torch"] = need_torch("bench clip").versions()
    result["step"] = _step_row(batch_size, steps, size)
  return result


def _loss_row(name: str, pairs: int, dim: int, chunk: int, repeats: int) -> dict[str, Any]:
  rng = np.random.default_rng(0)
  image, text = (jnp.asarray(rng.standard_normal((pairs, dim), np.float32)) for _ in range(2))
  values = {"clip": (2.659,), "siglip": (2.303, -10.0)}[name]
  loss = getattr(losses, name)

  def compiled(chunk: int):
    whole = lambda *args: loss(*args, chunk=chunk)[0]
    return jax.jit(jax.value_and_grad(whole, tuple(range(2 + len(values))))).lower(image, text, *values).compile()

  programs = {"whole": compiled(0), "chunks": compiled(chunk)}
  times_ms = alternating_ms(programs, (image, text, *values), repeats)
  found = {kind: program(image, text, *values) for kind, program in programs.items()}
  memory_mb = {kind: _temporaries(program) / 1e6 for kind, program in programs.items()}
  median_ms = {kind: statistics.median(times) for kind, times in times_ms.items()}
  ratios = [b / a for a, b in zip(times_ms["whole"], times_ms["chunks"], strict=True)]
  distance = lambda a, b: float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-30))
  return {
    "loss": name,
    "pairs": pairs,
    "dim": dim,
    "chunk": chunk,
    "ms": {kind: round(ms, 1) for kind, ms in median_ms.items()},
    "time_over_whole": round(statistics.median(ratios), 3),
    "memory_mb": {kind: round(mb, 1) for kind, mb in memory_mb.items()},
    "memory_over_whole": round(memory_mb["chunks"] / max(memory_mb["whole"], 1e-9), 3),
    "relative_difference": float(f"{max(map(distance, *(jax.tree.leaves(found[k]) for k in programs))):.1e}"),
  }


def _temporaries(program: Any) -> int:
  """Returns the bytes of a compiled program's temporaries."""
  return getattr(program.memory_analysis(), "temp_size_in_bytes", 0)


def config_of(batch_size: int, **size: Any) -> Config:
  """Returns what is timed; its data are not read."""
  encoder = {"name": "vit", "variant": "small", "image_size": 112, "patch_size": 16} | size
  crops = {"num": 1, "size_px": encoder["image_size"], "scale": (0.5, 1.0)}
  return build_config(
    {
      "name": "clip",
      "total": f"{masking.TOTAL}steps",
      "batch_size": batch_size,
      "data": {"source": "synthetic", "canvas_px": encoder["image_size"], "captions": {"train": "random words"}},
      "encoder": encoder,
      "objective": {
        "name": "clip",
        "projector": {"hidden": (), "out": 256, "norm": "none"},
        "text": {"width": 256, "depth": 4, "num_heads": 4},
        "views": {"global_crops": crops},
      },
      "optim": {"lr": 1e-4, "schedule": "constant", "start_lr": 1.0, "warmup": "0steps"},
      "probe": {"spectrum_every": 0},
    }
  )


def _step_row(batch_size: int, steps: int, size: dict[str, Any]) -> dict[str, Any]:
  cfg = config_of(batch_size, **size)
  run = make_experiment(cfg, make_mesh(cfg.mesh, jax.devices()[:1]), 100 * batch_size, masking.CLASSES)
  batch = random_batch(run)
  lengths_B = np.random.default_rng(0).integers(6, batch["caption"].shape[2] + 1, batch_size)
  ids = np.where(np.arange(batch["caption"].shape[2]) < lengths_B[:, None], np.asarray(batch["caption"][:, 0]), -1)
  images = jax.jit(run.objective.views)(example_keys(jax.random.key(1), jnp.arange(batch_size)), batch).images
  pairs, state, box = Pairs(images, jnp.asarray(ids)[:, None]), run.init(), {}
  theirs = _torch_step(cfg, run, jax.device_get(state.params))
  inputs = theirs.put(np.asarray(images.groups[0][:, 0]), ids)
  difference = against.distance(against.our_loss(run, state, pairs, jax.random.key(2)), theirs.loss(*inputs).item())
  step, box["state"] = against.given_views(run, pairs, cfg.data.captions), state

  def ours() -> None:
    box["state"], metrics = step(box["state"], batch, run.key)
    jax.block_until_ready((box["state"], metrics))

  turns: dict[str, Callable] = {"ours": ours, "torch": lambda: theirs(*inputs)}
  times_ms = alternating_ms(turns, (), steps, untimed=1)
  row = {"batch_size": batch_size, "step_ms": round(statistics.median(times_ms["ours"]), 1)}
  return row | masking.compared(times_ms, "ours", ["torch"]) | {"loss_difference": difference}


def _torch_step(cfg: Config, run, params):
  """Returns PyTorch's step from these weights."""
  from jepa_jax.bench import torch_pairs, torch_step

  captions, text, channels = cfg.data.captions, cfg.objective.text, run.objective.pixels.channels
  encoder, patch_size = cfg.encoder, cfg.encoder.patch_size
  image = torch_step.Encoder(encoder.size, patch_size, channels, (encoder.image_size // patch_size) ** 2)
  torch_step.load(image, encoder_to(params["encoder"], encoder, "meta", channels))
  words = torch_pairs.Text(text.size, captions.vocab_size, captions.length)
  torch_step.load(words, torch_pairs.text_tensors(flatten(params["text"]), text.depth))
  heads = [torch_pairs.linear(**params[name]["layers_0"]) for name in ("image_head", "text_head")]
  scale = float(params["logit_scale"])
  return torch_pairs.PairStep(image, words, heads, scale, cfg.optim.lr, cfg.optim.weight_decay)
