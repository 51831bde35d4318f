"""A class-balanced part of a source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jepa_jax.data.sources.source import Source, digest


class SubsetSource:
  """The given indices of another source."""

  def __init__(self, source: Source, indices: np.ndarray):
    self._source, self._indices = source, indices
    self.class_names = source.class_names
    for name in ("map_classes", "value_table"):  # of a source with label maps
      if hasattr(source, name):
        setattr(self, name, getattr(source, name))

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict:
    return self._source[int(self._indices[index])]

  def labels(self) -> np.ndarray:
    return self._source.labels()[self._indices]

  @property
  def names(self) -> list[str]:
    """What the images are called, where the source says."""
    return [self._source.names[i] for i in self._indices]  # type: ignore[attr-defined]

  def captions(self, indices: Sequence[int] | None = None) -> list[list[str]]:
    """Returns the captions of every image, or of these, where the source has any."""
    own = self._indices if indices is None else self._indices[np.asarray(indices, int)]
    return self._source.captions(own)  # type: ignore[attr-defined]

  def fingerprint(self) -> str:
    return digest(self._source.fingerprint(), self._indices)


def balanced_subset(labels: np.ndarray, num_images: int, seed: int) -> np.ndarray:
  """Returns sorted indices of `num_images` images, classes as equal in number as the labels allow.

  Classes take turns giving their next image in a seeded order, so a small class gives all it has, and the subset of n
  images lies within the subset of n + 1 (which is what makes curves over the number of images comparable).
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  turn = np.empty(len(labels), np.int64)
  for label in np.unique(labels):
    of_label = np.flatnonzero(labels[order] == label)
    turn[of_label] = np.arange(len(of_label))
  return np.sort(order[np.argsort(turn, kind="stable")[:num_images]])
