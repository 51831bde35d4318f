"""Vision Transformer (Dosovitskiy et al. 2021) as LeJEPA and I-JEPA use it.

Legend: B images, H W C image, N patches, P class and register tokens, D width, L depth, F probe width, K kept patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.models.attention import AttentionKind
from jepa_jax.models.attentive import AttentionPool
from jepa_jax.models.interface import (
  BIASES_AND_SCALES,
  Encoder,
  EncoderOutput,
  check_channels,
  check_divisible_by_patch,
  check_heads,
  require_at_least,
  resolve_dtype,
)
from jepa_jax.models.linear import WeightGrads, affine
from jepa_jax.models.position import (
  PositionFilter,
  axial_rotation,
  resize_position_embedding,
  sincos_position_embedding,
)
from jepa_jax.models.recompute import Remat
from jepa_jax.models.transformer import (
  BLOCK_RULES,
  LAYER_NORM_EPSILON,
  MATRIX_INITS,
  Activation,
  Affine,
  MatrixInit,
  apply_blocks,
  draw_branch_scales,
  kernel_init,
  layer_norm,
  standardise,
)
from jepa_jax.sharding import Rule, constrain


class ViTSize(NamedTuple):
  width: int
  depth: int
  num_heads: int
  mlp_dim: int


SIZES: dict[str, ViTSize] = {
  "tiny": ViTSize(192, 12, 3, 768),
  "small": ViTSize(384, 12, 6, 1536),
  "base": ViTSize(768, 12, 12, 3072),
  "large": ViTSize(1024, 24, 16, 4096),
  "huge": ViTSize(1280, 32, 16, 5120),
  "giant": ViTSize(1408, 40, 16, 6144),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig(Encoder):
  """Settings of a ViT; image_size fixes the grid of the position embedding, other sizes are interpolated.

  Attributes:
    variant: width, depth, heads and hidden width as published.
    patch_size: side of a patch in px.
    num_registers: extra learned tokens that take part in attention and are dropped from the output.
    cls_token: prepend a class token.
    pool: what `pooled` is: "mean" of the patch tokens or the "cls" token, after the final norm, or "map": what a
      learned query takes from the patch tokens (SigLIP).
    norm_embeddings: a LayerNorm on what goes into the first block (CLIP).
    norm_epsilon: of every LayerNorm; 1e-5 in CLIP.
    norm_after_pool: the final norm comes after the mean over the tokens, which stay without one (timm's fc_norm).
    layer_scale: what a learned factor of each number of a branch starts from (DINOv2, DINOv3); 0: there is none.
    activation: of the MLPs; "quick_gelu" in OpenAI's CLIP, "gelu_tanh" in SigLIP, "swiglu" in the largest DINOv2 and
      DINOv3, where mlp_dim counts what is left after the gate.
    drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first.
    pos_embed: "learned" (a parameter), "sincos" (a constant, I-JEPA's order) or "rope": queries and keys are turned by
      row and column (DINOv3), and nothing is added.
    pos_filter: how a learned one is brought to another grid; see `position.resize_position_embedding`.
    init: of the matrices, the predictor's too: "normal" (standard deviation .02, the papers') or "fan_in"
      (1 / sqrt(inputs); for narrow networks).
    scan: one compiled block for all depths, parameters stacked along axis 0.
    remat: what the backward pass computes again instead of keeping it: "none", "matmuls" (norms, activations and sums;
      no product) or "block" (everything; each block runs twice).
    attention: "auto" (cuDNN's kernel on NVIDIA GPUs, else "xla"), "xla", "plain" or "cudnn"; see
      `attention.attend`.
    weight_grads: where products are bfloat16: "float32" sums the gradients of weights in float32, over chips too, once
      for all uses of a weight; "compute" rounds each to bfloat16 first.
    width, depth, num_heads, mlp_dim: override the variant where not 0.
    probe_layers: `probe` joins the pooled vectors of this many last layers, each through the final norm.
  """

  drops_patches: ClassVar[bool] = True  # it can be given a part of the patches alone
  sizes_of_variant: ClassVar[tuple[str, ...]] = ("width", "depth", "num_heads", "mlp_dim")
  name: Literal["vit"] = "vit"
  variant: Literal["tiny", "small", "base", "large", "huge", "giant"] = "small"
  patch_size: int = 16
  num_registers: int = 0
  cls_token: bool = False
  pool: Literal["mean", "cls", "map"] = "mean"
  norm_embeddings: bool = False
  norm_after_pool: bool = False
  norm_epsilon: float = LAYER_NORM_EPSILON
  layer_scale: float = 0.0
  activation: Activation = "gelu"
  drop_path: float = 0.0
  pos_embed: Literal["learned", "sincos", "rope"] = "learned"
  pos_filter: PositionFilter = "cubic"
  init: MatrixInit = "normal"
  scan: bool = True
  remat: Remat = "matmuls"
  attention: AttentionKind = "auto"
  weight_grads: WeightGrads = "float32"
  width: int = 0
  depth: int = 0
  num_heads: int = 0
  mlp_dim: int = 0
  probe_layers: int = 2

  def __post_init__(self):
    super().__post_init__()
    require_at_least("patch_size", self.patch_size, 1)
    for name in ("num_registers", "width", "depth", "num_heads", "mlp_dim"):
      require_at_least(name, getattr(self, name), 0)
    check_divisible_by_patch("image_size", self.image_size, self.patch_size)
    check_heads(self.size.width, self.size.num_heads)
    if self.pos_embed == "sincos" and self.size.width % 4:
      raise ValueError(f"pos_embed='sincos' needs a width divisible by 4, got width={self.size.width}")
    head_width = self.size.width // self.size.num_heads
    if self.pos_embed == "rope" and head_width % 4:
      raise ValueError(f"pos_embed='rope' needs heads whose width is divisible by 4, got {head_width}")
    if self.norm_after_pool and (self.pool != "mean" or self.cls_token):
      raise ValueError("norm_after_pool=True is the norm of a mean over the tokens: pool='mean' and cls_token=False")
    if not 0.0 <= self.layer_scale <= 10.0:
      raise ValueError(f"layer_scale={self.layer_scale} is where it starts: above 0, such as 1e-5, or 0 for none")
    if self.pool == "cls" and not self.cls_token:
      raise ValueError("pool='cls' needs cls_token=True (or set pool='mean')")
    if not 0 < self.norm_epsilon < 1:
      raise ValueError(f"norm_epsilon={self.norm_epsilon} is added to a variance: above 0, such as 1e-6")
    if not 0.0 <= self.drop_path < 1.0:
      raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
    if not 1 <= self.probe_layers <= self.size.depth:
      raise ValueError(f"probe_layers must be between 1 and the depth {self.size.depth}, got {self.probe_layers}")

  @property
  def size(self) -> ViTSize:
    """The variant's size with the overrides applied; mlp_dim follows an overridden width at 4 times."""
    base = SIZES[self.variant]
    width = self.width or base.width
    mlp_dim = self.mlp_dim or (4 * width if self.width else base.mlp_dim)
    return ViTSize(width, self.depth or base.depth, self.num_heads or base.num_heads, mlp_dim)

  @property
  def num_heads_to_split(self) -> int:
    return self.size.num_heads

  @property
  def output_dim(self) -> int:
    return self.size.width

  @property
  def probe_dim(self) -> int:
    return self.size.width * self.probe_layers

  def make(self, channels: int) -> ViT:
    return ViT(
      **self.size._asdict(),
      patch_size=self.patch_size,
      native_grid=self.image_size // self.patch_size,
      channels=channels,
      num_registers=self.num_registers,
      cls_token=self.cls_token,
      pool=self.pool,
      norm_embeddings=self.norm_embeddings,
      norm_after_pool=self.norm_after_pool,
      norm_epsilon=self.norm_epsilon,
      layer_scale=self.layer_scale,
      activation=self.activation,
      drop_path=self.drop_path,
      pos_embed=self.pos_embed,
      pos_filter=self.pos_filter,
      scan=self.scan,
      remat=self.remat,
      attention=self.attention,
      weight_grads=self.weight_grads,
      probe_layers=self.probe_layers,
      dtype=resolve_dtype(self.compute_dtype),
      matrix_init=self.init,
    )


class PatchEmbed(nn.Module):
  """A strided convolution written as one matrix product; the kernel is kept in the convolution's form (p, p, C, D)."""

  width: int
  patch_size: int
  channels: int
  dtype: Any
  matrix_init: str = "normal"
  weight_grads: WeightGrads = "float32"

  @nn.compact
  def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
    p, (batch, height, width_px, channels) = self.patch_size, images_BxHxWxC.shape
    check_channels(images_BxHxWxC, self.channels)
    check_divisible_by_patch("image height", height, p)
    check_divisible_by_patch("image width", width_px, p)
    kernel = self.param("kernel", MATRIX_INITS[self.matrix_init], (p, p, channels, self.width))
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    x = images_BxHxWxC.astype(self.dtype).reshape(batch, height // p, p, width_px // p, p, channels)
    patches = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)
    return affine(patches, kernel.reshape(-1, self.width), bias, self.dtype, grads=self.weight_grads)


class ViT(nn.Module):
  """Images (B, H, W, C) -> EncoderOutput; any H and W divisible by the patch. Or a tuple of such, of several sizes,
  which go through each block together (`takes_several`) -> a tuple.

  Tokens are [class | registers | patches]. The position embedding is added to the patches only (a learned class
  position would be redundant with the class token) and before anything is dropped.
  """

  takes_several = True
  drops_patches = True
  rules = (
    *BLOCK_RULES,
    Rule(r"^patch_embed/kernel$", (None, None, None, "embed"), decays=True),
    Rule(r"^pos_embed$", optional=True),  # positions and tokens decay in no recipe of the papers
    Rule(r"^(cls_token|registers|pool/query)$", optional=True),
    Rule(r"^pool/attn/q/kernel$", ("embed", "heads", None), decays=True, optional=True),
    Rule(r"^pool/attn/kv/kernel$", ("embed", None, "heads", None), decays=True, optional=True),
    BIASES_AND_SCALES,
  )

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  patch_size: int
  native_grid: int
  channels: int = 3
  num_registers: int = 0
  cls_token: bool = False
  pool: str = "mean"
  norm_embeddings: bool = False
  norm_after_pool: bool = False
  norm_epsilon: float = LAYER_NORM_EPSILON
  layer_scale: float = 0.0
  activation: Activation = "gelu"
  drop_path: float = 0.0
  pos_embed: str = "learned"
  pos_filter: PositionFilter = "cubic"
  scan: bool = True
  remat: Remat = "matmuls"
  attention: AttentionKind = "auto"
  weight_grads: WeightGrads = "float32"
  probe_layers: int = 2
  dtype: Any = jnp.float32
  matrix_init: str = "normal"

  @nn.compact
  def __call__(
    self,
    images_BxHxWxC: jax.Array | tuple[jax.Array, ...],
    train: bool = False,
    keys_B: jax.Array | tuple[jax.Array, ...] | None = None,
    keep_BxK: jax.Array | None = None,
  ) -> EncoderOutput | tuple[EncoderOutput, ...]:
    """Encodes the images, or, given keep_BxK (indices in raster order), only these patches: N is K then.

    train=True with drop_path > 0 needs keys_B, one key per image.
    """
    several = images_BxHxWxC if isinstance(images_BxHxWxC, tuple) else (images_BxHxWxC,)
    if keep_BxK is not None and len(several) > 1:
      raise ValueError("keep_BxK says which patches of one size are kept: encode the sizes one after the other")
    if isinstance(keys_B, tuple) != isinstance(images_BxHxWxC, tuple) and keys_B is not None:
      raise ValueError("keys_B must be a tuple, an array for each size, where the images are one, and only there")
    if isinstance(keys_B, tuple) and len(keys_B) != len(several):
      raise ValueError(f"keys_B holds {len(keys_B)} arrays, the images are of {len(several)} sizes: give one for each")
    prefix_1xPxD, native_hw = self._prefix_tokens(), (self.native_grid, self.native_grid)
    embed, position = self._embedding(native_hw)
    num_prefix, several_x, scales, rotations = prefix_1xPxD.shape[1], [], [], []
    norm_embed = layer_norm("norm_embed", self.dtype, self.norm_epsilon) if self.norm_embeddings else lambda x: x
    for i, images in enumerate(several):
      patches_BxNxD, grid_hw = embed(constrain(images, "batch", None, None, None)), self._grid(images)
      patches_BxNxD += position(grid_hw)
      rotations.append(self._rotation(grid_hw, num_prefix, keep_BxK) if self.pos_embed == "rope" else None)
      if keep_BxK is not None:
        patches_BxNxD = jnp.take_along_axis(patches_BxNxD, keep_BxK[:, :, None], axis=1)
      prefix_BxPxD = jnp.broadcast_to(prefix_1xPxD, (patches_BxNxD.shape[0], *prefix_1xPxD.shape[1:]))
      several_x.append(norm_embed(jnp.concatenate([prefix_BxPxD, patches_BxNxD], axis=1).astype(self.dtype)))
      scales.append(self._branch_scales(keys_B[i] if isinstance(keys_B, tuple) else keys_B) if train else None)
    encoded, summaries = apply_blocks(
      tuple(several_x),
      tuple(scales),
      (None,) * len(several_x),
      tuple(rotations),
      depth=self.depth,
      scan=self.scan,
      recompute=self.remat,
      attention=self.attention,
      weight_grads=self.weight_grads,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      dtype=self.dtype,
      matrix_init=self.matrix_init,
      summary="cls" if self.cls_token else "mean_first" if self.norm_after_pool else "mean",
      num_prefix=num_prefix,
      activation=self.activation,
      norm_epsilon=self.norm_epsilon,
      layer_scale=self.layer_scale,
    )

    norm, pool = Affine(name="norm"), self._attention_pool()
    outputs = [self._output(norm, pool, num_prefix, *each) for each in zip(encoded, summaries, strict=True)]
    return tuple(outputs) if isinstance(images_BxHxWxC, tuple) else outputs[0]

  def _output(
    self,
    norm: Affine,
    pool: AttentionPool | None,
    num_prefix: int,
    x: jax.Array | None,
    summary_LxBxD: jax.Array | None,
  ) -> EncoderOutput:
    assert x is not None and summary_LxBxD is not None
    if self.norm_after_pool:
      tokens_BxNxD, pooled_BxD = x[:, num_prefix:].astype(jnp.float32), norm(summary_LxBxD[-1])
    else:
      x = constrain(norm(standardise(x, self.norm_epsilon)), "batch", None, None)
      tokens_BxNxD = x[:, num_prefix:]
      pooled_BxD = pool(tokens_BxNxD) if pool else x[:, 0] if self.pool == "cls" else tokens_BxNxD.mean(1)
    probe_BxF = jnp.concatenate(list(norm(summary_LxBxD[-self.probe_layers :])), axis=-1)
    return EncoderOutput(pooled_BxD.astype(jnp.float32), tokens_BxNxD, probe_BxF)

  def _attention_pool(self) -> AttentionPool | None:
    if self.pool != "map":
      return None
    sizes = self.num_heads, self.mlp_dim, self.dtype, self.matrix_init, self.activation, self.norm_epsilon
    return AttentionPool(*sizes, name="pool")

  def _branch_scales(self, keys_B: jax.Array | None) -> jax.Array | None:
    if not self.drop_path:
      return None
    if keys_B is None:
      raise ValueError(f"drop_path={self.drop_path} in training draws from keys_B: give one key per image")
    return draw_branch_scales(keys_B, self.drop_path, self.depth)

  def _embedding(self, native_hw: tuple[int, int]) -> tuple[PatchEmbed, Callable[[tuple[int, int]], jax.Array]]:
    """Returns the layer that embeds patches, and a function from a grid to the embedding of its positions."""
    sizes = self.width, self.patch_size, self.channels
    embed = PatchEmbed(*sizes, self.dtype, self.matrix_init, self.weight_grads, name="patch_embed")
    if self.pos_embed == "sincos":
      # A constant, not a parameter: the optimiser would decay it.
      return embed, lambda grid_hw: jnp.asarray(sincos_position_embedding(grid_hw, self.width, native_hw))
    if self.pos_embed == "rope":
      return embed, lambda grid_hw: jnp.zeros((1, 1, self.width))
    pos_1xNxD = self.param("pos_embed", kernel_init, (1, self.native_grid**2, self.width))
    return embed, lambda grid_hw: resize_position_embedding(pos_1xNxD, native_hw, grid_hw, self.pos_filter)

  def _grid(self, images_BxHxWxC: jax.Array) -> tuple[int, int]:
    return images_BxHxWxC.shape[1] // self.patch_size, images_BxHxWxC.shape[2] // self.patch_size

  def _rotation(
    self, grid_hw: tuple[int, int], num_prefix: int, keep_BxK: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the rotation of all tokens: none of class and registers, that of the patches that are there."""
    found = []
    for patches_NxK, still in zip(axial_rotation(grid_hw, self.width // self.num_heads), (1.0, 0.0), strict=True):
      patches = jnp.asarray(patches_NxK) if keep_BxK is None else jnp.asarray(patches_NxK)[keep_BxK]
      prefix = jnp.full((*patches.shape[:-2], num_prefix, patches.shape[-1]), still)
      found.append(jnp.concatenate([prefix, patches], axis=-2))
    return found[0], found[1]

  def _prefix_tokens(self) -> jax.Array:
    counts = {"cls_token": int(self.cls_token), "registers": self.num_registers}
    tokens = [self.param(name, kernel_init, (1, count, self.width)) for name, count in counts.items() if count]
    return jnp.concatenate([jnp.zeros((1, 0, self.width)), *tokens], axis=1)
