"""Which of our settings a checkpoint fits: read off its shapes and, where there is one, its config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jepa_jax.models import Encoder, ViTConfig
from jepa_jax.models.vit import SIZES
from jepa_jax.weights.convert import Tensors, is_sincos, measure, resolve_layout
from jepa_jax.weights.files import Checkpoint
from jepa_jax.weights.layouts import LAYOUTS, PREDICTOR
from jepa_jax.weights.pairs import describe_pair

EVALUATED_FIRST = ("target_encoder", "encoder", "state_dict", "model")
EPSILON = 1e-6  # of our LayerNorm, as in the originals; Hugging Face's default is 1e-12


@dataclasses.dataclass(frozen=True)
class Description:
  """Settings of an encoder, what was assumed for lack of a source, and what differs though the shapes fit.

  channels: of its images, for `data.channels`; 0 where the file does not say.
  """

  settings: dict[str, Any]
  assumed: tuple[str, ...]
  notes: tuple[str, ...]
  channels: int = 0


def is_predictor(tensors: Tensors) -> bool:
  """Returns whether these are the weights of a predictor in Meta's layout."""
  return "predictor_embed.weight" in tensors


def choose_item(checkpoint: Checkpoint, item: str = "") -> str:
  """Returns the name of an encoder in the checkpoint: `item`, or the one that its paper evaluates."""
  encoders = [name for name, tensors in checkpoint.items.items() if not is_predictor(tensors)]
  for name in (item,) if item else EVALUATED_FIRST:
    if name in encoders:
      return name
  if not item and len(encoders) == 1:
    return encoders[0]
  if not encoders:
    raise ValueError(f"{checkpoint.where} holds no encoder, only {', '.join(checkpoint.items)}")
  asked = f"no encoder {item!r}" if item else "several encoders"
  raise ValueError(f"{checkpoint.where} holds {asked}; choose by --item: {', '.join(encoders)}")


def describe(checkpoint: Checkpoint, item: str) -> Description:
  """Returns the settings under which this encoder of the checkpoint is one of ours; ValueError where it is no ViT."""
  if checkpoint.layout == "jepa_jax":
    return Description(dict(checkpoint.config.get("encoder", {})), (), ())
  tensors = checkpoint.items[item]
  layout = LAYOUTS[resolve_layout(checkpoint.layout, tensors)]
  found = measure({key: tuple(x.shape) for key, x in tensors.items()}, layout)
  lacking = [name for name in ("width", "mlp_dim", "patch_size", "positions") if name not in found]
  if lacking or not found["depth"]:
    raise ValueError(f"{checkpoint.where}, {item}: no ViT, its {', '.join(lacking or ['blocks'])} cannot be found")
  variant = next((name for name, size in SIZES.items() if size.width == found["width"]), "")
  heads, assumed = _heads(checkpoint, found), ()
  if not checkpoint.config.get("num_attention_heads"):
    why = "the usual one at this width" if variant else "a guess, 64 wide each where that divides"
    assumed = (f"num_heads={heads}: no shape shows it; it is {why}",)
  pos = tensors[layout.outside["pos_embed"]]
  cls_token, registers = int("cls_token" in tensors), found.get("num_registers", 0)
  grid = _grid(found["positions"], cls_token + registers)
  if grid is None:
    raise ValueError(f"{checkpoint.where}, {item}: {found['positions']} positions are no square grid, which ours is")
  size = SIZES[variant or "small"]
  settings = {
    "name": "vit",
    "variant": variant or "small",
    "image_size": grid * found["patch_size"],
    "patch_size": found["patch_size"],
    "pos_embed": "sincos" if not cls_token and not registers and is_sincos(pos) else "learned",
  }
  settings |= {"cls_token": True} if cls_token else {}
  settings |= {"num_registers": registers} if registers else {}
  numbers = {"width": found["width"], "depth": found["depth"], "num_heads": heads, "mlp_dim": found["mlp_dim"]}
  settings |= {name: n for name, n in numbers.items() if not variant or n != getattr(size, name)}
  return Description(settings, assumed, _notes(checkpoint.config), found["channels"])


