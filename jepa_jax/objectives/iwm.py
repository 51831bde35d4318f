"""Image World Models (arXiv 2403.00504): I-JEPA whose predictor is told what to do with the colours, the action.

B batch, N patches, K pictures of a bank, D encoder width, A numbers of an action, H W C image.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jepa_jax.models import PredictorConfig
from jepa_jax.objectives.ijepa import IJEPA, IJEPAConfig
from jepa_jax.objectives.masked import MaskedViews
from jepa_jax.views import (
  ColorParams,
  ColorSettings,
  apply_color,
  has_actions,
  normalize,
  paired_views,
)


@dataclasses.dataclass(frozen=True)
class IWMConfig(IJEPAConfig):
  """The fields of I-JEPA, with the paper's defaults where they differ, and how the source view is made.

  Attributes:
    views: one crop with its flip; `color` is the target's jitter.
    source: the source's colours: further jitter, and what destroys: grayscale, blur, solarise.
    source_from: the source's colours come on top of the target's ("target") or on the crop itself ("image"). The paper
      does not say. On top of the target, the predictor learns to undo just what `source` did; on the crop, also to do
      what the target's jitter did.
    predict: "masked", the patches that are dropped from the source, as the paper has it, or "all": also those that it
      shows, which are asked for whenever the whole image goes in, for MRR and for a reused predictor.
    one_pass: True, the union of the blocks is predicted in one pass.
    loss: "l2", the squared distance.
    target_norm: LayerNorm without affine on the targets; the paper does not say, I-JEPA has it.
  """

  source: ColorSettings = ColorSettings()
  predictor: PredictorConfig = PredictorConfig(depth=18, conditioning="feature")
  name: Literal["iwm"] = "iwm"  # type: ignore[assignment]
  source_from: Literal["target", "image"] = "target"
  predict: Literal["masked", "all"] = "masked"
  one_pass: bool = True
  loss: Literal["smooth_l1", "l1", "l2"] = "l2"

  def __post_init__(self):
    super().__post_init__()
    if not self.predictor.depth:
      raise ValueError("predictor.depth=0 is no world model: set it to 1 or more")
    if self.predictor.conditioning != "none" and not has_actions(self.views.color, self.source, self.source_from):
      raise ValueError(
        f"predictor.conditioning={self.predictor.conditioning!r}, but no augmentation makes source and target differ: "
        "set the jitter (p and strengths), grayscale_p, blur_p or solarize_p of `source`, or conditioning='none'"
      )


class IWM(IJEPA):
  """The objective of `IWMConfig`, on a ViT."""

  cfg: IWMConfig

  def views(self, keys_B, batch) -> MaskedViews:
    cfg = self.cfg
    source, target, action_BxA = paired_views(keys_B, batch, cfg.views, self.pixels, cfg.source, cfg.source_from)
    return MaskedViews(target, self.masks(keys_B), source, action_BxA)

  def masks(self, keys_B):
    masks = super().masks(keys_B)
    if self.cfg.predict == "all":
      masks = dataclasses.replace(self.whole(len(keys_B)), context_BxK=masks.context_BxK)
    return masks

  def to_pixels(self, images_BxHxWxC):
    """Returns normalised images as channel-first values in [0, 1], as colour operations take them."""
    mean, std = (jnp.asarray(v, jnp.float32) for v in self.pixels)
    return jnp.moveaxis(jnp.clip(images_BxHxWxC * std + mean, 0, 1), -1, 1)

  def encode_pixels(self, encoder, pixels_BxCxHxW, **keep):
    """Returns the tokens (B, N, D) of images as `to_pixels` gives them, through these parameters of the encoder."""
    images = normalize(jnp.moveaxis(pixels_BxCxHxW, 1, -1), self.pixels)
    return self.encoder.apply({"params": encoder}, images, **keep).tokens_BxNxD

  def encode_bank(self, encoder, pixels_CxHxW, colors_K: ColorParams, settings: ColorSettings, chunk: int):
    """Returns one image with each of these colours, drawn under `settings`, as targets (K, N, D), `chunk` at a time."""

    def encode(colors):
      picture = apply_color(pixels_CxHxW, colors, settings)
      return self.targets(self.encode_pixels(encoder, picture[None]))[0]

    return jax.lax.map(encode, colors_K, batch_size=chunk)

  def imagine(self, params, context_NxD, actions_KxA):
    """Returns what the predictor expects of one image, whose tokens these are, after each action: (K, N, D)."""
    context_KxNxD = jnp.broadcast_to(context_NxD, (len(actions_KxA), *context_NxD.shape))
    return self.predict(params, context_KxNxD, self.whole(len(actions_KxA)), actions_KxA)[:, 0]


METHOD = (IWMConfig, IWM)
