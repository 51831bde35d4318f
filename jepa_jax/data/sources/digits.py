"""scikit-learn's handwritten digits: a data set that is always there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from jepa_jax.data.sources.source import ArraySource, Opening

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig


def open_digits(_: DataConfig, split: str) -> ArraySource:
  """Returns scikit-learn's 8 x 8 digits (values 0..16) scaled to 0..255 and, bicubically, to 32 x 32.

  The split is stratified and fixed: 1,297 to train, 500 to test. Both hold digits of the same writers.
  """
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  pixels, labels = load_digits(return_X_y=True)
  train, test = train_test_split(np.arange(1797), test_size=500, stratify=labels, random_state=0)
  chosen = np.sort(train if split == "train" else test)
  small = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in small]
  return ArraySource(np.stack(large), labels[chosen], [str(i) for i in range(10)], f"digits-{split}")


DIGITS = Opening(open_digits, reads=("subset_seed",))
