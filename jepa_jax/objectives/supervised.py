"""Supervised training: cross-entropy of a linear head with smoothed labels, the yardstick of what a network can learn.

B batch, V views, F encoder features, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import optax

from jepa_jax.choices import check_choices
from jepa_jax.models import ProjectorConfig
from jepa_jax.objectives.base import Aux
from jepa_jax.objectives.multiview import MultiView
from jepa_jax.views import MultiCropSettings


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
  """`projector` is the head: its `out` is the number of classes, and no hidden layer makes it a linear one.

  The loss is the mean over all views; each view counts as an image of its own. Images with a label below 0 have none.
  """

  views: MultiCropSettings
  projector: ProjectorConfig
  name: Literal["supervised"] = "supervised"
  label_smoothing: float = 0.1

  def __post_init__(self):
    check_choices(self)
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(f"label_smoothing={self.label_smoothing} lies in [0, 1); 0 turns it off")

  @property
  def num_classes(self) -> int:
    return self.projector.out


class Supervised(MultiView):
  """The objective of `SupervisedConfig`."""

  def views(self, keys_B, batch) -> Any:  # labels go with the views: only they reach the loss
    return super().views(keys_B, batch), batch["label"]

  def encode(self, params, state, target, views: Any, keys_B):
    del target
    images, label_B = views
    encoded, state = self.encode_views(params, state, images, keys_B)
    return (*encoded, label_B), state

  def loss(self, params, state, target, encoded, key, progress):
    del target, key, progress
    pooled_BxVxF, probe_BxVxF, label_B = encoded
    logits_BxVxC, new_state = self.project(params, state, pooled_BxVxF)
    smooth_BxC = optax.smooth_labels(jnp.eye(self.cfg.num_classes)[label_B], self.cfg.label_smoothing)
    known_B = (label_B >= 0).astype(jnp.float32)
    right_BxV = (logits_BxVxC.argmax(-1) == label_B[:, None]) * known_B[:, None]
    entropy_BxV = optax.softmax_cross_entropy(logits_BxVxC, smooth_BxC[:, None]) * known_B[:, None]
    count = jnp.maximum(known_B.sum(), 1) * pooled_BxVxF.shape[1]
    terms = {"train_accuracy": 100 * right_BxV.sum() / count}
    return entropy_BxV.sum() / count, (Aux(terms, probe_BxVxF, pooled_BxVxF[:, 0], logits_BxVxC), new_state)

  def draw(self, views: Any, batch):
    return super().draw(views[0], batch)


METHOD = (SupervisedConfig, Supervised)
