"""Images at hand, onto canvases: for use of an encoder outside of training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jepa_jax.data.config import DataConfig
from jepa_jax.data.decode import Fit, decode_image
from jepa_jax.data.schema import empty_rows, image_columns


def canvases_of(images: Sequence[Any], cfg: DataConfig) -> dict[str, np.ndarray]:
  """Returns {"canvas" uint8 (N, S, S, C), "height", "width"} of paths, encoded bytes, Pillow images and uint8 arrays.

  They are scaled and cut as those of a data set with these settings. ValueError that names an image that is none.
  """
  columns = image_columns(cfg)
  rows = empty_rows({name: columns[name] for name in ("canvas", "height", "width")}, len(images))
  fit = Fit(cfg.canvas_px, cfg.canvas_side, whole=not cfg.max_aspect)
  for i, image in enumerate(images):
    try:
      pixels = decode_image(_plain(image), fit, cfg.channels)
    except Exception as error:  # Pillow raises a dozen kinds
      name = image if isinstance(image, str | Path) else f"image {i}"
      raise ValueError(f"{name} is no image that can be read: {error}") from error
    height, width = pixels.shape[:2]
    rows["canvas"][i, :height, :width] = pixels
    rows["height"][i], rows["width"][i] = height, width
  return rows


def _plain(image: Any) -> bytes | np.ndarray | Image.Image:
  if isinstance(image, bytes):
    return image
  if isinstance(image, str | Path):
    return Path(image).expanduser().read_bytes()
  if isinstance(image, Image.Image):
    return image
  array = np.asarray(image)
  if array.dtype != np.uint8 or array.ndim not in (2, 3):
    raise ValueError(f"it is {array.dtype} {array.shape}; give uint8 (height, width) or (height, width, channels)")
  return array
