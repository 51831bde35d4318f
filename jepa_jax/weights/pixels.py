"""What images the weights of a folder want: preprocessor_config.json (or processor_config.json) of transformers,
config.json of timm."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_jax.views import Interpolation
from jepa_jax.workdir import read_json

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second of whole processors, images within
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_MOST_PX = 10_000  # more is no size of a view
_BYTE = 1 / 255  # by what a byte is multiplied before mean and std
_CONVNEXT_WHOLE_PX = 384  # from here on ConvNext's processor, which ResNets have, cuts nothing off


def pixels_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what is told of {"data": {"mean", "std"}, "view": {"size_px", "crop_fraction", "interpolation"}, "notes"}.

  size_px: of the square that the network sees; crop_fraction: its side over the shorter side of the scaled image.
  notes: what ours cannot do. ValueError for a mean or a std that is no list of numbers.
  """
  path = next((folder / name for name in PREPROCESSORS if (folder / name).exists()), None)
  if path:
    told = read_json(path)
    told, prefix, view = told.get("image_processor", told), "image_", _of_transformers
  else:
    flat = config if "architecture" in config and "mean" in config else None  # as timm wrote it before 2023
    path, told, prefix, view = folder / "config.json", config.get("pretrained_cfg", flat), "", _of_timm
  if not isinstance(told, Mapping):
    return {}
  data = {key: told[prefix + key] for key in ("mean", "std") if told.get(prefix + key) is not None}
  data = {key: [x] * 3 if _is_number(x) else x for key, x in data.items()}
  if not pixels_known(data):
    raise ValueError(f"{path}: {prefix}mean and {prefix}std are no lists of numbers; get it again, or remove it")
  data, seen = _of_bytes(told, data), view(told)
  unsaid = [name for name in ("mean", "std") if name not in data]
  notes = [f"{path.name} says no {' and no '.join(unsaid)}: ImageNet's is taken"] if unsaid else []
  return {"data": data} | seen | {"notes": [*seen["notes"], *notes]}


def pixels_known(data: Mapping[str, Any]) -> bool:
  """Whether mean and std of the pixels, where they are given, are lists of numbers."""
  numbers = lambda x: isinstance(x, list) and all(map(_is_number, x))
  return isinstance(data, Mapping) and all(numbers(data[key]) for key in ("mean", "std") if key in data)


def _is_number(x: Any) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def view_of(size_hw: Sequence[Any], scaled_px: Any, interpolation: str, notes: Sequence[str] = ()) -> dict[str, Any]:
  """Returns {"view", "notes"} of a cut out of the middle of an image whose shorter side is scaled_px; an empty view,
  and a note, where ours cannot be so."""
  numbers = all(_is_number(x) and 0 < x < _MOST_PX for x in (*size_hw, scaled_px))
  if not numbers or len(size_hw) != 2 or size_hw[0] != size_hw[1] or size_hw[0] > scaled_px:
    told = f"{' x '.join(map(str, size_hw))} of {scaled_px} px"
    return {"view": {}, "notes": [*notes, f"theirs are seen as {told}, which ours are not: the weights' own size is"]}
  if interpolation not in typing.get_args(Interpolation):
    notes, interpolation = [*notes, f"theirs are scaled by {interpolation}, ours bicubic"], "bicubic"
  view = {"size_px": int(size_hw[0]), "crop_fraction": size_hw[0] / scaled_px, "interpolation": interpolation}
  return {"view": view, "notes": list(notes)}


def _of_bytes(told: Mapping[str, Any], data: dict[str, Any]) -> dict[str, Any]:
  """Returns the mean and std of pixels in [0, 1], whatever theirs are of, or whether they are asked for at all."""
  if told.get("do_normalize") is False:
    data = {"mean": [0.0] * 3, "std": [1.0] * 3}
  factor = told.get("rescale_factor", _BYTE) if told.get("do_rescale", True) else 1.0
  scale = factor / _BYTE if _is_number(factor) and factor > 0 else 1.0
  return data if math.isclose(scale, 1, rel_tol=1e-4) else {key: [x / scale for x in own] for key, own in data.items()}


def _of_transformers(told: Mapping[str, Any]) -> dict[str, Any]:
  size, cut, share = told.get("size"), told.get("crop_size"), told.get("crop_pct")
  if not told.get("do_resize", True) or size is None:
    return {"view": {}, "notes": ["the preprocessor does not say to which size images are scaled"]}
  sides = lambda x: (x.get("height"), x.get("width")) if isinstance(x, Mapping) else (x, x)
  shorter = size.get("shortest_edge") if isinstance(size, Mapping) else size
  squashed = shorter is None
  scaled: Any = sides(size)[0] if squashed else shorter
  cuts = bool(cut) and told.get("do_center_crop", True)
  seen = sides(cut) if cuts else sides(size) if squashed else (scaled, scaled)
  if share and _is_number(scaled) and _is_number(share):  # ConvNext's, of ResNets
    squashed = scaled >= _CONVNEXT_WHOLE_PX
    scaled = scaled if squashed else int(scaled / share)
  elif isinstance(size, int) and not cuts:  # the older ViTFeatureExtractor
    squashed = True
  notes = ["the preprocessor squashes an image to a square; here the middle of it is cut out"] if squashed else []
  usual = 2 if str(told.get("image_processor_type", "")).startswith("ViT") else 3
  named = told.get("resample") if told.get("resample") is not None else usual
  filtered = _RESAMPLE.get(named, "another filter") if isinstance(named, int) else str(named).lower()
  return view_of(seen, scaled, filtered, notes)


def _of_timm(told: Mapping[str, Any]) -> dict[str, Any]:
  size, share = told.get("input_size"), told.get("crop_pct") or 0.875
  if not isinstance(size, list) or len(size) != 3 or not _is_number(share) or not 0 < share <= 1:
    why = f"timm's input_size={size} and crop_pct={share} are no view of ours: they are left out"
    return {"view": {}, "notes": [why]}
  centred = told.get("crop_mode", "center") == "center"
  notes = [] if centred else ["timm's crop_mode is no cut of the middle, as ours is"]
  scaled = int(size[1] / share) if _is_number(size[1]) else size[1]
  return view_of(size[1:], scaled, told.get("interpolation", "bicubic"), notes)
