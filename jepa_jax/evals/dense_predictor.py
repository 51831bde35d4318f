"""Segmentation through the predictor of an I-JEPA, IWM or MAE: is what it has learned of use at every position?

IWM (arXiv 2403.00504) tunes predictors for ADE20K and does not say how; this is ours. The predictor is asked for all
positions after the null action, on the encoder that is evaluated; the head of `segmentation` reads its answer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.dense import check_dense, check_heads, results, windows_of
from jepa_jax.evals.dense_fit import DenseModel, fit_dense
from jepa_jax.evals.dense_floors import references
from jepa_jax.evals.predictor_tuning import PRETRAINED_SHARE, answer, check_networks, check_predicts, init_predictor
from jepa_jax.streams import stream

log = logging.getLogger(__name__)
Tree = Any


@dataclasses.dataclass(frozen=True)
class DensePredictor(Protocol):
  """Segmentation through the predictor of an I-JEPA, IWM or MAE, beside a random one and the tuned encoder.

  On windows of the size of training.

  How is said by `evals.dense`. What is pre-trained has a tenth of the learning rate, as in `predictor_tuning`.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"networks", "label_map"})
  shares: ClassVar[tuple[str, ...]] = ("dense",)

  def check(self, subject: Subject) -> None:
    check_predicts(subject.objective, "dense_predictor")
    if subject.settings.dense.layers != "last":
      raise ValueError("dense_predictor reads the last layer, as the predictor does: set evals.dense.layers='last'")
    if subject.settings.dense.window:
      log.warning(
        "dense_predictor does not read window: it sees squares of the size of training, %d px", _size(subject)
      )
    check_dense(subject, subject.settings.dense, _size(subject))
    check_heads(subject, subject.settings.dense)

  def run(self, subject: Subject) -> Iterator[Result]:
    settings, of = subject.settings.dense, windows_of(subject, subject.settings.dense, _size(subject))
    yield from references(subject, settings, of, f"mIoU in windows of {_size(subject)} px")
    networks, data = subject.networks(), subject.data
    rows = {"train": np.arange(len(data.train)), "test": np.arange(len(data.test))}
    for name, model in models(subject, networks["params"], networks["target"]).items():
      tuned = fit_dense(subject, settings, of, model, rows)
      yield from results(subject.row, f"mIoU, {name}", tuned.found, data.test, tuned.summary())


def _size(subject: Subject) -> int:
  height_px, width_px = subject.objective.cfg.views.global_crops.size_hw  # what the predictor's grid is made for
  if height_px != width_px:
    raise ValueError(f"dense_predictor reads square windows, and this predictor's are {height_px} x {width_px} px")
  return height_px


def models(subject: Subject, params: Tree, target: Tree) -> Mapping[str, DenseModel]:
  """Returns the networks to compare, by name: "tuned encoder", "random predictor" and "predictor"."""
  objective: Any = subject.objective
  check_networks(objective, params, target, "dense_predictor")
  encoder = {"encoder": objective.variables(params, {}, target)["image"]["params"]}
  predictor = {"predictor": params["predictor"]}
  random = {"predictor": init_predictor(objective, stream(jax.random.key(subject.settings.seed), "predictor"))}

  def grids(trained: Tree, frozen: Tree, views: jax.Array) -> jax.Array:
    nets = {**frozen, **trained}
    seen = objective.encoder.apply({"params": nets["encoder"]}, views.reshape(-1, *views.shape[2:]))
    tokens = seen.tokens_BxNxD
    if "predictor" in nets:
      tokens = answer(objective, nets["predictor"], objective.context(seen))
    return tokens.reshape(*views.shape[:2], *objective.grid_hw, -1)

  width, answer_width = objective.encoder.width, objective.answer_width
  tenth = dict.fromkeys(("encoder", "predictor"), PRETRAINED_SHARE)
  return {
    "tuned encoder": DenseModel(None, grids, encoder, {}, tenth, width),
    "random predictor": DenseModel(None, grids, random, encoder, {}, answer_width),
    "predictor": DenseModel(None, grids, predictor, encoder, tenth, answer_width),
  }


PROTOCOL = DensePredictor
