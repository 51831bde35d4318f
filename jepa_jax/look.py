"""`data`: what is in a data set before anything is trained on it, and the same set written as ArrayRecord."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from jepa_jax.config import Config, load_config
from jepa_jax.data import ImageSet, open_images, open_source, row_batches, write_array_record
from jepa_jax.workdir import write_whole

DESCRIPTION = (
  "look at the data of a config: inspect says what there is, stats gives data.mean and data.std, write makes "
  "ArrayRecord files of it, which are read at random from any disk"
)
ACTIONS = ("inspect", "stats", "write")
_BLOCK, _SHOWN = 64, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.description = DESCRIPTION
  parser.add_argument("action", choices=ACTIONS)
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="settings follow as --config.key=value")
  parser.add_argument("--images", type=int, default=2000, metavar="N", help="decode so many (default: 2000)")
  parser.add_argument("--out", default="", metavar="FOLDER", help="where write puts the files, a new folder")
  parser.add_argument("--per-file", type=int, default=10_000, metavar="N", help="images of a file (default: 10000)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(
  action: str,
  config: str,
  images: int = 2000,
  out: str = "",
  per_file: int = 10_000,
  overrides: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Returns what there is: of both splits ("inspect"), {"mean", "std"} of the training images ("stats"), or what was
  written of each ("write").

  ValueError for a config or training images that cannot be read, and for a folder that holds something.
  """
  if images < 1 or per_file < 1:
    raise ValueError(f"--images={images} and --per-file={per_file}: one at least")
  if bool(out) != (action == "write"):
    raise ValueError("--out names the folder that `data write` puts its files in, and nothing else reads it")
  cfg = load_config(config, _measurable(overrides) if action == "stats" else overrides)
  if action == "write":
    return {"action": action} | write(cfg, Path(out).expanduser(), per_file)
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


def write(cfg: Config, folder: Path, per_file: int) -> dict[str, Any]:
  """Writes both splits as they are encoded, and returns {"out", "splits": {name: images or why not}}."""
  if cfg.data.captions.train or cfg.data.label_maps.set:
    raise ValueError("ArrayRecord files hold images and labels: captions and label maps stay where they are")
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f"--out={folder} holds files, and none is overwritten: name a new folder")
  splits: dict[str, Any] = {}
  opened = {}
  for split in ("train", "test"):
    try:
      opened[split] = open_source(cfg.data, split)
    except ValueError as error:
      if split == "train":
        raise
      splits[split] = str(error)
      continue
    first = opened[split][0]["image"]
    if isinstance(first, np.ndarray) and first.ndim == 3 and first.shape[2] not in (1, 3, 4):
      raise ValueError(
        f"images of {first.shape[2]} channels have no encoded form in ArrayRecord files: keep the arrays"
      )

  def fill(folder: Path) -> None:
    folder.mkdir()
    for split, source in opened.items():
      num_files = -(-len(source) // per_file)
      places = iter(track(range(len(source)), f"{split}: {len(source):,} images", console=Console(stderr=True)))
      for number in range(num_files):
        examples = (source[i] for i in itertools.islice(places, per_file))
        path = folder / f"{split}-{number:05}-of-{num_files:05}.array_record"
        write_array_record(path, examples, source.class_names)
      splits[split] = len(source)

  if folder.exists():
    folder.rmdir()  # it is empty
  write_whole(folder, fill, overwrite=False)
  return {"out": str(folder), "splits": splits}


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
  if result["action"] == "write":
    told = ", ".join(
      f"{name}: {n:,} images" if isinstance(n, int) else f"{name}: {n}" for name, n in result["splits"].items()
    )
    flags = "--config.data.train='train-*.array_record' --config.data.test='test-*.array_record'"
    return f"{told}\n--config.data.source=array_record --config.data.root={result['out']} {flags}"
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
