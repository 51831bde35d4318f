"""ResNets of torchvision, timm (VICReg, Barlow Twins, SwAV, MoCo, MMCR) and Hugging Face <-> ours, with BatchNorm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jepa_jax.models import ResNetConfig
from jepa_jax.models.resnet import STAGES
from jepa_jax.weights.convert import Tensors, Tree, compare, flatten, give, take_entries, unflatten
from jepa_jax.weights.layouts import Entry, Shape

LAYOUTS = ("resnet", "hf_resnet")
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def resnet_from(tensors: Tensors, cfg: ResNetConfig, layout: str, channels: int = 3) -> tuple[Tree, Tree]:
  """Returns (params, batch_stats), float32; ValueError that lists every missing, unused or misshapen key."""
  entries = _entries(cfg, layout, channels)
  wanted = {key: entry.shape for entry in entries for key in entry.theirs}
  compare(wanted, {key: tuple(x.shape) for key, x in tensors.items()}, "the encoder")
  flat = take_entries(entries, tensors, 1, "the encoder")
  parts = {False: {}, True: {}}
  for key, x in flat.items():
    parts[key.rpartition("/")[2] in ("mean", "var")][key] = x
  return unflatten(parts[False]), unflatten(parts[True])


def resnet_to(
  params: Tree, batch_stats: Tree, cfg: ResNetConfig, layout: str, channels: int = 3
) -> dict[str, np.ndarray]:
  """Returns the tensors, float32: the inverse of `resnet_from`."""
  return give(_entries(cfg, layout, channels), flatten(params) | flatten(batch_stats), 1)


def describe(
  tensors: Tensors, layout: str, config: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...], int, str]:
  """Returns settings, what is assumed, notes, channels and the family; ValueError for a ResNet that ours is not."""
  for name, ours in (("hidden_act", "relu"), ("downsample_in_bottleneck", False)):
    if config.get(name, ours) != ours:
      raise ValueError(f"config.json has {name}={config[name]!r}, and our ResNets {ours!r}")
  pattern = r"layer(\d+)\.(\d+)\." if layout == "resnet" else r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
  found = {(int(m[1]), int(m[2])) for key in tensors if (m := re.match(pattern, key))}
  blocks = tuple(1 + max(b for s, b in found if s == stage) for stage in sorted({s for s, _ in found}))
  third = "layer1.0.conv3.weight" if layout == "resnet" else "encoder.stages.0.layers.0.layer.2.convolution.weight"
  fits = [n for n, sizes in STAGES.items() if sizes == blocks and (third in tensors) == (int(n) >= 50)]
  stem = tensors.get("conv1.weight" if layout == "resnet" else "embedder.embedder.convolution.weight")
  if not fits or stem is None:
    known = ", ".join(f"ResNet-{n}" for n in STAGES)
    raise ValueError(f"a ResNet with {blocks} blocks and stem {'of one' if stem is not None else 'not of one'} "
                     f"convolution; ours are {known}")  # fmt: skip
  kernel_px = stem.shape[2]
  settings = {"name": "resnet", "variant": fits[0], "image_size": 224 if kernel_px == 7 else 32}
  settings |= {} if kernel_px == 7 else {"stem": "cifar"}
  settings |= {} if len(stem) == 64 else {"width": len(stem)}
  assumed = (
    f"image_size={settings['image_size']}: no array shows it",
    "a plain ResNet v1.5 with ReLU: no array shows it",
  )
  return settings, assumed, (), stem.shape[1], f"ResNet-{fits[0]}"


def _entries(cfg: ResNetConfig, layout: str, channels: int) -> list[Entry]:
  hf, bottleneck, width = layout == "hf_resnet", cfg.has_bottleneck, cfg.width
  name = lambda ours, theirs: theirs if hf else ours
  stem_px = 7 if cfg.stem == "imagenet" else 3
  stem = name("conv1", "embedder.embedder.convolution"), name("bn1", "embedder.embedder.normalization")
  entries = _conv("stem", "stem_norm", *stem, (width, channels, stem_px, stem_px))
  before = width
  for stage, num_blocks in enumerate(STAGES[cfg.variant]):
    inner = width * 2**stage
    out = inner * 4 if bottleneck else inner
    for i in range(num_blocks):
      ours = f"stage{stage}_block{i}"
      theirs = name(f"layer{stage + 1}.{i}", f"encoder.stages.{stage}.layers.{i}")
      shapes = [(inner, before, 1, 1), (inner, inner, 3, 3), (out, inner, 1, 1)]
      shapes = shapes if bottleneck else [(inner, before, 3, 3), (inner, inner, 3, 3)]
      for n, shape in enumerate(shapes):
        at = name(f"{theirs}.conv{n + 1}", f"{theirs}.layer.{n}.convolution")
        norm = name(f"{theirs}.bn{n + 1}", f"{theirs}.layer.{n}.normalization")
        entries += _conv(f"{ours}/conv{n + 1}", f"{ours}/norm{n + 1}", at, norm, shape)
      if i == 0 and (before != out or stage):
        at = name(f"{theirs}.downsample.0", f"{theirs}.shortcut.convolution")
        norm = name(f"{theirs}.downsample.1", f"{theirs}.shortcut.normalization")
        entries += _conv(f"{ours}/shortcut", f"{ours}/shortcut_norm", at, norm, (out, before, 1, 1))
      before = out
  return entries


def _conv(ours: str, our_norm: str, theirs: str, their_norm: str, shape: Shape) -> list[Entry]:
  norm = [Entry(f"{our_norm}/{a}", (f"{their_norm}.{b}",), shape[:1], "as is") for a, b in _NORM.items()]
  return [Entry(f"{ours}/kernel", (f"{theirs}.weight",), shape, "convolution"), *norm]
