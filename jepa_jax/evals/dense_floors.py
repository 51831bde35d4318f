"""What dense evaluation is read against: two floors that look at no image, and what patches of a size allow.

Legend as in `dense`; R side of a square of places, as shares of an image's sides.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jepa_jax.data import VOID, ImageSet, row_batches
from jepa_jax.evals.base import Result, Subject
from jepa_jax.evals.confusion import scores
from jepa_jax.evals.dense import DenseSettings, Said, grid_of, not_reached, results, score, shares_of_patches
from jepa_jax.views import Windows

log = logging.getLogger(__name__)
Tree = Any
_POSITIONS_BYTES = 2**28  # of the counts of classes by position
ONE_CLASS, POSITIONS = "one class everywhere", "most frequent class per position"


def references(subject: Subject, settings: DenseSettings, of: Windows, column: str) -> Iterator[Result]:
  """Yields what scores are read against: two floors, and the true labels of such patches, a ceiling of sorts."""
  grid_hw, test = grid_of(subject, of), subject.data.test
  for row, found in _references(subject.data.train, test, subject.mesh, settings, of, grid_hw):
    yield from results(row, column, found, test)


@functools.lru_cache(maxsize=1)  # alike for every row of a table
def _references(
  train: ImageSet, test: ImageSet, mesh: Mesh, settings: DenseSettings, of: Windows, grid_hw: tuple[int, int]
) -> list[tuple[str, dict[str, Any]]]:
  num_classes = len(train.map_classes)
  rows_N = np.arange(len(test))

  def shares(_, batch: Tree) -> jax.Array:
    share, known = shares_of_patches(batch, of, grid_hw, num_classes)
    return share * known[..., None]  # of the whole patch: a patch of void says little

  patch = " x ".join(f"{size / grid:g}" for size, grid in zip(of.size_hw, grid_hw))
  perfect = score(mesh, settings, of, Said(test, rows_N, shares), settings.subset)
  counts_RxRxC = class_counts(train, num_classes, of)
  most_RxR = counts_RxRxC.argmax(-1)
  everywhere = np.full_like(most_RxR, counts_RxRxC.sum((0, 1)).argmax())
  floors = by_position(test, {ONE_CLASS: everywhere, POSITIONS: most_RxR}, num_classes, settings.subset)
  return [*floors.items(), (f"true labels per patch of {patch} px", perfect)]


def class_counts(images: ImageSet, num_classes: int, of: Windows) -> np.ndarray:
  """Returns how often each class stands at each place of an image, int (R, R, C), places as shares of its sides.

  ValueError where fewer than two classes are there at all, or a window cannot reach all of an image.
  """
  side = images.columns["canvas"].shape[0]
  while side**2 * num_classes * 4 > _POSITIONS_BYTES:
    side //= 2
  counts = np.zeros((side * side, num_classes + 1), np.int32)
  places = np.arange(side * side)
  at = (np.arange(side) + 0.5) / side
  for row, label in _label_maps(images):
    short, long = sorted(label.shape)
    lies = (of.size_hw[1] > of.size_hw[0]) == (label.shape[1] >= label.shape[0])
    if long > short * (of.aspect + 1e-3) or (of.size_hw[0] != of.size_hw[1] and not lies):
      raise not_reached(of, images, row)
    label_RxR = label[np.ix_(*((at * n).astype(int) for n in label.shape))]  # of each place the nearest pixel
    counts[places, np.minimum(label_RxR.ravel(), num_classes)] += 1
  there_C = counts[:, :-1].any(0)
  absent = [name for name, there in zip(images.map_classes, there_C) if not there]
  if there_C.sum() < 2:
    said = f"only {images.map_classes[int(there_C.argmax())]!r}" if there_C.any() else "none of the classes"
    raise ValueError(
      f"{said} is in the label maps of the training images; the rest is void, as 255 always is: store 0 and 1, not "
      "0 and 255, or correct data.label_maps"
    )
  if absent:
    log.warning("No training image shows %s: is data.label_maps right?", ", ".join(absent[:10]))
  return counts[:, :-1].reshape(side, side, num_classes)


def _label_maps(images: ImageSet) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (index, label map (h, w)) of every image that decodes."""
  for rows_B, batch, real_B in row_batches(images, np.arange(len(images)), 64):
    for i in np.flatnonzero(real_B):
      yield int(rows_B[i]), batch["label_map"][i, : batch["height"][i], : batch["width"][i]]


def by_position(
  images: ImageSet, guesses: Mapping[str, np.ndarray], num_classes: int, subset: str
) -> dict[str, dict[str, Any]]:
  """Returns the scores, as `score`, of saying the same of every image, for each guess (R, R) of what stands where."""
  names = images.names if subset else None
  parts = ["", subset] if names else [""]
  matrices = {(guess, part): np.zeros(num_classes**2, np.int64) for guess in guesses for part in parts}
  for row, label in _label_maps(images):
    known = label != VOID
    labels = label[known].astype(np.int64) * num_classes
    among = parts if names and re.search(subset, names[row]) else [""]
    for name, guess_RxR in guesses.items():
      y, x = (((np.arange(n) + 0.5) / n * len(guess_RxR)).astype(int) for n in label.shape)
      counts = np.bincount(labels + guess_RxR[np.ix_(y, x)][known], minlength=num_classes**2)
      for part in among:
        matrices[name, part] += counts
  of = lambda name, part: scores(matrices[name, part].reshape(num_classes, num_classes))
  return {name: {part: of(name, part) for part in parts} for name in guesses}
