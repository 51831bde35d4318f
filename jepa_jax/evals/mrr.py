"""MRR (IWM, arXiv 2403.00504): is the target found, from the source and the action, among many targets of one image?

1 is a world model that knows what each action does (equivariant), sum_r 1/r / K (.0239 for a bank of 256) one that is
blind to it (invariant). Legend: B images at a time, S sources, K pictures of a bank, N patches, D width.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.data import row_batches
from jepa_jax.evals.base import Monitor, Protocol, Result, Subject
from jepa_jax.objectives import Imagines, Objective
from jepa_jax.sharding import MeshConfig, batch_sharding, batch_ways, make_mesh, replicated
from jepa_jax.streams import stream
from jepa_jax.views import (
  PAPER_JITTER,
  ColorParams,
  ColorSettings,
  action,
  apply_color,
  center_view,
  example_keys,
  no_color,
  paired_views,
  sample_color,
)

# What is done to the source; the bank's pictures, the targets, are always jittered and nothing else, as in training.
OPERATIONS = {
  "jitter": ColorSettings(),
  "blur": ColorSettings(blur_p=(1.0,)),
  "grayscale": ColorSettings(grayscale_p=1.0),
  "solarize": ColorSettings(solarize_p=(1.0,)),
  "all": ColorSettings(grayscale_p=0.5, blur_p=(0.5,), solarize_p=(0.5,)),
}
ANY_SOURCE = ColorSettings(grayscale_p=0.5, blur_p=(0.5,), solarize_p=(0.5,))  # compiles what can destroy a source
ONLINE_IMAGES, ONLINE_BANK = 8, 16
BLIND = "blind predictor"
COLUMN = "MRR"  # of all operations; of one of them, "MRR blur"
# float32 copies of a chunk's tokens that are alive in a transformer block, its hidden layer included
_LAYERS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Mrr(Protocol):
  """Of an IWM: is the right picture found among a `bank` of them, given the action? 100 is always; needs no labels.

  See `mean_reciprocal_ranks`.

  chunk: pictures of a bank that go through the networks at a time, for batch_size images at a time: memory, not result.
  distance: "l2" over the patch tokens or "cosine" of their means.
  """

  images: int = 64
  bank: int = 256
  chunk: int = 64
  batch_size: int = 8
  distance: Literal["l2", "cosine"] = "l2"

  needs: ClassVar[frozenset[str]] = frozenset({"networks"})

  def __post_init__(self):
    check_choices(self)
    for name in ("images", "bank", "chunk", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

  def check(self, subject: Subject) -> None:
    check_imagines(subject.objective)

  def run(self, subject: Subject) -> Iterator[Result]:
    networks, data = subject.networks(), subject.data
    found = mean_reciprocal_ranks(
      subject.objective,
      networks["params"],
      networks["target"],
      data.test,
      num_images=self.images,
      num_bank=self.bank,
      chunk=self.chunk,
      batch_size=self.batch_size,
      distance=self.distance,
      crop_fraction=data.crop_fraction,
      seed=subject.settings.seed,
      mesh=subject.mesh,
    )
    for name, value in found.items():
      column = COLUMN if name == "overall" else f"{COLUMN} {name}"
      yield Result(BLIND, column, 100 * losses.blind_mrr(self.bank))
      yield Result(subject.row, column, 100 * value)

  @classmethod
  def monitor(cls, objective: Objective) -> Monitor | None:
    """Returns the mean reciprocal rank in a small bank, of the first images' crops: to watch, not to report."""
    if not isinstance(objective, Imagines):
      return None
    plain = dataclasses.replace(objective.cfg.views, color=ColorSettings())

    def watch(params, target, batch, keys_B):
      first, keys = jax.tree.map(lambda x: x[:ONLINE_IMAGES], batch), keys_B[:ONLINE_IMAGES]
      _, crops, _ = paired_views(keys, first, plain, objective.pixels, ColorSettings())
      clean, sizes = no_color((len(crops), 1)), dict(num_bank=ONLINE_BANK, chunk=ONLINE_BANK)
      ranks = reciprocal_ranks(objective, params, target, objective.to_pixels(crops), keys, clean, **sizes)
      return {"mrr": ranks.mean()}

    return Monitor(watch, {"mrr": losses.blind_mrr(ONLINE_BANK)})


def check_imagines(objective: Objective) -> None:
  """Raises a ValueError unless the objective has a world model."""
  if not isinstance(objective, Imagines):
    raise ValueError(
      f"objective {objective.cfg.name!r} has no predictor that is told actions, so there is no MRR: leave it out, or "
      "train one of configs/iwm_*.py"
    )


