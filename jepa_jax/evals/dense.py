"""What protocols on label maps share: windows, features of their patches, scores on pixels, floors and the ceiling.

Legend: B images, V windows of an image, G H their grid of patches, F features, C classes, S canvas side.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jepa_jax.choices import check_choices
from jepa_jax.data import VOID, ImageSet, prefetch_to_device, put_batch, row_batches
from jepa_jax.evals.base import Result, Subject
from jepa_jax.evals.blocks import check_features
from jepa_jax.evals.confusion import confusion, scores
from jepa_jax.evals.tuning import HELD_OUT
from jepa_jax.models import first_blocks
from jepa_jax.sharding import batch_sharding, batch_ways
from jepa_jax.views import Windows, image_windows, label_windows, on_pixels

log = logging.getLogger(__name__)
Tree = Any
_LAST = 4  # blocks that "last4" joins


@dataclasses.dataclass(frozen=True)
class DenseSettings:
  """What of an image is seen, and how heads are trained. The last line of a table's baselines is what patches allow.

  Attributes:
    short_px: to which the shorter side of an image is scaled; 0: data.canvas_px.
    window: height and width of the windows; () are squares of short_px, (240, 320) all of a 4 : 3 image.
    stride: between windows; 0 is two thirds of a window, in whole patches.
    layers: what a patch's features are: the last block's ("last"), or those of a ViT's last four in a row ("last4"),
      each through the final norm; the encoder runs four times for them.
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
  layers: Literal["last", "last4"] = "last"
  subset: str = ""
  learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
  steps: int = 3000
  batch_size: int = 16
  weight_decay: float = 1e-3
  selection_steps: int = 1000
  dropout: float = 0.1
  augment: bool = False

  def __post_init__(self):
    check_choices(self)
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
  tokens = jax.eval_shape(tokens_fn(subject), subject.abstract["image"], images)
  if tokens is None:
    raise ValueError("this encoder says nothing of positions, so there is nothing dense to evaluate: leave it out")
  return tokens.shape[1:]


def tokens_fn(subject: Subject) -> Callable[[Tree, jax.Array], Any]:
  """Returns (variables, images) -> the features of patches (B, N, F), of the layers that evals.dense.layers names.

  ValueError for an encoder that has no four blocks.
  """
  apply_fn, encoder = subject.apply_fn(), subject.objective.encoder
  if subject.settings.dense.layers == "last":
    return lambda variables, images: apply_fn(variables, images).tokens_BxNxD
  depth = getattr(encoder, "depth", 0) if hasattr(encoder, "drops_patches") else 0
  if depth < _LAST:
    raise ValueError(
      f"evals.dense.layers='last4' joins the last {_LAST} blocks of a ViT, and this encoder has {depth or 'none'}: "
      "set it to 'last'"
    )
  # The same network, cut off after each of them: what is scanned hands out its last block alone.
  cut = [(encoder.clone(depth=i), i) for i in range(depth - _LAST + 1, depth + 1)]

  def tokens(variables: Tree, images: jax.Array) -> jax.Array:
    of = lambda num: {**variables, "params": first_blocks(variables["params"], num)}
    return jnp.concatenate([short.apply(of(num), images).tokens_BxNxD for short, num in cut], axis=-1)

  return tokens


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
  if not subject.data.max_aspect:
    raise ValueError("data.max_aspect=0 scales the longer side: dense evaluation scales the shorter; set it to 2, say")
  if subject.data.max_aspect == 1:
    log.warning("data.max_aspect is 1: images larger than the canvas are cut to squares, and the rest is not evaluated")


def check_heads(subject: Subject, settings: DenseSettings) -> None:
  """Raises a ValueError where there are too few images to train a head."""
  ways, num = batch_ways(subject.mesh), len(subject.data.train)
  if len(settings.learning_rates) > 1 and num < 2:
    raise ValueError(
      "there is one training image, and none to choose a rate by: give one in evals.dense.learning_rates"
    )
  fit = num - num_held(num) if len(settings.learning_rates) > 1 else num
  if settings.batch_size < ways:
    raise ValueError(f"evals.dense.batch_size={settings.batch_size} is less than the {ways} devices: raise it")
  if fit < ways:
    raise ValueError(f"{fit} training images are fewer than the {ways} devices: evaluate on fewer devices")


def num_held(num: int) -> int:
  """Returns how many of the training images are held out to choose a rate by."""
  return max(1, round(HELD_OUT * num))


class Grids(NamedTuple):
  """Features of the patches of images that decode: their indices (N,) and (N, V, G, H, F), perhaps on disk."""

  rows_N: np.ndarray
  features: np.ndarray


def make_grids(subject: Subject, of: Windows, splits: tuple[str, ...] = ("train", "test")) -> dict[str, Grids]:
  """Returns {split: features of every window's patches}, of half or single precision.

  Every process calls it; those other than the first get no rows. ValueError for features that are no numbers.
  """
  grid_hw = grid_of(subject, of)
  pixels, interpolation = subject.objective.pixels, subject.objective.interpolation
  encode, layers = tokens_fn(subject), subject.settings.dense.layers

  def features(variables: Tree, batch: Tree) -> dict[str, jax.Array]:
    views = image_windows(batch, of, pixels, interpolation)
    tokens = encode(variables, views.reshape(-1, *views.shape[2:]))
    return {"pooled": tokens.astype(jnp.float32).reshape(len(views), -1)}

  cost = max(1.0, of.num * math.prod(of.size_hw) / math.prod(subject.data.view_hw))
  cost *= 1 if layers == "last" else _LAST
  found, named = {}, f"grid-{dataclasses.astuple(of)}" + ("" if layers == "last" else f"-{layers}")
  for split, made in subject.made(named, features, splits, cost).items():
    if num := len(made.index):
      found[split] = Grids(made.index, check_features(split, made.pooled).reshape(num, of.num, *grid_hw, -1))
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


