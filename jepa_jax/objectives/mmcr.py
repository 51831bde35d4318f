"""MMCR (arXiv 2303.03307): the centroids of an image's views should fill the sphere, measured by a nuclear norm.

B batch, K views, F encoder features, D embedding width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.models import ProjectorConfig
from jepa_jax.objectives.base import Aux
from jepa_jax.objectives.multiview import MultiView
from jepa_jax.views import MultiCropSettings, Pixels, Views


@dataclasses.dataclass(frozen=True)
class MMCRConfig:
  """`lam` weighs the local term (0 in every official script); `reduction` as in `losses.mmcr`.

  `momentum` > 0 is the variant of the paper's ImageNet runs (.99): a moving average of the networks embeds the same
  views, and the centroid is half its mean and half the online one. The online encoder is evaluated.
  """

  views: MultiCropSettings
  projector: ProjectorConfig
  name: Literal["mmcr"] = "mmcr"
  lam: float = 0.0
  reduction: Literal["sum", "bound"] = "sum"
  momentum: float = 0.0
  nuclear: Literal["auto", "svd", "newton_schulz", "qdwh"] = "auto"

  def __post_init__(self):
    check_choices(self)
    if self.lam < 0:
      raise ValueError(f"lam={self.lam} must be 0 (no local term) or more")
    if not 0 <= self.momentum < 1:
      raise ValueError(f"momentum={self.momentum} lies in [0, 1); 0 embeds with the online networks alone")
    if self.views.num_views < 2 and (self.lam > 0 or not self.momentum):
      raise ValueError(
        f"views has {self.views.num_views} view of each image: MMCR averages over at least 2; raise "
        "views.global_crops.num"
      )


class MMCR(MultiView):
  """The objective of `MMCRConfig`."""

  def __init__(self, cfg: MMCRConfig, encoder: Any, pixels: Pixels):
    super().__init__(cfg, encoder, pixels)
    self.averaged = ("encoder", "projector") if cfg.momentum else ()
    self.ema_schedule = (lambda progress: jnp.float32(cfg.momentum)) if cfg.momentum else None

  def encode(self, params, state, target, views: Views, keys_B):
    """Returns ((pooled_BxKxF, probe features), the averaged encoder's pooled features or None) and the new state."""
    online, new_state = self.encode_views(params, state, views, keys_B)
    if not self.cfg.momentum:
      return (online, None), new_state
    return (online, self.teach(target, state, views, keys_B)), new_state

  def loss(self, params, state, target, encoded, key, progress):
    del key, progress
    (pooled_BxKxF, probe_BxKxF), averaged_BxKxF = encoded
    z_BxKxD, new_state = self.project(params, state, pooled_BxKxF)
    momentum_BxKxD = None if averaged_BxKxF is None else self.project(target, state, averaged_BxKxF)[0]
    cfg = self.cfg
    loss, terms = losses.mmcr(z_BxKxD, momentum_BxKxD, cfg.lam, cfg.reduction, cfg.nuclear)
    return loss, (Aux(terms, probe_BxKxF, pooled_BxKxF[:, 0], z_BxKxD), new_state)


METHOD = (MMCRConfig, MMCR)
