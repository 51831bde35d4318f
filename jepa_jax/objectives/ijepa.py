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
from jepa_jax.models import PredictorConfig
from jepa_jax.objectives.base import Aux
from jepa_jax.objectives.masked import MaskedImages, MaskedViews, check_one_crop, gather_patches, pool_targets
from jepa_jax.views import MaskSettings, MultiCropSettings, Pixels, union_targets

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


class IJEPA(MaskedImages):
  """The objective of `IJEPAConfig`, on a ViT."""

  def __init__(self, cfg: IJEPAConfig, encoder: Any, pixels: Pixels):
    super().__init__(cfg, encoder, pixels, cfg.masks)
    self.references: Mapping[str, float] = {"cosine": 1.0}  # of predictions and targets
    self.references |= {"sigreg": losses.expected_under_gaussian()} if cfg.lam else {}
    start, end = cfg.ema
    self.averaged = ("encoder",) if cfg.target == "ema" else ()  # nothing reads an average of the predictor
    self.ema_schedule = (lambda progress: start + (end - start) * progress) if cfg.target == "ema" else None

  def masks(self, keys_B):
    masks = super().masks(keys_B)
    return union_targets(masks, self.num_patches) if self.cfg.one_pass else masks

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

  def targets(self, tokens_BxNxD, images_BxHxWxC=None):
    """Returns the targets that tokens of the target encoder stand for; the images, normalised, are not looked at."""
    del images_BxHxWxC
    return losses.normalise_targets(tokens_BxNxD) if self.cfg.target_norm else tokens_BxNxD

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


METHOD = (IJEPAConfig, IJEPA)
