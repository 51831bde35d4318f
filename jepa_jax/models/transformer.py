"""Pre-norm transformer blocks, shared by the encoder and by predictors.

Legend: B sequences, N tokens, D width, H heads, K head width, M hidden width, L depth.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jepa_jax.models.attention import Attention, AttentionKind
from jepa_jax.models.interface import gelu
from jepa_jax.models.linear import Linear, WeightGrads
from jepa_jax.models.recompute import KEPT_HIDDEN, KEPT_MIDDLE, Remat, remat
from jepa_jax.sharding import Rule, constrain

LAYER_NORM_EPSILON = 1e-6

# I-JEPA's trunc_normal_(std=.02) cuts at +-2 absolute, i.e. 100 sigma: a plain normal. JAX's truncated_normal would cut
# at 2 sigma and end with a standard deviation of .0176.
kernel_init = nn.initializers.normal(stddev=0.02)
# What matrices start from, by ViTConfig.init. .02 is 1/sqrt(D) for D = 2,500: in narrow networks the blocks then
# begin as hardly more than the identity, and patches weigh little beside their positions.
MATRIX_INITS = {"normal": kernel_init, "fan_in": nn.initializers.lecun_normal()}
MatrixInit = Literal["normal", "fan_in"]
# "quick_gelu" is OpenAI's CLIP's, "gelu_tanh" SigLIP's; "swiglu" (Shazeer 2020, arXiv 2002.05202) makes silu(a) b of
# two products, in the largest DINOv2 and DINOv3.
Activation = Literal["gelu", "quick_gelu", "gelu_tanh", "swiglu"]
ACTIVATIONS = {
  "gelu": gelu,
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}
Several = tuple[jax.Array | None, ...]  # one for each batch of sequences that goes through the blocks together

BLOCK_RULES = (
  Rule(r"attn/qkv/kernel$", ("embed", None, "heads", None), decays=True),  # (D, 3, heads, head width)
  Rule(r"attn/proj/kernel$", ("heads", None, "embed"), decays=True),
  Rule(r"mlp/fc1/kernel$", ("embed", "mlp"), decays=True, optional=True),
  Rule(r"mlp/gate/kernel$", ("embed", None, "mlp"), decays=True, optional=True),  # (D, 2, M): what is gated second
  Rule(r"mlp/fc2/kernel$", ("mlp", "embed"), decays=True),
)


def layer_norm(name: str, dtype: Any, epsilon: float = LAYER_NORM_EPSILON) -> nn.LayerNorm:
  """LayerNorm with the two-pass variance in float32: E[x^2] - E[x]^2 loses digits where the mean is large."""
  return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def standardise(x: jax.Array, epsilon: float = LAYER_NORM_EPSILON) -> jax.Array:
  """x with mean 0 and variance 1 along its last axis, float32: LayerNorm without its affine part."""
  x = x.astype(jnp.float32)
  centred = x - x.mean(-1, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


class Affine(nn.Module):
  """The scale and bias of a LayerNorm whose standardisation happens elsewhere."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    return x * scale + bias


class MLP(nn.Module):
  """Linear, exact (erf) GELU or another activation, linear; of "swiglu" two linear layers come first."""

  mlp_dim: int
  dtype: Any
  matrix_init: str = "normal"
  weight_grads: WeightGrads = "float32"
  activation: Activation = "gelu"

  @nn.compact
  def __call__(self, x_BxNxD: jax.Array) -> jax.Array:
    linear = dict(dtype=self.dtype, kernel_init=MATRIX_INITS[self.matrix_init], weight_grads=self.weight_grads)
    fc2 = Linear(x_BxNxD.shape[-1], name="fc2", **linear)
    if self.activation == "swiglu":
      h_BxNx2xM = Linear((2, self.mlp_dim), name="gate", **linear)(x_BxNxD)
      h_BxNx2xM = checkpoint_name(constrain(h_BxNx2xM, "batch", None, None, "mlp"), KEPT_HIDDEN)
      return fc2(nn.silu(h_BxNx2xM[:, :, 0]) * h_BxNx2xM[:, :, 1])
    h_BxNxM = Linear(self.mlp_dim, name="fc1", **linear)(x_BxNxD)
    h_BxNxM = checkpoint_name(constrain(h_BxNxM, "batch", None, "mlp"), KEPT_HIDDEN)
    return fc2(ACTIVATIONS[self.activation](h_BxNxM))


class LayerScale(nn.Module):
  """A learned factor for each number of a branch (Touvron et al. 2021, arXiv 2103.17239), `start` at first."""

  start: float

  @nn.compact
  def __call__(self, x_BxNxD: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.constant(self.start), (x_BxNxD.shape[-1],))
    return x_BxNxD * scale.astype(x_BxNxD.dtype)


