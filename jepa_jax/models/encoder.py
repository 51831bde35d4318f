"""From settings to a network: the one door to all encoders."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax

from jepa_jax.models.convnet import ConvNet, MLPEncoder
from jepa_jax.models.interface import RESNET_STAGES, EncoderConfig, resolve_dtype
from jepa_jax.models.resnet import ResNet
from jepa_jax.models.vit import ViT


def make_encoder(cfg: EncoderConfig) -> nn.Module:
  """The encoder of these settings: apply(variables, images (B, H, W, C), train=bool) -> EncoderOutput.

  For train=True a ViT with drop_path > 0 needs keys_B=, one key per image, and a ResNet mutable=["batch_stats"].
  """
  dtype = resolve_dtype(cfg.compute_dtype)
  if cfg.kind == "vit":
    return _make_vit(cfg, dtype)
  if cfg.kind == "resnet":
    return ResNet(
      stage_sizes=RESNET_STAGES[cfg.variant],
      bottleneck=cfg.variant == "50",
      width=cfg.width or 64,
      stem=cfg.stem,
      remat=cfg.remat == "block",
      channels=cfg.channels,
      dtype=dtype,
    )
  if cfg.kind == "convnet":
    return ConvNet(widths=cfg.layer_widths, channels=cfg.channels, dtype=dtype)
  return MLPEncoder(widths=cfg.layer_widths, image_size=cfg.image_size, channels=cfg.channels, dtype=dtype)


def _make_vit(cfg: EncoderConfig, dtype: Any) -> ViT:
  size = cfg.vit_size
  return ViT(
    width=size.width,
    depth=size.depth,
    num_heads=size.num_heads,
    mlp_dim=size.mlp_dim,
    patch_size=cfg.patch_size,
    native_grid=cfg.image_size // cfg.patch_size,
    channels=cfg.channels,
    num_registers=cfg.num_registers,
    cls_token=cfg.cls_token,
    pool=cfg.pool,
    drop_path=cfg.drop_path,
    pos_embed=cfg.pos_embed,
    scan=cfg.scan,
    remat=cfg.remat == "block",
    probe_layers=cfg.probe_layers,
    dtype=dtype,
    matrix_init=cfg.init,
  )


def count_params(tree: Any) -> int:
  """Number of scalars in a tree of arrays or of abstract arrays."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
