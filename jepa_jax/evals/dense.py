"""What protocols on label maps share: windows, features of their patches, scores on pixels, floors and the ceiling.

Legend: B images, V windows of an image, G H their grid of patches, F features, C classes, S canvas side.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.data import VOID, ImageSet, prefetch_to_device, row_batches
from jepa_jax.evals.base import Result, Subject
from jepa_jax.evals.confusion import confusion, scores
from jepa_jax.sharding import batch_sharding, batch_ways
from jepa_jax.views import Windows, image_windows, label_windows, on_pixels

log = logging.getLogger(__name__)
Tree = Any
_POSITIONS_BYTES = 2**28  # of the counts of classes by position
ONE_CLASS, POSITIONS = "one class everywhere", "most frequent class per position"


@dataclasses.dataclass(frozen=True)
class DenseSettings:
  """What of an image is seen, and how heads are trained. The last line of a table's baselines is what patches allow.

  Attributes:
    short_px: to which the shorter side of an image is scaled; 0: data.canvas_px.
    window: height and width of the windows; () are squares of short_px, (240, 320) all of a 4 : 3 image.
    stride: between windows; 0 is two thirds of a window, in whole patches.
    subset: a regular expression; test images whose names it finds are scored by themselves, too.
    learning_rates: of a head; where there are several, the one that is best on held-out training images.
    steps, batch_size, weight_decay: of AdamW, with a short warm-up and a cosine to zero.
    selection_steps: of the trainings by which the rate is chosen.
    dropout: share of features that a head does not see in a step.
    augment: training sees random crops of a quarter to all of an image, flipped or not, image and label map alike;
      features are made anew in every step then.
  """

  short_px: int = 0
  window: tuple[int, ...] = ()
  stride: int = 0
  subset: str = ""
  learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
  steps: int = 3000
  batch_size: int = 16
  weight_decay: float = 1e-3
  selection_steps: int = 1000
  dropout: float = 0.1
  augment: bool = False

  def __post_init__(self):
    if self.short_px < 0 or self.stride < 0:
      raise ValueError(f"short_px={self.short_px} and stride={self.stride} are 0 (chosen for you) or more")
    if self.window and (len(self.window) != 2 or min(self.window) < 1):
      raise ValueError(f"window={self.window}: give (height, width) in px, or () for squares of short_px")
    if not self.learning_rates or min(self.learning_rates) <= 0:
      raise ValueError(f"learning_rates={self.learning_rates}: give at least one, all above 0")
    if min(self.steps, self.batch_size, self.selection_steps) < 1 or self.weight_decay < 0:
      raise ValueError("steps, selection_steps and batch_size are 1 or more, and weight_decay 0 or more")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout={self.dropout} lies in [0, 1); 0 drops nothing")
    try:
      re.compile(self.subset)
    except re.error as error:
      raise ValueError(f"subset={self.subset!r} is no regular expression: {error}") from error


def windows_of(subject: Subject, settings: DenseSettings, square_px: int = 0) -> Windows:
  """Returns where the windows lie; square_px: the side of theirs, whatever the settings say.

  ValueError, before anything is compiled, for a window that is no whole number of patches, naming those that are.
  """
  columns, canvas_px = subject.data.train.columns, subject.data.canvas_px
  side = columns["canvas"].shape[0]
  short_px = settings.short_px or canvas_px
  size_hw = (square_px,) * 2 if square_px else tuple(settings.window) or (short_px, short_px)
  step = patch_of(subject)
  for name, size in zip(("height", "width"), size_hw):
    if size % step:
      whole = sorted({max(step, size // step * step), -(-size // step) * step})
      raise ValueError(
        f"the windows of dense evaluation have a {name} of {size} px, which is no whole number of patches of {step}: "
        f"set evals.dense.window to multiples such as {' or '.join(map(str, whole))}, and evals.dense.short_px so that "
        "it holds them"
      )
  stride = settings.stride or max(1, round(min(size_hw) * 2 / 3 / step)) * step
  return Windows(short_px, size_hw, stride, side / canvas_px)


def patch_of(subject: Subject) -> int:
  """Returns the side of a patch, px: how far tokens of the last feature map are apart."""
  encoder, size = subject.objective.encoder, subject.data.encoder_px
  if patch := getattr(encoder, "patch_size", 0):
    return patch
  side = 8 * size  # a feature map of one token says little of what is between them
  try:
    num, _ = _tokens(subject, (side, side))
  except ValueError:  # it reads one size
    num, _ = _tokens(subject, (side := size, size))
  return max(1, round(side / math.sqrt(num)))


def _tokens(subject: Subject, size_hw: tuple[int, int]) -> tuple[int, int]:
  """Returns (N, F) of the tokens that the encoder makes of an image; ValueError for one without positions."""
  images = jax.ShapeDtypeStruct((1, *size_hw, subject.objective.pixels.channels), jnp.float32)
  out = jax.eval_shape(subject.apply_fn(), subject.abstract["image"], images)
  if out.tokens_BxNxD is None:
    raise ValueError("this encoder says nothing of positions, so there is nothing dense to evaluate: leave it out")
  return out.tokens_BxNxD.shape[1:]


def grid_of(subject: Subject, of: Windows) -> tuple[int, int]:
  """Returns the grid (G, H) of what the encoder says of a window."""
  (num, _), (height, width) = _tokens(subject, of.size_hw), of.size_hw
  rows = max(1, round(math.sqrt(num * height / width)))
  if num % rows or height * (num // rows) != width * rows:
    raise ValueError(f"the encoder makes {num} tokens of a window of {of.size_hw} px, which are no grid over it")
  return rows, num // rows


def token_width(subject: Subject, of: Windows) -> int:
  """Returns F, the width of a patch's features."""
  return _tokens(subject, of.size_hw)[1]


