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

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from jepa_jax.evals.blocks import check_labelled, check_same_width, l2_normalised

REGULARISATION_C = 10.0


def few_shot(
  train_x,
  train_y,
  test_x,
  test_y,
  num_classes: int,
  shots: Sequence[int] = (1, 5, 10),
  num_draws: int = 10,
  seed: int = 0,
) -> dict[int, tuple[float, float]]:
  """Returns {labels per class: (mean, standard deviation) of the test accuracy in percent over the draws}.

  The deviation is the sample's (R - 1) and describes single draws; 0 for one draw. The draws are shared by all feature
  sets of the same labels and seed, so a difference of two rows is best judged draw by draw: few_shot_accuracies.
  Arguments and errors as in few_shot_accuracies.
  """
  accuracies = few_shot_accuracies(train_x, train_y, test_x, test_y, num_classes, shots, num_draws, seed)
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
) -> dict[int, np.ndarray]:
  """Returns {labels per class: test accuracy in percent of every draw (R,)}, draws in the order of labelled_draws.

  Args:
    train_x, test_x: (N, F), (Q, F) features.
    train_y, test_y: (N,), (Q,) integer labels in [0, num_classes); of train_y only the drawn ones reach the classifier.
    shots: labelled images per class.
    num_draws: how many labelled sets.
    seed: of the draws.

  Raises:
    ValueError: features that are not finite, labels out of range, a class with fewer images than shots.
  """
  train_NxF, train_y_N = check_labelled("train", train_x, train_y, num_classes)
  test_QxF, test_y_Q = check_labelled("test", test_x, test_y, num_classes)
  check_same_width(train_NxF, test_QxF)
  draws = labelled_draws(train_y_N, num_classes, shots, num_draws, seed)
  train_NxF, test_QxF = centred_directions(train_NxF, test_QxF)

  def accuracy(index) -> float:
    classifier = LogisticRegression(C=REGULARISATION_C, max_iter=1000)
    return 100.0 * classifier.fit(train_NxF[index], train_y_N[index]).score(test_QxF, test_y_Q)

  with threadpool_limits(1):  # the products of a fit are too small to share: on a busy machine threads only wait
    return {n: np.array([accuracy(index) for index in index_RxL]) for n, index_RxL in draws.items()}


def labelled_draws(train_y, num_classes: int, shots: Sequence[int], num_draws: int, seed: int) -> dict[int, np.ndarray]:
  """Returns {n: indices (R, C n) of the training images whose label is given}, a function of labels and seed only.

  Draws are nested: the images of 1 label per class are among those of 5, so that curves over n are paired too, and a
  draw does not depend on which other n or how many draws are asked for.
  """
  if not shots or min(shots) < 1:
    raise ValueError(f"shots = {shots}: give at least one, all 1 or more")
  if num_draws < 1:
    raise ValueError(f"num_draws = {num_draws}: must be 1 or more")
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


def centred_directions(train_NxF: np.ndarray, test_QxF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns both sets L2-normalised per image, less the training mean, over one scale: total training variance 1.

  Labels are not used, nor any statistic of the test images. Identical training features come back as zeros.
  """
  train_NxF, test_QxF = l2_normalised(train_NxF), l2_normalised(test_QxF)
  mean_F = train_NxF.mean(axis=0, dtype=np.float64).astype(np.float32)
  train_NxF, test_QxF = train_NxF - mean_F, test_QxF - mean_F
  scale = np.sqrt(np.mean(np.sum(train_NxF**2, axis=1)))
  if scale < 1e-6:  # below float32 rounding of unit vectors: collapsed
    return np.zeros_like(train_NxF), np.zeros_like(test_QxF)
  return train_NxF / scale, test_QxF / scale
