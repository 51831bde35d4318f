"""SigLIP (arXiv 2303.15343): of every image and text of the batch, do they belong together?

B batch, C captions, D width of an embedding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jepa_jax import losses
from jepa_jax.objectives.image_text import ImageText, ImageTextConfig


@dataclasses.dataclass(frozen=True)
class SigLIPConfig(ImageTextConfig):
  """`scale` and `bias` of the logits to begin with; both are learned, without a bound. `chunk`: images whose logits are
  made at a time, see `losses.siglip`; 0: all."""

  name: Literal["siglip"] = "siglip"
  scale: float = 10.0
  bias: float = -10.0
  chunk: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.scale <= 0:
      raise ValueError(f"scale={self.scale} must be positive; 10 in the paper")
    if self.chunk < 0:
      raise ValueError(f"chunk={self.chunk} is a number of images, or 0 for all")


class SigLIP(ImageText):
  """The objective of `SigLIPConfig`."""

  def scalars(self):
    return {"logit_scale": math.log(self.cfg.scale), "logit_bias": self.cfg.bias}

  def pair_loss(self, params, image_BxD, text_BxCxD):
    return losses.siglip(image_BxD, text_BxCxD, params["logit_scale"], params["logit_bias"], self.cfg.chunk)


METHOD = (SigLIPConfig, SigLIP)