class Block(nn.Module):
  """One pre-norm block over several batches of sequences: for each of them (tokens, branch scales or None, how many
  tokens are seen or None, rotation of queries and keys or None) -> (tokens, summary).

  The summary is what a probe reads of this layer, (B, D) float32, standardised: the class token (summary="cls"), the
  mean of the tokens after the first num_prefix ("mean"; "mean_first": standardised after the mean), or None ("none").
  Averaging commutes with the affine part of the final norm, so `Affine` applied to it gives exactly "this layer through
  the final norm, pooled".
  """

  num_heads: int
  mlp_dim: int
  dtype: Any
  matrix_init: str = "normal"
  summary: str = "none"
  num_prefix: int = 0
  attention: AttentionKind = "auto"
  weight_grads: WeightGrads = "float32"
  causal: bool = False
  activation: Activation = "gelu"
  norm_epsilon: float = LAYER_NORM_EPSILON
  layer_scale: float = 0.0

  @nn.compact
  def __call__(
    self,
    several_x: Several,
    several_scale_2xB: Several,
    several_num_valid_B: Several,
    several_rotation: Several,
  ):
    init, grads = MATRIX_INITS[self.matrix_init], self.weight_grads
    attention = Attention(self.num_heads, self.dtype, init, self.attention, grads, self.causal, name="attn")
    mlp = MLP(self.mlp_dim, self.dtype, self.matrix_init, grads, self.activation, name="mlp")
    norm1, norm2 = (layer_norm(name, self.dtype, self.norm_epsilon) for name in ("norm1", "norm2"))
    ls1, ls2 = (LayerScale(self.layer_scale, name=n) if self.layer_scale else _as_is for n in ("ls1", "ls2"))

    def one(x_BxNxD: jax.Array, branch_scale_2xB: jax.Array | None, num_valid_B: jax.Array | None, rotation):
      x = constrain(x_BxNxD, "batch", None, None)
      x = x + _scale_branch(ls1(attention(norm1(x), num_valid_B, rotation)), branch_scale_2xB, 0)
      x = checkpoint_name(x, KEPT_MIDDLE)
      x = x + _scale_branch(ls2(mlp(norm2(x))), branch_scale_2xB, 1)
      x = constrain(x, "batch", None, None)
      return x, _summarise(x, self.summary, self.num_prefix, self.norm_epsilon)

    several = zip(several_x, several_scale_2xB, several_num_valid_B, several_rotation, strict=True)
    return tuple(zip(*(one(*each) for each in several)))


def _as_is(x_BxNxD: jax.Array) -> jax.Array:
  return x_BxNxD


def _scale_branch(y_BxNxD: jax.Array, branch_scale_2xB: jax.Array | None, branch: int) -> jax.Array:
  if branch_scale_2xB is None:
    return y_BxNxD
  return y_BxNxD * branch_scale_2xB[branch, :, None, None].astype(y_BxNxD.dtype)


def _summarise(x_BxNxD: jax.Array, summary: str, num_prefix: int, epsilon: float) -> jax.Array | None:
  if summary == "none":
    return None
  if summary == "cls":
    return standardise(x_BxNxD[:, 0], epsilon)
  if summary == "mean_first":
    return standardise(x_BxNxD[:, num_prefix:].astype(jnp.float32).mean(1), epsilon)
  return standardise(x_BxNxD[:, num_prefix:], epsilon).mean(1)


def draw_branch_scales(keys_B: jax.Array, rate: float, depth: int) -> jax.Array:
  """Drop path: (L, 2, B) factors, 0 with probability p_l = rate * l/(L-1) and 1/(1-p_l) otherwise (mean 1).

  Drawn at once outside the blocks, so that scanned, unrolled and rematerialised stacks see the same draws, and from
  one key per example, so that devices and microbatches do.
  """
  keep_L = 1.0 - rate * jnp.linspace(0.0, 1.0, depth)
  kept_BxLx2 = jax.vmap(lambda key: jax.random.bernoulli(key, keep_L[:, None], (depth, 2)))(keys_B)
  return constrain(jnp.moveaxis(kept_BxLx2 / keep_L[:, None], 0, -1), None, None, "batch")


def apply_blocks(
  several_x: Several,
  several_scale_Lx2xB: Several,
  several_num_valid_B: Several,
  several_rotation: tuple[Any, ...] | None = None,
  *,
  depth: int,
  scan: bool,
  recompute: Remat,
  **block_fields,
) -> tuple[Several, Several]:
  """Runs the blocks inside a compact method: of each batch its tokens and the layers' summaries (L, B, D), or None.

  Batches of sequences of several lengths go through a block together, not through all blocks one after the other: the
  gradients of a weight then meet before they are summed over chips, once, and not once for each length.
  Tokens after the first num_valid_B are seen by no other token (padding); what becomes of them means nothing.
  several_rotation: of each batch what `position.axial_rotation` returns for its tokens, or None.
  Parameters: `blocks/...` stacked along axis 0 with scan, `blocks_0/...`, `blocks_1/...` without.
  """
  rotations = several_rotation or (None,) * len(several_x)
  block_cls = remat(Block, recompute, in_scan=scan)
  if scan:
    axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, nn.broadcast, nn.broadcast))
    stack = nn.scan(block_cls, length=depth, **axes)
    return stack(**block_fields, name="blocks")(several_x, several_scale_Lx2xB, several_num_valid_B, rotations)
  summaries = []
  for i in range(depth):
    scales = jax.tree.map(lambda scale_Lx2xB: scale_Lx2xB[i], several_scale_Lx2xB)  # noqa: B023
    several_x, summary = block_cls(**block_fields, name=f"blocks_{i}")(
      several_x, scales, several_num_valid_B, rotations
    )
    summaries.append(summary)
  return several_x, jax.tree.map(lambda *layers_BxD: jnp.stack(layers_BxD), *summaries)


def first_blocks(params: Any, num: int) -> Any:
  """Returns a ViT's parameters with its first num blocks alone, stacked or not."""
  last = lambda name: int(name.removeprefix("blocks_")) if name.startswith("blocks_") else -1
  kept = {name: own for name, own in params.items() if last(name) < num}
  return kept | ({"blocks": jax.tree.map(lambda x: x[:num], params["blocks"])} if "blocks" in params else {})
