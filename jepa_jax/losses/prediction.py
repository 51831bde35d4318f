"""Losses of a joint-embedding prediction: predicted against target tokens (I-JEPA, arXiv 2301.08243; IWM, 2403.00504).

Legend: B images, M target blocks, T patches of a block (padded), D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PREDICTION_LOSSES = ("smooth_l1", "l1", "l2")
TARGET_NORM_EPSILON = 1e-5


def normalise_targets(h: jax.Array) -> jax.Array:
  """Returns LayerNorm without affine of the last axis, eps 1e-5, float32: what I-JEPA's code predicts."""
  return jax.nn.standardize(h.astype(jnp.float32), axis=-1, epsilon=TARGET_NORM_EPSILON)


def prediction_error(prediction: jax.Array, target: jax.Array, kind: str = "smooth_l1") -> jax.Array:
  """Returns the error of every number, float32: smooth-L1 (d^2 / 2, from |d| = 1 on |d| - 1/2), |d| or d^2."""
  if kind not in PREDICTION_LOSSES:
    raise ValueError(f"prediction loss {kind!r}: choose one of {', '.join(PREDICTION_LOSSES)}")
  d = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
  if kind == "smooth_l1":
    return jnp.where(d < 1, 0.5 * d * d, d - 0.5)
  return d if kind == "l1" else d * d


def block_mean(x_BxMxT: jax.Array, valid_BxMxT: jax.Array) -> jax.Array:
  """Returns (B,), the mean over the blocks of each block's mean over its valid patches.

  The official mean over everything has blocks of one size in a batch, so every block counts alike there, too.
  """
  count_BxM = jnp.maximum(valid_BxMxT.sum(-1), 1)
  return (jnp.where(valid_BxMxT, x_BxMxT, 0).sum(-1) / count_BxM).mean(-1)


def prediction_loss(
  prediction_BxMxTxD: jax.Array, target_BxMxTxD: jax.Array, valid_BxMxT: jax.Array, kind: str = "smooth_l1"
) -> jax.Array:
  """Returns each image's loss (B,), float32; the loss of a batch is its mean (I-JEPA's code; its paper has L2)."""
  return block_mean(prediction_error(prediction_BxMxTxD, target_BxMxTxD, kind).mean(-1), valid_BxMxT)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the cosine along the last axis, 0 where one of them is 0."""
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / jnp.maximum(norms, 1e-12)
