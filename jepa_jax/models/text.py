"""A transformer for texts: ids of tokens in, one vector per text out.

Legend: B texts, L tokens of a text, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.choices import check_choices
from jepa_jax.models.attention import AttentionKind
from jepa_jax.models.interface import (
  BIASES_AND_SCALES,
  Dtype,
  EncoderOutput,
  check_heads,
  require_at_least,
  resolve_dtype,
)
from jepa_jax.models.linear import WeightGrads
from jepa_jax.models.recompute import Remat
from jepa_jax.models.transformer import (
  BLOCK_RULES,
  LAYER_NORM_EPSILON,
  Activation,
  Affine,
  MatrixInit,
  apply_blocks,
  draw_branch_scales,
  standardise,
)
from jepa_jax.models.vit import ViTSize
from jepa_jax.sharding import Rule, constrain


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Settings of the text tower; vocabulary and length are those of data.captions.

  Attributes:
    width, depth, num_heads, mlp_dim: as of a ViT; mlp_dim 0 is four times the width.
    pool: "eos": attention looks back only, and the last token, the end of the text, is the output (CLIP); "mean":
      attention looks both ways, and the output is the mean over the text's tokens; "last": both ways over the whole
      length, what follows the text included, and the output is the last place (SigLIP).
    pad_id: with "last" the id that stands after a text.
    norm_epsilon: of every LayerNorm.
    drop_path, init, scan, remat, attention, weight_grads, compute_dtype: as of a ViT.
    activation: of the MLPs.
  """

  width: int = 256
  depth: int = 4
  num_heads: int = 4
  mlp_dim: int = 0
  pool: Literal["eos", "mean", "last"] = "eos"
  pad_id: int = 1
  norm_epsilon: float = LAYER_NORM_EPSILON
  drop_path: float = 0.0
  init: MatrixInit = "normal"
  activation: Activation = "gelu"
  scan: bool = True
  remat: Remat = "matmuls"
  attention: AttentionKind = "auto"
  weight_grads: WeightGrads = "float32"
  compute_dtype: Dtype = "auto"

  def __post_init__(self):
    check_choices(self)
    for name in ("width", "depth", "num_heads"):
      require_at_least(name, getattr(self, name), 1)
    check_heads(self.width, self.num_heads)
    require_at_least("mlp_dim", self.mlp_dim, 0)
    if not 0 < self.norm_epsilon < 1 or self.pad_id < 0:
      raise ValueError(f"norm_epsilon={self.norm_epsilon} lies between 0 and 1, and pad_id={self.pad_id} is an id")
    if not 0.0 <= self.drop_path < 1.0:
      raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")

  @property
  def size(self) -> ViTSize:
    """Width, depth, heads and hidden width of the MLPs."""
    return ViTSize(self.width, self.depth, self.num_heads, self.mlp_dim or 4 * self.width)

  def make(self, vocab_size: int, length: int) -> TextTransformer:
    """Returns the network for ids below vocab_size and texts of `length` tokens at most."""
    return TextTransformer(
      vocab_size=vocab_size,
      length=length,
      **self.size._asdict(),
      pool=self.pool,
      pad_id=self.pad_id,
      norm_epsilon=self.norm_epsilon,
      drop_path=self.drop_path,
      activation=self.activation,
      scan=self.scan,
      remat=self.remat,
      attention=self.attention,
      weight_grads=self.weight_grads,
      dtype=resolve_dtype(self.compute_dtype),
      matrix_init=self.init,
    )


class TextTransformer(nn.Module):
  """ids int32 (B, L), -1 after the end of a text -> EncoderOutput; `pooled` is zero for a row that holds no text.

  The end is found by the padding, not by its id: vocabularies differ in what they pad with and in which id is largest.
  """

  rules = (
    *BLOCK_RULES,
    Rule(r"^token_embed$", (None, "embed")),  # embeddings decay in no recipe of the papers
    Rule(r"^pos_embed$"),
    BIASES_AND_SCALES,
  )

  vocab_size: int
  length: int
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  pool: str = "eos"
  pad_id: int = 1
  norm_epsilon: float = LAYER_NORM_EPSILON
  drop_path: float = 0.0
  activation: Activation = "gelu"
  scan: bool = True
  remat: Remat = "matmuls"
  attention: AttentionKind = "auto"
  weight_grads: WeightGrads = "float32"
  dtype: Any = jnp.float32
  matrix_init: str = "normal"

  @nn.compact
  def __call__(self, ids_BxL: jax.Array, train: bool = False, keys_B: jax.Array | None = None) -> EncoderOutput:
    if ids_BxL.ndim != 2 or ids_BxL.shape[1] > self.length:
      raise ValueError(f"texts are ids (B, L) with L up to {self.length}, not {ids_BxL.shape}")
    embed = self.param("token_embed", nn.initializers.normal(0.02), (self.vocab_size, self.width))
    position = self.param("pos_embed", nn.initializers.normal(0.01), (self.length, self.width))
    num_B = (ids_BxL >= 0).sum(1)
    x = embed[jnp.where(ids_BxL < 0, self.pad_id if self.pool == "last" else 0, ids_BxL)]
    x = x + position[: ids_BxL.shape[1]]
    x = constrain(x.astype(self.dtype), "batch", None, None)
    scales = None
    if train and self.drop_path:
      if keys_B is None:
        raise ValueError(f"drop_path={self.drop_path} in training draws from keys_B: give one key per text")
      scales = draw_branch_scales(keys_B, self.drop_path, self.depth)
    causal = self.pool == "eos"
    (x,), _ = apply_blocks(
      (x,),
      (scales,),
      # Looking back, no token sees what comes after the end.
      (jnp.maximum(num_B, 1) if self.pool == "mean" else None,),
      depth=self.depth,
      scan=self.scan,
      recompute=self.remat,
      attention=self.attention,
      weight_grads=self.weight_grads,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      dtype=self.dtype,
      matrix_init=self.matrix_init,
      causal=causal,
      activation=self.activation,
      norm_epsilon=self.norm_epsilon,
    )
    assert x is not None
    norm = Affine(name="norm")
    if self.pool != "mean":
      last_B = jnp.maximum(num_B - 1, 0) if causal else jnp.full_like(num_B, ids_BxL.shape[1] - 1)
      x = jnp.take_along_axis(x, last_B[:, None, None], axis=1)
      pooled_BxD = norm(standardise(x, self.norm_epsilon))[:, 0]
    else:
      seen_BxLx1 = (jnp.arange(ids_BxL.shape[1]) < num_B[:, None])[:, :, None]
      pooled_BxD = (norm(standardise(x, self.norm_epsilon)) * seen_BxLx1).sum(1) / jnp.maximum(num_B, 1)[:, None]
    pooled_BxD = constrain(pooled_BxD * (num_B > 0)[:, None], "batch", None)
    return EncoderOutput(pooled_BxD, None, pooled_BxD)
