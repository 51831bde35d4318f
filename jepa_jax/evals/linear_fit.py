"""Training and scoring of linear classifiers on features that need not fit the memory.

Both read rows by index and normalise them as they come. A training is cut into windows of steps: the rows that a window
draws go to the devices, and its steps run there. A set that fits is one window; however it is cut, every step sees the
same rows in the same order, and the result is the same.

Legend: N images, F features, C classes, S settings (learning rate, weight decay), B batch, T steps, R rows of a window.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jepa_jax.data import prefetch_to_device
from jepa_jax.evals.blocks import (
  EPSILON,
  Devices,
  Normalise,
  Progress,
  Report,
  as_float32,
  layer_normalised,
  mean_and_deviation,
  ranges,
  rows_that_fit,
)

_SEGMENT_STEPS = 32  # of one call: between calls we say how far we are
_MAX_SCORED = 2**25  # float32 numbers of a block of features or of logits
_GATHER_BYTES = 2**21  # of rows read and normalised at a time: in cache, a LayerNorm takes a seventh of the time


@dataclasses.dataclass(frozen=True)
class LabelledRows:
  """Some rows of a labelled set, by sorted index, and what normalises a block of its features."""

  x_NxF: np.ndarray
  y_N: np.ndarray
  index: np.ndarray
  normalise: Normalise = as_float32

  def __len__(self) -> int:
    return len(self.index)

  @property
  def width(self) -> int:
    return self.x_NxF.shape[1]

  def read(self, places: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the normalised features (num_rows, F) and labels (num_rows,) at places in the index, padded with (0, -1).

    Ascending places read a memory-mapped file from its beginning to its end.
    """
    x_RxF, y_R = np.zeros((num_rows, self.width), np.float32), np.full(num_rows, -1, np.int32)
    for start, stop in ranges(len(places), rows_that_fit(self.width, _GATHER_BYTES)):
      x_RxF[start:stop] = self.normalise(self.x_NxF[self.index[places[start:stop]]])
    y_R[: len(places)] = self.y_N[self.index[places]]
    return x_RxF, y_R


@dataclasses.dataclass(frozen=True)
class Room:
  """Where a training runs, the bytes that it may hold there, and who is told how far it is."""

  devices: Devices
  memory_bytes: int
  report: Report | None


def make_normalise(input_norm: str, x_NxF: np.ndarray, index: np.ndarray) -> Normalise:
  """Returns the function that normalises blocks; statistics of features, where it needs any, are those of the rows."""
  if input_norm == "layernorm":
    return layer_normalised
  if input_norm == "none":
    return as_float32
  mean_F, scale_F = mean_and_deviation(x_NxF, index)
  scale_F = np.where(scale_F > EPSILON * scale_F.max(), scale_F, np.float32(1.0))  # a constant feature stays constant
  return lambda x_BxF: (as_float32(x_BxF) - mean_F) / scale_F


def fit(
  rows: LabelledRows, rate_S, decay_S, order_TxB: np.ndarray, num_classes: int, batch_norm: bool, room: Room, title
):
  """Returns weights {kernel (S, F, C), bias (S, C)} after the steps of order_TxB, places in the rows.

  As many settings are trained at once as the memory takes; ValueError where it takes none.
  """
  most = _settings_that_fit(rows.width, num_classes, order_TxB.shape[1], room.memory_bytes)
  groups = list(ranges(len(rate_S), most))
  progress = Progress(room.report, title, len(groups) * len(order_TxB))
  parts = []
  for i, (start, stop) in enumerate(groups):
    settings = np.float32(rate_S[start:stop]), np.float32(decay_S[start:stop])
    progress.before = i * len(order_TxB)
    parts.append(_fit_together(rows, settings, order_TxB, num_classes, batch_norm, room, progress.at))
  return parts[0] if len(parts) == 1 else jax.tree.map(lambda *w: jnp.concatenate(w), *parts)


