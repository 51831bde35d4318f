"""What a predictor knows: for held-out images, the patches of other images nearest to its predictions in target space.

Legend: B images, N patches, K context patches, M target blocks, T patches of a block (padded), D width, Q predicted
patches (of all blocks of all images), G patches of some gallery images, H W C image, S side of a patch in px.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.decomposition import PCA

from jepa_jax.config import build_config, to_dict
from jepa_jax.data import open_images
from jepa_jax.evaluate import check_overrides
from jepa_jax.figure import subplots
from jepa_jax.objectives import Objective, Predicts
from jepa_jax.runs import open_run
from jepa_jax.show import held_out
from jepa_jax.show.held_out import batches, rank_numbers, rounded
from jepa_jax.views import NUM_ACTIONS, center_view

DESCRIPTION = (
  "Held-out images, what is masked, the gallery's patches nearest to what is predicted, PCA of the features."
)
MEASURED = 64  # images whose predictions are measured; the first of them are drawn
CELL_IN, TITLE_IN, DPI, GREY = 1.7, 0.45, 120, 0.5
COLUMNS = (
  "image",
  "context",
  "nearest to the\nprediction",
  "nearest to the\ntrue target",
  "target features,\nPCA",
  "predicted features,\nsame components",
)


def add_arguments(parser: Any) -> None:
  """Adds the arguments of `run` to an argparse parser; settings of data and evals follow as --config.data.key=value."""
  held_out.add_arguments(parser, images=4, seed="images and masks", picture="predictions.png")
  parser.add_argument(
    "--gallery", type=int, default=512, help="images that patches are found in (default: %(default)s)"
  )


def run(
  workdir: str | Path,
  step: int | None = None,
  images: int = 4,
  gallery: int = 512,
  seed: int = 0,
  out: str | Path = "",
  overrides: dict[str, str] | None = None,
) -> dict[str, Any]:
  """Draws a PNG and returns its path and the numbers, for JSON: the cosine of predictions and targets, and the rank of
  the true patch among it and the gallery's patches by their cosine with the prediction (`all_places`), and among those
  at its own place (`same_place`: what is known beyond the position), each beside chance.

  The numbers are over 64 held-out images, of which the first are drawn; the gallery are other held-out images.
  ValueError where the checkpoint has no predictor, or there are too few images.
  """
  check_overrides(overrides)
  found_run = open_run(workdir, step)
  workdir, step, experiment = found_run.workdir, found_run.step, found_run.experiment()
  objective, cfg = experiment.objective, build_config(to_dict(experiment.cfg), overrides)
  if not isinstance(objective, Predicts):
    raise ValueError(
      f"{workdir} was trained with objective {cfg.objective.name!r}, which predicts no patches; use ijepa, iwm or mae"
    )
  test = open_images(cfg.data, "test")
  path = held_out.picture_path(out, workdir / "predictions.png")
  seen_B, gallery_B = choose(len(test), images, gallery, seed)
  describe_fn, networks = make_describe_fn(objective, cfg), found_run.networks(experiment)
  seen = [describe_fn(networks, *rows[:2]) for rows in batches(test, seen_B, seed)]
  seen = {name: np.concatenate([part[name] for part in map(jax.device_get, seen)])[: len(seen_B)] for name in seen[0]}
  gallery_fn = jax.jit(lambda *row: {name: describe_fn(*row)[name] for name in ("target_BxNxD", "pixels_BxNxSxSxC")})
  others = (gallery_fn(networks, *rows[:2]) | {"real_B": rows[2]} for rows in batches(test, gallery_B, seed))
  found = retrieve(seen, others)
  draw(path, {name: x[:images] for name, x in seen.items()}, found, objective.grid_hw)
  num_gallery = int(found["real_B"].sum()), int(found["real_B"].sum()) * seen["target_BxNxD"].shape[1]
  return {
    "step": step,
    "images": len(seen_B),
    "patches": len(found["place_Q"]),
    "gallery_images": num_gallery[0],
    "cosine": rounded(found["own_Q"].mean()),
    "cosine_with_gallery": rounded(found["mean_Q"].mean()),
    "all_places": rank_numbers(found["rank_Q"], num_gallery[1] + 1),
    "same_place": rank_numbers(found["rank_here_Q"], num_gallery[0] + 1),
    "picture": str(path),
  }


def choose(num_test: int, images: int, gallery: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the indices of the images that are measured (at least `images`) and of the gallery's, disjoint."""
  if min(images, gallery) < 1:
    raise ValueError(f"images={images} and gallery={gallery} must be at least 1")
  num = max(images, min(MEASURED, num_test // 2))
  if num >= num_test:
    raise ValueError(f"images={images} of {num_test} test images leave none for the gallery; ask for fewer")
  order = np.random.default_rng(seed).permutation(num_test)
  return order[:num], order[num : num + gallery]


def make_describe_fn(objective: Objective, cfg: Any):
  """Returns the jitted (networks, batch, keys) -> masks, pixels in [0, 1], targets, predictions of evaluation views."""
  size_hw = cfg.objective.views.global_crops.size_hw

  @jax.jit
  def describe(networks, batch, keys_B):
    params, target = networks["params"], networks["target"] or networks["params"]
    crop = size_hw, objective.pixels, cfg.evals.crop_fraction, objective.interpolation
    images, masks = center_view(batch, *crop), objective.masks(keys_B)
    encode = lambda params, **keep: objective.encoder.apply({"params": params["encoder"]}, images, **keep)
    target_BxNxD = encode(target).tokens_BxNxD
    context_BxKxD = objective.context(encode(params, keep_BxK=masks.context_BxK))
    null_BxA = jnp.zeros((len(images), NUM_ACTIONS))  # for the predictors that are told an action
    pixels = images * jnp.asarray(objective.pixels.std) + jnp.asarray(objective.pixels.mean)
    return {
      "pixels_BxNxSxSxC": to_patches(pixels, objective.encoder.patch_size),
      "context_BxK": masks.context_BxK,
      "targets_BxMxT": masks.targets_BxMxT,
      "valid_BxMxT": masks.valid_BxMxT,
      "prediction_BxMxTxD": objective.predict(params, context_BxKxD, masks, null_BxA),
      "target_BxNxD": objective.targets(target_BxNxD, images),
    }

  return describe


def retrieve(seen: dict[str, np.ndarray], gallery: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
  """Returns for each predicted patch (in the order of seen["valid_BxMxT"]) what a search of the gallery finds.

  own_Q: cosine of prediction and target, mean_Q: of prediction and gallery. rank_Q, rank_here_Q: the true patch's rank
  by cosine with the prediction among the gallery's patches, and among those at its place; equals count half.
  pixels_QxSxSxC, true_pixels_QxSxSxC: of the gallery's patch nearest to the prediction, and to the target.
  """
  valid, place = seen["valid_BxMxT"], seen["targets_BxMxT"]
  image_Q = np.nonzero(valid)[0]
  place_Q = place[valid]
  prediction_QxD, target_QxD = _unit(seen["prediction_BxMxTxD"][valid]), _unit(seen["target_BxNxD"][image_Q, place_Q])
  own_Q = (prediction_QxD * target_QxD).sum(-1)
  query_2xQxD = jnp.stack([prediction_QxD, target_QxD])
  shape_2xQ = query_2xQxD.shape[:2]
  best = jnp.full(shape_2xQ, -jnp.inf), jnp.zeros((*shape_2xQ, *seen["pixels_BxNxSxSxC"].shape[2:]))
  total, reals = jnp.zeros((5, len(own_Q))), []
  for part in gallery:
    best, counts = _compare(
      query_2xQxD, own_Q, place_Q, best, part["target_BxNxD"], part["pixels_BxNxSxSxC"], part["real_B"]
    )
    total += counts
    reals.append(part["real_B"])
  above, equal, above_here, equal_here, summed = np.asarray(total)
  real_B, pixels_2xQxSxSxC = np.concatenate(reals), np.asarray(best[1])
  return {
    **{"place_Q": place_Q, "own_Q": np.asarray(own_Q), "real_B": real_B},
    "mean_Q": summed / max(1, real_B.sum() * seen["target_BxNxD"].shape[1]),
    "rank_Q": 1 + above + equal / 2,
    "rank_here_Q": 1 + above_here + equal_here / 2,
    **{"pixels_QxSxSxC": pixels_2xQxSxSxC[0], "true_pixels_QxSxSxC": pixels_2xQxSxSxC[1]},
  }


@jax.jit
def _compare(query_2xQxD, own_Q, place_Q, best, tokens_BxNxD, pixels_BxNxSxSxC, real_B):
  """Returns the best patches so far, and what these images add to the counts (5, Q) of the predictions."""
  num_images, num_patches, width = tokens_BxNxD.shape
  gallery_GxD = _unit(tokens_BxNxD.reshape(-1, width))
  real_G, place_G = jnp.repeat(real_B, num_patches), jnp.tile(jnp.arange(num_patches), num_images)
  cosine_2xQxG = jnp.einsum("aqd,gd->aqg", query_2xQxD, gallery_GxD, precision="highest")
  cosine_2xQxG = jnp.where(real_G, cosine_2xQxG, -jnp.inf)
  nearest_2xQ = cosine_2xQxG.argmax(-1)
  value_2xQ = cosine_2xQxG.max(-1)
  better_2xQ = value_2xQ > best[0]
  pixels_2xQxSxSxC = pixels_BxNxSxSxC.reshape(-1, *pixels_BxNxSxSxC.shape[2:])[nearest_2xQ]
  best = jnp.maximum(value_2xQ, best[0]), jnp.where(better_2xQ[..., None, None, None], pixels_2xQxSxSxC, best[1])
  cosine_QxG, here_QxG = cosine_2xQxG[0], place_G == place_Q[:, None]
  above, equal = cosine_QxG > own_Q[:, None], cosine_QxG == own_Q[:, None]
  counted = (above, equal, above & here_QxG, equal & here_QxG, jnp.where(real_G, cosine_QxG, 0))
  return best, jnp.stack([x.sum(-1, dtype=jnp.float32) for x in counted])


def _unit(x):
  return jnp.asarray(x, jnp.float32) / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def to_patches(images_BxHxWxC, side_px: int):
  """Returns the pixels of each patch, (B, N, S, S, C), in raster order."""
  batch, height, width, channels = images_BxHxWxC.shape
  grid = images_BxHxWxC.reshape(batch, height // side_px, side_px, width // side_px, side_px, channels)
  return grid.swapaxes(2, 3).reshape(batch, -1, side_px, side_px, channels)


def from_patches(pixels_NxSxSxC: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
  """Returns the image (H, W, 3) of these patches; one channel becomes grey."""
  (rows, columns), (_, side_px, _, channels) = grid_hw, pixels_NxSxSxC.shape
  grid = pixels_NxSxSxC.reshape(rows, columns, side_px, side_px, channels).swapaxes(1, 2)
  image = grid.reshape(rows * side_px, columns * side_px, channels)
  return np.broadcast_to(image, (*image.shape[:2], 3)).clip(0, 1)


def draw(path: Path, seen: dict[str, np.ndarray], found: dict[str, np.ndarray], grid_hw: tuple[int, int]) -> None:
  """Writes the picture: a row for each image of `seen`, the columns are COLUMNS. Where blocks overlap, the last counts.

  PCA: three components, fitted on the targets of all images that are drawn, as red, green and blue.
  """
  rows = _rows(seen, found, grid_hw)
  num = len(rows)
  size_in = CELL_IN * len(COLUMNS), CELL_IN * num + TITLE_IN
  fig, axes = subplots(num, len(COLUMNS), figsize=size_in, squeeze=False)
  fig.subplots_adjust(0.005, 0.02 / num, 0.995, 1 - TITLE_IN / size_in[1], wspace=0.03, hspace=0.03)
  for axes_row, cells in zip(axes, rows):
    for ax, cell in zip(axes_row, cells):
      ax.imshow(cell, interpolation="nearest")
      ax.axis("off")
  for ax, title in zip(axes[0], COLUMNS):
    ax.set_title(title, fontsize=9)
  fig.savefig(path, dpi=DPI)


def _rows(
  seen: dict[str, np.ndarray], found: dict[str, np.ndarray], grid_hw: tuple[int, int]
) -> list[list[np.ndarray]]:
  """Returns the cells of every image: arrays (height, width, 3) in [0, 1]."""
  color_fn = fit_colors(seen["target_BxNxD"].reshape(-1, seen["target_BxNxD"].shape[-1]))
  rows, first = [], 0
  for b, (pixels, context_K) in enumerate(zip(seen["pixels_BxNxSxSxC"], seen["context_BxK"])):
    valid_MxT = seen["valid_BxMxT"][b]
    here = slice(first, first := first + valid_MxT.sum())
    place = found["place_Q"][here]
    faded = GREY + 0.25 * (pixels - GREY)
    context = np.full_like(pixels, GREY)
    context[context_K] = pixels[context_K]
    nearest, nearest_true = faded.copy(), faded.copy()
    nearest[place], nearest_true[place] = found["pixels_QxSxSxC"][here], found["true_pixels_QxSxSxC"][here]
    target_color = color_fn(seen["target_BxNxD"][b])
    color = np.full_like(target_color, GREY)
    color[place] = color_fn(seen["prediction_BxMxTxD"][b][valid_MxT])
    pictures = [from_patches(x, grid_hw) for x in (pixels, context, nearest, nearest_true)]
    rows.append(pictures + [x.reshape(*grid_hw, 3) for x in (target_color, color)])
  return rows


def fit_colors(features_NxD: np.ndarray):
  """Returns features (N, D) -> RGB (N, 3): three principal components of these, from the 1st to the 99th percentile."""
  pca = PCA(3, svd_solver="full").fit(features_NxD)
  low, high = np.percentile(pca.transform(features_NxD), (1, 99), axis=0)
  return lambda x_NxD: ((pca.transform(x_NxD) - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
