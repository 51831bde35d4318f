"""Few-label accuracy of frozen features: one fixed classifier, the same labelled images for every feature set.

Legend: N training images, Q test images, F features, C classes, R draws.

The protocol has no setting to select, so nothing can be tuned for one row of a table. Each image's features are
L2-normalised; the training images, without their labels, give one mean vector and one scale (total variance 1) that are
applied to both sets; scikit-learn's multinomial LogisticRegression with C = 10 is fitted to the labelled images.

Why this one: for *pixels*, the baseline everything is held against, it is the best of the common choices or within .6
points of it. On held-out training images of the digits, 1/5/10 labels per class give pixels 65.9/85.7/92.0 with it,
against 59.9/83.5/90.2 with per-feature standardisation (C = 1), which blows up the pixels that are almost always blank.
The mean and the scale change nothing there; they make C mean the same for 64 pixels, for 2048 features, and for random
networks whose features lie in a narrow cone (mean cosine .96). C from 10 to 100 moves any of these by 1.1 at most.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jepa_jax.choices import check_choices
from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.blocks import (
  MEMORY_GB,
  Normalise,
  Progress,
  Report,
  check_labelled,
  check_same_width,
  l2_normalised,
  memory_bytes,
  ranges,
  rows_that_fit,
)
from jepa_jax.evals.table import shots_columns

log = logging.getLogger(__name__)
REGULARISATION_C = 10.0
_PASS_BYTES = 2**24  # of a block: larger ones are no faster
_SMALL_FIT = 2**24  # products of labelled images, features and classes, below which threads only wait


@dataclasses.dataclass(frozen=True)
class FewShot(Protocol):
  """Few labels: so many (`shots`) per class, the mean over so many `draws`. See `few_shot`.

  features: "probe" (of a ViT the last layers, concatenated) or "pooled".
  """

  shots: tuple[int, ...] = (1, 5, 10)
  draws: int = 10
  features: Literal["probe", "pooled"] = "probe"

  def __post_init__(self):
    check_choices(self)
    _check_settings(self.shots, self.draws)

  def run(self, subject: Subject) -> Iterator[Result]:
    (train, test), num_classes = subject.features("image"), subject.data.num_classes
    check_labelled("train", getattr(train, self.features), train.label, num_classes)
    rarest = int(np.bincount(train.label, minlength=num_classes).min())
    shots = tuple(n for n in self.shots if n <= rarest)
    if shots != self.shots:
      log.warning("The rarest class has %d training images: only %s labels per class are evaluated", rarest, shots)
    if not shots:
      return
    x, y = getattr(train, self.features), getattr(test, self.features)
    room = {name: value for name, value in subject.room().items() if name != "mesh"}  # no accelerator is used
    found = few_shot(x, train.label, y, test.label, num_classes, shots, self.draws, subject.settings.seed, **room)
    for column, value in shots_columns(found).items():
      yield Result(subject.row, column, value)


def few_shot(
  train_x,
  train_y,
  test_x,
  test_y,
  num_classes: int,
  shots: Sequence[int] = (1, 5, 10),
  num_draws: int = 10,
  seed: int = 0,
  *,
  memory_gb: float = MEMORY_GB,
  report: Report | None = None,
) -> dict[int, tuple[float, float]]:
  """Returns {labels per class: (mean, standard deviation) of the test accuracy in percent over the draws}.

  The deviation is the sample's (R - 1) and describes single draws; 0 for one draw. The draws are shared by all feature
  sets of the same labels and seed, so a difference of two rows is best judged draw by draw: few_shot_accuracies.
  Arguments and errors as in few_shot_accuracies.
  """
  accuracies = few_shot_accuracies(
    train_x, train_y, test_x, test_y, num_classes, shots, num_draws, seed, memory_gb=memory_gb, report=report
  )
  deviation = lambda acc_R: float(acc_R.std(ddof=1)) if len(acc_R) > 1 else 0.0
  return {n: (float(acc_R.mean()), deviation(acc_R)) for n, acc_R in accuracies.items()}


def few_shot_accuracies(
  train_x,
  train_y,
  test_x,
  test_y,
  num_classes: int,
  shots: Sequence[int] = (1, 5, 10),
  num_draws: int = 10,
  seed: int = 0,
  *,
  memory_gb: float = MEMORY_GB,
  report: Report | None = None,
) -> dict[int, np.ndarray]:
  """Returns {labels per class: test accuracy in percent of every draw (R,)}, draws in the order of labelled_draws.

  Args:
    train_x, test_x: (N, F), (Q, F) features, float16 or float32, also memory-mapped; other types are copied.
    train_y, test_y: (N,), (Q,) integer labels in [0, num_classes); of train_y only the drawn ones reach the classifier.
    shots: labelled images per class.
    num_draws: how many labelled sets.
    seed: of the draws.
    memory_gb: what this may hold on the host; the largest labelled set has to fit. No accelerator is used.
    report: told how far the fits are, at most every ten seconds.

  Raises:
    ValueError: features that are not finite, labels out of range, a class with fewer images than shots, a
      memory_gb in which the largest labelled set and its classifier do not fit.
  """
  # Half a second at the start of every command, and only this one needs them.
  from sklearn.linear_model import LogisticRegression
  from threadpoolctl import threadpool_limits  # comes with scikit-learn

  train_NxF, train_y_N = check_labelled("train", train_x, train_y, num_classes)
  test_QxF, test_y_Q = check_labelled("test", test_x, test_y, num_classes)
  check_same_width(train_NxF, test_QxF)
  draws = labelled_draws(train_y_N, num_classes, shots, num_draws, seed)
  _check_memory(num_classes * max(shots), train_NxF.shape[1], num_classes, memory_bytes(memory_gb))
  normalise = centred_directions(train_NxF)
  progress, done = Progress(report, "fewshot: fit", len(draws) * num_draws), 0
  accuracies: dict[int, list[float]] = {n: [] for n in draws}
  for n, index_RxL in draws.items():
    for index_L in index_RxL:
      labelled_LxF = normalise(train_NxF[index_L])
      # The products of a small fit are too small to share: on a busy machine threads only wait.
      with threadpool_limits(1 if labelled_LxF.size * num_classes < _SMALL_FIT else None):
        classifier = LogisticRegression(C=REGULARISATION_C, max_iter=1000).fit(labelled_LxF, train_y_N[index_L])
        accuracies[n].append(_accuracy(classifier, normalise, test_QxF, test_y_Q))
      done += 1
      progress.at(done)
  return {n: np.array(of_draws) for n, of_draws in accuracies.items()}


def _accuracy(classifier: Any, normalise: Normalise, test_QxF, test_y_Q) -> float:
  """Returns the accuracy in percent; the test features are normalised and scored in blocks."""
  widest = max(test_QxF.shape[1], len(classifier.classes_))
  blocks = ranges(len(test_QxF), rows_that_fit(widest, _PASS_BYTES))
  hits = [(classifier.predict(normalise(test_QxF[i:j])) == test_y_Q[i:j]).sum() for i, j in blocks]
  return 100.0 * float(sum(hits) / len(test_QxF))


def _check_settings(shots: Sequence[int], num_draws: int) -> None:
  if not shots or min(shots) < 1:
    raise ValueError(f"shots = {shots}: give at least one, all 1 or more")
  if num_draws < 1:
    raise ValueError(f"num_draws = {num_draws}: must be 1 or more")


def _check_memory(num_labelled: int, width: int, num_classes: int, memory: int) -> None:
  # scikit-learn fits in float64: the images, three arrays of probabilities, and lbfgs' ten pairs of weights.
  needed = 8 * (2 * num_labelled * width + 3 * num_labelled * num_classes + 24 * width * num_classes)
  if needed > memory:
    raise ValueError(
      f"the fit to {num_labelled} labelled images of {num_classes} classes and {width} features needs "
      f"{needed / 1e9:.2g} GB, and memory_gb is {memory / 1e9:.2g}: raise memory_gb, or lower shots"
    )


def labelled_draws(train_y, num_classes: int, shots: Sequence[int], num_draws: int, seed: int) -> dict[int, np.ndarray]:
  """Returns {n: indices (R, C n) of the training images whose label is given}, a function of labels and seed only.

  Draws are nested: the images of 1 label per class are among those of 5, so that curves over n are paired too, and a
  draw does not depend on which other n or how many draws are asked for.
  """
  _check_settings(shots, num_draws)
  train_y = np.asarray(train_y)
  members_C = [np.flatnonzero(train_y == label) for label in range(num_classes)]
  for label, members in enumerate(members_C):
    if len(members) < max(shots):
      raise ValueError(
        f"class {label} has {len(members)} training images, fewer than the {max(shots)} labels per class asked for: "
        f"lower shots = {tuple(shots)}, or give more images"
      )

  def draw(r: int, n: int) -> np.ndarray:
    orders = [np.random.default_rng((seed, r, c)).permutation(members) for c, members in enumerate(members_C)]
    return np.concatenate([order[:n] for order in orders])

  return {n: np.stack([draw(r, n) for r in range(num_draws)]) for n in shots}


def centred_directions(train_NxF: np.ndarray) -> Normalise:
  """Returns what makes blocks of features L2-normalised, less the training mean, over one scale: total variance 1.

  Labels are not used, nor any statistic of the test images. Identical training features come back as zeros.
  """
  blocks = list(ranges(len(train_NxF), rows_that_fit(train_NxF.shape[1], _PASS_BYTES)))
  total_F = sum(l2_normalised(train_NxF[start:stop]).sum(axis=0, dtype=np.float64) for start, stop in blocks)
  mean_F = np.float32(total_F / len(train_NxF))
  centred = lambda x_BxF: l2_normalised(x_BxF) - mean_F
  squares = sum(np.sum(centred(train_NxF[start:stop]) ** 2, dtype=np.float64) for start, stop in blocks)
  scale = np.float32(np.sqrt(squares / len(train_NxF)))
  if scale < 1e-6:  # below float32 rounding of unit vectors: collapsed
    return lambda x_BxF: np.zeros(x_BxF.shape, np.float32)
  return lambda x_BxF: centred(x_BxF) / scale


PROTOCOL = FewShot
