"""MCR2 (arXiv 2006.08558), self-supervised: all views together cost many bits, the views of one image few."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.models import ProjectorConfig
from jepa_jax.objectives.multiview import MultiView, check_views
from jepa_jax.views import MultiCropSettings


@dataclasses.dataclass(frozen=True)
class MCR2Config:
  """`eps`: the precision at which bits are counted; `class_weight`: of those of an image's views (`losses.mcr2`); any
  number of views."""

  views: MultiCropSettings
  projector: ProjectorConfig
  name: Literal["mcr2"] = "mcr2"
  compares_images: ClassVar[bool] = True
  eps: float = 0.5
  class_weight: float = 1.0

  def __post_init__(self):
    check_choices(self)
    check_views(self.views, "MCR2")
    if self.eps <= 0:
      raise ValueError(f"eps={self.eps} is a precision above 0, such as .5")
    if self.class_weight <= 0:
      raise ValueError(f"class_weight={self.class_weight} must be above 0: what an image's views cost would be free")


class MCR2(MultiView):
  """The objective of `MCR2Config`."""

  def embedding_loss(self, z_BxVxD):
    return losses.mcr2(z_BxVxD, self.cfg.eps, self.cfg.class_weight)


METHOD = (MCR2Config, MCR2)