def _settings_that_fit(width: int, num_classes: int, batch_size: int, memory: int) -> int:
  # Weights, gradient, update and Adam's moments, old and new, and logits with their gradient: 8 and 4 at once.
  setting_bytes = 4 * (8 * (width + 1) * num_classes + 4 * batch_size * num_classes)
  needed = setting_bytes + 4 * 4 * batch_size * width
  if needed > memory:
    raise ValueError(
      f"the linear probe needs {needed / 1e9:.2g} GB to train one setting ({width} x {num_classes} weights, batches of "
      f"{batch_size}), and memory_gb is {memory / 1e9:.2g}: raise memory_gb, or lower batch_size"
    )
  return max(1, memory // 2 // setting_bytes)


def _fit_together(rows: LabelledRows, settings, order_TxB, num_classes: int, batch_norm: bool, room: Room, tell):
  devices, (num_steps, batch_size) = room.devices, order_TxB.shape
  split = devices.columns if batch_size % devices.ways == 0 else devices.whole  # a batch of a tiny set stays whole

  def put(window):
    x_RxF, y_R, local_TxB, num_valid = window
    return *jax.device_put((x_RxF, y_R), devices.whole), jax.device_put(local_TxB, split), num_valid

  rate_S, decay_S = jax.device_put(settings, devices.whole)
  carry, done = jax.device_put(_start(rate_S, decay_S, rows.width, num_classes), devices.whole), 0
  # Three windows are held at most (in use, ready, in the making), the last on the host too: half of the memory.
  capacity = rows_that_fit(rows.width, room.memory_bytes // 8)
  with prefetch_to_device(_windows(rows, order_TxB, capacity), put, size=1) as windows:
    for *window, num_valid in windows:
      for first in range(0, num_valid, _SEGMENT_STEPS):
        before, last = carry, min(first + _SEGMENT_STEPS, num_valid)
        carry = _advance(carry, *window, first, last, rate_S, decay_S, num_steps=num_steps, batch_norm=batch_norm)
        jax.block_until_ready(before)
        tell(done + first)
      done += num_valid
  return carry[0]


def _windows(rows: LabelledRows, order_TxB, capacity: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
  """Yields (features (R, F), labels (R,), steps (T, B) as places in these, how many of the steps are meant)."""
  num_steps, batch_size = order_TxB.shape
  steps = num_steps if len(rows) <= capacity else min(num_steps, max(1, capacity // batch_size))
  num_rows = min(len(rows), steps * batch_size)
  for start in range(0, num_steps, steps):
    wanted_TxB = order_TxB[start : start + steps]
    places, local = np.unique(wanted_TxB, return_inverse=True)
    local_TxB = np.zeros((steps, batch_size), np.int32)  # one shape, one compile
    local_TxB[: len(wanted_TxB)] = local.reshape(wanted_TxB.shape)
    yield *rows.read(places, num_rows), local_TxB, len(wanted_TxB)


def _optimiser(rate, decay, num_steps: int):
  schedule = optax.cosine_decay_schedule(1.0, num_steps)
  return optax.adamw(lambda step: rate * schedule(step), weight_decay=decay, mask={"kernel": True, "bias": False})


@functools.partial(jax.jit, static_argnames=("width", "num_classes"))
def _start(rate_S, decay_S, width: int, num_classes: int):
  """Returns (weights, optimiser state) of S settings before the first step."""
  shape = (len(rate_S), width, num_classes)
  weights = {"kernel": jnp.zeros(shape), "bias": jnp.zeros((shape[0], shape[2]))}
  return weights, jax.vmap(lambda rate, decay, w: _optimiser(rate, decay, 1).init(w))(rate_S, decay_S, weights)


@functools.partial(jax.jit, static_argnames=("num_steps", "batch_norm"))
def _advance(carry, x_RxF, y_R, order_TxB, first, last, rate_S, decay_S, *, num_steps: int, batch_norm: bool):
  """Returns the carry (weights, optimiser state) after the steps [first, last) of a window, of all S settings."""

  def update(rate, decay, weights, opt_state, x_BxF, y_B):
    grad = jax.grad(lambda w: _cross_entropy(w, x_BxF, y_B).mean())(weights)
    updates, opt_state = _optimiser(rate, decay, num_steps).update(grad, opt_state, weights)
    return optax.apply_updates(weights, updates), opt_state

  def step(t, carry):
    x_BxF, y_B = x_RxF[order_TxB[t]], y_R[order_TxB[t]]
    if batch_norm:
      x_BxF = jax.nn.standardize(x_BxF, axis=0, epsilon=EPSILON)
    # One (B, F) x (F, S C) product: vmap folds the settings into the columns.
    return jax.vmap(update, in_axes=(0, 0, 0, 0, None, None))(rate_S, decay_S, *carry, x_BxF, y_B)

  return jax.lax.fori_loop(first, last, step, carry)


def _logits(weights, x_BxF):
  return x_BxF @ weights["kernel"] + weights["bias"]


def _cross_entropy(weights, x_BxF, y_B):
  return optax.softmax_cross_entropy_with_integer_labels(_logits(weights, x_BxF), y_B)


def score(weights, rows: LabelledRows, room: Room, title: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (accuracy in percent (S,), mean cross-entropy in nats (S,)) of the classifiers on all rows, in blocks."""
  devices, widest = room.devices, max(rows.width, weights["bias"].shape[1])
  blocks = list(ranges(len(rows), rows_that_fit(widest, min(4 * _MAX_SCORED, room.memory_bytes // 16))))
  most = devices.ways * math.ceil(max(stop - start for start, stop in blocks) / devices.ways)
  read = ((stop, rows.read(np.arange(start, stop), most)) for start, stop in blocks)
  progress, totals = Progress(room.report, title, len(rows)), []
  with prefetch_to_device(read, lambda item: (item[0], jax.device_put(item[1], devices.rows)), size=1) as ahead:
    for stop, block in ahead:
      totals.append(jax.device_get(_hits_and_loss(weights, *block)))
      progress.at(stop)
  hits_S, loss_S = (np.array(parts, np.float64).sum(axis=0) for parts in zip(*totals))
  return 100.0 * hits_S / len(rows), loss_S / len(rows)


@jax.jit
def _hits_and_loss(weights, x_BxF, y_B):
  """Returns the sums over the rows with a label of the hits (S,) and of the cross-entropies (S,)."""

  def one(w):  # one setting after the other: S x B x C logits need not fit
    hit_B = jnp.argmax(_logits(w, x_BxF), axis=-1) == y_B
    return hit_B.sum(), jnp.where(y_B >= 0, _cross_entropy(w, x_BxF, y_B), 0.0).sum()

  return jax.lax.map(one, weights)
