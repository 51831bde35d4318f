"""Segmentation without training: a patch takes the classes of its nearest training patches (Balazevic et al. 2023).

Legend: M patches in memory, Q patches of a batch, K neighbours, F features, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.data import prefetch_to_device, row_batches
from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.blocks import l2_normalised, ranges
from jepa_jax.evals.dense import (
  Said,
  by_image,
  check_dense,
  grid_of,
  make_grids,
  results,
  score,
  shares_of_patches,
  token_width,
  windows_of,
)
from jepa_jax.evals.dense_floors import references
from jepa_jax.sharding import batch_sharding, batch_ways, replicated
from jepa_jax.views import Windows

_LEAST_KNOWN = 0.5  # of a training patch's pixels, for it to be remembered
_CHUNK = 16_384  # patches of the memory that are compared at a time


@dataclasses.dataclass(frozen=True)
class DenseRetrieval(Protocol):
  """Segmentation without training: a patch takes the classes of its `k` nearest training patches.

  Exact search by cosine; patches of which less than half is of a class are not remembered.

  Attributes:
    k: neighbours.
    temperature: of the softmax over their similarities, by which their classes are weighted.
    memory: most patches that are remembered; 0: all. Else each image gives as many, rare classes first.
  """

  k: int = 30
  temperature: float = 0.02
  memory: int = 0

  needs: ClassVar[frozenset[str]] = frozenset({"encoder", "label_map"})
  shares: ClassVar[tuple[str, ...]] = ("dense",)

  def __post_init__(self):
    if self.k < 1 or self.temperature <= 0 or self.memory < 0:
      raise ValueError(
        f"k={self.k} is 1 or more, temperature={self.temperature} above 0, memory={self.memory} 0 or more"
      )
    if self.memory and self.memory < self.k:
      raise ValueError(f"memory={self.memory} patches cannot give k={self.k} neighbours: raise it, or lower k")

  def check(self, subject: Subject) -> None:
    check_dense(subject, subject.settings.dense)
    of, num = windows_of(subject, subject.settings.dense), len(subject.data.train)
    if self.memory and self.memory < num:
      raise ValueError(f"memory={self.memory} patches are fewer than {num} training images: each gives one at least")
    per_image, width = of.num * math.prod(grid_of(subject, of)), token_width(subject, of)
    size_gb, limit_gb = 4e-9 * width * (self.memory or num * per_image), subject.settings.memory_gb
    if size_gb > limit_gb:
      raise ValueError(
        f"the patches of {num} images may take {size_gb:.1f} GB, more than evals.memory_gb={limit_gb:g}: set "
        f"evals.dense_retrieval.memory={int(limit_gb * 2.5e8 / width)} or less, or raise evals.memory_gb"
      )

  def prepare(self, subject: Subject) -> None:
    make_grids(subject, windows_of(subject, subject.settings.dense))

  def run(self, subject: Subject) -> Iterator[Result]:
    settings, of = subject.settings.dense, windows_of(subject, subject.settings.dense)
    yield from references(subject, settings, of, "retrieval mIoU")
    grids = make_grids(subject, of)
    keys_MxF, shares_MxC = self.remembered(subject, of, grids["train"].features, grids["train"].rows_N)
    if self.k > len(keys_MxF):
      raise ValueError(f"k={self.k} neighbours of {len(keys_MxF)} patches in memory: lower evals.dense_retrieval.k")
    memory = jax.device_put(padded(keys_MxF, shares_MxC), replicated(subject.mesh))

    def said(memory, batch):  # comparing patches takes memory
      of_images = lambda grid: neighbours_say(grid, *memory, self.k, self.temperature)
      return by_image(of_images, batch["grid"], batch_ways(subject.mesh))

    extra = lambda at: {"grid": np.asarray(grids["test"].features[at], np.float32)}
    test, rows_N = subject.data.test, grids["test"].rows_N
    found = score(subject.mesh, settings, of, Said(test, rows_N, said, extra, memory), settings.subset)
    detail = {"k": self.k, "temperature": self.temperature, "memory": len(keys_MxF)}
    yield from results(subject.row, "retrieval mIoU", found, subject.data.test, detail)

  def remembered(self, subject: Subject, of: Windows, grids: np.ndarray, rows_N: np.ndarray):
    """Returns the (unit features (M, F) float32, shares of classes (M, C)) of training patches."""
    ways, num_classes = batch_ways(subject.mesh), len(subject.data.train.map_classes)
    size, grid_hw = max(ways, subject.settings.batch_size // 8 // ways * ways), grids.shape[2:4]
    shares_fn = jax.jit(lambda batch: shares_of_patches(batch, of, grid_hw, num_classes))
    per_image, draw = self.memory // max(len(rows_N), 1), np.random.default_rng(subject.settings.seed)
    keys, shares = [], []
    columns = ("label_map", "height", "width")
    real: list[np.ndarray] = []

    def reader():
      for _, batch, real_B in row_batches(subject.data.train, rows_N, size):
        real.append(real_B)
        yield {c: batch[c] for c in columns}

    with prefetch_to_device(reader(), batch_sharding(subject.mesh)) as on_device:
      for step, batch in enumerate(on_device):
        share, known = jax.device_get(shares_fn(batch))
        start = step * size
        for i in np.flatnonzero(real[step]):
          good = known[i].ravel() >= _LEAST_KNOWN
          features = l2_normalised(grids[start + i].reshape(-1, grids.shape[-1])[good])
          of_image = share[i].reshape(-1, num_classes)[good]
          if self.memory and len(features) > per_image:
            kept = rare_first(of_image, draw)[:per_image]
            features, of_image = features[kept], of_image[kept]
          keys.append(features)
          shares.append(of_image)
    return np.concatenate(keys), np.concatenate(shares)


def rare_first(shares_MxC: np.ndarray, draw: np.random.Generator) -> np.ndarray:
  """Returns the patches of an image in the order in which they are kept: with chance, those of rare classes first.

  By the smallest of (how many patches of the image hold one of its classes, summed over these) times a uniform number.
  """
  there_MxC = shares_MxC > 0
  return np.argsort((there_MxC * there_MxC.sum(0)).sum(1) * draw.random(len(shares_MxC)), kind="stable")


def padded(keys_MxF: np.ndarray, shares_MxC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns both in chunks of one size, (N, M / N, ...), and which rows are real, bool (N, M / N)."""
  num = max(1, len(list(ranges(len(keys_MxF), _CHUNK))))
  size = -(-len(keys_MxF) // num)
  fill = lambda x: np.concatenate([x, np.zeros((num * size - len(x), *x.shape[1:]), x.dtype)])
  cut = lambda x: fill(x).reshape(num, size, *x.shape[1:])
  return cut(keys_MxF), cut(shares_MxC.astype(np.float32)), cut(np.ones(len(keys_MxF), bool))


def neighbours_say(
  grid_xF: jax.Array, keys_NxMxF: jax.Array, shares_NxMxC: jax.Array, real_NxM: jax.Array, k: int, temperature: float
) -> jax.Array:
  """Returns the classes (..., C) that the k nearest of the memory have, weighted by softmax(cosine / temperature)."""
  query = grid_xF.astype(jnp.float32)
  query = query / jnp.maximum(jnp.linalg.norm(query, axis=-1, keepdims=True), 1e-12)
  shape = query.shape[:-1]
  query = query.reshape(-1, query.shape[-1])
  most = min(k, keys_NxMxF.shape[1])

  def nearest(best, chunk):
    keys_MxF, shares_MxC, real_M = chunk
    similar = jnp.where(real_M, jnp.dot(query, keys_MxF.T, precision=jax.lax.Precision.HIGHEST), -jnp.inf)
    value, place = jax.lax.top_k(similar, most)
    values = jnp.concatenate([best[0], value], 1)
    shares = jnp.concatenate([best[1], shares_MxC[place]], 1)
    value, place = jax.lax.top_k(values, k)
    return (value, jnp.take_along_axis(shares, place[..., None], 1)), None

  start = jnp.full((len(query), k), -jnp.inf), jnp.zeros((len(query), k, shares_NxMxC.shape[-1]))
  (value, shares), _ = jax.lax.scan(nearest, start, (keys_NxMxF, shares_NxMxC, real_NxM))
  weight = jax.nn.softmax(value / temperature, -1)
  return jnp.einsum("qk,qkc->qc", weight, shares).reshape(*shape, -1)


PROTOCOL = DenseRetrieval
