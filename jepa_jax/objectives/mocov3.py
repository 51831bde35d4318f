"""MoCo v3 (arXiv 2104.02057): a query finds the same image's key among those of the batch; keys are a teacher's."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax

from jepa_jax import losses
from jepa_jax.models import ProjectorConfig
from jepa_jax.objectives.simclr import check_temperature
from jepa_jax.objectives.teacher import Predicted, PredictedConfig
from jepa_jax.streams import stream
from jepa_jax.views import Pixels


@dataclasses.dataclass(frozen=True)
class MoCoV3Config(PredictedConfig):
  """`temperature`: .2 for ViTs, 1 for ResNets. `frozen_patches`: a ViT's patch projection keeps its random start, what
  stabilises large ViTs in the paper; other encoders have none."""

  name: Literal["mocov3"] = "mocov3"
  predictor: ProjectorConfig = ProjectorConfig(hidden=(4096,), out=256, last_norm="batch")
  ema: tuple[float, float] = (0.99, 1.0)
  temperature: float = 0.2
  frozen_patches: bool = False

  def __post_init__(self):
    super().__post_init__()
    check_temperature(self.temperature)


class MoCoV3(Predicted):
  """The objective of `MoCoV3Config`."""

  def __init__(self, cfg: MoCoV3Config, encoder: Any, pixels: Pixels):
    super().__init__(cfg, encoder, pixels)
    if not cfg.frozen_patches:
      return
    if not hasattr(encoder, "drops_patches"):
      raise ValueError("frozen_patches=True freezes the patch projection of a ViT, and this encoder has none")
    still = lambda rule: rule._replace(decays=False) if "patch_embed" in rule.pattern else rule
    self.rules = {**self.rules, "encoder": tuple(still(rule) for rule in encoder.rules)}

  def init(self, key, batch):
    params, state = super().init(key, batch)
    if self.cfg.frozen_patches:  # what is never learned must be right from the start: Xavier's, of the whole projection
      kernel = params["encoder"]["patch_embed"]["kernel"]
      most = (6 / (math.prod(kernel.shape[:3]) + kernel.shape[3])) ** 0.5
      drawn = jax.random.uniform(stream(key, "patches"), kernel.shape, kernel.dtype, -most, most)
      params["encoder"] = {**params["encoder"], "patch_embed": params["encoder"]["patch_embed"] | {"kernel": drawn}}
    return params, state

  def encode_views(self, params, state, views, keys_B):
    if self.cfg.frozen_patches:
      own = params["encoder"]
      params = {**params, "encoder": {**own, "patch_embed": jax.lax.stop_gradient(own["patch_embed"])}}
    return super().encode_views(params, state, views, keys_B)

  def pair_loss(self, prediction_BxVxD, target_BxVxD):
    return losses.moco_v3(prediction_BxVxD, target_BxVxD, self.cfg.temperature)


METHOD = (MoCoV3Config, MoCoV3)
