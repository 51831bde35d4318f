"""ResNet v1.5 (He et al. 2015; the stride is in the 3x3 convolution) with ImageNet or CIFAR stem.

BatchNorm statistics are means over the whole batch: under jit with a sharded batch, over all devices.
Legend: B images, H W C image or feature map, N positions of the last map, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.models.interface import (
  BIASES_AND_SCALES,
  RUNNING_AVERAGES,
  Encoder,
  EncoderOutput,
  check_channels,
  require_at_least,
  resolve_dtype,
)
from jepa_jax.models.recompute import Remat, remat
from jepa_jax.sharding import Rule, constrain

STAGES: dict[str, tuple[int, ...]] = {  # blocks per stage
  "18": (2, 2, 2, 2),
  "34": (3, 4, 6, 3),
  "50": (3, 4, 6, 3),
  "101": (3, 4, 23, 3),
}


@dataclasses.dataclass(frozen=True)
class ResNetConfig(Encoder):
  """Settings of a ResNet.

  Attributes:
    variant: number of layers; from "50" on blocks have a bottleneck.
    stem: "imagenet" (7x7 stride 2 and max-pool) or "cifar" (3x3 stride 1).
    width: of the first stage.
    remat: as of a ViT; "matmuls" keeps the results of convolutions.
  """

  name: Literal["resnet"] = "resnet"
  variant: Literal["18", "34", "50", "101"] = "50"
  stem: Literal["imagenet", "cifar"] = "imagenet"
  width: int = 64
  remat: Remat = "none"

  uses_batch_statistics: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    require_at_least("width", self.width, 1)

  @property
  def output_dim(self) -> int:
    return self.width * 8 * (4 if self.has_bottleneck else 1)

  @property
  def has_bottleneck(self) -> bool:
    return int(self.variant) >= 50

  def make(self, channels: int) -> ResNet:
    return ResNet(
      stage_sizes=STAGES[self.variant],
      bottleneck=self.has_bottleneck,
      width=self.width,
      stem=self.stem,
      remat=self.remat,
      channels=channels,
      dtype=resolve_dtype(self.compute_dtype),
    )


def _conv(features: int, kernel_px: int, stride: int, dtype: Any, name: str) -> nn.Conv:
  # Symmetric padding as in torch: "SAME" would pad strided convolutions on one side only, and weights would not carry.
  return nn.Conv(
    features,
    (kernel_px, kernel_px),
    strides=stride,
    padding=kernel_px // 2,
    use_bias=False,
    dtype=dtype,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    name=name,
  )


def batch_norm(train: bool, dtype: Any) -> Callable[..., nn.BatchNorm]:
  """A builder of BatchNorm with running momentum .9, eps 1e-5 and statistics in float32 whatever dtype is."""
  return partial(
    nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, use_fast_variance=False
  )


class BasicBlock(nn.Module):
  """Two 3x3 convolutions (ResNet-18 and 34)."""

  features: int
  stride: int
  train: bool
  dtype: Any

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    norm, shortcut = batch_norm(self.train, self.dtype), x_BxHxWxC
    x = _conv(self.features, 3, self.stride, self.dtype, "conv1")(x_BxHxWxC)
    x = nn.relu(norm(name="norm1")(x))
    x = _conv(self.features, 3, 1, self.dtype, "conv2")(x)
    # Zero scale: every block starts as the identity.
    x = norm(scale_init=nn.initializers.zeros, name="norm2")(x)
    if shortcut.shape != x.shape:
      shortcut = _conv(self.features, 1, self.stride, self.dtype, "shortcut")(shortcut)
      shortcut = norm(name="shortcut_norm")(shortcut)
    return constrain(nn.relu(x + shortcut), "batch", None, None, None)


class BottleneckBlock(nn.Module):
  """1x1, 3x3 and 1x1 convolutions, output 4 times as wide (ResNet-50 and 101)."""

  features: int
  stride: int
  train: bool
  dtype: Any

  @nn.compact
  def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
    norm, shortcut = batch_norm(self.train, self.dtype), x_BxHxWxC
    x = _conv(self.features, 1, 1, self.dtype, "conv1")(x_BxHxWxC)
    x = nn.relu(norm(name="norm1")(x))
    x = _conv(self.features, 3, self.stride, self.dtype, "conv2")(x)
    x = nn.relu(norm(name="norm2")(x))
    x = _conv(self.features * 4, 1, 1, self.dtype, "conv3")(x)
    x = norm(scale_init=nn.initializers.zeros, name="norm3")(x)
    if shortcut.shape != x.shape:
      shortcut = _conv(self.features * 4, 1, self.stride, self.dtype, "shortcut")(shortcut)
      shortcut = norm(name="shortcut_norm")(shortcut)
    return constrain(nn.relu(x + shortcut), "batch", None, None, None)


class ResNet(nn.Module):
  """Images (B, H, W, C) -> EncoderOutput; pooled is the mean of the last feature map, probe is pooled."""

  uses_batch_statistics = True
  rules = (Rule(r"kernel$", (None, None, None, "embed"), decays=True), BIASES_AND_SCALES, RUNNING_AVERAGES)

  stage_sizes: tuple[int, ...]
  bottleneck: bool
  width: int = 64
  stem: str = "imagenet"
  remat: Remat = "none"
  channels: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images_BxHxWxC: jax.Array, train: bool = False) -> EncoderOutput:
    """train=True normalises with the batch's statistics and needs mutable=["batch_stats"]."""
    check_channels(images_BxHxWxC, self.channels)
    x = constrain(images_BxHxWxC.astype(self.dtype), "batch", None, None, None)
    kernel_px, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
    x = _conv(self.width, kernel_px, stride, self.dtype, "stem")(x)
    x = nn.relu(batch_norm(train, self.dtype)(name="stem_norm")(x))
    if self.stem == "imagenet":
      x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    block_cls = BottleneckBlock if self.bottleneck else BasicBlock
    block_cls = remat(block_cls, self.remat)
    for stage, num_blocks in enumerate(self.stage_sizes):
      for i in range(num_blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        x = block_cls(self.width * 2**stage, stride, train, self.dtype, name=f"stage{stage}_block{i}")(x)
    tokens_BxNxD = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
    pooled_BxD = tokens_BxNxD.mean(1)
    return EncoderOutput(pooled_BxD, tokens_BxNxD, pooled_BxD)
