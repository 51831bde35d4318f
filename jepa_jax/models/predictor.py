"""The predictor of I-JEPA (arXiv 2301.08243) and IWM (2403.00504): a narrow ViT that fills mask tokens from a context.

Legend: B images, K context patches, M target blocks, T patches of a block (padded), E encoder width, P predictor width,
A numbers of an action, X extra tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.choices import check_choices
from jepa_jax.models.attention import AttentionKind
from jepa_jax.models.interface import BIASES_AND_SCALES, Dtype, check_heads, gelu, require_at_least, resolve_dtype
from jepa_jax.models.linear import Linear, WeightGrads
from jepa_jax.models.position import sincos_position_embedding
from jepa_jax.models.recompute import Remat
from jepa_jax.models.transformer import BLOCK_RULES, MATRIX_INITS, Affine, apply_blocks, kernel_init, standardise
from jepa_jax.sharding import Rule, constrain

Conditioning = Literal["none", "feature", "sequence"]
CONDITIONINGS = get_args(Conditioning)


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
  """Settings of I-JEPA's and IWM's predictor, a narrow ViT over context tokens and mask tokens.

  Attributes:
    depth: number of blocks; 0 is no predictor at all: every target is predicted by the mean of the context tokens.
    width: of its tokens, in and out of which linear layers lead.
    num_heads: 0 takes the encoder's number, as the paper does (24 wide at ViT-L and H: slow on accelerators).
    conditioning: how IWM tells it the action (arXiv 2403.00504): "feature" (joined to every mask token with its
      position, then three layers back to the width; context tokens hear of it only through attention), "sequence" (a
      token per number of the action) or "none".
    remat, attention, weight_grads, compute_dtype: as of an encoder.
  """

  depth: int = 6
  width: int = 384
  num_heads: int = 0
  conditioning: Conditioning = "none"
  remat: Remat = "matmuls"
  attention: AttentionKind = "auto"
  weight_grads: WeightGrads = "float32"
  compute_dtype: Dtype = "auto"

  def __post_init__(self):
    check_choices(self)
    require_at_least("depth", self.depth, 0)
    require_at_least("num_heads", self.num_heads, 0)
    if self.width < 4 or self.width % 4:
      raise ValueError(f"width={self.width} of the predictor must be a multiple of 4: its positions are 2-D sin-cos")


class Condition(nn.Module):
  """Mask tokens with their positions and the action -> mask tokens (B, M, T, P): three linear layers, GELU between."""

  width: int
  dtype: Any
  matrix_init: str
  weight_grads: WeightGrads

  @nn.compact
  def __call__(self, query_BxMxTxP: jax.Array, action_BxA: jax.Array) -> jax.Array:
    shape = (*query_BxMxTxP.shape[:-1], action_BxA.shape[-1])
    x = jnp.concatenate([query_BxMxTxP, jnp.broadcast_to(action_BxA[:, None, None], shape)], axis=-1)
    linear = dict(dtype=self.dtype, kernel_init=MATRIX_INITS[self.matrix_init], weight_grads=self.weight_grads)
    for i in range(3):
      x = gelu(x) if i else x
      x = Linear(self.width, name=f"fc{i + 1}", **linear)(x)
    return x


class ActionTokens(nn.Module):
  """Actions (B, A) -> one token for each of their numbers (B, A, P), each through a linear layer of its own."""

  width: int

  @nn.compact
  def __call__(self, action_BxA: jax.Array) -> jax.Array:
    shape = (action_BxA.shape[-1], self.width)
    # One input each: from variance 1 / inputs, whatever matrix_init says, lest a number be lost beside its bias.
    kernel_AxP = self.param("kernel", nn.initializers.normal(1.0), shape)
    return action_BxA[:, :, None] * kernel_AxP + self.param("bias", kernel_init, shape)


class Predictor(nn.Module):
  """Context tokens and the places of the targets -> the predicted target tokens (B, M, T, E), float32.

  Every target block is a sequence of its own, [context | extra tokens | mask tokens at the block's places]: blocks do
  not see one another. Padded places are seen by nobody; what is predicted there means nothing.
  """

  rules = (
    *BLOCK_RULES,
    Rule(r"^(embed|proj)/kernel$", ("embed", None), decays=True),
    Rule(r"^(condition/fc\d|action)/kernel$", (None, "embed"), decays=True, optional=True),
    Rule(r"^mask_token$", decays=True),  # as in the official code, which excludes vectors and biases only
    BIASES_AND_SCALES,
  )

  width: int
  depth: int
  num_heads: int
  out: int
  remat: Remat = "matmuls"
  attention: AttentionKind = "auto"
  weight_grads: WeightGrads = "float32"
  dtype: Any = jnp.float32
  matrix_init: str = "normal"
  conditioning: str = "none"

  @nn.compact
  def __call__(
    self,
    context_BxKxE: jax.Array,
    context_BxK: jax.Array,
    targets_BxMxT: jax.Array,
    valid_BxMxT: jax.Array,
    grid_hw: tuple[int, int],
    action_BxA: jax.Array | None = None,
    extra_BxXxP: jax.Array | None = None,
  ) -> jax.Array:
    """context_BxK and targets_BxMxT are places on the grid, in raster order; of a block the valid ones come first.
    Tokens of the context before those (MAE's class token) have no place.

    action_BxA: what the predictor is conditioned on; without conditioning it is not looked at. extra_BxXxP: tokens
    without a place, such as the token of a task.
    """
    if not self.depth:
      return jnp.broadcast_to(context_BxKxE.mean(1)[:, None, None], (*targets_BxMxT.shape, self.out))
    batch, num_blocks, num_targets = targets_BxMxT.shape
    position_NxP = jnp.asarray(sincos_position_embedding(grid_hw, self.width))
    layer = dict(dtype=self.dtype, matrix_init=self.matrix_init, weight_grads=self.weight_grads)
    linear = dict(dtype=self.dtype, kernel_init=MATRIX_INITS[self.matrix_init], weight_grads=self.weight_grads)
    mask_token = self.param("mask_token", kernel_init, (1, 1, self.width))

    position_BxKxP = position_NxP[context_BxK]
    if placeless := context_BxKxE.shape[1] - context_BxK.shape[1]:
      position_BxKxP = jnp.pad(position_BxKxP, ((0, 0), (placeless, 0), (0, 0)))
    context_BxKxP = Linear(self.width, name="embed", **linear)(context_BxKxE) + position_BxKxP
    query_BxMxTxP = mask_token[0, 0] + position_NxP[targets_BxMxT]
    before = [context_BxKxP] if extra_BxXxP is None else [context_BxKxP, extra_BxXxP]
    if self.conditioning == "feature":
      query_BxMxTxP = Condition(self.width, **layer, name="condition")(query_BxMxTxP, action_BxA)
    elif self.conditioning == "sequence":
      before.append(ActionTokens(self.width, name="action")(action_BxA))
    before_BxSxP = jnp.concatenate(before, axis=1)
    num_before = before_BxSxP.shape[1]
    before_BxMxSxP = jnp.broadcast_to(before_BxSxP[:, None], (batch, num_blocks, num_before, self.width))
    x = jnp.concatenate([before_BxMxSxP, query_BxMxTxP], axis=2).astype(self.dtype)
    x = constrain(x.reshape(batch * num_blocks, -1, self.width), "batch", None, None)
    num_seen_BxM = num_before + valid_BxMxT.sum(-1, dtype=jnp.int32)
    encoded, _ = apply_blocks(
      (x,),
      (None,),
      (num_seen_BxM.reshape(-1),),
      depth=self.depth,
      scan=True,
      recompute=self.remat,
      attention=self.attention,
      num_heads=self.num_heads,
      mlp_dim=4 * self.width,
      **layer,
    )
    assert encoded[0] is not None
    x = Affine(name="norm")(standardise(encoded[0][:, num_before:]))
    out = Linear(self.out, name="proj", **linear)(x).astype(jnp.float32)
    return constrain(out.reshape(batch, num_blocks, num_targets, self.out), "batch", None, None, None)


def make_predictor(cfg: PredictorConfig, encoder: Any, out: int = 0) -> Predictor:
  """The predictor of these settings for a ViT, of tokens of this width (0: the encoder's).

  ValueError where its heads do not divide its width.
  """
  num_heads = cfg.num_heads or encoder.num_heads
  check_heads(cfg.width, num_heads, "the predictor's ")
  return Predictor(
    width=cfg.width,
    depth=cfg.depth,
    num_heads=num_heads,
    out=out or encoder.width,
    remat=cfg.remat,
    attention=cfg.attention,
    weight_grads=cfg.weight_grads,
    dtype=resolve_dtype(cfg.compute_dtype),
    matrix_init=encoder.matrix_init,
    conditioning=cfg.conditioning,
  )
