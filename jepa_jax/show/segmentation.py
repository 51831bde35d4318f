"""What a linear head says of the pixels of held-out images, beside their label maps and what patches of a size allow.

The head is that of `eval --evals=segmentation`, trained here as it is there.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jepa_jax.data import VOID, open_images
from jepa_jax.evals.dense import Said, grid_of, label_maps, shares_of_patches, windows_of
from jepa_jax.evals.segmentation import fit
from jepa_jax.evaluate import eval_config
from jepa_jax.figure import subplots
from jepa_jax.runs import open_run
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.show import held_out
from jepa_jax.show.held_out import rounded
from jepa_jax.subjects import seen_of, subjects

DESCRIPTION = "Held-out images with label maps: the labels, what patches of this size allow, what a linear head says."
COLUMNS = ("image", "labels", "the labels, by patch", "linear head")
_CELL_IN, _LEGEND_IN, _DPI, _LEGEND = 2.2, 1.6, 110, 24  # as many classes have a name beside the picture
_VOID_COLOR = (0.0, 0.0, 0.0)


def add_arguments(parser: Any) -> None:
  """Adds the arguments of `run` to an argparse parser; settings of data and evals follow as --config.data.key=value."""
  held_out.add_arguments(parser, images=4, seed="images", picture="segmentation.png")


def run(
  workdir: str | Path,
  step: int | None = None,
  images: int = 4,
  seed: int = 0,
  out: str | Path = "",
  overrides: dict[str, str] | None = None,
) -> dict[str, Any]:
  """Draws a PNG, a row per image, and returns its path and numbers, for JSON: the mean IoU of all test images, and of
  each image that is drawn the share of its labelled pixels that are right.

  Black is void. The head is trained as `evals.dense` says, on the training images, as for the table. ValueError where
  the images have no label maps, or there are too few.
  """
  source = open_run(workdir, step)
  cfg, mesh = eval_config(source.cfg, overrides, ("segmentation",)), make_mesh(MeshConfig(), jax.local_devices())
  experiment, train, test = source.experiment(mesh), open_images(cfg.data, "train"), open_images(cfg.data, "test")
  if not (train.map_classes and test.map_classes):
    raise ValueError(f"the images of data.source={cfg.data.source!r} have no label maps: set data.label_maps.set")
  if not 1 <= images <= len(test):
    raise ValueError(f"images={images} of {len(test)} test images: ask for 1 to {len(test)}")
  data = seen_of(cfg, experiment.objective, train, test)
  path = held_out.picture_path(out, source.workdir / "segmentation.png")
  with subjects(source, cfg, experiment, data, mesh, False, False, False) as (subject,):
    cfg.evals.asked["segmentation"].check(subject)
    tuned, rows_N = fit(subject)
    of = windows_of(subject, cfg.evals.dense)
    order = np.random.default_rng(seed).permutation(len(rows_N))
    said = dict(itertools.islice(tuned.label_maps(order), images))  # of those that decode
    if len(said) < images:
      raise ValueError(f"images={images}, and {len(said)} test images decode: ask for fewer")
    shares = lambda _, batch: shares_of_patches(batch, of, grid_of(subject, of), len(test.map_classes))[0]
    allowed = dict(label_maps(mesh, of, Said(test, np.array(list(said)), shares)))
  rows = []
  for row, guess in said.items():
    image, batch = held_out.picture(test, row)
    label = batch["label_map"][0, : image.shape[0], : image.shape[1]]
    rows.append((image, label, np.where(label == VOID, VOID, allowed[row]), guess))
  names = [test.names[row] if test.names else f"image {row}" for row in said]
  draw(path, rows, names, test.map_classes)
  return {
    "step": source.step,
    "mean_iou": rounded(tuned.found[""]["miou"]),
    "learning_rate": tuned.learning_rate,
    "right": {name: right(label, guess) for name, (_, label, _, guess) in zip(names, rows, strict=True)},
    "right_by_patch": {name: right(label, guess) for name, (_, label, guess, _) in zip(names, rows, strict=True)},
    "picture": str(path),
  }


def right(label: np.ndarray, guess: np.ndarray) -> float | None:
  """Returns the percentage of labelled pixels that are guessed right; None where all is void."""
  known = label != VOID
  return rounded(100 * (label == guess)[known].mean()) if known.any() else None


def draw(path: Path, rows: list, names: list[str], classes: tuple[str, ...]) -> None:
  """Draws a row for each (image, label map, map by patch, map of the head), all of a colour per class."""
  from matplotlib.patches import Patch

  aspect = max(image.shape[0] / image.shape[1] for image, *_ in rows)
  colors = palette(len(classes))
  size = _CELL_IN * len(COLUMNS) + _LEGEND_IN, _CELL_IN * aspect * len(rows) + 0.35 * len(rows) + 0.4
  fig, axes = subplots(len(rows), len(COLUMNS), figsize=size, squeeze=False, layout="constrained")
  for ax, title in zip(axes[0], COLUMNS, strict=True):
    ax.set_title(title, fontsize=9)
  for cells, (image, label, *guesses), name in zip(axes, rows, names, strict=True):
    cells[0].imshow(image.squeeze(), cmap="gray")
    cells[0].set_xlabel(name, fontsize=7)
    cells[1].imshow(colored(label, colors))
    for ax, guess in zip(cells[2:], guesses, strict=True):
      ax.imshow(colored(guess, colors))
      ax.set_xlabel("all void" if (share := right(label, guess)) is None else f"{share:.1f} % right", fontsize=7)
    for ax in cells:
      ax.set(xticks=[], yticks=[])
  shown = np.unique(np.concatenate([part.ravel() for _, *maps in rows for part in maps]))
  named = [c for c in shown.tolist() if c < len(classes)][:_LEGEND]
  handles = [Patch(color=colors[c], label=classes[c]) for c in named] + [Patch(color=_VOID_COLOR, label="void")]
  fig.legend(handles=handles, loc="outside right upper", fontsize=8)
  fig.savefig(path, dpi=_DPI)


def palette(num: int) -> np.ndarray:
  """Returns a colour for each class, (num, 3) in [0, 1]: neighbours differ in hue, and every third in lightness."""
  from matplotlib.colors import hsv_to_rgb

  at = np.arange(num)
  return hsv_to_rgb(np.stack([at * 0.618 % 1, np.choose(at % 3, (0.75, 0.45, 0.9)), 1 - 0.2 * (at % 3)], -1))


def colored(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
  """Returns the picture of a label map, (h, w, 3); void is black."""
  return np.concatenate([colors, [_VOID_COLOR]])[np.minimum(label, len(colors))]
