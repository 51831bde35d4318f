"""A throw-away protocol: is what one tower makes of a test image nearest to what the other does? See test_one_file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from jepa_jax.evals.base import Protocol, Result, Subject


@dataclasses.dataclass(frozen=True)
class Pairs(Protocol):
  """Recall at `top` over the test images, after both sets are reduced to their common number of columns."""

  top: int = 1

  needs: ClassVar[frozenset[str]] = frozenset({"features", "encoder"})
  reads: ClassVar[tuple[str, ...]] = ("image", "other")

  def __post_init__(self):
    if self.top < 1:
      raise ValueError(f"top={self.top} must be at least 1")

  def run(self, subject: Subject) -> Iterator[Result]:
    a, b = (subject.features(name).test.pooled for name in self.reads)
    width = min(a.shape[1], b.shape[1])
    similar_NxN = np.asarray(a[:, :width], np.float32) @ np.asarray(b[:, :width], np.float32).T
    rank_N = (similar_NxN > np.diagonal(similar_NxN)[:, None]).sum(1)
    yield Result(subject.row, "pairs", 100 * float((rank_N < self.top).mean()), {"top": self.top, "images": len(a)})


PROTOCOL = Pairs