def by_image(fn: Callable[[Tree], Tree], batch: Tree, ways: int) -> Tree:
  """Returns fn of a batch (leaves (B, ...) in and out), given one image of each of the `ways` devices at a time."""
  split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(ways, -1, *x.shape[1:]), 1, 0), batch)
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), jax.lax.map(fn, split))


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
  return by_image(lambda rows: jax.vmap(one)(*rows), parts, ways)


class Said(NamedTuple):
  """What is said of the patches of images: grids_fn(state, batch) -> (B, V, G, H, C) of those at rows_N.

  batch has the columns of the images and what extra(places in rows_N) adds.
  """

  images: ImageSet
  rows_N: np.ndarray
  grids_fn: Callable[[Any, Tree], jax.Array]
  extra: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda _: {}
  state: Tree = None

  def batches(self, size: int) -> Iterator[tuple[np.ndarray, Tree, np.ndarray]]:
    """Yields `row_batches`, each with what `extra` adds."""
    for i, (rows_B, batch, real_B) in enumerate(row_batches(self.images, self.rows_N, size)):
      places = np.arange(i * size, min((i + 1) * size, len(self.rows_N)))
      yield rows_B, batch | self.extra(np.resize(places, size)), real_B


def score(mesh: Mesh, settings: DenseSettings, of: Windows, said: Said, subset: str = "") -> dict[str, dict[str, Any]]:
  """Returns {"": scores of these images, subset: of those whose names it finds}, from one matrix each."""
  images = said.images
  ways, num_classes = batch_ways(mesh), len(images.map_classes)
  size = max(ways, settings.batch_size // ways * ways)
  names = images.names if subset else None
  among = np.array([bool(re.search(subset, name)) for name in names]) if names else None
  total, part = np.zeros((num_classes, num_classes), np.int64), np.zeros((num_classes, num_classes), np.int64)
  program = jax.jit(lambda state, batch: pixel_confusion(said.grids_fn(state, batch), batch, of, ways))
  about: list[tuple[np.ndarray, np.ndarray]] = []

  def batches() -> Iterator[Tree]:
    for rows_B, batch, real_B in said.batches(size):
      about.append((rows_B, real_B))
      yield batch

  with prefetch_to_device(batches(), batch_sharding(mesh)) as on_device:
    for i, batch in enumerate(on_device):
      matrices, lost = jax.device_get(program(said.state, batch))
      rows_B, real_B = about[i]
      if (lost * real_B).any():
        raise not_reached(of, images, int(rows_B[np.argmax(lost * real_B)]))
      total += matrices[real_B].astype(np.int64).sum(0)
      if among is not None:
        part += matrices[real_B & among[rows_B]].astype(np.int64).sum(0)
  return {"": scores(total)} | ({subset: scores(part)} if among is not None else {})


def label_maps(mesh: Mesh, of: Windows, said: Said) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (row, the class of every pixel that what is said of patches is largest for, int (h, w)) of each image."""

  @jax.jit
  def largest(state: Tree, batch: Tree) -> jax.Array:
    side = batch["label_map"].shape[-1]
    one = lambda grid, height, width: on_pixels(grid, height, width, of, side)[0].argmax(-1)
    return jax.vmap(one)(said.grids_fn(state, batch), batch["height"], batch["width"])

  for rows_B, batch, real_B in said.batches(batch_ways(mesh)):
    found = np.asarray(largest(said.state, put_batch(batch, batch_sharding(mesh))))
    for i in np.flatnonzero(real_B):
      yield int(rows_B[i]), found[i, : batch["height"][i], : batch["width"][i]]


def not_reached(of: Windows, images: ImageSet, row: int) -> ValueError:
  """Returns the error for an image of which a part lies in no window."""
  name = images.names[row] if images.names else f"image {row}"
  return ValueError(
    f"windows of {of.size_hw} px (height x width) do not reach all of {name}: it is of the other orientation, or more "
    f"than {of.aspect:g} times as long as short (images smaller than the canvas are not cut). Leave evals.dense.window "
    "out for squares, or raise data.max_aspect"
  )


def results(
  row: str, column: str, found: dict[str, dict[str, Any]], images: ImageSet, detail: Any = None
) -> Iterator[Result]:
  """Yields the cells of what `score` has found: mean IoU of all, with the rest as its detail, and of the subset."""
  for subset, values in found.items():
    iou = {name: None if math.isnan(x) else round(x, 2) for name, x in zip(images.map_classes, values["iou"].tolist())}
    said = {"pixel_accuracy": values["pixel_accuracy"], "class_accuracy": values["class_accuracy"], "iou": iou}
    yield Result(row, f"{column}, {subset}" if subset else column, values["miou"], said | (detail or {}))
