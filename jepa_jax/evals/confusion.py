"""What is counted in dense evaluation: one confusion matrix of a whole set of images, and the scores of it.

Legend: C classes, N pixels; rows of a matrix are labels, columns predictions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.data import VOID


def confusion(label_N: jax.Array, predicted_N: jax.Array, num_classes: int) -> jax.Array:
  """Returns how many pixels of each class are taken for each, int32 (C, C); VOID counts nowhere.

  Sum those of images as 64-bit integers: a set has more pixels than 32 bits count.
  """
  known_N = label_N != VOID
  place_N = jnp.where(known_N, label_N.astype(jnp.int32) * num_classes + predicted_N.astype(jnp.int32), 0)
  counts = jnp.zeros(num_classes**2, jnp.int32).at[place_N.ravel()].add(known_N.ravel().astype(jnp.int32))
  return counts.reshape(num_classes, num_classes)


def scores(matrix_CxC: np.ndarray) -> dict[str, Any]:
  """Returns {"miou", "pixel_accuracy", "class_accuracy": percent, "iou": (C,) percent, NaN without such a class}.

  A class that is neither in the labels nor in what was predicted is left out of the mean; one that was predicted and is
  nowhere counts 0. ValueError for a matrix that has counted nothing.
  """
  matrix_CxC = np.asarray(matrix_CxC, np.int64)
  labels_C, predicted_C, right_C = matrix_CxC.sum(1), matrix_CxC.sum(0), np.diag(matrix_CxC)
  if not labels_C.sum():
    raise ValueError("no pixel of these images is of a class: all are void; check data.label_maps")
  union_C = labels_C + predicted_C - right_C
  share = lambda part, whole: np.where(whole > 0, 100 * part / np.maximum(whole, 1), np.nan)
  iou_C = share(right_C, union_C)
  return {
    "miou": float(np.nanmean(iou_C)),
    "pixel_accuracy": float(100 * right_C.sum() / labels_C.sum()),
    "class_accuracy": float(np.nanmean(share(right_C, labels_C))),
    "iou": iou_C,
  }
