"""A held-out part of one set of images, for data that come without a test split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def held_out_rows(labels: np.ndarray, names: Sequence[str], share: float, split: str) -> np.ndarray:
  """Returns the indices of the images of "train" or "test", sorted; `share` of every class is test, at least one image.

  By a hash of the image's name: the same on every machine, and an image that is added or removed moves few others.
  ValueError where a class has one image alone.
  """
  rank = np.array([int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:8], "big") for name in names])
  test = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    rows = np.flatnonzero(labels == label)
    if len(rows) < 2:
      raise ValueError(
        f"data.held_out={share:g} cannot split one image, {names[rows[0]]}, the only one of its class: add images, or "
        "name a test split in data.test"
      )
    num = min(max(1, round(share * len(rows))), len(rows) - 1)
    test[rows[np.argsort(rank[rows], kind="stable")[:num]]] = True
  return np.flatnonzero(test if split == "test" else ~test)
