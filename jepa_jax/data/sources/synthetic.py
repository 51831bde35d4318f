"""Random images, and captions of random words, for measuring speed without a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jepa_jax.data.sources.source import Opening, digest

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

TRAIN_IMAGES = 4096
TEST_IMAGES = 512
WORDS = tuple(a + b for a in ("ba", "ko", "mi", "ru", "so", "te", "vu", "za") for b in "lnrstx")


class SyntheticSource:
  """Random pixels, a function of (split, index) alone."""

  class_names = tuple(str(i) for i in range(10))

  def __init__(self, num_images: int, side_px: int, channels: int, split: str, num_captions: int = 0):
    self._num_images, self._shape, self._split = num_images, (side_px, side_px, channels), split
    self._num_captions = num_captions

  def __len__(self) -> int:
    return self._num_images

  def __getitem__(self, index: int) -> dict:
    generator = np.random.default_rng((int(self._split == "test"), index))
    pixels = np.frombuffer(generator.bytes(int(np.prod(self._shape))), np.uint8).reshape(self._shape)
    example = {"image": pixels, "label": index % 10, "name": f"synthetic-{self._split}[{index}]"}
    return example | ({"captions": self._captions(index)} if self._num_captions else {})

  def captions(self, indices: Sequence[int] | None = None) -> list[list[str]]:
    """Returns the captions of every image, or of these: 4 to 12 words each, a function of (split, index) alone."""
    return [self._captions(int(index)) for index in (range(len(self)) if indices is None else indices)]

  def _captions(self, index: int) -> list[str]:
    generator = np.random.default_rng((2 + int(self._split == "test"), index))
    return [" ".join(generator.choice(WORDS, generator.integers(4, 13))) for _ in range(self._num_captions)]

  def labels(self) -> np.ndarray:
    return np.arange(self._num_images, dtype=np.int32) % 10

  def fingerprint(self) -> str:
    return digest("synthetic", self._split, self._num_images, self._shape)


def open_synthetic(cfg: DataConfig, split: str) -> SyntheticSource:
  """Returns `max_train` random images to train with, as large as the canvas, or 512 to test with."""
  num_images = (cfg.max_train or TRAIN_IMAGES) if split == "train" else TEST_IMAGES
  num_captions = cfg.captions.per_image if cfg.captions.train else 0
  return SyntheticSource(num_images, cfg.canvas_px, cfg.channels, split, num_captions)


SYNTHETIC = Opening(open_synthetic, reads=("captions",))
