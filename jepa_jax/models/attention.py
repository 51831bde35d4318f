"""The one attention call of all networks: which implementation runs is decided here, and nowhere else.

What it costs is counted by `flops.matrix_flops`, also where a fused kernel hides its products (`flops.KERNELS`).
Legend: B sequences, N queries, M keys, D width, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.sharding import constrain


def attend(
  q_BxNxHxK: jax.Array, k_BxMxHxK: jax.Array, v_BxMxHxK: jax.Array, valid_BxM: jax.Array | None = None
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(K)) v, (B, N, H, K), softmax in float32; keys that are not valid are not seen."""
  mask = None if valid_BxM is None else valid_BxM[:, None, None, :]
  return jax.nn.dot_product_attention(q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, mask=mask)


class Attention(nn.Module):
  """Multi-head self-attention; one linear layer for q, k, v (kernel (D, 3, H, K))."""

  num_heads: int
  dtype: Any
  kernel_init: Any

  @nn.compact
  def __call__(self, x_BxNxD: jax.Array, valid_BxN: jax.Array | None = None) -> jax.Array:
    width = x_BxNxD.shape[-1]
    # A kernel with an axis of its own for the heads can be split over them; a (D, 3D) one would be cut through q, k, v.
    dense = dict(dtype=self.dtype, kernel_init=self.kernel_init)
    qkv = nn.DenseGeneral((3, self.num_heads, width // self.num_heads), name="qkv", **dense)(x_BxNxD)
    qkv_BxNx3xHxK = constrain(qkv, "batch", None, None, "heads", None)
    out_BxNxHxK = attend(*(qkv_BxNx3xHxK[:, :, i] for i in range(3)), valid_BxN)
    return nn.DenseGeneral(width, axis=(-2, -1), name="proj", **dense)(out_BxNxHxK)


class CrossAttention(nn.Module):
  """One query (D,) over tokens (B, M, D) -> (B, D)."""

  num_heads: int
  dtype: Any
  kernel_init: Any

  @nn.compact
  def __call__(self, query_D: jax.Array, x_BxMxD: jax.Array) -> jax.Array:
    batch, _, width = x_BxMxD.shape
    dense = dict(dtype=self.dtype, kernel_init=self.kernel_init)
    heads = (self.num_heads, width // self.num_heads)
    q_HxK = nn.DenseGeneral(heads, name="q", **dense)(query_D)
    kv_BxMx2xHxK = nn.DenseGeneral((2, *heads), name="kv", **dense)(x_BxMxD)
    q_Bx1xHxK = jnp.broadcast_to(q_HxK, (batch, 1, *heads))
    out_Bx1xHxK = attend(q_Bx1xHxK, kv_BxMx2xHxK[:, :, 0], kv_BxMx2xHxK[:, :, 1])
    return nn.DenseGeneral(width, axis=(-2, -1), name="proj", **dense)(out_Bx1xHxK[:, 0])
