"""MRR (IWM, arXiv 2403.00504): is the target found, from the source and the action, among many targets of one image?

1 is a world model that knows what each action does (equivariant), sum_r 1/r / K (.0239 for a bank of 256) one that is
blind to it (invariant). Legend: B images at a time, K pictures of a bank, N patches, D width.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jepa_jax.data import row_batches
from jepa_jax.sharding import MeshConfig, batch_sharding, batch_ways, make_mesh, replicated
from jepa_jax.views import ColorParams, ColorSettings, center_view, example_keys, sample_color

# What is done to the source; the bank's pictures, the targets, are always jittered and nothing else, as in training.
OPERATIONS = {
  "jitter": ColorSettings(),
  "blur": ColorSettings(blur_p=(1.0,)),
  "grayscale": ColorSettings(grayscale_p=1.0),
  "solarize": ColorSettings(solarize_p=(1.0,)),
  "all": ColorSettings(grayscale_p=0.5, blur_p=(0.5,), solarize_p=(0.5,)),
}
_SOURCE_STREAM = 3  # folded into an example's key, away from what else is drawn from it
# float32 copies of a chunk's tokens that are alive in a transformer block, its hidden layer included
_LAYERS_AT_ONCE = 16


def mean_reciprocal_ranks(
  objective: Any,
  params: Any,
  target: Any,
  images: Any,
  *,
  num_images: int = 64,
  num_bank: int = 256,
  chunk: int = 64,
  batch_size: int = 8,
  distance: str = "l2",
  crop_fraction: float = 1.0,
  seed: int = 0,
  mesh: Mesh | None = None,
) -> dict[str, float]:
  """Returns {operation on the source: MRR in [0, 1]}, their mean as "overall"; the paper's is "jitter", a clean source.

  For each image a bank of num_bank jitters at the paper's strengths, whatever the run was trained with, so that runs
  can be compared; the source is the image itself, after the operation. See `IWM.reciprocal_ranks`.

  Args:
    objective, params, target: an IWM and its networks (target None: the encoder is its own).
    images: an ImageSet; num_images of them are drawn with `seed`.
    chunk: pictures of a bank that go through the networks at a time, batch_size: images at a time. They change the
      memory that is needed, not the result.
    distance: "l2" over the patch tokens, or "cosine" of their means.
    mesh: images are split over its devices; default: this process's first device.

  Raises:
    ValueError: objective has no world model, the bank does not fit into memory (with what does), sizes that do not fit.
  """
  if not hasattr(objective, "reciprocal_ranks"):
    raise ValueError(
      f"objective {objective.cfg.name!r} has no predictor that is told actions, so there is no MRR: leave it out, or "
      "train one of configs/iwm_*.py"
    )
  mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  batch_size = -(-min(batch_size, num_images) // batch_ways(mesh)) * batch_ways(mesh)
  check_memory(objective, num_bank, chunk, batch_size // batch_ways(mesh), mesh.devices.flat[0])
  chosen = np.random.default_rng(seed).permutation(len(images))[:num_images]
  views, found = objective.cfg.views, []

  @jax.jit
  def ranks(params, target, batch, keys_B):
    crop = views.global_crops.size_px, views.mean, views.std, crop_fraction, views.interpolation
    pixels = objective.pixels(center_view(batch, *crop))
    sources_BxS = jax.vmap(sample_sources)(keys_B)
    sizes = dict(num_bank=num_bank, chunk=chunk, distance=distance)
    return objective.reciprocal_ranks(params, target, pixels, keys_B, sources_BxS, **sizes).mean(2)

  # Without a mesh in force the networks constrain nothing, and XLA splits the images as they come.
  params, target = jax.device_put((params, target), replicated(mesh))
  for rows_B, batch, real_B in row_batches(images, chosen, batch_size):
    keys_B = example_keys(jax.random.key(seed), jnp.asarray(rows_B))
    found.append(np.asarray(ranks(params, target, *jax.device_put((batch, keys_B), batch_sharding(mesh))))[real_B])
  mean_S = np.concatenate(found).mean(axis=0)
  return {name: float(x) for name, x in zip(OPERATIONS, mean_S)} | {"overall": float(mean_S.mean())}


def sample_sources(key) -> ColorParams:
  """Returns the colours of one image's source under each of OPERATIONS, fields (S,)."""
  key = jax.random.fold_in(key, _SOURCE_STREAM)
  each = [sample_color(key, settings) for settings in OPERATIONS.values()]
  return jax.tree.map(lambda *x: jnp.stack(x), *each)


def check_memory(objective: Any, num_bank: int, chunk: int, images: int, device: Any) -> None:
  """Raises a ValueError with sizes that fit where a device cannot hold the banks of so many images and one chunk."""
  if min(num_bank, chunk) < 1:
    raise ValueError(f"a bank of {num_bank} in chunks of chunk={chunk}: both must be at least 1")
  chunk = min(chunk, num_bank)
  picture = objective.num_patches * objective.encoder.width * 4
  room = _memory(device) // 2  # the networks and the program want some, too
  most_bank = room // (picture * images)
  gib = lambda num_bytes: f"{num_bytes / 2**30:.1f} GiB"
  if num_bank >= most_bank:
    raise ValueError(
      f"a bank of {num_bank} pictures for {images} images at a time takes {gib(num_bank * images * picture)}, and "
      f"{gib(room)} can be had: lower mrr_batch, or mrr_bank to at most {most_bank}"
    )
  most_chunk = (room - num_bank * images * picture) // (picture * images * _LAYERS_AT_ONCE)
  if chunk > most_chunk:
    fix = f"mrr_chunk={most_chunk} fits" if most_chunk else "lower mrr_batch"
    raise ValueError(
      f"chunk={chunk} pictures of {images} banks at a time take about "
      f"{gib(chunk * images * picture * _LAYERS_AT_ONCE)} beside the bank, more than can be had: {fix}"
    )


def _memory(device: Any) -> int:
  """Returns the bytes of memory of a device; of the host for a CPU."""
  limit = (device.memory_stats() or {}).get("bytes_limit")
  return int(limit) if limit else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
