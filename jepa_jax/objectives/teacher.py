"""What methods share whose targets come from a teacher: a moving average of the networks, or the networks themselves.

B batch, V views, F encoder features, D embedding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jepa_jax.choices import check_choices
from jepa_jax.models import ProjectorConfig, make_projector
from jepa_jax.objectives.base import Aux, Tree
from jepa_jax.objectives.multiview import MultiView, apply_head, check_views
from jepa_jax.streams import stream
from jepa_jax.views import MultiCropSettings, Pixels, Views


@dataclasses.dataclass(frozen=True)
class PredictedConfig:
  """What BYOL and MoCo v3 have in common.

  Attributes:
    predictor: an MLP on the online embeddings; hidden=() is none at all (its `out` is not read then).
    target: "ema" (a moving average of encoder and projector) or "online" (they themselves, behind a stop-gradient).
    ema: momentum at the first and after the last step, along a cosine.
  """

  views: MultiCropSettings
  projector: ProjectorConfig
  predictor: ProjectorConfig = ProjectorConfig(hidden=(4096,), out=256)
  target: Literal["ema", "online"] = "ema"
  ema: tuple[float, float] = (0.996, 1.0)
  compares_images: ClassVar[bool] = True

  def __post_init__(self):
    check_choices(self)
    check_momenta(self.ema)
    check_views(self.views, type(self).__name__.removesuffix("Config"), exactly=2)
    if self.predictor.hidden and self.predictor.out != self.projector.out:
      raise ValueError(f"predictor.out={self.predictor.out} must be projector.out={self.projector.out}, its target")


def check_momenta(ema: tuple[float, float]) -> None:
  """Raises a ValueError unless these are two momenta, of which the first lets the teacher move."""
  if len(ema) != 2 or not 0 <= ema[0] < 1 or not 0 <= ema[1] <= 1:
    raise ValueError(f"ema={ema} are momenta: at the first step in [0, 1), after the last one in [0, 1]")


def cosine_momentum(ema: tuple[float, float]) -> Callable[[jax.Array], jax.Array]:
  """Returns progress -> momentum, from the first to the second along half a cosine."""
  first, last = ema
  return lambda progress: last - (last - first) * (jnp.cos(jnp.pi * progress) + 1) / 2


class Predicted(MultiView):
  """Each view's prediction against the teacher's embedding of the other: a method adds `pair_loss`.

  The teacher's BatchNorm has the statistics of its own batch, as in the official codes; it drops no paths. The online
  encoder is evaluated.
  """

  def __init__(self, cfg: Any, encoder: Any, pixels: Pixels):
    super().__init__(cfg, encoder, pixels)
    self.predictor = make_projector(cfg.predictor) if cfg.predictor.hidden else None
    if self.predictor:
      self.rules = {**self.rules, "predictor": self.predictor.rules}
    self.averaged = ("encoder", "projector") if cfg.target == "ema" else ()
    self.ema_schedule = cosine_momentum(cfg.ema) if self.averaged else None

  def init(self, key, batch):
    params, state = super().init(key, batch)
    if self.predictor:
      made = self.predictor.init(stream(key, "predictor"), jnp.zeros((2, self.cfg.projector.out)), train=False)
      params["predictor"] = made["params"]
      state |= {"predictor": made["batch_stats"]} if "batch_stats" in made else {}
    return params, state

  def encode(self, params, state, target, views: Views, keys_B):
    """Returns ((pooled_BxVxF, probe features), the teacher's pooled features or None) and the new state."""
    online, new_state = self.encode_views(params, state, views, keys_B)
    if not self.averaged:
      return (online, None), new_state
    return (online, self.teach(target, state, views)), new_state

  def loss(self, params, state, target, encoded, key, progress):
    del key, progress
    (pooled_BxVxF, probe_BxVxF), teacher_BxVxF = encoded
    z_BxVxD, new_state = self.project(params, state, pooled_BxVxF)
    teacher_BxVxD = z_BxVxD if teacher_BxVxF is None else self.project(target, state, teacher_BxVxF)[0]
    prediction_BxVxD = z_BxVxD
    if self.predictor:
      prediction_BxVxD, new_state = apply_head("predictor", self.predictor, params, new_state, z_BxVxD)
    loss, terms = self.pair_loss(prediction_BxVxD, jax.lax.stop_gradient(teacher_BxVxD))
    return loss, (Aux(terms, probe_BxVxF, pooled_BxVxF[:, 0], z_BxVxD), new_state)

  def pair_loss(self, prediction_BxVxD: jax.Array, target_BxVxD: jax.Array) -> tuple[jax.Array, Tree]:
    """Returns (loss, terms) of the whole batch."""
    raise NotImplementedError
