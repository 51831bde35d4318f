"""From encoded bytes or pixels to one uint8 image that fits the canvas. S canvas side, C channels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps


def decode_image(image: bytes | np.ndarray, canvas_px: int, channels: int) -> np.ndarray:
  """Returns uint8 (h, w, C) with h, w <= S: the aspect is kept, and a smaller image is left as it is.

  The EXIF orientation is applied. Transparency is dropped, as torchvision's loader does. Raises whatever Pillow raises
  where the bytes are no image.
  """
  if isinstance(image, np.ndarray):
    if max(image.shape[:2]) <= canvas_px and (image.ndim == 2 or image.shape[2] in (1, channels)):
      pixels = image if image.ndim == 3 else image[:, :, None]
      return np.broadcast_to(pixels, (*pixels.shape[:2], channels))
    return _to_array(Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image), canvas_px, channels)
  with Image.open(io.BytesIO(image)) as opened:
    return _to_array(opened, canvas_px, channels)


def _to_array(image: Image.Image, canvas_px: int, channels: int) -> np.ndarray:
  mode = "RGB" if channels == 3 else "L"
  scale = canvas_px / max(image.size)
  if scale < 1:
    # A JPEG decodes straight to 1/2, 1/4 or 1/8 of its size, never below what is asked for: several times quicker.
    image.draft(mode, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
  image = _convert(ImageOps.exif_transpose(image), mode)
  # Antialiased; with reducing_gap, large images shrink by a whole number first, which is quicker.
  image.thumbnail((canvas_px, canvas_px), Image.Resampling.BICUBIC, reducing_gap=3.0)
  return np.asarray(image).reshape(image.height, image.width, channels)


def _convert(image: Image.Image, mode: str) -> Image.Image:
  if image.mode == mode:
    return image
  if image.mode.startswith("I;16"):
    # Pillow clips 16-bit greys at 255 instead of scaling them.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  elif image.mode in ("I", "F"):  # Pillow would clip at 0 and 255: white or black
    kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
    raise ValueError(f"its pixels are {kind}, whose range the file does not say: store it with 8 or 16 bits")
  elif image.mode == "P" and "transparency" in image.info:
    image = image.convert("RGBA")
  return image.convert(mode)
