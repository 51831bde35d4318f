"""All encoders, by the name of their settings: a new one is a file of its own and a line here."""

from __future__ import annotations

import math
from typing import Any

import jax

from jepa_jax.models.convnet import ConvNetConfig, MLPConfig
from jepa_jax.models.mixer import MixerConfig
from jepa_jax.models.resnet import ResNetConfig
from jepa_jax.models.vit import ViTConfig

EncoderConfig = ViTConfig | ResNetConfig | ConvNetConfig | MLPConfig | MixerConfig  # told apart by `name`


def count_params(tree: Any) -> int:
  """Number of scalars in a tree of arrays or of abstract arrays."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
