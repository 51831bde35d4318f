"""Which family published a ViT, and what of it no array shows: epsilon, activation, how positions are resized."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jepa_jax.models.position import ROTARY_BASE, PositionFilter
from jepa_jax.weights.files import Checkpoint
from jepa_jax.weights.layouts import LAYOUTS
from jepa_jax.weights.names import Tensors

EPSILON = 1e-6  # of our LayerNorm, as in the originals; Hugging Face's default is 1e-12
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


@dataclasses.dataclass(frozen=True)
class Family:
  """A family in words, and settings of `ViTConfig` that its code has; `assumed` says which are no more than likely."""

  name: str
  norm_epsilon: float
  pos_filter: PositionFilter
  activation: str
  cls_token: bool
  layer_scale: bool
  rotary: bool
  norm_after_pool: bool
  assumed: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


def is_moco(item: str) -> bool:
  """Returns whether MoCo v3 has networks of this name; its ViTs have 12 heads, ViT-S too."""
  return item.split(".")[-1] in ("base_encoder", "momentum_encoder")


def family_of(checkpoint: Checkpoint, tensors: Tensors, item: str = "") -> Family:
  """Returns the family of a ViT of the checkpoint; what its config.json says goes before what is usual.

  ValueError for an activation or rotary positions that our networks do not have.
  """
  names, config, layout = LAYOUTS[checkpoint.layout], checkpoint.config, checkpoint.layout
  has = lambda stem: names.outside.get(stem, " ") in tensors
  first = names.block.format(0)
  rotary = not has("pos_embed")
  scaled = any(first + key in tensors for key in names.scales.values())
  _check_rotary(checkpoint, rotary, scaled and has("registers"))
  dino = layout == "timm" and item in ("teacher", "student") and has("cls_token") and not scaled
  name = _name(checkpoint, layout, rotary, scaled, has("registers"), has("cls_token"))
  name = "MoCo v3" if is_moco(item) else "DINO" if dino else name
  epsilon = config.get("layer_norm_eps", 1e-5 if rotary else EPSILON)
  dinov2 = layout == "timm" and scaled and not rotary and not has("registers") and "mask_token" in checkpoint.rest
  antialiased = layout in ("timm", "meta") and not (dino or dinov2) or (layout == "dinov2" and has("registers"))
  activation = _activation(checkpoint, tensors, config)
  notes = []
  if dino or dinov2:
    notes.append(f"{name}'s own code shifts resized positions by a tenth of a patch; here they are not moved")
  if "layer_norm_eps" in config and config["layer_norm_eps"] < 1e-9:
    notes.append(f"config.json has layer_norm_eps={epsilon}, transformers' default; the originals have 1e-6")
  told = f"norm_epsilon={epsilon}, activation={activation}" + ("" if rotary else ", a square grid of positions")
  assumed = () if "hidden_act" in config else (f"{told}: no array shows it; it is that of {name}",)
  return Family(
    name,
    epsilon,
    "antialiased" if antialiased else "torch",
    activation,
    has("cls_token"),
    scaled,
    rotary,
    "fc_norm.weight" in tensors and "norm.weight" not in tensors,
    assumed,
    tuple(notes),
  )


def _check_rotary(checkpoint: Checkpoint, rotary: bool, scaled_with_registers: bool) -> None:
  """Raises a ValueError for a ViT without a table of positions that is no DINOv3, or one with another base."""
  if not rotary:
    return
  if checkpoint.layout != "dinov3" and not scaled_with_registers:
    raise ValueError(f"{checkpoint.where}: a ViT without a table of positions, and no DINOv3: that kind is not read")
  base = checkpoint.config.get("rope_theta", ROTARY_BASE)
  periods = np.array(checkpoint.config.get("rope_periods", []))
  ours = ROTARY_BASE ** (np.arange(len(periods)) / max(len(periods), 1))
  if base != ROTARY_BASE or (len(periods) and not np.allclose(periods, ours, rtol=2e-2)):
    raise ValueError(f"{checkpoint.where}: its rotary positions have another base than DINOv3's {ROTARY_BASE:g}")


def _name(checkpoint: Checkpoint, layout: str, rotary: bool, scaled: bool, registers: bool, cls_token: bool) -> str:
  source = " (Hugging Face)" if layout in ("hf", "dinov2", "dinov3") else ""
  if rotary:
    return "DINOv3" + source
  if scaled:
    return f"DINOv2 with{'' if registers else 'out'} registers{source}"
  if layout == "hf" and not cls_token:
    return "I-JEPA" + source
  if layout == "hf":
    kind = {"vit_mae": "MAE", "vit": "a ViT with class token"}.get(checkpoint.config.get("model_type", "vit"), "a ViT")
    return kind + source
  if any("decoder" in item for item in checkpoint.items) or any(rest.startswith("decoder") for rest in checkpoint.rest):
    return "MAE"
  return (
    "a ViT with class token (timm's names: DINO, MoCo v3, LeJEPA, ...)"
    if cls_token
    else "I-JEPA, or a ViT without class token"
  )


def _activation(checkpoint: Checkpoint, tensors: Tensors, config: Mapping[str, Any]) -> str:
  names = LAYOUTS[checkpoint.layout]
  first, gate = names.block.format(0), names.gated.get("mlp/gate", "")
  shape = lambda part, axis: getattr(tensors.get(f"{first}{part}.weight"), "shape", (0, 0))[axis]
  if isinstance(gate, str):  # both halves are one array: twice as wide as what the second layer reads
    gated = 0 < shape(gate, 0) == 2 * shape(names.gated.get("mlp/fc2", ""), 1)
  else:
    gated = shape(gate[0], 0) > 0
  given = config.get("hidden_act", "gelu")
  if gated and checkpoint.layout == "dinov3" and config and given != "silu":
    raise ValueError(f"{checkpoint.where}: gated MLPs with hidden_act={given!r}, and ours have 'silu', as DINOv3's")
  if gated:
    return "swiglu"
  if given not in ACTIVATIONS:
    raise ValueError(f"{checkpoint.where}: hidden_act={given!r}, and our ViT has {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[given]