def check_config(checkpoint: Checkpoint, cfg: Encoder, pixels: Mapping[str, tuple]) -> tuple[str, ...]:
  """Returns what may differ though the shapes fit; ValueError where the file says for sure what no shape shows.

  pixels: what those of the config's data are normalised with, {"mean": ..., "std": ...}.
  """
  config, faults, notes = checkpoint.config, [], []
  known = config.get("data", {})
  for name in (name for name in pixels if name in known):
    trained, ours = tuple(known[name]), pixels[name]
    if np.array_equal(trained, ours):
      continue
    if checkpoint.layout in ("hf", "clip"):  # transformers writes its defaults (.5) where a conversion said nothing
      notes.append(f"preprocessor_config.json says {name} {trained}, the config has {ours}. It may hold the library's "
                   f"defaults; if it was trained so: --config.data.{name}='{trained}'")  # fmt: skip
    else:  # pixels normalised in another way are other pixels to the networks
      faults.append(f"data.{name}: trained with {trained}, the config has {ours}: --config.data.{name}='{trained}'")
  if isinstance(cfg, ViTConfig) and checkpoint.layout == "jepa_jax":
    size = config.get("encoder", {}).get("image_size", cfg.image_size)
    if size != cfg.image_size:
      faults.append(f"image_size: the checkpoint has {size}, the config {cfg.image_size}")
  if isinstance(cfg, ViTConfig) and checkpoint.layout == "hf" and config:
    heads = config.get("num_attention_heads", cfg.size.num_heads)
    if heads != cfg.size.num_heads:
      faults.append(f"num_attention_heads: the checkpoint has {heads}, the config {cfg.size.num_heads}")
    if (act := config.get("hidden_act", "gelu")) != "gelu":
      faults.append(f"hidden_act: the checkpoint has {act!r}, our networks the exact GELU")
  if isinstance(cfg, ViTConfig) and checkpoint.layout == "clip":
    (tensors,) = checkpoint.items.values()
    told = describe_pair(tensors, checkpoint.config)["encoder"]
    own = {"num_heads": cfg.size.num_heads, "activation": cfg.activation, "norm_epsilon": cfg.norm_epsilon}
    own |= {name: getattr(cfg, name) for name in ("pool", "cls_token", "norm_embeddings") if name in told}
    faults += [f"encoder.{k}: the checkpoint has {told[k]}, the config {v}" for k, v in own.items() if told[k] != v]
    return _checked(checkpoint, faults, tuple(notes))
  notes += _notes(config) if isinstance(cfg, ViTConfig) else ()
  return _checked(checkpoint, faults, tuple(notes))


def _checked(checkpoint: Checkpoint, faults: Sequence[str], notes: tuple[str, ...]) -> tuple[str, ...]:
  if faults:
    raise ValueError(f"{checkpoint.where} does not fit the config:\n  " + "\n  ".join(faults))
  return notes


def _notes(config: dict[str, Any]) -> tuple[str, ...]:
  epsilon = config.get("layer_norm_eps", EPSILON)
  if math.isclose(epsilon, EPSILON):
    return ()
  return (f"config.json has layer_norm_eps={epsilon}; ours is {EPSILON}, with which I-JEPA was trained",)


def _heads(checkpoint: Checkpoint, found: dict[str, int]) -> int:
  if heads := checkpoint.config.get("num_attention_heads"):
    return heads
  width = found["width"]
  known = [s.num_heads for s in SIZES.values() if s.width == width]
  return known[0] if known else max(1, width // 64) if width % max(1, width // 64) == 0 else 1


def _grid(num_positions: int, num_prefix: int) -> int | None:
  """Returns the side of the patch grid, whether or not the first positions are those of other tokens; None if none."""
  prefixes = (num_prefix, min(num_prefix, 1), 0)  # DINOv2's registers have no position
  counts = [num_positions - own for own in prefixes]
  sides = [math.isqrt(n) for n in counts if n > 0 and math.isqrt(n) ** 2 == n]
  return sides[0] if sides else None


def predictor_sizes(tensors: Tensors) -> dict[str, int]:
  """Returns depth, width, encoder_width, ... of a predictor in Meta's layout."""
  return measure({key: tuple(x.shape) for key, x in tensors.items()}, PREDICTOR)