def check_dense(subject: Subject, settings: DenseSettings, square_px: int = 0) -> None:
  """Raises a ValueError for what cannot be evaluated so."""
  of = windows_of(subject, settings, square_px)
  grid_of(subject, of)
  train, test = subject.data.train, subject.data.test
  if train.map_classes != test.map_classes:
    raise ValueError("the label maps of training and test images are of other classes: give both the same")
  if settings.subset and not any(re.search(settings.subset, name) for name in test.names or ()):
    raise ValueError(f"evals.dense.subset={settings.subset!r} finds none of the names of the test images")
  if settings.augment and of.size_hw[0] != of.size_hw[1]:
    raise ValueError(
      f"evals.dense.augment draws square crops, and windows are {of.size_hw}: leave evals.dense.window out"
    )
  if subject.data.train.columns["canvas"].shape[0] == subject.data.canvas_px:
    log.warning("data.max_aspect is 1: images are cut to squares, and what is cut off is not evaluated")


def make_grids(subject: Subject, of: Windows, splits: tuple[str, ...] = ("train", "test")) -> dict[str, np.ndarray]:
  """Returns the features of every window's patches, {split: (N, V, G, H, F)}, of half or single precision, on disk.

  Of images that decode, in their order. Every process calls it; those other than the first get no rows.
  """
  grid_hw = grid_of(subject, of)
  apply_fn, pixels, interpolation = subject.apply_fn(), subject.objective.pixels, subject.objective.interpolation

  def features(variables: Tree, batch: Tree) -> dict[str, jax.Array]:
    views = image_windows(batch, of, pixels, interpolation)
    tokens = apply_fn(variables, views.reshape(-1, *views.shape[2:])).tokens_BxNxD
    return {"pooled": tokens.astype(jnp.float32).reshape(len(views), -1)}

  cost = max(1.0, of.num * math.prod(of.size_hw) / subject.data.view_px**2)
  found = {}
  for split, made in subject.made(f"grid-{dataclasses.astuple(of)}", features, splits, cost).items():
    x = made.pooled
    found[split] = x.reshape(len(x), of.num, *grid_hw, -1) if len(x) else x
  return found


