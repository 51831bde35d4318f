"""What a checkpoint makes of held-out images: neighbours, the spectrum of the features, maps of patch features.

Legend: N images, D width of a feature, T tokens of an image, Q queries, K neighbours.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jepa_jax.config import build_config, to_dict
from jepa_jax.data import ImageSet, open_images, row_batches
from jepa_jax.evals.blocks import l2_normalised
from jepa_jax.runs import Run, open_run
from jepa_jax.show import predictions, retrieval, world_model
from jepa_jax.theory import rankme
from jepa_jax.views import as_rgb, center_view

_QUERIES, _NEIGHBOURS, _MAPS, _CELL_PX, _GAP_PX = 8, 6, 8, 72, 3
_BATCH, _TOKEN_IMAGES = 64, 64
RIGHT, WRONG, NEUTRAL = (26, 127, 55), (207, 34, 46), (140, 149, 159)
_JPEG_QUALITY = 85


class Seen(NamedTuple):
  """Held-out images, what is seen of their canvases, and what the encoder makes of them; tokens where it has any."""

  shown: list[np.ndarray]
  label_N: np.ndarray
  features_NxD: np.ndarray
  tokens_MxTxD: np.ndarray | None
  view_hw: tuple[int, int] = (1, 1)  # height and width of what the encoder saw, or their ratio


def look(workdir: Path, num: int, overrides: Mapping[str, str] | None = None) -> tuple[Run, Seen]:
  """Returns the newest checkpoint, and what its encoder makes of `num` evenly spread images of the test split.

  ValueError (or CheckpointError) where there is no checkpoint, or the images cannot be opened.
  """
  run = open_run(workdir)
  cfg = build_config(to_dict(run.cfg), overrides)
  tokenizer = (run.tokenizer,) if cfg.data.captions.train and run.tokenizer else ()
  experiment = run.experiment()
  objective, share = experiment.objective, cfg.evals.crop_fraction
  network = objective.networks()["image"]

  @jax.jit
  def encode(variables, batch):
    view = center_view(batch, cfg.view_hw, objective.pixels, share, objective.interpolation)
    out = network.apply_fn(variables, view)
    return out.pooled_BxD, out.tokens_BxNxD

  variables = run.variables(experiment, "image")["image"]
  with contextlib.closing(open_images(cfg.data, "test", *tokenizer)) as test:
    return run, _seen(test, num, lambda batch: encode(variables, batch))._replace(view_hw=cfg.view_hw)


def _seen(test: ImageSet, num: int, encode: Callable[[Any], Any]) -> Seen:
  wanted = np.unique(np.linspace(0, len(test) - 1, min(num, len(test))).astype(int))
  shown, labels, features, tokens = [], [], [], []
  for _, batch, real_B in row_batches(test, wanted, min(_BATCH, len(wanted))):
    pooled, of_patches = jax.device_get(encode(batch))
    for i in np.flatnonzero(real_B):
      shown.append(batch["canvas"][i, : batch["height"][i], : batch["width"][i]])
    labels.append(batch["label"][real_B])
    features.append(np.asarray(pooled[real_B], np.float32))
    if of_patches is not None and sum(map(len, tokens)) < _TOKEN_IMAGES:
      tokens.append(np.asarray(of_patches[real_B], np.float32))
  patches = np.concatenate(tokens)[:_TOKEN_IMAGES] if tokens else None
  return Seen(shown, np.concatenate(labels), np.concatenate(features), patches)


def neighbours(seen: Seen) -> tuple[np.ndarray, float]:
  """Returns a picture: in each row an image, then the images nearest to it by cosine, framed green where they are of
  its class and red where not; and the percentage of such neighbours over all images, NaN without labels."""
  z = l2_normalised(seen.features_NxD - seen.features_NxD.mean(0))
  similar = z @ z.T
  np.fill_diagonal(similar, -np.inf)
  nearest_NxK = np.argsort(-similar, axis=1)[:, :_NEIGHBOURS]
  labelled = (seen.label_N >= 0).all()
  agree_NxK = seen.label_N[nearest_NxK] == seen.label_N[:, None]
  rows = []
  for n in np.unique(np.linspace(0, len(z) - 1, _QUERIES).astype(int)):
    cells = [_framed(seen.shown[n], NEUTRAL)]
    for k, other in enumerate(nearest_NxK[n]):
      color = NEUTRAL if not labelled else RIGHT if agree_NxK[n, k] else WRONG
      cells.append(_framed(seen.shown[other], color))
    rows.append(np.concatenate([cells[0], np.full((cells[0].shape[0], 10, 3), 255, np.uint8), *cells[1:]], axis=1))
  return np.concatenate(rows), 100 * float(agree_NxK.mean()) if labelled else float("nan")


def patch_maps(seen: Seen) -> np.ndarray | None:
  """Returns a picture: images, and below each the first three principal components of its patches' features as red,
  green and blue, the components those of all patches together; None for an encoder without a grid of patches."""
  if seen.tokens_MxTxD is None:
    return None
  num, count, width = seen.tokens_MxTxD.shape
  height, wide = seen.view_hw
  grid_hw = round((count * height / wide) ** 0.5), round((count * wide / height) ** 0.5)
  if math.prod(grid_hw) != count or count < 4 or width < 3:
    return None
  flat = seen.tokens_MxTxD.reshape(-1, width)
  flat = flat - flat.mean(0)
  _, _, axes = np.linalg.svd(flat, full_matrices=False)
  parts = flat @ axes[:3].T
  low, high = np.percentile(parts, [2, 98], axis=0)
  colors = np.clip((parts - low) / np.maximum(high - low, 1e-9), 0, 1).reshape(num, *grid_hw, 3)
  top = [_framed(seen.shown[n], (255, 255, 255)) for n in range(min(_MAPS, num))]
  below = [_framed((255 * colors[n]).astype(np.uint8), (255, 255, 255), smooth=False) for n in range(len(top))]
  return np.concatenate([np.concatenate(top, axis=1), np.concatenate(below, axis=1)])


def spectrum(seen: Seen) -> tuple[np.ndarray, float]:
  """Returns the singular values of the features, not centred, each over the largest, and their RankMe."""
  values = np.linalg.svd(seen.features_NxD, compute_uv=False)
  return values / max(values[0], 1e-12), float(rankme(seen.features_NxD))


def of_method(run: Run, overrides: Mapping[str, str] | None = None) -> list[tuple[str, str, bytes]]:
  """Returns (title, what there is to see, PNG) of the pictures that the method has of its own; the commands `show` draw
  them larger, with all their numbers."""
  found = []
  with tempfile.TemporaryDirectory() as folder:
    for title, about, draw in _SHOWN:
      path = Path(folder) / "picture.png"
      try:
        draw(run.workdir, run.step, out=path, overrides=dict(overrides or {}))
      except ValueError:  # not of this method, or of too few images
        continue
      found.append((title, about, path.read_bytes()))
      path.unlink()
  return found


_Draw = Callable[..., Any]
_SHOWN: tuple[tuple[str, str, _Draw], ...] = (
  (
    "What the predictor fills in",
    "`show predictions`: nearest patches to what is predicted, PCA maps.",
    predictions.run,
  ),
  ("What the world model imagines", "`show world_model`: asked for an action, the nearest picture.", world_model.run),
  ("What texts and images find", "`show retrieval`: right ones are framed.", retrieval.run),
)


def as_jpeg(picture: np.ndarray | bytes, most_px: int = 1100) -> str:
  """Returns a picture as a data URI: JPEG, no wider than most_px."""
  from PIL import Image

  opened = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else Image.fromarray(picture)
  image = opened.convert("RGB")
  if image.width > most_px:
    image = image.resize((most_px, round(image.height * most_px / image.width)), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
  return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _framed(image: np.ndarray, color: tuple[int, int, int], smooth: bool = True) -> np.ndarray:
  """Returns an image as a square cell with a frame."""
  from PIL import Image

  shown = as_rgb(image)
  size = _CELL_PX - 2 * _GAP_PX
  scale = size / max(shown.shape[:2])
  height, width = (max(1, round(side * scale)) for side in shown.shape[:2])
  how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
  cell = np.full((size, size, 3), 255, np.uint8)
  top, left = (size - height) // 2, (size - width) // 2
  cell[top : top + height, left : left + width] = np.asarray(Image.fromarray(shown).resize((width, height), how))
  framed = np.full((_CELL_PX + 2, _CELL_PX + 2, 3), 255, np.uint8)
  framed[1:-1, 1:-1] = color
  framed[1 + _GAP_PX : -1 - _GAP_PX, 1 + _GAP_PX : -1 - _GAP_PX] = cell
  return framed
