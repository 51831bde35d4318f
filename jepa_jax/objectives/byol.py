"""BYOL (arXiv 2006.07733), and SimSiam (arXiv 2011.10566): a view's prediction of the other view's embedding.

Without negatives, what keeps it from collapsing are the predictor and the stop-gradient, helped by BatchNorm over the
global batch in projector and predictor.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jepa_jax import losses
from jepa_jax.objectives.teacher import Predicted, PredictedConfig


@dataclasses.dataclass(frozen=True)
class BYOLConfig(PredictedConfig):
  """SimSiam is target="online" with its own widths (projector.last_norm="batch"); it collapses without a predictor."""

  name: Literal["byol"] = "byol"
  lars_collapses: ClassVar[bool] = True  # on a ViT, as stable-pretraining found


class BYOL(Predicted):
  """The objective of `BYOLConfig`."""

  def pair_loss(self, prediction_BxVxD, target_BxVxD):
    return losses.byol(prediction_BxVxD, target_BxVxD)


METHOD = (BYOLConfig, BYOL)
