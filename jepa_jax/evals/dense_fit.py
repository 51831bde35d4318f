"""Training of a linear head on patches, with or without networks below it, by labels of pixels; and what it scores.

The head is that of linear segmentation: dropout of channels, BatchNorm, a linear layer; its logits go up to the pixels
of the window, and the loss is the mean over the pixels of the global batch that are of a class. Legend as in `dense`;
P Q window height and width, N images.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jepa_jax.data import VOID, ImageSet, prefetch_to_device
from jepa_jax.evals.base import Subject
from jepa_jax.evals.dense import DenseSettings, Said, by_image, label_maps, num_held, score
from jepa_jax.evals.linear import batch_order
from jepa_jax.evals.tuning import adamw_of_kernels, warm_up_and_cosine
from jepa_jax.sharding import batch_sharding, batch_ways, replicated
from jepa_jax.streams import stream
from jepa_jax.views import (
  CropSettings,
  Windows,
  crop_with_labels,
  enlarged,
  example_keys,
  image_windows,
  label_windows,
  sample_crop,
)

log = logging.getLogger(__name__)
Tree = Any
CROP_SCALE = (0.25, 1.0)  # of the area of an image, where crops are drawn
_HEAD_STD, _EPSILON, _MOMENTUM = 0.01, 1e-5, 0.9


@dataclasses.dataclass(frozen=True)
class DenseModel:
  """What makes features of patches: grids_fn(trained, frozen, views (B, V, P, Q, C)) -> (B, V, G, H, F), or those that
  lie there.

  grids: {split: (N, V, G, H, F)} of images that decode: then nothing but the head is trained. shares: each group's
  share of the learning rate; the head's is 1.
  """

  grids: Mapping[str, np.ndarray] | None = None
  grids_fn: Callable[[Tree, Tree, Tree], jax.Array] | None = None
  trained: Mapping[str, Tree] = dataclasses.field(default_factory=dict)
  frozen: Mapping[str, Tree] = dataclasses.field(default_factory=dict)
  shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
  width: int = 0  # F, where there are no grids


@dataclasses.dataclass(frozen=True)
class DenseTuned:
  """found: as `dense.score`, of the test images. held_out: {learning rate: mean IoU}, where one was selected.

  label_maps(places among the rows of the test images) yields what is said of their pixels, as `dense.label_maps`.
  """

  found: dict[str, dict[str, Any]]
  learning_rate: float
  held_out: Mapping[float, float]
  label_maps: Callable[[np.ndarray], Iterator[tuple[int, np.ndarray]]]

  def summary(self) -> dict[str, Any]:
    return {
      "learning_rate": self.learning_rate,
      "held_out": {str(rate): None if math.isnan(x) else x for rate, x in self.held_out.items()},
    }


def init_head(key: jax.Array, width: int, num_classes: int) -> tuple[Tree, Tree]:
  """Returns the (parameters, running averages) of a head."""
  kernel = _HEAD_STD * jax.random.normal(key, (width, num_classes))
  params = {"scale": jnp.ones(width), "shift": jnp.zeros(width), "kernel": kernel, "bias": jnp.zeros(num_classes)}
  return params, {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def apply_head(params: Tree, averages: Tree, grid_xF: jax.Array) -> jax.Array:
  """Returns the logits (..., C) of features (..., F) in testing."""
  normal = (grid_xF.astype(jnp.float32) - averages["mean"]) * jax.lax.rsqrt(averages["var"] + _EPSILON)
  return jnp.dot(normal * params["scale"] + params["shift"], params["kernel"], precision="highest") + params["bias"]


def train_head(
  params: Tree, averages: Tree, grid_BxVxGxHxF: jax.Array, seen_BxV: jax.Array, keys_B: jax.Array, dropout: float
) -> tuple[jax.Array, Tree]:
  """Returns (logits (B, V, G, H, C), new averages) in training; statistics are of all patches of windows that are seen.

  A channel is dropped in all patches of an image.
  """
  x = grid_BxVxGxHxF.astype(jnp.float32)
  kept_BxF = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout, x.shape[-1:]))(keys_B)
  x = x * (kept_BxF / (1 - dropout))[:, None, None, None]
  weight = jnp.broadcast_to(seen_BxV[:, :, None, None, None].astype(jnp.float32), (*x.shape[:-1], 1))
  count = jnp.maximum(weight.sum(), 1)
  mean_F = (x * weight).sum((0, 1, 2, 3)) / count
  var_F = (jnp.square(x - mean_F) * weight).sum((0, 1, 2, 3)) / count
  moved = jax.tree.map(
    lambda old, new: _MOMENTUM * old + (1 - _MOMENTUM) * new, averages, {"mean": mean_F, "var": var_F}
  )
  return apply_head(params, {"mean": mean_F, "var": var_F}, x), moved


def cross_entropy(logits_BxVxGxHxC: jax.Array, label_BxVxPxQ: jax.Array, ways: int) -> jax.Array:
  """Returns the mean over pixels that are of a class, 0 where there is none: sums over the global batch are divided.

  One image of each device at a time, computed again in the backward pass: logits of pixels are large.
  """

  @jax.checkpoint
  def of_images(rows):
    logits, label = rows
    pixels = enlarged(logits, label.shape[-2:])
    known = label != VOID
    loss = optax.softmax_cross_entropy_with_integer_labels(pixels, jnp.where(known, label, 0).astype(jnp.int32))
    return jnp.where(known, loss, 0).sum((1, 2, 3)), known.sum((1, 2, 3))

  loss_B, count_B = by_image(of_images, (logits_BxVxGxHxC, label_BxVxPxQ), ways)
  return loss_B.sum() / jnp.maximum(count_B.sum(), 1)


def fit_dense(
  subject: Subject, settings: DenseSettings, of: Windows, model: DenseModel, rows: Mapping[str, np.ndarray]
) -> DenseTuned:
  """Returns what the model scores on the test images after training on the training images.

  rows: {split: indices of images}, in the order of the model's grids; one that does not decode counts nowhere. The rate
  is chosen by the mean IoU on a fifth of the training images, the last of the order in which they come: neighbours in a
  film stay together.
  """
  train = subject.data.train
  # Not at random: of two frames of one second one would be held out, and the other learned.
  held_out = num_held(len(rows["train"]))
  every = np.arange(len(rows["train"]))
  rates: tuple[float, ...] = settings.learning_rates
  found: dict[float, float] = {}
  step_fn, init_fn = _programs(subject, settings, of, model, len(train.map_classes))

  def trained_on(places: np.ndarray, rate: float, steps: int) -> tuple[Tree, Tree]:
    trained, averages, opt_state = init_fn(jax.device_put(dict(model.trained), replicated(subject.mesh)))
    frozen = jax.device_put(dict(model.frozen), replicated(subject.mesh))
    order_SxB = _order(places, settings, steps, batch_ways(subject.mesh), subject.settings.seed)
    previous = None
    with _read(train, rows["train"], order_SxB, model, subject) as batches:
      for batch, factor in zip(batches, warm_up_and_cosine(len(order_SxB))):
        rate_now = np.float32(rate * factor)
        trained, averages, opt_state, loss = step_fn(trained, averages, opt_state, frozen, rate_now, batch)
        jax.block_until_ready(previous)
        previous = loss
    if previous is not None and not np.isfinite(previous):
      log.warning("%s: a head diverged at the learning rate %g: lower evals.dense.learning_rates", subject.row, rate)
    return trained, averages

  objective = subject.objective
  seen = lambda batch: image_windows(batch, of, objective.pixels, objective.interpolation)

  def grids_fn(state: tuple[tuple[Tree, Tree], Tree], batch: Tree) -> jax.Array:
    (params, averages), frozen = state
    grid = batch["grid"] if model.grids_fn is None else model.grids_fn(params, frozen, seen(batch))
    return apply_head(params["head"], averages, grid)

  def said(trained: tuple[Tree, Tree], split: str, places: np.ndarray) -> Said:
    images, grids = getattr(subject.data, split), model.grids and model.grids[split]
    extra = (lambda at: {"grid": np.asarray(grids[places[at]])}) if grids is not None else lambda _: {}
    return Said(images, rows[split][places], grids_fn, extra, (trained, dict(model.frozen)))

  def scored(trained: tuple[Tree, Tree], split: str, places: np.ndarray) -> dict[str, dict[str, Any]]:
    subset = settings.subset if split == "test" else ""
    return score(subject.mesh, settings, of, said(trained, split, places), subset)

  if len(rates) > 1:
    fit, held = every[:-held_out], every[-held_out:]
    for rate in rates:
      values = scored(trained_on(fit, rate, min(settings.selection_steps, settings.steps)), "train", held)
      found[rate] = values[""]["miou"]
      log.info("%s: rate %g, mean IoU %.1f on held-out training images", subject.row, rate, found[rate])
  rate = max(found, key=lambda r: found[r]) if found else min(rates)
  trained = trained_on(every, rate, settings.steps)
  maps = lambda places: label_maps(subject.mesh, of, said(trained, "test", places))
  return DenseTuned(scored(trained, "test", np.arange(len(rows["test"]))), rate, found, maps)


def _programs(subject: Subject, settings: DenseSettings, of: Windows, model: DenseModel, num_classes: int):
  ways = batch_ways(subject.mesh)
  width = model.grids["train"].shape[-1] if model.grids else model.width
  adamw = adamw_of_kernels(settings.weight_decay)
  root = jax.random.key(subject.settings.seed)

  @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
  def step_fn(trained, averages, opt_state, frozen, rate, batch):
    keys_B = example_keys(stream(root, "dropout"), batch["draw"])
    crop_keys_B = example_keys(stream(root, "crops"), batch["draw"])
    views, label = _training_views(subject, settings, of, model, batch, crop_keys_B)

    def loss_fn(trained):
      grid = batch["grid"] if model.grids_fn is None else model.grids_fn(trained, frozen, views)
      seen_BxV = (label != VOID).any((2, 3))
      logits, moved = train_head(trained["head"], averages, grid, seen_BxV, keys_B, settings.dropout)
      return cross_entropy(logits, label, ways), moved

    (loss, averages), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    updates: Any
    updates, opt_state = adamw.update(grads, opt_state, trained)
    rates = {name: rate * model.shares.get(name, 1.0) for name in trained}
    step = lambda params, update, rate: jax.tree.map(lambda p, u: p - rate * u, params, update)
    moved = {name: step(params, updates[name], rates[name]) for name, params in trained.items()}
    return moved, averages, opt_state, loss

  @jax.jit
  def init_fn(networks):
    head, averages = init_head(stream(root, "heads"), width, num_classes)
    trained = jax.tree.map(jnp.copy, dict(networks)) | {"head": head}
    return trained, averages, adamw.init(trained)

  return step_fn, init_fn


def _training_views(
  subject: Subject, settings: DenseSettings, of: Windows, model: DenseModel, batch: Tree, keys_B: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
  """Returns what is seen in a step, (B, V, P, Q, C), None where features lie there, and its classes (B, V, P, Q)."""
  pixels, interpolation = subject.objective.pixels, subject.objective.interpolation
  if model.grids_fn is None:
    return None, label_windows(batch, of)
  if not settings.augment:
    return image_windows(batch, of, pixels, interpolation), label_windows(batch, of)
  crop = CropSettings(num=1, size_px=of.size_hw[0], scale=CROP_SCALE)
  params = jax.vmap(lambda key, h, w: sample_crop(key, crop, h, w))(keys_B, batch["height"], batch["width"])
  images, classes = crop_with_labels(batch, params, of.size_hw[0], pixels, interpolation)
  return images[:, None], classes[:, None]


def _order(places: np.ndarray, settings: DenseSettings, steps: int, ways: int, seed: int) -> np.ndarray:
  """Returns which places of the training rows every step sees, (S, B)."""
  size = min(settings.batch_size, len(places)) // ways * ways
  if not size:
    raise ValueError(
      f"evals.dense.batch_size={settings.batch_size} of {len(places)} images does not divide over {ways} devices"
    )
  epochs = -(-steps // (len(places) // size))
  return places[batch_order(len(places), epochs, size, seed)[:steps]]


def _read(images: ImageSet, rows_N: np.ndarray, order_SxB: np.ndarray, model: DenseModel, subject: Subject):
  grids = model.grids["train"] if model.grids else None

  def batches() -> Iterator[dict[str, np.ndarray]]:
    for step, places in enumerate(order_SxB):
      batch = images.read(rows_N[places])
      stands_in = batch["index"] != rows_N[places]  # for an image that does not decode
      batch["label_map"] = np.where(stands_in[:, None, None], np.uint8(VOID), batch["label_map"])
      if grids is not None:  # the images have done their work
        batch = {key: batch[key] for key in ("label_map", "height", "width")}
        batch["grid"] = np.asarray(grids[places])
      yield batch | {"draw": np.arange(step * len(places), (step + 1) * len(places), dtype=np.int32)}

  return prefetch_to_device(batches(), batch_sharding(subject.mesh))
