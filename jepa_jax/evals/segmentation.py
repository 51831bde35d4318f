"""Linear segmentation of frozen patch features: one head for every patch, mean IoU over one matrix of all images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np

from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.dense import (
  check_dense,
  check_heads,
  grid_of,
  make_grids,
  results,
  token_width,
  tokens_fn,
  windows_of,
)
from jepa_jax.evals.dense_fit import DenseModel, DenseTuned, fit_dense
from jepa_jax.evals.dense_floors import references
from jepa_jax.views import Windows


@dataclasses.dataclass(frozen=True)
class Segmentation(Protocol):
  """Linear segmentation of frozen patch features: mean IoU over label maps, as `evals.dense` says.

  Features are made once, of windows; with evals.dense.augment anew in every step.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"encoder", "label_map"})
  shares: ClassVar[tuple[str, ...]] = ("dense",)

  def check(self, subject: Subject) -> None:
    check_dense(subject, subject.settings.dense)
    check_heads(subject, subject.settings.dense)

  def prepare(self, subject: Subject) -> None:
    if not subject.settings.dense.augment:
      make_grids(subject, windows_of(subject, subject.settings.dense))

  def run(self, subject: Subject) -> Iterator[Result]:
    settings, of = subject.settings.dense, windows_of(subject, subject.settings.dense)
    yield from references(subject, settings, of, "mIoU")
    tuned, _ = fit(subject)
    yield from results(subject.row, "mIoU", tuned.found, subject.data.test, tuned.summary())


def fit(subject: Subject) -> tuple[DenseTuned, np.ndarray]:
  """Returns the trained head, and the test images that it is asked of, in the order of its places."""
  settings, of, data = subject.settings.dense, windows_of(subject, subject.settings.dense), subject.data
  if settings.augment:
    rows = {"train": np.arange(len(data.train)), "test": np.arange(len(data.test))}
    return fit_dense(subject, settings, of, _on_the_fly(subject, of), rows), rows["test"]
  grids = make_grids(subject, of)
  rows = {split: own.rows_N for split, own in grids.items()}
  model = DenseModel({split: own.features for split, own in grids.items()})
  return fit_dense(subject, settings, of, model, rows), rows["test"]


def _on_the_fly(subject: Subject, of: Windows) -> DenseModel:
  """Returns a model whose features are made of what is seen in each step."""
  encode, grid_hw = tokens_fn(subject), grid_of(subject, of)

  def grids(trained: Any, frozen: Any, views: jax.Array) -> jax.Array:
    tokens = encode(frozen["encoder"], views.reshape(-1, *views.shape[2:]))
    return tokens.reshape(*views.shape[:2], *grid_hw, -1)

  return DenseModel(None, grids, frozen={"encoder": subject.variables("image")}, width=token_width(subject, of))


PROTOCOL = Segmentation
