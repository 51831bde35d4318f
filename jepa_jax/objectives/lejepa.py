"""LeJEPA (arXiv 2511.08544, Alg. 2): invariance of the views' embeddings plus SIGReg. No target, no stop-gradient.

B batch, V views, F encoder features, D embedding width, M slices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jepa_jax import losses
from jepa_jax.choices import check_choices, require_choice
from jepa_jax.models import ProjectorConfig
from jepa_jax.objectives.base import Aux
from jepa_jax.objectives.multiview import MultiView
from jepa_jax.views import MultiCropSettings, Pixels


@dataclasses.dataclass(frozen=True)
class LeJEPAConfig:
  """`lam` weighs SIGReg: loss = (1 - lam) invariance + lam SIGReg, in the official units (times the global batch).

  `regulariser` is what stands in SIGReg's place, for study (`losses.REGULARISERS`): another univariate test along the
  same directions, VISReg's or VICReg's terms. Each has a scale of its own, so `lam` means another thing with each.
  `redraw`: new directions in every step; without it the same ones for the whole run, and for every run.

  `stop_gradient`: the centre of the views is a constant to their invariance, as a teacher's embedding would be. Without
  local views it changes nothing: the gradient through a mean of all views is zero.
  `weight_average` > 0 keeps an exponential average of the encoder with that momentum, which is then evaluated.
  """

  views: MultiCropSettings
  projector: ProjectorConfig
  name: Literal["lejepa"] = "lejepa"
  lam: float = 0.05
  num_slices: int = 1024
  num_knots: int = 17
  t_max: float = 3.0
  directions: Literal["gaussian", "sobol"] = "gaussian"
  redraw: bool = True
  regulariser: str = "epps_pulley"
  stop_gradient: bool = False
  weight_average: float = 0.0

  def __post_init__(self):
    check_choices(self)
    require_choice("regulariser", self.regulariser, tuple(losses.REGULARISERS))
    if self.regulariser != "epps_pulley" and (changed := [n for n in ("t_max", "num_knots") if _changed(self, n)]):
      raise ValueError(
        f"{', '.join(changed)}: the grid of Epps-Pulley, which regulariser={self.regulariser} does not read; "
        "leave it out"
      )
    if not 0 <= self.lam <= 1:
      raise ValueError(f"lam={self.lam} must lie in [0, 1]: loss = (1 - lam) invariance + lam SIGReg")
    if self.views.num_views < 2 and self.lam < 1:
      raise ValueError(
        f"views.global_crops.num={self.views.global_crops.num} and no local crops: with one view there is nothing that "
        "should be alike. Give 2 or more; lam=1 would be SIGReg alone"
      )
    if not 0 <= self.weight_average < 1:
      raise ValueError(f"weight_average={self.weight_average} is a momentum in [0, 1); 0 turns it off")


def _changed(cfg: LeJEPAConfig, name: str) -> bool:
  return getattr(cfg, name) != LeJEPAConfig.__dataclass_fields__[name].default


class LeJEPA(MultiView):
  """The objective of `LeJEPAConfig`."""

  def __init__(self, cfg: LeJEPAConfig, encoder: Any, pixels: Pixels):
    super().__init__(cfg, encoder, pixels)
    if cfg.weight_average and getattr(encoder, "uses_batch_statistics", False):
      raise ValueError(
        f"weight_average={cfg.weight_average} with an encoder that has BatchNorm: its running averages would be those "
        "of the weights, not of their average; set weight_average to 0 or choose an encoder without BatchNorm"
      )
    self.averaged = ("encoder",) if cfg.weight_average else ()
    # What SIGReg is worth for exactly Gaussian embeddings, at any batch size: a healthy run sits near it, not near 0.
    self.references: Mapping[str, float] = {}
    self.regulariser, self.term = losses.REGULARISERS[cfg.regulariser], cfg.regulariser  # its name in the metrics
    if cfg.regulariser == "epps_pulley":
      statistic = functools.partial(losses.epps_pulley, t_max=cfg.t_max, num_knots=cfg.num_knots)
      self.regulariser, self.term = functools.partial(losses.sliced, statistic=statistic), "sigreg"
      self.references = {"sigreg": losses.expected_under_gaussian(cfg.t_max, cfg.num_knots)}
    self.ema_schedule = (lambda progress: jnp.float32(cfg.weight_average)) if cfg.weight_average else None

  def loss(self, params, state, target, encoded, key, progress):
    del target, progress
    pooled_BxVxF, probe_BxVxF = encoded
    z_BxVxD, new_state = self.project(params, state, pooled_BxVxF)
    key = key if self.cfg.redraw else jax.random.key(0)
    directions_DxM = losses.slice_directions(key, z_BxVxD.shape[-1], self.cfg.num_slices, self.cfg.directions)
    loss, terms = losses.lejepa(
      z_BxVxD.swapaxes(0, 1),
      directions_DxM,
      num_global=self.cfg.views.global_crops.num,
      lam=self.cfg.lam,
      regulariser=self.regulariser,
      stop_gradient=self.cfg.stop_gradient,
    )
    terms = {"inv": terms["inv"], self.term: terms["sigreg"]}
    return loss, (Aux(terms, probe_BxVxF, pooled_BxVxF[:, 0], z_BxVxD), new_state)

  def variables(self, params, state, target):
    return super().variables(target or params, state, target)


METHOD = (LeJEPAConfig, LeJEPA)
