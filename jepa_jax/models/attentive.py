"""The attentive head (V-JEPA, arXiv 2404.08471; IWM, 2403.00504): one learned query asks all tokens, then a class.

Legend: B images, N tokens, D width, C classes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.models.attention import CrossAttention
from jepa_jax.models.interface import check_heads, resolve_dtype
from jepa_jax.models.transformer import LAYER_NORM_EPSILON, MATRIX_INITS, MLP, Activation, kernel_init, layer_norm

_HEAD_WIDTH = 64  # of ViT-S, B and L alike
_INIT = "fan_in"  # the same start at every width, see MATRIX_INITS
_MLP_RATIO = 4


class AttentionPool(nn.Module):
  """Tokens (B, N, D) -> (B, D): one learned query asks all tokens, then an MLP (SigLIP, arXiv 2303.15343).

  q = CrossAttention(query, tokens); q + MLP(LayerNorm(q)).
  """

  num_heads: int
  mlp_dim: int
  dtype: Any
  matrix_init: str = "normal"
  activation: Activation = "gelu"
  norm_epsilon: float = LAYER_NORM_EPSILON

  @nn.compact
  def __call__(self, tokens_BxNxD: jax.Array) -> jax.Array:
    query_D = self.param("query", kernel_init, (tokens_BxNxD.shape[-1],))
    attention = CrossAttention(self.num_heads, self.dtype, MATRIX_INITS[self.matrix_init], name="attn")
    x_BxD = attention(query_D, tokens_BxNxD.astype(self.dtype))
    mlp = MLP(self.mlp_dim, self.dtype, self.matrix_init, activation=self.activation, name="mlp")
    return x_BxD + mlp(layer_norm("norm", self.dtype, self.norm_epsilon)(x_BxD)[:, None])[:, 0]


class AttentiveHead(nn.Module):
  """Tokens (B, N, D) -> logits (B, C), float32: a pre-norm block whose queries are one learned vector, norm, linear.

  q = query + CrossAttention(query, LayerNorm(tokens)); q = q + MLP(LayerNorm(q)); logits = Linear(LayerNorm(q)).
  """

  num_classes: int
  num_heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens_BxNxD: jax.Array | None) -> jax.Array:
    """ValueError where there are no tokens: the encoder has no positions."""
    if tokens_BxNxD is None:
      raise ValueError(
        "an attentive head needs the tokens of an encoder, and this one has none (an MLP): use a linear probe, or an "
        "encoder vit, convnet or resnet"
      )
    width = tokens_BxNxD.shape[-1]
    query_D = self.param("query", kernel_init, (width,))
    attention = CrossAttention(self.num_heads, self.dtype, MATRIX_INITS[_INIT], name="attn")
    x_BxD = query_D + attention(query_D, layer_norm("norm1", self.dtype)(tokens_BxNxD))
    x_BxD = x_BxD + MLP(_MLP_RATIO * width, self.dtype, _INIT, name="mlp")(layer_norm("norm2", self.dtype)(x_BxD))
    x_BxD = layer_norm("norm", jnp.float32)(x_BxD)
    return nn.Dense(self.num_classes, dtype=jnp.float32, kernel_init=kernel_init, name="classify")(x_BxD)


def make_attentive_head(width: int, num_classes: int, num_heads: int = 0, compute_dtype: str = "auto") -> AttentiveHead:
  """The head for tokens of this width; num_heads=0 makes heads of 64 numbers, or a little wider where 64 do not divide.

  ValueError where num_heads does not divide the width.
  """
  if not num_heads:
    num_heads = next(h for h in range(max(width // _HEAD_WIDTH, 1), 0, -1) if width % h == 0)
  check_heads(width, num_heads, "the attentive head's ")
  return AttentiveHead(num_classes, num_heads, resolve_dtype(compute_dtype))
