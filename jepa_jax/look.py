"""`data`: what is in a data set before anything is trained on it: what is found, what is bad, mean and deviation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jepa_jax.config import load_config
from jepa_jax.data import ImageSet, open_images, row_batches

DESCRIPTION = "look at the data of a config: inspect says what there is, stats gives data.mean and data.std"
ACTIONS = ("inspect", "stats")
_BLOCK, _SHOWN = 64, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.description = DESCRIPTION
  parser.add_argument("action", choices=ACTIONS)
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="settings follow as --config.key=value")
  parser.add_argument("--images", type=int, default=2000, metavar="N", help="decode so many (default: 2000)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(action: str, config: str, images: int = 2000, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
  """Returns what there is: of both splits ("inspect"), or {"mean", "std"} of the training images ("stats").

  ValueError for a config or training images that cannot be read.
  """
  if images < 1:
    raise ValueError(f"--images={images}: one at least is decoded")
  cfg = load_config(config, _measurable(overrides) if action == "stats" else overrides)
  train = open_images(cfg.data, "train")
  if action == "stats":
    return {"action": action} | stats(train, images)
  splits = {"train": look(train, images)}
  try:
    splits["test"] = look(open_images(cfg.data, "test", *filter(None, [train.tokenizer])), images)
  except ValueError as error:
    splits["test"] = {"error": str(error)}
  return {"action": action, "splits": splits}


def _measurable(overrides: Mapping[str, str] | None) -> dict[str, str]:
  """Returns settings with a mean and std for as many channels as are asked for: they are what is to be measured."""
  given = dict(overrides or {})
  channels = given.get("data.channels", "")
  if channels.isdigit():
    for name in ("data.mean", "data.std"):
      given.setdefault(name, repr((0.5,) * int(channels)))
  return given


def look(found: ImageSet, num: int) -> dict[str, Any]:
  """Returns {"summary", "decoded", "bad": {name: why}, "shorter_side_px", "canvas_px", "classes": counts}."""
  sides = []
  for rows in _blocks(found, num):
    sides += np.minimum(rows["height"], rows["width"]).tolist()
  canvas_px = found.columns["canvas"].shape[0]
  labels = found.labels()
  counts = {name: int((labels == i).sum()) for i, name in enumerate(found.class_names)}
  return {
    "summary": found.summary(),
    "decoded": len(sides),
    "bad": dict(found.bad.reasons),
    "shorter_side_px": [int(x) for x in np.percentile(sides, [0, 50, 100])] if sides else [],
    "canvas_px": canvas_px,
    "classes": counts,
  }


def stats(found: ImageSet, num: int) -> dict[str, Any]:
  """Returns {"mean", "std", "images", "bad"}: per channel, of the pixels in [0, 1] of so many images, each weighing
  as many as it has."""
  sums, squares, count = 0.0, 0.0, 0
  for rows in _blocks(found, num):
    for canvas, height, width in zip(rows["canvas"], rows["height"], rows["width"]):
      pixels = canvas[:height, :width].reshape(-1, canvas.shape[-1]).astype(np.float64) / 255
      sums, squares, count = sums + pixels.sum(0), squares + np.square(pixels).sum(0), count + len(pixels)
  if not count:
    raise ValueError(f"none of the images decodes:\n{found.bad.report()}")
  mean = sums / count
  std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
  said = {"mean": [round(x, 4) for x in mean.tolist()], "std": [round(x, 4) for x in std.tolist()]}
  return said | {"images": min(num, len(found)), "bad": len(found.bad.reasons)}


def _blocks(found: ImageSet, num: int) -> Iterator[dict[str, np.ndarray]]:
  """Yields the rows of evenly spread images that decode."""
  every = np.unique(np.linspace(0, len(found) - 1, min(num, len(found))).astype(int))
  for _, batch, real in row_batches(found, every, _BLOCK):
    yield {name: column[real] for name, column in batch.items()}


def render(result: dict[str, Any]) -> str:
  """Returns the answer in words, or the flags to type."""
  if result["action"] == "stats":
    flags = " ".join(f'"--config.data.{name}=({", ".join(map(str, result[name]))},)"' for name in ("mean", "std"))
    return f"{flags}\n# of {result['images']:,} images, {result['bad']} of which do not decode"
  return "\n".join(line for name, split in result["splits"].items() for line in _lines(name, split))


def _lines(name: str, split: Mapping[str, Any]) -> Iterator[str]:
  if "error" in split:
    yield f"{name}: cannot be opened: {split['error']}"
    return
  yield f"{name}: {split['summary']}"
  yield (
    f"  decoded {split['decoded']:,}; on the canvas of {split['canvas_px']} px the shorter side has "
    + " / ".join(f"{px}" for px in split["shorter_side_px"])
    + " px (least / median / most)"
  )
  if split["classes"]:
    shown = list(split["classes"].items())[:_SHOWN]
    more = f", and {len(split['classes']) - _SHOWN} more" if len(split["classes"]) > _SHOWN else ""
    yield "  " + ", ".join(f"{label} {count:,}" for label, count in shown) + more
  if split["bad"]:
    yield f"  {len(split['bad'])} do not decode: {json.dumps(dict(list(split['bad'].items())[:_SHOWN]))}"
