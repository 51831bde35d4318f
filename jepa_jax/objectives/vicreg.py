"""VICReg (arXiv 2105.04906): alike views, every dimension spread, no two dimensions saying the same."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.models import ProjectorConfig
from jepa_jax.objectives.multiview import MultiView, check_views
from jepa_jax.views import MultiCropSettings


@dataclasses.dataclass(frozen=True)
class VICRegConfig:
  """`invariance`, `variance`, `covariance`: weights of the three terms, see `losses.vicreg`; any number of views."""

  views: MultiCropSettings
  projector: ProjectorConfig
  name: Literal["vicreg"] = "vicreg"
  compares_images: ClassVar[bool] = True
  invariance: float = 25.0
  variance: float = 25.0
  covariance: float = 1.0

  def __post_init__(self):
    check_choices(self)
    check_views(self.views, "VICReg")
    if min(self.invariance, self.variance, self.covariance) < 0:
      raise ValueError("invariance, variance and covariance are weights: 0 (off) or more")


class VICReg(MultiView):
  """The objective of `VICRegConfig`."""

  def embedding_loss(self, z_BxVxD):
    return losses.vicreg(z_BxVxD, self.cfg.invariance, self.cfg.variance, self.cfg.covariance)


METHOD = (VICRegConfig, VICReg)
