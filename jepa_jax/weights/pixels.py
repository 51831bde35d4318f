"""What images the weights of a folder want: preprocessor_config.json of transformers, config.json of timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_jax.workdir import read_json

PREPROCESSOR = "preprocessor_config.json"
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_OURS = ("bilinear", "bicubic")


def pixels_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what is told of {"data": {"mean", "std"}, "view": {"size_px", "crop_fraction", "interpolation"}, "notes"}.

  size_px: of the square that the network sees; crop_fraction: its side over the shorter side of the scaled image.
  ValueError for numbers that are none.
  """
  if (path := folder / PREPROCESSOR).exists():
    told = read_json(path)
    data = {key: told[f"image_{key}"] for key in ("mean", "std") if told.get(f"image_{key}") is not None}
    if not pixels_known(data):
      raise ValueError(f"{path}: image_mean and image_std are no lists of numbers; get it again, or remove it")
    return {"data": data} | _of_transformers(told)
  if isinstance(told := config.get("pretrained_cfg"), Mapping):
    data = {key: list(told[key]) for key in ("mean", "std") if isinstance(told.get(key), list | tuple)}
    if not pixels_known(data):
      raise ValueError(f"{folder}/config.json: mean and std of pretrained_cfg are no lists of numbers; get it again")
    return {"data": data} | _of_timm(told)
  return {}


def pixels_known(data: Mapping[str, Any]) -> bool:
  """Whether mean and std of the pixels, where they are given, are lists of numbers."""
  numbers = lambda x: isinstance(x, list) and all(isinstance(v, int | float) for v in x)
  return all(numbers(data[key]) for key in ("mean", "std") if key in data)


def _of_transformers(told: Mapping[str, Any]) -> dict[str, Any]:
  if not told.get("do_resize", True) or not told.get("size"):
    return {}
  size, squashed = told["size"], False
  sides = lambda x: (x.get("height"), x.get("width")) if isinstance(x, Mapping) else (x, x)
  scaled = size.get("shortest_edge") if isinstance(size, Mapping) else size
  if scaled is None:
    scaled, width = sides(size)
    squashed = True
    if scaled != width:
      return {}
  seen = sides(told["crop_size"]) if told.get("do_center_crop") and told.get("crop_size") else (scaled, scaled)
  notes = [f"{PREPROCESSOR} squashes an image to a square; here the middle of it is cut out"] if squashed else []
  return _view(seen, scaled, _RESAMPLE.get(told.get("resample", 3), "another filter"), notes)


def _of_timm(told: Mapping[str, Any]) -> dict[str, Any]:
  size, share = told.get("input_size"), told.get("crop_pct", 0.875)
  if not isinstance(size, list | tuple) or len(size) != 3 or not isinstance(share, int | float) or not 0 < share <= 1:
    return {}
  notes = (
    ["timm's crop_mode is no cut of the middle, as ours is"] if told.get("crop_mode", "center") != "center" else []
  )
  return _view(size[1:], size[1] / share, told.get("interpolation", "bicubic"), notes)


def _view(seen: Any, scaled: Any, interpolation: str, notes: list[str]) -> dict[str, Any]:
  numbers = all(isinstance(x, int | float) and x > 0 for x in (*seen, scaled))
  if not numbers or seen[0] != seen[1] or seen[0] > scaled:
    return {}
  if interpolation not in _OURS:
    notes = [*notes, f"theirs scale images by {interpolation}; here bicubic"]
    interpolation = "bicubic"
  share = round(float(seen[0]) / float(scaled), 4)
  view = {"size_px": int(seen[0]), "crop_fraction": share, "interpolation": interpolation}
  return {"view": view, "notes": notes}
