"""MAE (arXiv 2111.06377): from the visible patches of an image, predict the pixels of the removed ones.

B batch, N patches, K what the decoder reads (visible patches, and a class token where there is one), T removed patches,
C numbers of a patch, D encoder width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.models import PredictorConfig
from jepa_jax.objectives.base import Aux
from jepa_jax.objectives.masked import MaskedImages, MaskedViews, check_masks_patches, check_one_crop, gather_patches
from jepa_jax.views import MaskSettings, MultiCropSettings, Pixels


@dataclasses.dataclass(frozen=True)
class MAEConfig:
  """The decoder is I-JEPA's predictor, at every removed place of one pass.

  Attributes:
    views: one crop; the paper has scale (.2, 1), bicubic, a flip and no colours.
    mask_ratio: share of the patches that is removed, at random; int(N (1 - mask_ratio)) stay, as in the official code.
    predictor: the decoder; 8 blocks of width 512 with 16 heads in the paper.
    norm_pixels: targets are every patch less its mean, over its (unbiased) deviation.
  """

  views: MultiCropSettings
  predictor: PredictorConfig = PredictorConfig(depth=8, width=512, num_heads=16)
  name: Literal["mae"] = "mae"
  mask_ratio: float = 0.75
  norm_pixels: bool = True

  def __post_init__(self):
    check_choices(self)
    check_one_crop(self.views)
    if not 0 < self.mask_ratio < 1:
      raise ValueError(f"mask_ratio={self.mask_ratio} is the share that is removed: between 0 and 1, .75 in the paper")
    if not self.predictor.depth or self.predictor.conditioning != "none":
      raise ValueError("predictor, the decoder, has a depth of at least 1, and conditioning='none'")


class MAE(MaskedImages):
  """The objective of `MAEConfig`, on a ViT. The online probe sees what the encoder does: the visible patches.

  A class token goes through the decoder, too, as in the official code: that is what it learns from.
  """

  def __init__(self, cfg: MAEConfig, encoder: Any, pixels: Pixels):
    check_masks_patches(cfg, encoder)
    if getattr(encoder, "cls_token", False) and encoder.pool != "cls":
      raise ValueError(
        f"encoder.pool={encoder.pool!r} leaves out the class token, which MAE's decoder reads: set 'cls'"
      )
    num_patches = math.prod(side // encoder.patch_size for side in cfg.views.global_crops.size_hw)
    if not 0 < (visible := int(num_patches * (1 - cfg.mask_ratio))) < num_patches:
      raise ValueError(f"mask_ratio={cfg.mask_ratio} leaves {visible} of {num_patches} patches: at least 1, not all")
    masks = MaskSettings(kind="random", num_context_patches=visible)
    super().__init__(cfg, encoder, pixels, masks, answer_width=encoder.patch_size**2 * pixels.channels)

  def encode(self, params, state, target, views: MaskedViews, keys_B):
    """Returns each example's loss and pooled features: all that is kept of it."""
    del target
    images, masks = views.images_BxHxWxC, views.masks
    random = {"keys_B": keys_B} if getattr(self.encoder, "drop_path", 0) else {}
    seen = self.encoder.apply({"params": params["encoder"]}, images, train=True, keep_BxK=masks.context_BxK, **random)
    prediction_BxTxC = self.predict(params, self.context(seen), masks)[:, 0]
    target_BxTxC = gather_patches(self.targets(None, images), masks.targets_BxMxT)[:, 0]
    # Every image has the same number of removed patches, so that the mean of means is `losses.mae` of all.
    ones_1xT = jnp.ones((1, target_BxTxC.shape[1]))
    loss_B = jax.vmap(lambda p, t: losses.mae(p[None], t[None], ones_1xT)[0])(prediction_BxTxC, target_BxTxC)
    return {"loss_B": loss_B, "pooled_BxD": seen.pooled_BxD, "probe_BxF": seen.probe_BxF}, state

  def context(self, seen):
    if not self.encoder.cls_token:
      return seen.tokens_BxNxD
    return jnp.concatenate([seen.pooled_BxD[:, None], seen.tokens_BxNxD], axis=1)

  def targets(self, tokens_BxNxD, images_BxHxWxC):
    """Returns the patches of the images, normalised, or each over its own deviation; tokens are not looked at."""
    del tokens_BxNxD
    patches_BxNxC = patches_of(images_BxHxWxC, self.encoder.patch_size)
    return losses.patch_targets(patches_BxNxC) if self.cfg.norm_pixels else patches_BxNxC

  def loss(self, params, state, target, encoded, key, progress):
    del params, target, key, progress
    metrics = {"context_ratio": jnp.float32(self.num_context / self.num_patches)}
    return encoded["loss_B"].mean(), (Aux(metrics, encoded["probe_BxF"][:, None], encoded["pooled_BxD"]), state)


def patches_of(images_BxHxWxC: jax.Array, patch_size: int) -> jax.Array:
  """Returns the patches in raster order, each as its (row, column, channel) values: (B, N, p p C)."""
  batch, height, width, channels = images_BxHxWxC.shape
  p = patch_size
  x = images_BxHxWxC.reshape(batch, height // p, p, width // p, p, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)


METHOD = (MAEConfig, MAE)
