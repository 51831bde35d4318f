"""What images and captions find: for held-out captions the nearest images, for images the nearest captions.

Legend: N images, C captions of an image, L tokens, T captions of all images, D width of an embedding.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jepa_jax.config import build_config, to_dict
from jepa_jax.data import ImageSet, open_images, row_batches
from jepa_jax.evals.blocks import l2_normalised
from jepa_jax.evals.retrieval import recalls
from jepa_jax.evaluate import check_overrides
from jepa_jax.figure import subplots
from jepa_jax.runs import open_run
from jepa_jax.show import held_out
from jepa_jax.show.held_out import rounded
from jepa_jax.views import center_view

DESCRIPTION = (
  "Held-out captions with the images nearest to them, and images with the nearest captions; right ones framed."
)
NEAREST, LINES = 5, 3  # images of a caption, captions of an image
RIGHT, WRONG = "#1a7f37", "#57606a"
_BATCH, _CELL_IN, _DPI = 64, 1.45, 110


def add_arguments(parser: Any) -> None:
  """Adds the arguments of `run` to an argparse parser; settings of data and evals follow as --config.data.key=value."""
  held_out.add_arguments(parser, images=6, seed="captions and images", picture="retrieval.png")


def run(
  workdir: str | Path,
  step: int | None = None,
  images: int = 6,
  seed: int = 0,
  out: str | Path = "",
  overrides: dict[str, str] | None = None,
) -> dict[str, Any]:
  """Draws a PNG and returns its path and the recalls over all held-out images, for JSON.

  Each row shows a caption of one image, with the images nearest to it, and another image with the captions nearest to
  it. ValueError where the checkpoint has no text tower, or there are too few images.
  """
  check_overrides(overrides)
  found, tokenizer = (source := open_run(workdir, step)).experiment(), source.tokenizer
  objective, cfg = found.objective, build_config(to_dict(found.cfg), overrides)
  if tokenizer is None:
    raise ValueError(f"{workdir} was trained with objective {cfg.objective.name!r}, which reads no captions; use clip")
  if not cfg.data.captions.train:
    raise ValueError("data.captions.train is empty: say where the captions of these images are")
  test = open_images(cfg.data, "test", tokenizer)
  path = held_out.picture_path(out, source.workdir / "retrieval.png")
  if not 1 <= 2 * images <= len(test):
    raise ValueError(f"images={images}: a caption and an image for each, of {len(test)} test images; ask for fewer")
  variables = source.variables(found, "image_embedding", "text_embedding")
  size_hw, share = cfg.view_hw, cfg.evals.crop_fraction
  networks = objective.networks()

  @jax.jit
  def embed(variables, batch):
    view = center_view(batch, size_hw, objective.pixels, share, objective.interpolation)
    image = networks["image_embedding"].apply_fn(variables["image_embedding"], view).pooled_BxD
    return image, networks["text_embedding"].apply_fn(variables["text_embedding"], batch["caption"]).pooled_BxD

  image_NxD, text_NxCxD, ids_NxCxL, index_N = _embedded(embed, variables, test)
  similar_TxN, owner_T, place_T = similarities(image_NxD, text_NxCxD)
  order = np.random.default_rng(seed).permutation(len(image_NxD))
  words = [tokenizer.decode(ids_NxCxL[n, c]) for n, c in zip(owner_T, place_T)]
  shown = lambda n: held_out.picture(test, index_N[n])[0]
  draw(path, similar_TxN, owner_T, words, order[:images], order[images : 2 * images], shown)
  numbers = recalls(image_NxD, text_NxCxD)
  return {"step": source.step, **{name: rounded(value) for name, value in numbers.items()}, "picture": str(path)}


def _embedded(embed: Any, variables: Any, test: ImageSet):
  """Returns embeddings (N, D) and (N, C, D), captions' ids and indices of all images that decode."""
  parts = []
  for _, batch, real_B in row_batches(test, np.arange(len(test)), _BATCH):
    image, text = jax.device_get(embed(variables, batch))
    parts.append([x[real_B] for x in (image, text, batch["caption"], batch["index"])])
  image, text, ids, index = (np.concatenate(column) for column in zip(*parts))
  return image, text.reshape(len(text), -1, image.shape[1]), ids, index


def similarities(image_NxD: np.ndarray, text_NxCxD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the cosine of every caption with every image (T, N), whose caption it is, and which of that image's."""
  owner_T, place_T = np.nonzero(np.abs(text_NxCxD).max(-1) > 0)
  return l2_normalised(text_NxCxD[owner_T, place_T]) @ l2_normalised(image_NxD).T, owner_T, place_T


def draw(path: Path, similar_TxN, owner_T, words: list[str], of_caption, of_image, pixels: Any) -> None:
  """Draws a row for each: the first caption of an image, its nearest images; an image, its nearest captions.

  pixels(n) -> the picture of image n; what belongs together is framed, or written, in green.
  """
  rows, widths = len(of_caption), [1.7, *[1.0] * NEAREST, 0.25, 1.0, 3.4]
  size = _CELL_IN * sum(widths), _CELL_IN * rows + 0.4
  fig, axes = subplots(rows, len(widths), figsize=size, width_ratios=widths, squeeze=False, layout="constrained")
  for ax in axes.ravel():
    ax.set_axis_off()
  axes[0][0].set_title("caption", fontsize=9, loc="left")
  axes[0][1].set_title("nearest images", fontsize=9, loc="left")
  axes[0][-2].set_title("image", fontsize=9, loc="left")
  axes[0][-1].set_title("nearest captions", fontsize=9, loc="left")
  for cells, n, m in zip(axes, of_caption, of_image, strict=True):
    (t, *_) = np.flatnonzero(owner_T == n)
    _write(cells[0], 0.5, words[t], "black", 24)
    for ax, near in zip(cells[1:], np.argsort(-similar_TxN[t], kind="stable")[:NEAREST]):
      _show(ax, pixels(near), near == n)
    _show(cells[-2], pixels(m), False)
    for i, t in enumerate(np.argsort(-similar_TxN[:, m], kind="stable")[:LINES]):
      _write(cells[-1], 1 - (i + 0.5) / LINES, words[t], RIGHT if owner_T[t] == m else WRONG, 46)
  fig.savefig(path, dpi=_DPI)


def _write(ax: Any, y: float, text: str, color: str, width: int) -> None:
  bold = "bold" if color == RIGHT else "normal"
  style = dict(fontsize=7.5, color=color, weight=bold, va="center", parse_math=False)  # "$5" is no formula
  ax.text(0, y, textwrap.fill(text, width), transform=ax.transAxes, **style)


def _show(ax: Any, picture: np.ndarray, is_right: bool) -> None:
  ax.imshow(picture.squeeze(), cmap="gray")
  if is_right:
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
      side.set(color=RIGHT, linewidth=4)
