"""Linear probe of frozen features: the LeJEPA protocol, with the learning rate selected on held-out training images.

Legend: N training images, Q test images, F features, C classes, S settings (learning rate, weight decay), B batch,
T steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jepa_jax.choices import check_choices
from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.blocks import MEMORY_GB, Report, check_labelled, check_same_width, devices_of, memory_bytes
from jepa_jax.evals.linear_fit import LabelledRows, Room, fit, make_normalise, score

LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclasses.dataclass(frozen=True)
class Linear(Protocol):
  """A linear probe on frozen features, its learning rate selected on held-out training images. See `linear_probe`.

  Up to 50,000 images no bound is reached: all epochs, on all images.

  The bounds are for large sets: 50 epochs of 1.28 million images are 125,000 steps of one rate after 100,000 of nine.
  Selection is given few images and few steps: with all the steps on few images the classifiers learn these by heart,
  which favours low rates. What the bounds cost was measured on made-up features: docs/reproducing.md.

  features: "probe" (of a ViT the last layers, concatenated) or "pooled".
  input_norm: "layernorm" per image; "standardize" by the mean and deviation of the training images; "batchnorm" by
    those of the minibatch in training, of the training images in testing; or "none". None has a learnt scale and
    shift: the linear layer that follows can absorb them.
  learning_rates, weight_decays: every pair is tried on held-out training images; the best is trained again on all.
  epochs, batch_size: of both trainings; the last incomplete batch of an epoch is dropped.
  min_steps: a small training set gets more epochs, until it has taken this many steps.
  max_steps: a large one stops after so many (the cosine schedule ends there): four epochs of 1.28 million images.
  selection_images: the learning rate is chosen with so many training images, drawn at random where there are more.
  selection_steps: as max_steps, of the trainings by which it is chosen.
  validation_fraction: of every class of these images, held out to choose by, in (0, 1).
  """

  features: Literal["probe", "pooled"] = "probe"
  learning_rates: tuple[float, ...] = LEARNING_RATES
  weight_decays: tuple[float, ...] = (1e-6,)
  epochs: int = 50
  min_steps: int = 1000
  max_steps: int = 10_000
  batch_size: int = 512
  selection_images: int = 131_072
  selection_steps: int = 5_000
  validation_fraction: float = 0.2
  input_norm: Literal["layernorm", "batchnorm", "standardize", "none"] = "layernorm"

  def __post_init__(self):
    check_choices(self)
    if not len(self.learning_rates) or min(self.learning_rates) <= 0:
      raise ValueError(f"learning_rates = {self.learning_rates}: give at least one, all above 0")
    if not len(self.weight_decays) or min(self.weight_decays) < 0:
      raise ValueError(f"weight_decays = {self.weight_decays}: give at least one, none below 0")
    for name in ("epochs", "batch_size", "max_steps", "selection_images", "selection_steps"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} = {getattr(self, name)}: must be 1 or more")
    if self.min_steps < 0:
      raise ValueError(f"min_steps = {self.min_steps}: must be 0 (off) or more")
    if not 0 < self.validation_fraction < 1:
      raise ValueError(f"validation_fraction = {self.validation_fraction}: must lie between 0 and 1, for example 0.2")

  def run(self, subject: Subject) -> Iterator[Result]:
    found = probe_features(subject, self.features, self)
    yield Result(subject.row, "linear", found.accuracy, dataclasses.asdict(found))


@dataclasses.dataclass(frozen=True)
class ProbeSetting:
  """One setting of the sweep, scored on the held-out training images: accuracy in percent, loss in nats."""

  learning_rate: float
  weight_decay: float
  accuracy: float
  loss: float


@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """What a probe found. `accuracy` (percent) is the test set's only use; everything else comes from training images."""

  accuracy: float
  train_accuracy: float
  selected: ProbeSetting
  sweep: tuple[ProbeSetting, ...]
  num_validation: int

  @property
  def validation_by_lr(self) -> dict[float, float]:
    """{learning rate: held-out accuracy in percent}, the best over the weight decays."""
    best: dict[float, float] = {}
    for s in self.sweep:
      best[s.learning_rate] = max(s.accuracy, best.get(s.learning_rate, 0.0))
    return best

  @property
  def at_edge(self) -> bool:
    """Whether the selected learning rate is the lowest or highest of several: then widen the sweep."""
    rates = sorted({s.learning_rate for s in self.sweep})
    return len(rates) > 1 and self.selected.learning_rate in (rates[0], rates[-1])


def probe_features(subject: Subject, kind: str, settings: Linear = Linear(), **changes) -> LinearProbe:
  """Returns `linear_probe` of a row's features, "probe" or "pooled"."""
  train, test = subject.features("image")
  rows = getattr(train, kind), train.label, getattr(test, kind), test.label
  seed = subject.settings.seed
  return linear_probe(*rows, subject.data.num_classes, settings, seed=seed, **subject.room(), **changes)


