"""I-JEPA (arXiv 2301.08243): from the visible patches of an image, predict the features of hidden blocks.

B batch, N patches, K context patches, M target blocks, T patches of a block, D encoder width, S positions under SIGReg.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.models import PredictorConfig, check_divisible_by_patch, make_predictor
from jepa_jax.objectives.base import Aux, Network, vision_variables
from jepa_jax.streams import stream
from jepa_jax.views import (
  Masks,
  MaskSettings,
  MultiCropSettings,
  Pixels,
  example_keys,
  mask_shape,
  masks_grid,
  multi_crop,
  sample_masks,
  union_targets,
)

_SIGREG_POSITIONS = 8


@dataclasses.dataclass(frozen=True)
class IJEPAConfig:
  """Defaults are the official code's, where the method is concerned; what keeps it from collapsing can be switched off.

  Attributes:
    views: one global crop; the paper has scale (.3, 1) and neither flip nor colours.
    one_pass: predict the union of the blocks in one pass; otherwise each block is a sequence of its own.
    loss: of the predicted tokens against the targets.
    target: "ema" (a moving average of the encoder) or "online" (the encoder itself).
    ema: momentum at the first and after the last step, linear in between.
    stop_gradient: no gradient through the targets; only an "online" target can do without.
    target_norm: LayerNorm without affine on the targets.
    lam: weighs SIGReg of the online encoder's features of the whole image, (1 - lam) prediction + lam SIGReg, in place
      of the moving average; 0 is off.
    sigreg_on: its samples are the images' "pooled" features, or "tokens": at each of 8 positions, the batch's tokens.
  """

  views: MultiCropSettings
  masks: MaskSettings
  predictor: PredictorConfig
  name: Literal["ijepa"] = "ijepa"
  one_pass: bool = False
  loss: Literal["smooth_l1", "l1", "l2"] = "smooth_l1"
  target: Literal["ema", "online"] = "ema"
  ema: tuple[float, float] = (0.996, 1.0)
  stop_gradient: bool = True
  target_norm: bool = True
  lam: float = 0.0
  sigreg_on: Literal["pooled", "tokens"] = "pooled"
  num_slices: int = 256

  def __post_init__(self):
    check_choices(self)
    check_one_crop(self.views)
    if self.name == "ijepa" and self.predictor.conditioning != "none":
      raise ValueError(f"predictor.conditioning={self.predictor.conditioning!r} needs actions: set name='iwm'")
    if not all(0 <= m <= 1 for m in self.ema):
      raise ValueError(f"ema={self.ema} are momenta in [0, 1]: at the first and after the last step")
    if self.target == "ema" and not self.stop_gradient:
      raise ValueError("stop_gradient=False needs target='online': a moving average has no gradient to give")
    if not 0 <= self.lam < 1:
      raise ValueError(f"lam={self.lam} must lie in [0, 1): loss = (1 - lam) prediction + lam SIGReg")
    if self.lam and self.target == "ema":
      raise ValueError(f"lam={self.lam}: SIGReg stands in place of the moving average; set target='online' with it")


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


class IJEPA:
  """The objective of `IJEPAConfig`, on a ViT."""

  lr_scales: Mapping[str, float] = {}

  def __init__(self, cfg: IJEPAConfig, encoder: Any, pixels: Pixels):
    if not hasattr(encoder, "patch_size"):
      raise ValueError(f'{cfg.name} masks patches: set encoder.name="vit"')
    self.cfg, self.encoder, self.pixels, self.interpolation = cfg, encoder, pixels, cfg.views.interpolation
    self.predictor = make_predictor(cfg.predictor, encoder)
    size_px = cfg.views.global_crops.size_px
    check_divisible_by_patch("views.global_crops.size_px", size_px, encoder.patch_size)
    self.grid_hw = (size_px // encoder.patch_size,) * 2
    self.num_patches = self.grid_hw[0] * self.grid_hw[1]
    # A ValueError says what does not fit, before anything is compiled.
    self.num_context, _, _ = mask_shape(self.grid_hw, cfg.masks)
    self.rules = {"encoder": encoder.rules} | ({"predictor": self.predictor.rules} if cfg.predictor.depth else {})
    self.references: Mapping[str, float] = {"cosine": 1.0}  # of predictions and targets
    self.references |= {"sigreg": losses.expected_under_gaussian()} if cfg.lam else {}
    start, end = cfg.ema
    self.averaged = ("encoder",) if cfg.target == "ema" else ()  # nothing reads an average of the predictor
    self.ema_schedule = (lambda progress: start + (end - start) * progress) if cfg.target == "ema" else None

  def init(self, key, batch):
    views = self.views(example_keys(stream(key, "views"), jnp.arange(len(batch["label"]))), batch)
    masks = views.masks
    images, encoder_key = views.images_BxHxWxC, stream(key, "encoder")
    out, encoder = self.encoder.init_with_output(encoder_key, images, keep_BxK=masks.context_BxK)
    params = {"encoder": encoder["params"]}
    if self.cfg.predictor.depth:
      args = (out.tokens_BxNxD, masks.context_BxK, masks.targets_BxMxT, masks.valid_BxMxT)
      kwargs = dict(grid_hw=self.grid_hw, action_BxA=views.action_BxA)
      params["predictor"] = self.predictor.init(stream(key, "predictor"), *args, **kwargs)["params"]
    return params, {}

  def views(self, keys_B, batch) -> MaskedViews:
    images = multi_crop(keys_B, batch, self.cfg.views, self.pixels).groups[0][:, 0]
    return MaskedViews(images, self.masks(keys_B))

  def masks(self, keys_B):
    """Returns the Masks of a batch; each example's depend on its own key only."""
    masks = sample_masks(jax.vmap(lambda key: stream(key, "masks"))(keys_B), self.grid_hw, self.cfg.masks)
    return union_targets(masks, self.num_patches) if self.cfg.one_pass else masks

  def whole(self, batch: int) -> Masks:
    """Returns the masks with which all patches are seen and all are predicted."""
    places_BxN = jnp.broadcast_to(jnp.arange(self.num_patches, dtype=jnp.int32), (batch, self.num_patches))
    return Masks(places_BxN, places_BxN[:, None], jnp.ones((batch, 1, self.num_patches), bool))

  def encode(self, params, state, target, views: MaskedViews, keys_B):
    """Returns each example's loss, metrics and pooled features: all that is kept of it."""
    images, masks, cfg = views.images_BxHxWxC, views.masks, self.cfg
    random = {"keys_B": keys_B} if getattr(self.encoder, "drop_path", 0) else {}
    source = images if views.source_BxHxWxC is None else views.source_BxHxWxC
    context = self.encoder.apply(
      {"params": params["encoder"]}, source, train=True, keep_BxK=masks.context_BxK, **random
    )
    whole = self.encoder.apply({"params": (target or params)["encoder"]}, images)
    prediction_BxMxTxD = self.predict(params, context.tokens_BxNxD, masks, views.action_BxA)
    target_BxNxD = self.targets(whole.tokens_BxNxD)
    target_BxMxTxD = gather_patches(target_BxNxD, masks.targets_BxMxT)
    if cfg.stop_gradient:
      target_BxMxTxD = jax.lax.stop_gradient(target_BxMxTxD)
    pair = jnp.stack([pool_targets(x, masks.valid_BxMxT) for x in (prediction_BxMxTxD, target_BxMxTxD)], axis=1)
    encoded = {
      "loss_B": losses.prediction_loss(prediction_BxMxTxD, target_BxMxTxD, masks.valid_BxMxT, cfg.loss),
      "cosine_B": losses.block_mean(losses.cosine(prediction_BxMxTxD, target_BxMxTxD), masks.valid_BxMxT),
      "token_std_B": target_BxNxD.std(axis=1).mean(-1),
      "pair_Bx2xD": pair,
      "pooled_BxD": whole.pooled_BxD,
      "probe_BxF": whole.probe_BxF,
    }
    if cfg.lam and cfg.sigreg_on == "tokens":
      at_S = jnp.linspace(0, whole.tokens_BxNxD.shape[1] - 1, _SIGREG_POSITIONS).astype(jnp.int32)
      encoded["tokens_BxSxD"] = whole.tokens_BxNxD[:, at_S]
    return encoded, state

  def targets(self, tokens_BxNxD):
    """Returns the targets that tokens of the target encoder stand for."""
    return losses.normalise_targets(tokens_BxNxD) if self.cfg.target_norm else tokens_BxNxD

  def predict(self, params, context_BxKxD, masks, action_BxA=None, extra_BxXxP=None):
    """Returns the predicted tokens (B, M, T, D) of the targets, after the action where the predictor takes one."""
    places = (masks.context_BxK, masks.targets_BxMxT, masks.valid_BxMxT)
    kwargs = dict(grid_hw=self.grid_hw, action_BxA=action_BxA, extra_BxXxP=extra_BxXxP)
    return self.predictor.apply({"params": params.get("predictor", {})}, context_BxKxD, *places, **kwargs)

  def loss(self, params, state, target, encoded, key, progress):
    del params, target, progress
    loss, cfg = encoded["loss_B"].mean(), self.cfg
    metrics = {
      "prediction_loss": loss,
      "cosine": encoded["cosine_B"].mean(),
      "token_std": encoded["token_std_B"].mean(),
      "context_ratio": jnp.float32(self.num_context / self.num_patches),
    }
    if cfg.lam:
      z = encoded["pooled_BxD"] if cfg.sigreg_on == "pooled" else encoded["tokens_BxSxD"].swapaxes(0, 1)
      metrics["sigreg"] = losses.sigreg(z, key, cfg.num_slices)
      loss = (1 - cfg.lam) * loss + cfg.lam * metrics["sigreg"]
    aux = Aux(metrics, encoded["probe_BxF"][:, None], encoded["pooled_BxD"], encoded["pair_Bx2xD"])
    return loss, (aux, state)

  def draw(self, views: MaskedViews, batch):
    num, source = len(batch["canvas"]), views.source_BxHxWxC
    return masks_grid(views.images_BxHxWxC, views.masks, self.encoder.patch_size, self.pixels, num, source)

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


METHOD = (IJEPAConfig, IJEPA)
