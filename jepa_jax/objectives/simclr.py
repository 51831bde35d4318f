"""SimCLR (arXiv 2002.05709): of all other views of the batch, which is of the same image?"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.models import ProjectorConfig
from jepa_jax.objectives.multiview import MultiView, check_views
from jepa_jax.views import MultiCropSettings


@dataclasses.dataclass(frozen=True)
class SimCLRConfig:
  """`temperature` divides the cosines; .1 to .5 in the paper. Two views, against all of the global batch."""

  views: MultiCropSettings
  projector: ProjectorConfig
  name: Literal["simclr"] = "simclr"
  compares_images: ClassVar[bool] = True
  temperature: float = 0.2

  def __post_init__(self):
    check_choices(self)
    check_views(self.views, "SimCLR", exactly=2)
    check_temperature(self.temperature)


def check_temperature(temperature: float, name: str = "temperature") -> None:
  """Raises a ValueError for a temperature that is not above 0."""
  if not temperature > 0:
    raise ValueError(f"{name}={temperature} divides the logits: above 0, such as .1 to .5")


class SimCLR(MultiView):
  """The objective of `SimCLRConfig`."""

  def embedding_loss(self, z_BxVxD):
    return losses.nt_xent(z_BxVxD, self.cfg.temperature)


METHOD = (SimCLRConfig, SimCLR)
