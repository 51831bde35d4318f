"""Which of our settings a checkpoint fits: read off its shapes and, where there is one, its config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jepa_jax.models import Encoder, ViTConfig
from jepa_jax.models.vit import SIZES
from jepa_jax.weights import resnets
from jepa_jax.weights.convert import Tensors, fold_positions, is_sincos, measure
from jepa_jax.weights.families import EPSILON, Family, family_of, is_moco
from jepa_jax.weights.files import Checkpoint
from jepa_jax.weights.layouts import LAYOUTS, PREDICTOR, Layout
from jepa_jax.weights.pairs import describe_pair

EVALUATED_FIRST = ("target_encoder", "encoder", "state_dict", "model")


@dataclasses.dataclass(frozen=True)
class Description:
  """Settings of an encoder, what was assumed for lack of a source, and what differs though the shapes fit.

  family: what it is in words. channels: of its images, for `data.channels`; 0 where the file does not say.
  """

  settings: dict[str, Any]
  assumed: tuple[str, ...]
  notes: tuple[str, ...]
  channels: int = 0
  family: str = ""


def is_predictor(tensors: Tensors) -> bool:
  """Returns whether these are the weights of a predictor in Meta's layout."""
  return any(key.startswith("predictor_") for key in tensors)


def predictor_of(checkpoint: Checkpoint, item: str) -> str | None:
  """Returns the name of the predictor, or MAE's decoder, that belongs to an encoder; None where there is none.

  ValueError where there are several, and none of them is this encoder's.
  """
  names = [name for name, tensors in checkpoint.items.items() if is_predictor(tensors)]
  if len(names) < 2:
    return names[0] if names else None
  stem = lambda name: name.removesuffix(".decoder")
  own = [name for name in names if stem(name) == item or item.startswith(f"{stem(name)}.")]
  if len(own) == 1:
    return own[0]
  raise ValueError(
    f"{checkpoint.where} holds {', '.join(names)}, and none of them is called after {item}: begin with a new one, "
    "--without-predictor"
  )


def check_decoder(config: Mapping[str, Any], objective: Any, num_heads: int) -> list[str]:
  """Returns notes on what config.json says of MAE's loss; ValueError for another decoder, which no array would show."""
  heads, activation = config.get("decoder_num_attention_heads", num_heads), config.get("hidden_act", "gelu")
  if heads != num_heads:
    raise ValueError(
      f"the decoder has {heads} heads in config.json, and the config {num_heads}: set objective.predictor.num_heads"
    )
  if activation != "gelu":
    raise ValueError(f"the decoder has hidden_act={activation!r}, and ours has gelu")
  ours = {
    "norm_pix_loss": getattr(objective, "norm_pixels", None),
    "mask_ratio": getattr(objective, "mask_ratio", None),
  }
  return [
    f"config.json has {name}={config[name]}, the config {value}"
    for name, value in ours.items()
    if name in config and value is not None and config[name] != value
  ]


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
  if checkpoint.layout in resnets.LAYOUTS:
    return Description(*resnets.describe(tensors, checkpoint.layout, checkpoint.config))
  layout, family = LAYOUTS[checkpoint.layout], family_of(checkpoint, tensors, item)
  found = measure({key: tuple(x.shape) for key, x in tensors.items()}, layout)
  wanted = ("width", "mlp_dim", "patch_size") + (() if family.rotary else ("positions",))
  if (lacking := [name for name in wanted if name not in found]) or not found["depth"]:
    missing = ", ".join(lacking or ["blocks"])
    raise ValueError(
      f"{checkpoint.where}, {item}: looks like {family.name}, but its {missing} cannot be found; it has "
      f"{', '.join(sorted(tensors)[:5])}"
    )
  if family.norm_after_pool and family.cls_token:
    raise ValueError(f"{checkpoint.where}, {item}: a norm after the mean (fc_norm) beside a class token is not read")
  heads, assumed = _heads(checkpoint, item, family, found), []
  variant = next((name for name, size in SIZES.items() if size.width == found["width"]), "")
  if not checkpoint.config.keys() & {"num_attention_heads", "rope_periods"}:
    why = "the usual one at this width" if variant else "a guess, 64 wide each where that divides"
    assumed.append(f"num_heads={heads}: no shape shows it; it is {why}")
  settings = {"name": "vit", "variant": variant or "small", "patch_size": found["patch_size"]}
  settings |= _positions(checkpoint, item, family, layout, found)
  settings |= {"cls_token": True, "pool": "cls"} if family.cls_token else {}
  settings |= {"num_registers": found["num_registers"]} if found.get("num_registers") else {}
  settings |= {"layer_scale": 1e-5} if family.layer_scale else {}
  settings |= {"norm_after_pool": True} if family.norm_after_pool else {}
  settings |= {"activation": family.activation} if family.activation != "gelu" else {}
  if not math.isclose(family.norm_epsilon, EPSILON):
    settings["norm_epsilon"] = family.norm_epsilon
  settings |= {"probe_layers": 1} if found["depth"] < 2 else {}
  size = SIZES[variant or "small"]
  numbers = {"width": found["width"], "depth": found["depth"], "num_heads": heads, "mlp_dim": found["mlp_dim"]}
  settings |= {name: n for name, n in numbers.items() if not variant or n != getattr(size, name)}
  assumed += family.assumed
  return Description(settings, tuple(assumed), family.notes, found["channels"], family.name)


