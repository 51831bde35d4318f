"""What every protocol that tunes networks on labelled images shares: one loop, for which images are read as it goes.

Legend: B batch, N images, T tasks (label sets of the same images), S steps, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jepa_jax.data import ImageSet, prefetch_to_device
from jepa_jax.evals.base import Subject
from jepa_jax.evals.linear import batch_order, stratified_split
from jepa_jax.sharding import MeshConfig, batch_sharding, batch_ways, make_mesh, replicated
from jepa_jax.streams import stream
from jepa_jax.views import example_keys

log = logging.getLogger(__name__)
Tree = Any
HELD_OUT = 0.2  # of the training images, where there is a learning rate to select
WARMUP = 0.05  # of the steps


@dataclasses.dataclass(frozen=True)
class TuningSettings:
  """AdamW with a short warm-up and a cosine to zero; kernels decay, biases, scales and tokens do not.

  learning_rates: of what starts at random; where there are several, the one that is best on held-out training images.
  """

  learning_rates: tuple[float, ...] = (1e-3,)
  epochs: int = 20
  batch_size: int = 128
  weight_decay: float = 0.05

  def __post_init__(self):
    if not self.learning_rates or min(self.learning_rates) <= 0:
      raise ValueError(f"learning_rates={self.learning_rates}: give at least one, all above 0")
    if self.epochs < 1 or self.batch_size < 1 or self.weight_decay < 0:
      raise ValueError(
        f"epochs={self.epochs} and batch_size={self.batch_size} must be at least 1, and "
        f"weight_decay={self.weight_decay} 0 (off) or more"
      )


@dataclasses.dataclass(frozen=True)
class Task:
  """One set of labels of the training and the test images, in the order of the images; ValueError out of range."""

  train_N: np.ndarray
  test_N: np.ndarray
  num_classes: int

  def __post_init__(self):
    for split, y_N in (("training", self.train_N), ("test", self.test_N)):
      bad = np.flatnonzero((y_N < 0) | (y_N >= self.num_classes))
      if len(bad):
        raise ValueError(
          f"{len(bad)} of {len(y_N)} {split} labels are outside [0, {self.num_classes}), the first is {y_N[bad[0]]} at "
          f"index {bad[0]}: leave out images without a label (-1)"
        )


@dataclasses.dataclass(frozen=True)
class TuningData:
  """Images, what is seen of them (view_fn: a batch of canvases -> images_BxHxWxC, normalised), and their labels.

  seed: of the held-out part, the order of the images and what starts at random. train_view_fn(batch, keys_B): what is
  seen in training, where that is drawn anew each time.
  """

  train: ImageSet
  test: ImageSet
  view_fn: Callable[[Tree], jax.Array]
  tasks: tuple[Task, ...]
  seed: int = 0
  train_view_fn: Callable[[Tree, jax.Array], jax.Array] | None = None

  @classmethod
  def of(cls, subject: Subject) -> TuningData:
    """Returns what a row of the table is tuned on: the labels of its data are the one task."""
    data = subject.data
    task = Task(data.train.labels(), data.test.labels(), data.num_classes)
    return cls(data.train, data.test, data.view_fn, (task,), subject.settings.seed)


@dataclasses.dataclass(frozen=True)
class Tunable:
  """Networks to tune: forward_fn(trained, frozen, images_BxHxWxC, task) -> logits_BxC of one task.

  Only `trained`, {group: parameters}, has gradients; shares gives each group's share of the learning rate: a number, or
  one for every parameter. train_fn: what stands in forward_fn's place in training, with keys_B of the images as well.
  mixup: alpha of the share by which the images of a task in a batch are mixed with those in reverse; 0: not at all.
  """

  forward_fn: Callable[[Tree, Tree, jax.Array, int], jax.Array]
  trained: Mapping[str, Tree]
  frozen: Mapping[str, Tree]
  shares: Mapping[str, Tree]
  train_fn: Callable[[Tree, Tree, jax.Array, int, jax.Array], jax.Array] | None = None
  mixup: float = 0.0


@dataclasses.dataclass(frozen=True)
class Tuned:
  """Accuracies in percent, one per task, NaN where training diverged; the test images have no other use.

  held_out: {learning rate: accuracy on held-out training images, the mean over tasks}, where one had to be selected.
  """

  accuracy: tuple[float, ...]
  train_accuracy: tuple[float, ...]
  learning_rate: float
  held_out: Mapping[float, float]
  seconds: float
  trained: Tree = dataclasses.field(repr=False)

  def summary(self) -> dict[str, Any]:
    """Returns all but the parameters as plain values, None for NaN."""
    plain = lambda x: None if math.isnan(x) else x
    return {
      "accuracy": [plain(x) for x in self.accuracy],
      "train_accuracy": [plain(x) for x in self.train_accuracy],
      "learning_rate": self.learning_rate,
      "held_out": {str(rate): plain(x) for rate, x in self.held_out.items()},
      "seconds": round(self.seconds, 1),
    }


def tune(networks: Tunable, data: TuningData, settings: TuningSettings, mesh: Mesh | None = None) -> Tuned:
  """Returns what the networks, tuned on the training images of `data`, make of the test images.

  With several tasks every batch is split evenly over them: an image is asked for one of its labels at a time. The
  order of the images depends on their number, the batch, the epochs and the seed only, so all networks see the same.
  Batches are split over the devices of `mesh`; default: this process's first.

  ValueError where a batch does not divide over tasks and devices.
  """
  began = time.monotonic()
  mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  init_fn, step_fn, score_fn = _programs(networks, data, settings.weight_decay)
  # Without a mesh in force the networks constrain nothing, and XLA splits the images as they come.
  frozen = jax.device_put(networks.frozen, replicated(mesh))
  labels = {split: np.stack([getattr(t, f"{split}_N") for t in data.tasks], 1) for split in ("train", "test")}
  ways = batch_ways(mesh)

  def train(rows_N: np.ndarray, rate: float) -> Tree:
    order_SxB = _order(rows_N, settings, ways, len(data.tasks), data.seed)
    trained, opt_state = init_fn(jax.device_put(networks.trained, replicated(mesh)))
    previous = None
    with _read(data.train, labels["train"], order_SxB, mesh) as batches:
      for batch, factor in zip(batches, warm_up_and_cosine(len(order_SxB))):
        trained, opt_state, loss = step_fn(trained, opt_state, frozen, np.float32(rate * factor), batch)
        jax.block_until_ready(previous)  # else the host would put all batches of the run onto the device
        previous = loss
    return trained

  def score(trained: Tree, split: str, rows_N: np.ndarray) -> tuple[tuple[float, ...], float]:
    """Returns each task's accuracy in percent, NaN where it diverged, and the mean cross-entropy."""
    batch_size = -(-min(settings.batch_size, len(rows_N)) // ways) * ways
    order_SxB = np.resize(rows_N, (-(-len(rows_N) // batch_size), batch_size))
    with _read(getattr(data, split), labels[split], order_SxB, mesh, len(rows_N)) as batches:
      sums = [jax.device_get(score_fn(trained, frozen, batch)) for batch in batches]
    hits_T, loss_T, count = (sum(x) for x in zip(*sums))
    return tuple(np.where(np.isfinite(loss_T), 100 * hits_T / count, np.nan).tolist()), float(loss_T.mean() / count)

  every_N, found = np.arange(len(data.train)), {}
  if len(settings.learning_rates) > 1:
    fit, left = stratified_split(data.tasks[0].train_N, HELD_OUT, data.seed)
    found = {rate: score(train(fit, rate), "train", left) for rate in settings.learning_rates}
  held_out = {rate: float(np.mean(accuracy_T)) for rate, (accuracy_T, _) in found.items()}
  rate = select_rate(found) if found else min(settings.learning_rates)
  trained = train(every_N, rate)
  accuracy, train_accuracy = score(trained, "test", np.arange(len(data.test)))[0], score(trained, "train", every_N)[0]
  if np.isnan([*accuracy, *train_accuracy]).any():
    log.warning("Tuning diverged at the learning rate %g: lower evals.tuning.learning_rates", rate)
  seconds = time.monotonic() - began
  shown = ", ".join(f"{x:.1f}" for x in accuracy)  # each takes minutes: say that it moves
  log.info("Tuned %s (frozen: %s): %s %% in %.0f s", *map(_names, (networks.trained, networks.frozen)), shown, seconds)
  return Tuned(accuracy, train_accuracy, rate, held_out, seconds, trained)


def _names(groups: Mapping[str, Tree]) -> str:
  return ", ".join(sorted(groups)) or "nothing"


def select_rate(scores: Mapping[float, tuple[tuple[float, ...], float]]) -> float:
  """Returns the learning rate of the best scores, {rate: (accuracy of each task, loss)}.

  That is the highest mean accuracy, and among equals the lowest loss. What diverged, NaN, never wins; where all did,
  the lowest rate is the one to fail once more.
  """
  finite = {rate: (np.mean(accuracy_T), -loss) for rate, (accuracy_T, loss) in scores.items() if np.isfinite(loss)}
  return max(finite, key=lambda rate: finite[rate]) if finite else min(scores)


def adamw_of_kernels(weight_decay: float) -> optax.GradientTransformation:
  """Returns AdamW's direction, to be multiplied by the rate; kernels decay, biases, scales and tokens do not."""
  decayed = lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", tree)
  return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(weight_decay, mask=decayed))


def _programs(networks: Tunable, data: TuningData, weight_decay: float):
  """Returns (init_fn, step_fn, score_fn): compiled once each, whatever the learning rate and the number of steps."""
  num_tasks = len(data.tasks)
  adamw = adamw_of_kernels(weight_decay)
  each = lambda share, params: jax.tree.map(lambda _: share, params) if isinstance(share, float) else share
  shares = {group: each(networks.shares[group], params) for group, params in networks.trained.items()}

  cross_entropy = optax.softmax_cross_entropy_with_integer_labels

  def said(trained, frozen, images, task, keys_B):
    if networks.train_fn:
      return networks.train_fn(trained, frozen, images, task, keys_B)
    return networks.forward_fn(trained, frozen, images, task)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step_fn(trained, opt_state, frozen, rate, batch):
    keys_B = example_keys(stream(jax.random.key(data.seed), "tuning"), batch["draw"])
    images_BxHxWxC = data.train_view_fn(batch, keys_B) if data.train_view_fn else data.view_fn(batch)

    def loss_fn(trained):
      losses = []
      for task in range(num_tasks):  # rows task, task + T, ...: as many of every device
        rows = (every(x, num_tasks)[:, task] for x in (images_BxHxWxC, batch["labels_BxT"], keys_B))
        images, labels, keys = rows
        if networks.mixup:
          share = mixed_share(data.seed, batch["draw"][0], networks.mixup)
          logits_BxC = said(trained, frozen, share * images + (1 - share) * images[::-1], task, keys)
          own_B, other_B = (cross_entropy(logits_BxC, y_B) for y_B in (labels[:, task], labels[::-1, task]))
          losses.append((share * own_B + (1 - share) * other_B).mean())
        else:
          losses.append(cross_entropy(said(trained, frozen, images, task, keys), labels[:, task]).mean())
      return sum(losses) / num_tasks

    loss, grads = jax.value_and_grad(loss_fn)(trained)
    updates, opt_state = adamw.update(grads, opt_state, trained)
    trained = jax.tree.map(lambda p, u, share: p - rate * share * u, trained, updates, shares)
    return trained, opt_state, loss

  @jax.jit
  def score_fn(trained, frozen, batch):
    images, real_B = data.view_fn(batch), batch["real"]
    answers = [networks.forward_fn(trained, frozen, images, t) for t in range(num_tasks)]
    right = list(zip(answers, batch["labels_BxT"].T, strict=True))
    summed = lambda scores: jnp.stack([jnp.where(real_B, x, 0).sum() for x in scores])
    loss_T = summed(cross_entropy(logits_BxC, y_B) for logits_BxC, y_B in right)
    hits_T = summed(logits_BxC.argmax(-1) == y_B for logits_BxC, y_B in right)
    return hits_T, loss_T, real_B.sum()

  @jax.jit
  def init_fn(trained):
    trained = jax.tree.map(jnp.copy, trained)  # the step takes the memory of what it is given
    return trained, adamw.init(trained)

  return init_fn, step_fn, score_fn


def mixed_share(seed: int, step: jax.Array, alpha: float) -> jax.Array:
  """Returns the share of an image in its mixture, drawn from Beta(alpha, alpha) for each step."""
  key = jax.random.fold_in(stream(jax.random.key(seed), "mixup"), step)
  return jax.random.beta(key, alpha, alpha)


def every(x_Bx: jax.Array, num_tasks: int) -> jax.Array:
  """Returns the rows (B / T, T, ...): column t holds those of task t."""
  return x_Bx.reshape(-1, num_tasks, *x_Bx.shape[1:])


def _order(rows_N: np.ndarray, settings: TuningSettings, ways: int, num_tasks: int, seed: int) -> np.ndarray:
  """Returns the images of every step, (S, B): a new order each epoch, incomplete batches dropped."""
  batch_size = min(settings.batch_size, len(rows_N)) // (ways * num_tasks) * ways * num_tasks
  if not batch_size:
    raise ValueError(
      f"evals.tuning.batch_size={settings.batch_size} of {len(rows_N)} training images does not divide over {ways} "
      f"devices and {num_tasks} tasks: at least {ways * num_tasks} are needed"
    )
  return rows_N[batch_order(len(rows_N), settings.epochs, batch_size, seed)]


def warm_up_and_cosine(num_steps: int) -> np.ndarray:
  """Returns the factor on the learning rate of every step: linear warm-up, then a cosine to zero; none is zero."""
  warmup = max(1, round(WARMUP * num_steps))
  schedule = jax.vmap(optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, num_steps + 1))
  return np.asarray(schedule(jnp.arange(1, num_steps + 1)))


def _read(images: ImageSet, labels_NxT: np.ndarray, order_SxB: np.ndarray, mesh: Mesh, num_real: int | None = None):
  """Returns device batches with their labels_BxT and `real`: not filled up beyond num_real, nor a stand-in."""

  def batches() -> Iterator[dict[str, np.ndarray]]:
    place_SxB = np.arange(order_SxB.size).reshape(order_SxB.shape)
    for rows_B, place_B in zip(order_SxB, place_SxB):
      batch = images.read(rows_B)  # a stand-in for a broken image brings its own index, and so its own label
      real_B = (batch["index"] == rows_B) & (place_B < (num_real or order_SxB.size))
      yield batch | {"labels_BxT": labels_NxT[batch["index"]], "real": real_B, "draw": place_B.astype(np.int32)}

  return prefetch_to_device(batches(), batch_sharding(mesh))
