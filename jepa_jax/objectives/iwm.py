"""Image World Models (arXiv 2403.00504): I-JEPA whose predictor is told what to do with the colours, the action.

B batch, N patches, K pictures of a bank, D encoder width, A numbers of an action, H W C image.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jepa_jax import losses
from jepa_jax.models import PredictorConfig
from jepa_jax.objectives.ijepa import IJEPA, IJEPAConfig, MaskedViews
from jepa_jax.views import (
  ColorParams,
  ColorSettings,
  action,
  apply_color,
  has_actions,
  no_color,
  normalize,
  paired_views,
  sample_color,
)

_BANK_STREAM = 2  # folded into an example's key, away from those of its crop and masks
# Always applied, or a fifth of a bank would be equal pictures; in one order, so that the action says all that was done.
PAPER_JITTER = ColorSettings(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=1.0, order="fixed")
ANY_SOURCE = ColorSettings(grayscale_p=0.5, blur_p=(0.5,), solarize_p=(0.5,))  # compiles what can destroy a source
ONLINE_IMAGES, ONLINE_BANK = 8, 16


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

  def __init__(self, cfg: IWMConfig, encoder: Any):
    super().__init__(cfg, encoder)
    self.references = {**self.references, "mrr": losses.blind_mrr(ONLINE_BANK)}

  def views(self, keys_B, batch) -> MaskedViews:
    source, target, action_BxA = paired_views(keys_B, batch, self.cfg.views, self.cfg.source, self.cfg.source_from)
    return MaskedViews(target, self.masks(keys_B), source, action_BxA)

  def masks(self, keys_B):
    masks = super().masks(keys_B)
    if self.cfg.predict == "all":
      masks = dataclasses.replace(self.whole(len(keys_B)), context_BxK=masks.context_BxK)
    return masks

  def monitor(self, params, target, batch, keys_B):
    """Returns the mean reciprocal rank in a small bank, of the first images' crops: to watch, not to report."""
    first = jax.tree.map(lambda x: x[:ONLINE_IMAGES], batch)
    plain = dataclasses.replace(self.cfg.views, color=ColorSettings())
    _, crops, _ = paired_views(keys_B[:ONLINE_IMAGES], first, plain, ColorSettings())
    clean, sizes = no_color((len(crops), 1)), dict(num_bank=ONLINE_BANK, chunk=ONLINE_BANK)
    ranks = self.reciprocal_ranks(params, target, self.pixels(crops), keys_B[:ONLINE_IMAGES], clean, **sizes)
    return {"mrr": ranks.mean()}

  def pixels(self, images_BxHxWxC):
    """Returns normalised images as channel-first values in [0, 1], as colour operations take them."""
    mean, std = (jnp.asarray(v, jnp.float32) for v in (self.cfg.views.mean, self.cfg.views.std))
    return jnp.moveaxis(jnp.clip(images_BxHxWxC * std + mean, 0, 1), -1, 1)

  def encode_pixels(self, encoder, pixels_BxCxHxW, **keep):
    """Returns the tokens (B, N, D) of images as `pixels` gives them, through these parameters of the encoder."""
    views = self.cfg.views
    images = normalize(jnp.moveaxis(pixels_BxCxHxW, 1, -1), views.mean, views.std)
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

  def reciprocal_ranks(
    self,
    params,
    target,
    pixels_BxCxHxW,
    keys_B,
    sources_BxS: ColorParams,
    *,
    num_bank: int,
    chunk: int,
    jitter: ColorSettings = PAPER_JITTER,
    distance: str = "l2",
  ):
    """Returns (B, S, K): 1 / rank of each picture of an image's bank by its distance from the one that was imagined.

    The bank of an image: K = num_bank draws of `jitter` of it, through the target encoder. The image itself, with
    the colours of each of S sources, goes whole through the encoder, and the predictor is asked for all patches after
    each action that leads to one of the bank. `chunk` pictures go through the networks at a time; what is kept is the
    bank's tokens.
    """
    online, average = params["encoder"], (target or params)["encoder"]
    valid_N = jnp.ones(self.num_patches)

    def one(pixels_CxHxW, key, sources_S):
      keys_K = jax.random.split(jax.random.fold_in(key, _BANK_STREAM), num_bank)
      colors_K = jax.vmap(lambda k: sample_color(k, jitter))(keys_K)
      bank_KxNxD = self.encode_bank(average, pixels_CxHxW, colors_K, jitter, chunk)
      pictures = jax.vmap(lambda s: apply_color(pixels_CxHxW, s, ANY_SOURCE))(sources_S)
      context_SxNxD = self.encode_pixels(online, pictures)

      def rank_source(row):
        context_NxD, of_source = row

        def rank(row):
          colors, truth = row
          imagined_1xNxD = self.imagine(params, context_NxD, action(of_source, colors)[None])
          distance_1xK = losses.distances(imagined_1xNxD, bank_KxNxD, valid_N, distance)
          return losses.reciprocal_ranks(distance_1xK, truth[None])[0]

        return jax.lax.map(rank, (colors_K, jnp.arange(num_bank)), batch_size=chunk)

      return jax.lax.map(rank_source, (context_SxNxD, sources_S))

    return jax.vmap(one)(pixels_BxCxHxW, keys_B, sources_BxS)
