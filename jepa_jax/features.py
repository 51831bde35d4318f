"""`features`: what an encoder makes of images, in one file, with their names."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jepa_jax.config import Config
from jepa_jax.data import CaptionConfig, DataConfig, ImageSet, LabelMapConfig, open_images
from jepa_jax.evals.features import make_features
from jepa_jax.evaluate import eval_config
from jepa_jax.runs import open_run
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.subjects import network_features

DESCRIPTION = "features of your images by the encoder of a run, into one .npz or .parquet file"
ENDINGS = (".npz", ".parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.description = DESCRIPTION
  parser.epilog = (
    "The view is that of evaluation: --config.evals.view_px, .view_width_px, .crop_fraction and .batch_size change it."
  )
  parser.add_argument("--workdir", required=True, metavar="DIR", help="the workdir of a run, or one checkpoint folder")
  parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
  parser.add_argument("--images", metavar="FOLDER", help="images in it and below (default: those of --split)")
  parser.add_argument("--split", choices=("train", "test"), default="test", help="of the run's data")
  parser.add_argument("--out", required=True, metavar="FILE", help="ends in .npz or .parquet")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(
  workdir: str,
  out: str,
  images: str | None = None,
  split: str = "test",
  step: int | None = None,
  overrides: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Returns {"out", "images", "width", "skipped": {name: why}}; writes names, features (N, D) and labels, if any.

  Arrays of .npz: `features` float32 (N, D), `names`, and where there are classes `labels` and `class_names`; columns of
  .parquet: name, features, label.
  """
  path = Path(out).expanduser()
  if path.suffix not in ENDINGS:
    raise ValueError(f"--out={out} ends in {path.suffix or 'nothing'}: give a name that ends in {' or '.join(ENDINGS)}")
  if not path.parent.is_dir():
    raise ValueError(f"--out={out}: there is no folder {path.parent}; make it first")
  opened = open_run(workdir, step)
  cfg = eval_config(opened.cfg, overrides, None)
  found = _images(cfg, images, split, opened.tokenizer)
  mesh = make_mesh(MeshConfig(), jax.local_devices())
  experiment = opened.experiment(mesh)
  features_fn = network_features("image", experiment, cfg.view_hw, cfg.evals.crop_fraction)
  variables = opened.variables(experiment, "image")["image"]
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=".features") as folder:
    kept = Path(folder) / "features"
    args = found, mesh, cfg.evals.batch_size, False, cfg.evals.memory_gb
    made = make_features(kept, "features", features_fn, variables, *args)
    names = found.names or [str(i) for i in range(len(found))]
    _write(path, np.asarray(made.pooled, np.float32), [names[i] for i in made.index], made.label, found.class_names)
    return {
      "out": str(path),
      "images": len(made.index),
      "width": made.pooled.shape[1],
      "skipped": dict(found.bad.reasons),
    }


def _images(cfg: Config, folder: str | None, split: str, tokenizer: Any) -> ImageSet:
  """Returns the images of a folder, or of a split of the run's data; captions and label maps are not read."""
  data = dataclasses.replace(cfg.data, captions=CaptionConfig(), label_maps=LabelMapConfig(), cache_mb=0)
  if folder is None:
    return open_images(data, split)
  here = Path(folder).expanduser()
  if not here.is_dir():
    raise ValueError(f"--images={folder} is no folder: give one that holds images, in it or below")
  same = ("canvas_px", "max_aspect", "channels", "mean", "std", "num_threads", "prefetch")
  kept = {name: getattr(data, name) for name in same}
  return open_images(DataConfig("folder", **kept, root=str(here), train=".", cache_mb=0, max_bad_share=1.0), "train")


def _write(path: Path, features_NxD, names: list[str], label_N: np.ndarray, classes: tuple[str, ...]) -> None:
  if path.suffix == ".npz":
    labels = {"labels": label_N, "class_names": np.array(classes)} if classes else {}
    np.savez(path, features=features_NxD, names=np.array(names), **labels)
    return
  import pyarrow as pa
  import pyarrow.parquet

  flat = pa.array(np.ascontiguousarray(features_NxD).ravel())
  columns = {"name": pa.array(names), "features": pa.FixedSizeListArray.from_arrays(flat, features_NxD.shape[1])}
  if classes:
    columns["label"] = pa.array([classes[i] if i >= 0 else None for i in label_N])
  pyarrow.parquet.write_table(pa.table(columns), path)


def render(result: dict[str, Any]) -> str:
  """Returns a line, and one for each image that was skipped (ten at most)."""
  lines = [f"{result['images']} images, {result['width']} features each: {result['out']}"]
  skipped = list(result["skipped"].items())
  lines += [f"skipped {name}: {why}" for name, why in skipped[:10]]
  return "\n".join([*lines, *([f"and {len(skipped) - 10} more"] if len(skipped) > 10 else [])])
