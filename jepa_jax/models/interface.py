"""What the other rooms see of an encoder: its settings and its output; and checks that several networks share.

Legend: B images, N patches (or positions of the last feature map), D width of the encoder, F probe width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jepa_jax.choices import check_choices
from jepa_jax.sharding import Rule

Dtype = Literal["auto", "float32", "bfloat16"]

# What several networks have: a bias and a norm's scale are whole everywhere and do not decay; of BatchNorm's running
# averages a network has some or none.
BIASES_AND_SCALES = Rule(r"(^|/)(bias|scale)$")
RUNNING_AVERAGES = Rule(r"(^|/)(mean|var)$", optional=True)


class EncoderOutput(NamedTuple):
  """All float32. `tokens` is None where a network has no positions; class and register tokens are never in it."""

  pooled_BxD: jax.Array
  tokens_BxNxD: jax.Array | None
  probe_BxF: jax.Array


@dataclasses.dataclass(frozen=True)
class Encoder:
  """What the settings of every encoder have; a kind of encoder is a subclass with a `name`, in the file of its network.

  Attributes:
    image_size: native image side in px.
    compute_dtype: "auto" (bfloat16 on accelerators, float32 on CPU), "float32" or "bfloat16".
  """

  image_size: int = 224
  compute_dtype: Dtype = "auto"

  num_heads_to_split: ClassVar[int] = 1  # the heads that a tensor axis of the mesh can be split over
  uses_batch_statistics: ClassVar[bool] = False  # the output of one image depends on the rest of the batch (BatchNorm)

  def __post_init__(self):
    check_choices(self)
    require_at_least("image_size", self.image_size, 1)

  @property
  def output_dim(self) -> int:
    """D, the width of `pooled` (and of each token)."""
    raise NotImplementedError

  @property
  def probe_dim(self) -> int:
    """F, the width of `probe`."""
    return self.output_dim

  def make(self, channels: int) -> Any:
    """Returns the network for images of so many channels: apply(variables, images_BxHxWxC, train=) -> EncoderOutput.

    One whose `takes_several` is True is given the views of several sizes in one call, as a tuple (keys_B= then too),
    and returns a tuple; a subclass of ViT whose call takes one array sets it to False.
    """
    raise NotImplementedError


def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU (Hendrycks & Gimpel 2016), computed in float32, in the dtype of x.

  Written with erf: jax.nn.gelu's erfc is exact far below 0 also, where this one has an absolute error of a rounding,
  and takes 1.8 times as long forward and backward on a CPU.
  """
  x32 = x.astype(jnp.float32)
  return (x32 * (0.5 + 0.5 * jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


def resolve_dtype(compute_dtype: str) -> jnp.dtype:
  """The dtype of matrix products; "auto" looks at this process's backend, so name it when compiling for another."""
  if compute_dtype == "auto":
    compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(compute_dtype)


def check_heads(width: int, num_heads: int, whose: str = "") -> None:
  """Raises ValueError naming the nearest numbers of heads that work unless num_heads divides width."""
  if width % num_heads:
    divisors = [h for h in range(1, min(width, 100_000) + 1) if width % h == 0]
    nearest = sorted(divisors, key=lambda h: abs(h - num_heads))[:3]
    raise ValueError(
      f"{whose}width={width} is not divisible by num_heads={num_heads}; the nearest num_heads that work: "
      f"{sorted(nearest)}"
    )


def check_divisible_by_patch(name: str, size_px: int, patch_size: int) -> None:
  """Raises ValueError naming the nearest sizes that work unless size_px is a positive multiple of patch_size."""
  if size_px % patch_size == 0 and size_px > 0:
    return
  below = size_px // patch_size * patch_size
  sizes = " or ".join(str(s) for s in (below, below + patch_size) if s > 0)
  raise ValueError(f"{name}={size_px} is not divisible by patch_size={patch_size}; the nearest that are: {sizes}")


def check_one_size(images_BxHxWxC: jax.Array, image_size: int, whose: str) -> None:
  """Raises ValueError unless the images have the one size that such an encoder reads; `whose` is "a mixer"."""
  if images_BxHxWxC.shape[1:3] != (image_size, image_size):
    raise ValueError(
      f"{whose} reads one image size, {image_size} px, but was given {images_BxHxWxC.shape[1:3]}; make all views that "
      "size or choose another encoder"
    )


def check_channels(images_BxHxWxC: jax.Array, channels: int) -> None:
  """Raises ValueError unless the images have the configured number of channels."""
  if images_BxHxWxC.shape[-1] != channels:
    raise ValueError(
      f"the images have {images_BxHxWxC.shape[-1]} channels but the encoder was made for {channels}; set data.channels "
      "to match the data"
    )


def require_at_least(name: str, value: int, least: int) -> None:
  """Raises ValueError unless value is at least so large."""
  if value < least:
    raise ValueError(f"{name} must be at least {least}, got {value}")
