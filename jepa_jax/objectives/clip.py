"""CLIP (arXiv 2103.00020): each image finds its text among those of the batch, and back, at a learned temperature.

B batch, C captions, D width of an embedding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jepa_jax import losses
from jepa_jax.objectives.image_text import ImageText, ImageTextConfig, bounded

MAX_LOG_SCALE = math.log(100)


@dataclasses.dataclass(frozen=True)
class CLIPConfig(ImageTextConfig):
  """`temperature` to begin with; its inverse is learned as a logarithm, and never above 100. `chunk`: images whose
  logits are made at a time, see `losses.clip`; 0: all."""

  name: Literal["clip"] = "clip"
  temperature: float = 0.07
  chunk: int = 0

  def __post_init__(self):
    super().__post_init__()
    if not 0.01 <= self.temperature <= 100:
      raise ValueError(f"temperature={self.temperature} lies in [.01, 100]; .07 in the paper")
    if self.chunk < 0:
      raise ValueError(f"chunk={self.chunk} is a number of images, or 0 for all")


class CLIP(ImageText):
  """The objective of `CLIPConfig`."""

  def scalars(self):
    return {"logit_scale": -math.log(self.cfg.temperature)}

  def pair_loss(self, params, image_BxD, text_BxCxD):
    log_scale = bounded(params["logit_scale"], MAX_LOG_SCALE)
    return losses.clip(image_BxD, text_BxCxD, log_scale, self.cfg.chunk)


METHOD = (CLIPConfig, CLIP)