def _positions(
  checkpoint: Checkpoint, item: str, family: Family, layout: Layout, found: Mapping[str, int]
) -> dict[str, Any]:
  """Returns image_size and what the positions are."""
  if family.rotary:
    return {"image_size": int(checkpoint.config.get("image_size", 224)), "pos_embed": "rope"}
  tokens = int(family.cls_token) + found.get("num_registers", 0)
  grid = _grid(found["positions"], tokens)
  if grid is None:
    raise ValueError(f"{checkpoint.where}, {item}: {found['positions']} positions are no square grid, which ours is")
  image_size = grid * found["patch_size"]
  pos = fold_positions(checkpoint.items[item], layout, grid**2)[layout.outside["pos_embed"]]
  if not tokens and is_sincos(pos):
    return {"image_size": image_size, "pos_embed": "sincos"}
  return {"image_size": image_size, "pos_embed": "learned", "pos_filter": family.pos_filter}


def check_layout(checkpoint: Checkpoint, layout: str | None) -> None:
  """Raises a ValueError where another layout is asked for than the names are those of; Meta's names are timm's, too."""
  if layout and layout != checkpoint.layout and {layout, checkpoint.layout} != {"meta", "timm"}:
    raise ValueError(f"--layout={layout}: the names in {checkpoint.where} are those of the layout {checkpoint.layout}")


def check_config(checkpoint: Checkpoint, cfg: Encoder, pixels: Mapping[str, tuple], item: str = "") -> tuple[str, ...]:
  """Returns what may differ though the shapes fit; ValueError where the file says for sure what no shape shows.

  pixels: what those of the config's data are normalised with, {"mean": ..., "std": ...}. item: which of the encoders
  (default: the one that its paper evaluates).
  """
  config, faults, notes = checkpoint.config, [], []
  known = config.get("data", {})
  for name in (name for name in pixels if name in known):
    trained, ours = tuple(known[name]), pixels[name]
    if np.array_equal(trained, ours):
      continue
    if checkpoint.layout in (
      "hf",
      "dinov2",
      "dinov3",
      "hf_resnet",
      "clip",
    ):  # transformers writes its defaults (.5) where a conversion said nothing
      notes.append(f"preprocessor_config.json says {name} {trained}, the config has {ours}. It may hold the library's "
                   f"defaults; if it was trained so: --config.data.{name}='{trained}'")  # fmt: skip
    else:  # pixels normalised in another way are other pixels to the networks
      faults.append(f"data.{name}: trained with {trained}, the config has {ours}: --config.data.{name}='{trained}'")
  if isinstance(cfg, ViTConfig) and checkpoint.layout == "jepa_jax":
    size = config.get("encoder", {}).get("image_size", cfg.image_size)
    if size != cfg.image_size:
      faults.append(f"image_size: the checkpoint has {size}, the config {cfg.image_size}")
  if isinstance(cfg, ViTConfig) and checkpoint.layout in LAYOUTS and checkpoint.layout != "clip":
    return _checked(checkpoint, faults, (*notes, *_unseen(checkpoint, item, cfg, faults)))
  if isinstance(cfg, ViTConfig) and checkpoint.layout == "clip":
    about = describe_pair(checkpoint.items[choose_item(checkpoint, item)], checkpoint.config)
    told, own = about["encoder"], {}
    if not about["assumed"]:  # config.json knows
      own = {"num_heads": cfg.size.num_heads, "activation": cfg.activation, "norm_epsilon": cfg.norm_epsilon}
    own |= {name: getattr(cfg, name) for name in ("pool", "cls_token", "norm_embeddings") if name in told}
    faults += [f"encoder.{k}: the checkpoint has {told[k]}, the config {v}" for k, v in own.items() if told[k] != v]
    return _checked(checkpoint, faults, tuple(notes))
  return _checked(checkpoint, faults, tuple(notes))


def _checked(checkpoint: Checkpoint, faults: Sequence[str], notes: tuple[str, ...]) -> tuple[str, ...]:
  if faults:
    raise ValueError(f"{checkpoint.where} does not fit the config:\n  " + "\n  ".join(faults))
  return notes


def _unseen(checkpoint: Checkpoint, item: str, cfg: ViTConfig, faults: list[str]) -> list[str]:
  """Returns notes on what no shape shows and differs from the config; adds to `faults` what the file says for sure."""
  config, notes = checkpoint.config, []
  item = choose_item(checkpoint, item)
  family = family_of(checkpoint, checkpoint.items[item], item)
  heads = config.get("num_attention_heads", cfg.size.num_heads)
  if heads != cfg.size.num_heads:
    faults.append(f"num_attention_heads: the checkpoint has {heads}, the config {cfg.size.num_heads}")
  if family.activation != cfg.activation:
    faults.append(f"encoder.activation: the checkpoint has {family.activation!r}, the config {cfg.activation!r}")
  if not math.isclose(family.norm_epsilon, cfg.norm_epsilon):
    notes.append(f"the checkpoint has norm_epsilon={family.norm_epsilon}, the config {cfg.norm_epsilon}")
  if cfg.pos_embed == "learned" and family.pos_filter != cfg.pos_filter:
    notes.append(f"the positions of {family.name} are resized by pos_filter={family.pos_filter!r}, the config has "
                 f"{cfg.pos_filter!r}: at the image size {cfg.image_size} it is all the same")  # fmt: skip
  return notes


def _heads(checkpoint: Checkpoint, item: str, family: Family, found: dict[str, int]) -> int:
  if heads := checkpoint.config.get("num_attention_heads"):
    return heads
  width = found["width"]
  if periods := checkpoint.config.get("rope_periods"):  # one for every four numbers of a head
    return max(1, width // (4 * len(periods)))
  if family.rotary:
    return {4096: 32}.get(width, max(1, width // 64))
  if is_moco(item):
    return 12
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