def shares_of_patches(batch: Tree, of: Windows, grid_hw: tuple[int, int], num_classes: int) -> tuple[Any, Any]:
  """Returns the share of each class among a patch's pixels that are not void, (B, V, G, H, C), and the share of such
  pixels, (B, V, G, H)."""
  label = label_windows(batch, of)
  (height, width), (grid_h, grid_w) = of.size_hw, grid_hw
  patch_of = lambda size, grid: jax.nn.one_hot(jnp.arange(size) * grid // size, grid, dtype=jnp.float32)
  y_PxG, x_QxH = patch_of(height, grid_h), patch_of(width, grid_w)
  per_class = lambda c: jnp.einsum("bvpq,pg,qh->bvgh", (label == c).astype(jnp.float32), y_PxG, x_QxH)
  counts = jnp.moveaxis(jax.lax.map(per_class, jnp.arange(num_classes, dtype=jnp.uint8)), 0, -1)
  known = counts.sum(-1)
  area = jnp.einsum("pg,qh->gh", y_PxG, x_QxH)
  return counts / jnp.maximum(known, 1)[..., None], known / area


def pixel_confusion(grids_BxVxGxHxC: jax.Array, batch: Tree, of: Windows, ways: int) -> tuple[jax.Array, jax.Array]:
  """Returns each image's confusion matrix, int32 (B, C, C), and how many of its labelled pixels no window shows, (B,).

  What windows say of their patches goes up to the pixels of the label, then the largest wins: not the other way round.
  One image of each device at a time: a map of logits is large.
  """

  def one(grid, label_map_SxS, height, width):
    said, count = on_pixels(grid, height, width, of, len(label_map_SxS))
    lost = ((count == 0) & (label_map_SxS != VOID)).sum()
    return confusion(label_map_SxS, said.argmax(-1), grid.shape[-1]), lost

  parts = (grids_BxVxGxHxC, batch["label_map"], batch["height"], batch["width"])
  split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(ways, -1, *x.shape[1:]), 1, 0), parts)
  matrices, lost = jax.lax.map(lambda rows: jax.vmap(one)(*rows), split)
  joined = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
  return joined(matrices), joined(lost)


