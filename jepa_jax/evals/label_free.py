"""What can be said of features without labels: how many directions they use, and how evenly they cover the sphere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.blocks import check_features, l2_normalised
from jepa_jax.theory import rankme, uniformity


@dataclasses.dataclass(frozen=True)
class LabelFree(Protocol):
  """RankMe (arXiv 2210.02885) of the pooled features of test images; their uniformity and mean cosine in the file.

  Attributes:
    images: most that are looked at, drawn at random where there are more.
  """

  images: int = 10_000

  needs: ClassVar[frozenset[str]] = frozenset({"features"})
  splits: ClassVar[tuple[str, ...]] = ("test",)

  def __post_init__(self):
    if self.images < 2:
      raise ValueError(f"images={self.images}: features of two images at least are compared")

  def run(self, subject: Subject) -> Iterator[Result]:
    pooled = check_features("test", subject.features("image", self.splits).test.pooled)
    if len(pooled) < 2:
      raise ValueError("label_free compares features of several images, and there is one: give more test images")
    rows = np.random.default_rng(subject.settings.seed).permutation(len(pooled))[: self.images]
    x_NxD = np.asarray(pooled[np.sort(rows)], np.float32)
    yield Result(subject.row, "RankMe", *measured(x_NxD))


def measured(x_NxD: np.ndarray) -> tuple[float, dict[str, float]]:
  """Returns (RankMe, {"most": of so many images of this width, "uniformity": at most 0, "mean_cosine"}) of features."""
  unit_NxD = l2_normalised(x_NxD)
  num = len(unit_NxD)
  # The mean over pairs of different images: the square of the sum holds every image's own cosine, 1, too.
  mean_cosine = (np.square(unit_NxD.sum(0, dtype=np.float64)).sum() - num) / (num * (num - 1))
  of = {"most": float(min(x_NxD.shape)), "uniformity": float(jax.jit(uniformity)(jnp.asarray(unit_NxD[:_PAIRED])))}
  return float(jax.jit(rankme)(jnp.asarray(x_NxD))), of | {"mean_cosine": float(mean_cosine), "images": num}


_PAIRED = 2_048  # images whose pairs are all looked at

PROTOCOL = LabelFree
