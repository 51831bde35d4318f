"""I-JEPA's predictor (arXiv 2301.08243): a narrow ViT that fills mask tokens from the context's tokens.

Legend: B images, K context patches, M target blocks, T patches of a block (padded), E encoder width, P predictor width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.models.interface import PredictorConfig, check_heads, resolve_dtype
from jepa_jax.models.position import sincos_position_embedding
from jepa_jax.models.transformer import MATRIX_INITS, Affine, apply_blocks, kernel_init, standardise
from jepa_jax.sharding import constrain


class Predictor(nn.Module):
  """Context tokens and the places of the targets -> the predicted target tokens (B, M, T, E), float32.

  Every target block is a sequence of its own, [context | mask tokens at the block's places]: blocks do not see one
  another. Padded places are seen by nobody; what is predicted there means nothing.
  """

  width: int
  depth: int
  num_heads: int
  out: int
  remat: bool = False
  dtype: Any = jnp.float32
  matrix_init: str = "normal"

  @nn.compact
  def __call__(
    self,
    context_BxKxE: jax.Array,
    context_BxK: jax.Array,
    targets_BxMxT: jax.Array,
    valid_BxMxT: jax.Array,
    grid_hw: tuple[int, int],
  ) -> jax.Array:
    """context_BxK and targets_BxMxT are places on the grid, in raster order."""
    if not self.depth:
      return jnp.broadcast_to(context_BxKxE.mean(1)[:, None, None], (*targets_BxMxT.shape, self.out))
    (batch, num_context), (_, num_blocks, num_targets) = context_BxK.shape, targets_BxMxT.shape
    position_NxP = jnp.asarray(sincos_position_embedding(grid_hw, self.width))
    dense = dict(dtype=self.dtype, kernel_init=MATRIX_INITS[self.matrix_init])
    mask_token = self.param("mask_token", kernel_init, (1, 1, self.width))

    x_BxKxP = nn.Dense(self.width, name="embed", **dense)(context_BxKxE) + position_NxP[context_BxK]
    x_BxMxKxP = jnp.broadcast_to(x_BxKxP[:, None], (batch, num_blocks, num_context, self.width))
    query_BxMxTxP = mask_token[0, 0] + position_NxP[targets_BxMxT]
    x = jnp.concatenate([x_BxMxKxP, query_BxMxTxP], axis=2).astype(self.dtype)
    x = constrain(x.reshape(batch * num_blocks, -1, self.width), "batch", None, None)
    seen = jnp.concatenate([jnp.ones((batch, num_blocks, num_context), bool), valid_BxMxT], axis=2)
    x, _ = apply_blocks(
      x,
      None,
      seen.reshape(batch * num_blocks, -1),
      depth=self.depth,
      scan=True,
      remat=self.remat,
      num_heads=self.num_heads,
      mlp_dim=4 * self.width,
      dtype=self.dtype,
      matrix_init=self.matrix_init,
    )
    x = Affine(name="norm")(standardise(x[:, num_context:]))
    out = nn.Dense(self.out, name="proj", **dense)(x).astype(jnp.float32)
    return constrain(out.reshape(batch, num_blocks, num_targets, self.out), "batch", None, None, None)


def make_predictor(cfg: PredictorConfig, encoder: Any) -> Predictor:
  """The predictor of these settings for a ViT; ValueError where its heads do not divide its width."""
  num_heads = cfg.num_heads or encoder.num_heads
  check_heads(cfg.width, num_heads, "the predictor's ")
  return Predictor(
    width=cfg.width,
    depth=cfg.depth,
    num_heads=num_heads,
    out=encoder.width,
    remat=cfg.remat == "block",
    dtype=resolve_dtype(cfg.compute_dtype),
    matrix_init=encoder.matrix_init,
  )
