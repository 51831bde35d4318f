"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601): patches mixed by MLPs over positions and over channels.

Legend: B images, H W C image, N patches, D width, S and M hidden widths of the two MLPs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.models.interface import (
  BIASES_AND_SCALES,
  Encoder,
  EncoderOutput,
  check_channels,
  check_divisible_by_patch,
  check_one_size,
  gelu,
  require_at_least,
  resolve_dtype,
)
from jepa_jax.models.linear import Linear
from jepa_jax.models.transformer import layer_norm
from jepa_jax.sharding import Rule, constrain

_kernel_init = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class MixerConfig(Encoder):
  """Settings of an MLP-Mixer; all images have `image_size`, since the MLP over positions has a weight for each.

  Attributes:
    patch_size: side of a patch in px.
    width, depth: channels of a patch, and blocks.
    token_dim, channel_dim: hidden widths of the MLPs over positions and over channels.
  """

  name: Literal["mixer"] = "mixer"
  patch_size: int = 16
  width: int = 512
  depth: int = 8
  token_dim: int = 256
  channel_dim: int = 2048

  def __post_init__(self):
    super().__post_init__()
    for name in ("patch_size", "width", "depth", "token_dim", "channel_dim"):
      require_at_least(name, getattr(self, name), 1)
    check_divisible_by_patch("image_size", self.image_size, self.patch_size)

  @property
  def output_dim(self) -> int:
    return self.width

  def make(self, channels: int) -> Mixer:
    fields = {name: getattr(self, name) for name in ("image_size", "patch_size", "width", "depth")}
    fields |= {"token_dim": self.token_dim, "channel_dim": self.channel_dim}
    return Mixer(**fields, channels=channels, dtype=resolve_dtype(self.compute_dtype))


class Mixer(nn.Module):
  """Images (B, S, S, C) of the native size S -> EncoderOutput: tokens are patches, pooled is their mean."""

  rules = (Rule(r"kernel$", ("embed", "mlp"), decays=True), BIASES_AND_SCALES)

  image_size: int
  patch_size: int
  width: int
  depth: int
  token_dim: int
  channel_dim: int
  channels: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images_BxSxSxC: jax.Array, train: bool = False) -> EncoderOutput:
    del train  # no dropout, no running statistics
    check_channels(images_BxSxSxC, self.channels)
    check_one_size(images_BxSxSxC, self.image_size, "a mixer")
    side, patch = self.image_size // self.patch_size, self.patch_size
    patches = images_BxSxSxC.reshape(-1, side, patch, side, patch, self.channels).swapaxes(2, 3)
    x_BxNxD = Linear(self.width, self.dtype, _kernel_init, name="patches")(
      patches.reshape(-1, side**2, patch**2 * self.channels)
    )
    for i in range(self.depth):
      x_BxNxD = constrain(x_BxNxD, "batch", None, None)
      normal_BxDxN = layer_norm(f"token_norm_{i}", self.dtype)(x_BxNxD).swapaxes(1, 2)
      x_BxNxD += self._mlp(normal_BxDxN, self.token_dim, f"token_{i}").swapaxes(1, 2)
      x_BxNxD += self._mlp(layer_norm(f"channel_norm_{i}", self.dtype)(x_BxNxD), self.channel_dim, f"channel_{i}")
    tokens_BxNxD = layer_norm("norm", self.dtype)(x_BxNxD).astype(jnp.float32)
    pooled_BxD = tokens_BxNxD.mean(1)
    return EncoderOutput(pooled_BxD, tokens_BxNxD, pooled_BxD)

  def _mlp(self, x: jax.Array, hidden: int, name: str) -> jax.Array:
    width = x.shape[-1]
    x = gelu(Linear(hidden, self.dtype, _kernel_init, name=f"{name}_in")(x))
    return Linear(width, self.dtype, _kernel_init, name=f"{name}_out")(x)