def mean_reciprocal_ranks(
  objective: Imagines,
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
  can be compared; the source is the image itself, after the operation. See `reciprocal_ranks`.

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
  check_imagines(objective)
  mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  batch_size = -(-min(batch_size, num_images) // batch_ways(mesh)) * batch_ways(mesh)
  check_memory(objective, num_bank, chunk, batch_size // batch_ways(mesh), mesh.devices.flat[0])
  chosen = np.random.default_rng(seed).permutation(len(images))[:num_images]
  found, size_hw = [], objective.cfg.views.global_crops.size_hw

  @jax.jit
  def ranks(params, target, batch, keys_B):
    crop = size_hw, objective.pixels, crop_fraction, objective.interpolation
    pixels = objective.to_pixels(center_view(batch, *crop))
    sources_BxS = jax.vmap(sample_sources)(keys_B)
    sizes = dict(num_bank=num_bank, chunk=chunk, distance=distance)
    return reciprocal_ranks(objective, params, target, pixels, keys_B, sources_BxS, **sizes).mean(2)

  # Without a mesh in force the networks constrain nothing, and XLA splits the images as they come.
  params, target = jax.device_put((params, target), replicated(mesh))
  for rows_B, batch, real_B in row_batches(images, chosen, batch_size):
    keys_B = example_keys(stream(jax.random.key(seed), "images"), jnp.asarray(rows_B))
    found.append(np.asarray(ranks(params, target, *jax.device_put((batch, keys_B), batch_sharding(mesh))))[real_B])
  mean_S = np.concatenate(found).mean(axis=0)
  return {name: float(x) for name, x in zip(OPERATIONS, mean_S)} | {"overall": float(mean_S.mean())}


def reciprocal_ranks(
  objective: Imagines,
  params: Any,
  target: Any,
  pixels_BxCxHxW: jax.Array,
  keys_B: jax.Array,
  sources_BxS: ColorParams,
  *,
  num_bank: int,
  chunk: int,
  jitter: ColorSettings = PAPER_JITTER,
  distance: str = "l2",
) -> jax.Array:
  """Returns (B, S, K): 1 / rank of each picture of an image's bank by its distance from the one that was imagined.

  The bank of an image: K = num_bank draws of `jitter` of it, through the target encoder. The image itself, with
  the colours of each of S sources, goes whole through the encoder, and the predictor is asked for all patches after
  each action that leads to one of the bank. `chunk` pictures go through the networks at a time; what is kept is the
  bank's tokens.
  """
  online, average = params["encoder"], (target or params)["encoder"]
  valid_N = jnp.ones(objective.num_patches)

  def one(pixels_CxHxW, key, sources_S):
    colors_K = jax.vmap(lambda k: sample_color(k, jitter))(jax.random.split(stream(key, "bank"), num_bank))
    bank_KxNxD = objective.encode_bank(average, pixels_CxHxW, colors_K, jitter, chunk)
    pictures = jax.vmap(lambda s: apply_color(pixels_CxHxW, s, ANY_SOURCE))(sources_S)
    context_SxNxD = objective.encode_pixels(online, pictures)

    def rank_source(row):
      context_NxD, of_source = row

      def rank(row):
        colors, truth = row
        imagined_1xNxD = objective.imagine(params, context_NxD, action(of_source, colors)[None])
        distance_1xK = losses.distances(imagined_1xNxD, bank_KxNxD, valid_N, distance)
        return losses.reciprocal_ranks(distance_1xK, truth[None])[0]

      return jax.lax.map(rank, (colors_K, jnp.arange(num_bank)), batch_size=chunk)

    return jax.lax.map(rank_source, (context_SxNxD, sources_S))

  return jax.vmap(one)(pixels_BxCxHxW, keys_B, sources_BxS)


def sample_sources(key) -> ColorParams:
  """Returns the colours of one image's source under each of OPERATIONS, fields (S,)."""
  each = [sample_color(stream(key, "sources"), settings) for settings in OPERATIONS.values()]
  return jax.tree.map(lambda *x: jnp.stack(x), *each)


def check_memory(objective: Imagines, num_bank: int, chunk: int, images: int, device: Any) -> None:
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
      f"{gib(room)} can be had: lower evals.mrr.batch_size, or evals.mrr.bank to at most {most_bank}"
    )
  most_chunk = (room - num_bank * images * picture) // (picture * images * _LAYERS_AT_ONCE)
  if chunk > most_chunk:
    fix = f"evals.mrr.chunk={most_chunk} fits" if most_chunk else "lower evals.mrr.batch_size"
    raise ValueError(
      f"chunk={chunk} pictures of {images} banks at a time take about "
      f"{gib(chunk * images * picture * _LAYERS_AT_ONCE)} beside the bank, more than can be had: {fix}"
    )


def _memory(device: Any) -> int:
  """Returns the bytes of memory of a device; of the host for a CPU."""
  limit = (device.memory_stats() or {}).get("bytes_limit")
  return int(limit) if limit else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


PROTOCOL = Mrr
