"""MMCR on pairs (arXiv 2406.09366): the centroids of an image and its captions fill the sphere. No temperature.

B batch, C captions, D width of an embedding.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.objectives.image_text import ImageText, ImageTextConfig


@dataclasses.dataclass(frozen=True)
class MMCRPairsConfig(ImageTextConfig):
  """`weights`: a centroid is half the image and half the mean of its captions ("towers"), or the mean of all 1 + C
  views ("views"); the same with one caption. The paper does not say. `reduction` and `nuclear` as of MMCR; the
  gradient of one pair shrinks with the batch for "bound" only, as CLIP's does."""

  name: Literal["mmcr_pairs"] = "mmcr_pairs"
  weights: Literal["towers", "views"] = "towers"
  reduction: Literal["sum", "bound"] = "bound"
  nuclear: Literal["auto", "svd", "newton_schulz", "qdwh"] = "auto"

  def __post_init__(self):
    super().__post_init__()
    check_choices(self)


class MMCRPairs(ImageText):
  """The objective of `MMCRPairsConfig`."""

  def pair_loss(self, params, image_BxD, text_BxCxD):
    del params
    views_BxKxD = jnp.concatenate([image_BxD[:, None], text_BxCxD], axis=1)
    num_captions = text_BxCxD.shape[1]
    weights = None
    if self.cfg.weights == "towers" and num_captions > 1:
      weights = (0.5, *(0.5 / num_captions,) * num_captions)
    loss, terms = losses.mmcr(views_BxKxD, reduction=self.cfg.reduction, method=self.cfg.nuclear, weights=weights)
    terms |= losses.pair_geometry(image_BxD, text_BxCxD) | losses.pair_recalls(image_BxD, text_BxCxD)
    return loss, terms


METHOD = (MMCRPairsConfig, MMCRPairs)
