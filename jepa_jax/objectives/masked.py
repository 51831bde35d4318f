"""What methods share that see some patches of an image and predict the others: masks, a ViT, a predictor.

B batch, N patches, K context patches, M target blocks, T patches of a block, D encoder width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax.models import check_divisible_by_patch, make_predictor
from jepa_jax.objectives.base import Network, vision_variables
from jepa_jax.streams import stream
from jepa_jax.views import (
  Drawn,
  Masks,
  MaskSettings,
  MultiCropSettings,
  Pixels,
  example_keys,
  mask_shape,
  masks_grid,
  masks_titles,
  multi_crop,
  sample_masks,
)


def check_one_crop(views: MultiCropSettings) -> None:
  """Raises a ValueError unless the views are one crop of each image."""
  if views.num_views != 1:
    raise ValueError(f"views has {views.num_views} views of an image: masked prediction takes one; set views to 1 crop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedViews:
  """Images (B, H, W, C), normalised, of which features are the targets, and their masks.

  The context is taken from source_BxHxWxC where there is one (IWM), which action_BxA leads from; else from the images.
  """

  images_BxHxWxC: jax.Array
  masks: Any
  source_BxHxWxC: jax.Array | None = None
  action_BxA: jax.Array | None = None


def check_masks_patches(cfg: Any, encoder: Any) -> None:
  """Raises a ValueError unless the encoder has patches that can be left out."""
  if not hasattr(encoder, "drops_patches"):
    raise ValueError(f'{cfg.name} masks patches: set encoder.name="vit"')


class MaskedImages:
  """Views, masks, encoder and predictor; a method adds what is predicted and its loss.

  cfg has `views` and `predictor`. See `objectives.base.Objective` for what is returned.
  """

  lr_scales: Mapping[str, float] = {}
  references: Mapping[str, float] = {}
  averaged: tuple[str, ...] = ()
  ema_schedule: Callable[[jax.Array], jax.Array] | None = None

  def __init__(self, cfg: Any, encoder: Any, pixels: Pixels, masks: MaskSettings, answer_width: int = 0):
    """answer_width: of what is predicted of a patch; 0: the encoder's."""
    check_masks_patches(cfg, encoder)
    self.answer_width = answer_width or encoder.width
    self.cfg, self.encoder, self.pixels, self.interpolation = cfg, encoder, pixels, cfg.views.interpolation
    self.predictor = make_predictor(cfg.predictor, encoder, self.answer_width)
    height_px, width_px = cfg.views.global_crops.size_hw
    check_divisible_by_patch("views.global_crops.size_px", height_px, encoder.patch_size)
    check_divisible_by_patch("views.global_crops.width_px", width_px, encoder.patch_size)
    self.grid_hw = (height_px // encoder.patch_size, width_px // encoder.patch_size)
    self.num_patches = self.grid_hw[0] * self.grid_hw[1]
    # A ValueError says what does not fit, before anything is compiled.
    self.mask_settings = masks
    self.num_context, _, _ = mask_shape(self.grid_hw, masks)
    self.rules = {"encoder": encoder.rules} | ({"predictor": self.predictor.rules} if cfg.predictor.depth else {})

  def init(self, key, batch):
    views = self.views(example_keys(stream(key, "views"), jnp.arange(len(batch["label"]))), batch)
    masks = views.masks
    images, encoder_key = views.images_BxHxWxC, stream(key, "encoder")
    out, encoder = self.encoder.init_with_output(encoder_key, images, keep_BxK=masks.context_BxK)
    params = {"encoder": encoder["params"]}
    if self.cfg.predictor.depth:
      args = (self.context(out), masks.context_BxK, masks.targets_BxMxT, masks.valid_BxMxT)
      kwargs = dict(grid_hw=self.grid_hw, action_BxA=views.action_BxA)
      params["predictor"] = self.predictor.init(stream(key, "predictor"), *args, **kwargs)["params"]
    return params, {}

  def views(self, keys_B, batch) -> MaskedViews:
    images = multi_crop(keys_B, batch, self.cfg.views, self.pixels).groups[0][:, 0]
    return MaskedViews(images, self.masks(keys_B))

  def masks(self, keys_B):
    """Returns the Masks of a batch; each example's depend on its own key only."""
    return sample_masks(jax.vmap(lambda key: stream(key, "masks"))(keys_B), self.grid_hw, self.mask_settings)

  def whole(self, batch: int) -> Masks:
    """Returns the masks with which all patches are seen and all are predicted."""
    places_BxN = jnp.broadcast_to(jnp.arange(self.num_patches, dtype=jnp.int32), (batch, self.num_patches))
    return Masks(places_BxN, places_BxN[:, None], jnp.ones((batch, 1, self.num_patches), bool))

  def context(self, seen) -> jax.Array:
    """Returns what the predictor reads of an encoder's output, (B, K, D)."""
    return seen.tokens_BxNxD

  def predict(self, params, context_BxKxD, masks, action_BxA=None, extra_BxXxP=None):
    """Returns the predicted tokens (B, M, T, D) of the targets, after the action where the predictor takes one."""
    places = (masks.context_BxK, masks.targets_BxMxT, masks.valid_BxMxT)
    kwargs = dict(grid_hw=self.grid_hw, action_BxA=action_BxA, extra_BxXxP=extra_BxXxP)
    return self.predictor.apply({"params": params.get("predictor", {})}, context_BxKxD, *places, **kwargs)

  def draw(self, views: MaskedViews, batch):
    num, source = len(batch["canvas"]), views.source_BxHxWxC
    grid = masks_grid(views.images_BxHxWxC, views.masks, self.encoder.patch_size, self.pixels, num, source)
    return Drawn(grid, masks_titles(views.masks, source is not None))

  def networks(self):
    return {"image": Network(self.encoder.apply)}

  def variables(self, params, state, target):
    return {"image": vision_variables("encoder", target or params, state)}


def gather_patches(x_BxNxD: jax.Array, places_BxMxT: jax.Array) -> jax.Array:
  """Returns the tokens at these places, (B, M, T, D)."""
  return jax.vmap(lambda x_NxD, places_MxT: x_NxD[places_MxT])(x_BxNxD, places_BxMxT)


def pool_targets(x_BxMxTxD: jax.Array, valid_BxMxT: jax.Array) -> jax.Array:
  """Returns the mean of the valid tokens, (B, D)."""
  weight_BxMxT = valid_BxMxT / valid_BxMxT.sum(axis=(1, 2), keepdims=True)
  return jnp.einsum("bmtd,bmt->bd", x_BxMxTxD, weight_BxMxT.astype(x_BxMxTxD.dtype))
