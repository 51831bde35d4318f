"""`weights compare`: two encoders on the same images: what each knows of their classes, and how alike they see them.

N images, D width of an encoder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jepa_jax import checkpoint, features
from jepa_jax.evaluate import evaluate
from jepa_jax.runs import open_run
from jepa_jax.weights.encoders import import_encoder, split_overrides, with_canvas, workdir_for

_NEIGHBOURS = 10
_SEEN = ("evals.view_px", "evals.view_width_px", "evals.crop_fraction", "data.canvas_px", "data.max_aspect")
_BLOCK = 2048  # rows of similarities at a time


def compare_encoders(
  a: str, b: str, images: str, held_out: float = 0.2, overrides: Mapping[str, str] | None = None
) -> dict[str, Any]:
  """Returns {"images", "classes", A: {"knn", "linear", ...}, B: {...}, "cka", "mutual_neighbours"}, in percent but cka.

  Of weights without a word on what no array shows, `assumed` of A and B says what was taken.

  a, b: workdirs, or files, folders or repositories of weights, which are imported into workdirs/NAME. images: a folder;
  where it has a folder per class, `held_out` of each is what kNN and linear probe are tested on. cka: linear, of all
  images. mutual_neighbours: of an image's 10 nearest by the cosine in one encoder how many are so in the other, on
  average.
  """
  folder = Path(images).expanduser().resolve()
  data = {"data.source": "folder", "data.root": str(folder), "data.train": ".", "data.held_out": str(held_out)}
  data |= dict(overrides or {})
  own, data = split_overrides(data)
  names, found, rows = _names(a, b), [], {}
  with tempfile.TemporaryDirectory() as temporary:
    for name, where in zip(names, (a, b), strict=True):
      workdir, assumed = _workdir(where, own)
      out = Path(temporary) / f"{len(found)}.npz"
      seen = with_canvas(data, workdir)
      features.run(workdir, str(out), images=str(folder), overrides={k: seen[k] for k in _SEEN if k in seen})
      with np.load(out) as kept:
        found.append({key: kept[key] for key in kept.files})
      if len(found[-1].get("class_names", ())) > 1:
        rows[name] = evaluate(workdir, None, seen, ("knn", "linear"), baselines=False, show=False).row
        rows[name] = {column: round(float(value), 1) for column, value in rows[name].items()}
      else:
        rows[name] = {}
      rows[name] = {"width": found[-1]["features"].shape[1], "family": _family(workdir)} | rows[name]
      rows[name] |= {"assumed": assumed} if assumed else {}
  both = [name for name in found[0]["names"] if name in set(found[1]["names"])]
  if len(both) < 3:
    raise ValueError(f"--images={images} has {len(both)} images that both could read: give 3 or more, better thousands")
  x, y = (_in_order(f, both) for f in found)
  shared = {"cka": round(linear_cka(x, y), 4), "mutual_neighbours": round(100 * mutual_neighbours(x, y), 1)}
  return {"images": len(both), "classes": len(found[0].get("class_names", ()))} | rows | shared


def linear_cka(x_NxD: np.ndarray, y_NxE: np.ndarray) -> float:
  """Returns the linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414): 1 for what is equal up to a
  rotation, a factor and a shift; of unlike ones near 0 where there are many more images than numbers."""
  x, y = (np.asarray(z, np.float64) - np.mean(z, axis=0, dtype=np.float64) for z in (x_NxD, y_NxE))
  cross = np.square(x.T @ y).sum()
  return float(cross / np.maximum(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y), 1e-30))


def mutual_neighbours(x_NxD: np.ndarray, y_NxE: np.ndarray, k: int = _NEIGHBOURS) -> float:
  """Returns the mean share of the k nearest images, by the cosine, that both have in common."""
  k = min(k, len(x_NxD) - 1)
  if k < 1:
    return 1.0
  near_x, near_y = (_nearest(z, k) for z in (x_NxD, y_NxE))
  return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(near_x, near_y, strict=True)]))


def _nearest(x_NxD: np.ndarray, k: int) -> np.ndarray:
  unit = x_NxD / np.maximum(np.linalg.norm(x_NxD, axis=1, keepdims=True), 1e-30)
  found = []
  for start in range(0, len(unit), _BLOCK):
    scores = unit[start : start + _BLOCK] @ unit.T
    scores[np.arange(len(scores)), start + np.arange(len(scores))] = -np.inf  # itself
    found.append(np.argpartition(-scores, k - 1, axis=1)[:, :k])
  return np.concatenate(found)


def _in_order(found: Mapping[str, np.ndarray], names: list[str]) -> np.ndarray:
  place = {name: i for i, name in enumerate(found["names"])}
  return found["features"][[place[name] for name in names]]


def _names(a: str, b: str) -> tuple[str, str]:
  short = [str(where).rstrip("/").split("/")[-1] for where in (a, b)]
  return (short[0], short[1]) if short[0] != short[1] else (str(a), f"{b} (B)" if a == b else str(b))


def _workdir(where: str, own: Mapping[str, str]) -> tuple[str, list[str]]:
  """Returns the workdir of a run, or that of weights, which are imported if need be, and what was assumed of them."""
  path = Path(where).expanduser()
  is_run = path.is_dir() and (checkpoint.steps(path) or path.parent.name == "checkpoints")
  if is_run:
    return str(path), []
  workdir = workdir_for(where)
  return workdir, import_encoder(where, workdir, own)["assumed"]


def _family(workdir: str) -> str:
  run = open_run(workdir)
  return (run.meta.get("imported") or {}).get("family") or f"{run.cfg.objective.name}, {run.cfg.encoder.name}"
