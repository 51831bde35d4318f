"""Barlow Twins (arXiv 2103.03230): each dimension agrees with itself over two views, and with no other one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.models import ProjectorConfig
from jepa_jax.objectives.multiview import MultiView, check_views
from jepa_jax.views import MultiCropSettings


@dataclasses.dataclass(frozen=True)
class BarlowConfig:
  """`lam` weighs the correlations off the diagonal; .0051 in the paper, at an embedding of 8,192. Two views."""

  views: MultiCropSettings
  projector: ProjectorConfig
  name: Literal["barlow"] = "barlow"
  compares_images: ClassVar[bool] = True
  lars_collapses: ClassVar[bool] = True  # on a ViT, as stable-pretraining found
  lam: float = 0.0051

  def __post_init__(self):
    check_choices(self)
    check_views(self.views, "Barlow Twins", exactly=2)
    if self.lam < 0:
      raise ValueError(f"lam={self.lam} is a weight: 0 (off) or more")


class Barlow(MultiView):
  """The objective of `BarlowConfig`."""

  def embedding_loss(self, z_BxVxD):
    return losses.barlow_twins(z_BxVxD, self.cfg.lam)


METHOD = (BarlowConfig, Barlow)