def linear_probe(
  train_x,
  train_y,
  test_x,
  test_y,
  num_classes: int,
  settings: Linear = Linear(),
  *,
  seed: int = 0,
  mesh: Mesh | None = None,
  memory_gb: float = MEMORY_GB,
  report: Report | None = None,
  **changes,
) -> LinearProbe:
  """Returns the test accuracy of a linear classifier on frozen features, and how its setting was selected.

  Every (learning rate, weight decay) is trained at once on a stratified part of the training images and scored on the
  rest of them. The best (by accuracy, then by loss) is trained again on all training images and tested once. The
  optimiser is AdamW with a cosine schedule to zero, weights start at zero, the bias is not decayed (LeJEPA,
  arXiv 2511.08544: LayerNorm -> linear, AdamW, weight decay 1e-6).

  Args:
    train_x, test_x: (N, F), (Q, F) features, float16 or float32, also memory-mapped; other types are copied.
    train_y, test_y: (N,), (Q,) integer labels in [0, num_classes).
    settings: see Linear; **changes are fields of it, for this call: linear_probe(..., input_norm="none").
    seed: of the images to select with, of their split and of the order of the batches.
    mesh: every batch is split over its devices, all of this process; None: the first local device.
    memory_gb: what this may hold on the host, and on each device. The probe's result does not depend on it.
    report: told how far the trainings are, at most every ten seconds.

  Raises:
    ValueError: features not finite, labels or settings out of range, all diverged, memory_gb too small for a setting.
  """
  settings = dataclasses.replace(settings, **changes)
  train_NxF, train_y_N = check_labelled("train", train_x, train_y, num_classes)
  test_QxF, test_y_Q = check_labelled("test", test_x, test_y, num_classes)
  check_same_width(train_NxF, test_QxF)
  if settings.input_norm == "layernorm" and train_NxF.shape[1] < 2:
    raise ValueError("LayerNorm makes a single feature zero: use input_norm='standardize'")
  room = Room(devices_of(mesh), memory_bytes(memory_gb), report)
  kept, held_out = selection_split(train_y_N, settings.selection_images, settings.validation_fraction, seed)

  def train(index, rate_S, decay_S, most_steps, title):
    rows = LabelledRows(train_NxF, train_y_N, index, make_normalise(settings.input_norm, train_NxF, index))
    order_TxB, batch_norm = steps_of(len(rows), settings, most_steps, seed), settings.input_norm == "batchnorm"
    return fit(rows, rate_S, decay_S, order_TxB, num_classes, batch_norm, room, title), rows

  rate_S, decay_S = (a.ravel() for a in np.meshgrid(settings.learning_rates, settings.weight_decays, indexing="ij"))
  # Full float32 products: the number should not depend on the machine's matmul.
  with jax.default_matmul_precision("highest"):
    weights, rows = train(kept, rate_S, decay_S, settings.selection_steps, "linear, selection: step")
    accuracy_S, loss_S = score(weights, dataclasses.replace(rows, index=held_out), room, "linear, selection: scored")
    sweep = tuple(ProbeSetting(*map(float, row)) for row in zip(rate_S, decay_S, accuracy_S, loss_S))
    best = select(sweep)
    chosen = np.array([best.learning_rate]), np.array([best.weight_decay])
    weights, rows = train(np.arange(len(train_NxF)), *chosen, settings.max_steps, "linear: step")
    train_accuracy = float(score(weights, rows, room, "linear: scored training image")[0][0])
    test = LabelledRows(test_QxF, test_y_Q, np.arange(len(test_QxF)), rows.normalise)
    accuracy = float(score(weights, test, room, "linear: scored test image")[0][0])
  return LinearProbe(accuracy, train_accuracy, best, sweep, len(held_out))


def steps_of(num_images: int, settings: Linear, most_steps: int, seed: int) -> np.ndarray:
  """Returns the images of every step, int32 (T, B): `batch_order` of all epochs, cut off at most_steps."""
  batch = min(settings.batch_size, num_images)
  per_epoch = num_images // batch
  epochs = max(settings.epochs, math.ceil(settings.min_steps / per_epoch))
  num_steps = min(epochs * per_epoch, most_steps)
  return batch_order(num_images, math.ceil(num_steps / per_epoch), batch, seed)[:num_steps]


def selection_split(y_N: np.ndarray, most: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns `stratified_split` of at most so many images, drawn at random; sorted indices (kept, held out)."""
  if len(y_N) <= most:
    return stratified_split(y_N, fraction, seed)
  drawn = np.sort(np.random.default_rng(seed).choice(len(y_N), most, replace=False))
  kept, held_out = stratified_split(y_N[drawn], fraction, seed)
  return drawn[kept], drawn[held_out]


def stratified_split(y_N: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns sorted indices (kept, held out): about `fraction` of every class is held out, and one of each is kept.

  Unlike scikit-learn's, it takes classes of one image (they are kept), as long-tailed sets have them.
  """
  if not 0 < fraction < 1:
    raise ValueError(f"validation_fraction = {fraction}: must lie between 0 and 1, for example 0.2")
  rng = np.random.default_rng(seed)
  held_out = []
  for label in np.unique(y_N):
    members = rng.permutation(np.flatnonzero(y_N == label))
    held_out.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
  held_out = np.sort(np.concatenate(held_out))
  if not len(held_out):
    raise ValueError("no class has two training images, so none can be held out to select the learning rate")
  return np.setdiff1d(np.arange(len(y_N)), held_out), held_out


def select(sweep: Sequence[ProbeSetting]) -> ProbeSetting:
  """Returns the setting of highest held-out accuracy, among equals that of lowest loss; diverged ones never win."""
  finite = [s for s in sweep if np.isfinite(s.loss)]
  if not finite:
    raise ValueError(f"all {len(sweep)} settings diverged: lower learning_rates, or use another input_norm than 'none'")
  return max(finite, key=lambda s: (s.accuracy, -s.loss))


def batch_order(num_images: int, num_epochs: int, batch_size: int, seed: int) -> np.ndarray:
  """Returns the images of every step, int32 (steps, batch_size): a new order each epoch, incomplete batches dropped."""
  rng = np.random.default_rng(seed)  # on the host: jax.random.permutation in the scan triples its compile time
  whole = num_images // batch_size * batch_size
  epochs = [rng.permutation(num_images)[:whole].astype(np.int32) for _ in range(num_epochs)]
  return np.concatenate(epochs).reshape(-1, batch_size)


PROTOCOL = Linear