def score(
  subject: Subject,
  settings: DenseSettings,
  of: Windows,
  rows_N: np.ndarray,
  images: ImageSet,
  grids_fn: Callable[[Any, Tree], jax.Array],
  extra: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda _: {},
  state: Tree = None,
) -> dict[str, dict[str, Any]]:
  """Returns {"": scores of these images, subset: of those whose names it finds}, from one matrix each.

  grids_fn(state, batch) -> what is said of patches, (B, V, G, H, C); batch has the columns of the images and what
  extra(places in rows_N) adds.
  """
  ways, num_classes = batch_ways(subject.mesh), len(images.map_classes)
  size = max(ways, settings.batch_size // ways * ways)
  names = images.names if settings.subset and images is subject.data.test else None
  among = np.array([bool(re.search(settings.subset, name)) for name in names]) if names else None
  total, part = np.zeros((num_classes, num_classes), np.int64), np.zeros((num_classes, num_classes), np.int64)
  program = jax.jit(lambda state, batch: pixel_confusion(grids_fn(state, batch), batch, of, ways))
  about: list[tuple[np.ndarray, np.ndarray]] = []

  def batches() -> Iterator[Tree]:
    for start, (rows_B, batch, real_B) in zip(range(0, len(rows_N), size), row_batches(images, rows_N, size)):
      about.append((rows_B, real_B))
      yield batch | extra(np.resize(np.arange(start, min(start + size, len(rows_N))), size))

  with prefetch_to_device(batches(), batch_sharding(subject.mesh)) as on_device:
    for i, batch in enumerate(on_device):
      matrices, lost = jax.device_get(program(state, batch))
      rows_B, real_B = about[i]
      if (lost * real_B).any():
        row = int(rows_B[np.argmax(lost * real_B)])
        name = images.names[row] if images.names else f"image {row}"
        raise ValueError(
          f"windows of {of.size_hw} px (height x width) do not reach all of {name}: it is of the other orientation, or "
          "longer than data.max_aspect; leave evals.dense.window out for squares, or raise data.max_aspect"
        )
      total += matrices[real_B].astype(np.int64).sum(0)
      if among is not None:
        part += matrices[real_B & among[rows_B]].astype(np.int64).sum(0)
  return {"": scores(total)} | ({settings.subset: scores(part)} if among is not None else {})


def results(
  row: str, column: str, found: dict[str, dict[str, Any]], images: ImageSet, detail: Any = None
) -> Iterator[Result]:
  """Yields the cells of what `score` has found: mean IoU of all, with the rest as its detail, and of the subset."""
  for subset, values in found.items():
    iou = {name: None if math.isnan(x) else round(x, 2) for name, x in zip(images.map_classes, values["iou"].tolist())}
    said = {"pixel_accuracy": values["pixel_accuracy"], "class_accuracy": values["class_accuracy"], "iou": iou}
    yield Result(row, f"{column}, {subset}" if subset else column, values["miou"], said | (detail or {}))


def references(subject: Subject, settings: DenseSettings, of: Windows, column: str) -> Iterator[Result]:
  """Yields what scores are read against: two floors, and the true labels of such patches, a ceiling of sorts."""
  train, test, grid_hw = subject.data.train, subject.data.test, grid_of(subject, of)
  num_classes = len(train.map_classes)
  rows_N = np.arange(len(test))

  def shares(_, batch: Tree) -> jax.Array:
    share, known = shares_of_patches(batch, of, grid_hw, num_classes)
    return share * known[..., None]  # of the whole patch: a patch of void says little

  patch = (
    "true labels per patch of " + " x ".join(f"{size / grid:g}" for size, grid in zip(of.size_hw, grid_hw)) + " px"
  )
  perfect = score(subject, settings, of, rows_N, test, shares)
  counts_RxRxC = class_counts(train, num_classes)
  most_RxR = counts_RxRxC.argmax(-1)
  everywhere = np.full_like(most_RxR, counts_RxRxC.sum((0, 1)).argmax())
  for row, guess in ((ONE_CLASS, everywhere), (POSITIONS, most_RxR)):
    yield from results(row, column, by_position(test, guess, num_classes, settings), test)
  yield from results(patch, column, perfect, test)


def class_counts(images: ImageSet, num_classes: int) -> np.ndarray:
  """Returns how often each class stands at each place of an image, int (R, R, C), places as shares of its sides."""
  side = images.columns["canvas"].shape[0]
  while side**2 * num_classes * 4 > _POSITIONS_BYTES:
    side //= 2
  counts = np.zeros((side * side, num_classes + 1), np.int32)
  places = np.arange(side * side)
  for label_RxR, _ in _label_maps(images, side):
    counts[places, np.minimum(label_RxR.ravel(), num_classes)] += 1
  if not counts[:, :-1].any():
    raise ValueError("no pixel of the training images is of a class: all are void; check data.label_maps")
  return counts[:, :-1].reshape(side, side, num_classes)


def _label_maps(images: ImageSet, side: int) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, int]]]:
  """Yields every label map that decodes as (R, R), of each place the nearest pixel, and as it is with its index."""
  at = (np.arange(side) + 0.5) / side
  for rows_B, batch, real_B in row_batches(images, np.arange(len(images)), 64):
    for i in np.flatnonzero(real_B):
      height, width = batch["height"][i], batch["width"][i]
      label = batch["label_map"][i, :height, :width]
      yield label[np.ix_((at * height).astype(int), (at * width).astype(int))], (label, int(rows_B[i]))


def by_position(images: ImageSet, guess_RxR: np.ndarray, num_classes: int, settings: DenseSettings) -> dict[str, Any]:
  """Returns the scores, as `score`, of saying the same of every image: at each place what stands there."""
  side = len(guess_RxR)
  matrices = {"": np.zeros(num_classes**2, np.int64)}
  names = images.names if settings.subset else None
  if names:
    matrices[settings.subset] = np.zeros(num_classes**2, np.int64)
  for _, (label, row) in _label_maps(images, 1):
    y, x = (((np.arange(n) + 0.5) / n * side).astype(int) for n in label.shape)
    known = label != VOID
    counts = np.bincount(
      label[known].astype(np.int64) * num_classes + guess_RxR[np.ix_(y, x)][known], minlength=num_classes**2
    )
    matrices[""] += counts
    if names and re.search(settings.subset, names[row]):
      matrices[settings.subset] += counts
  return {name: scores(matrix.reshape(num_classes, num_classes)) for name, matrix in matrices.items()}
