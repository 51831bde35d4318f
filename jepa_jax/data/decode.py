"""From encoded bytes or pixels to one uint8 image that fits the canvas. C channels."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import ExifTags, Image, ImageOps


@dataclasses.dataclass(frozen=True)
class Fit:
  """How large an image is kept: its shorter side is scaled down to short_px, and what then is beyond long_px is cut.

  A smaller image stays as it is. Where `whole`, nothing is cut: the longer side is scaled down to long_px.
  """

  short_px: int
  long_px: int
  whole: bool = False

  def target(self, width: int, height: int) -> tuple[int, int]:
    """Returns the (width, height) that an image is scaled to, before anything is cut."""
    scale = min(1.0, self.long_px / max(width, height) if self.whole else self.short_px / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))

  def cut(self, pixels: np.ndarray) -> np.ndarray:
    """Returns what is kept of a scaled image (h, w, ...): the middle of a side that is too long."""
    top, left = (max(0, side - self.long_px) // 2 for side in pixels.shape[:2])
    return pixels[top : top + self.long_px, left : left + self.long_px]


def decode_image(image: bytes | np.ndarray | Image.Image, fit: Fit, channels: int) -> np.ndarray:
  """Returns uint8 (h, w, C) that is as large as `fit` says: the aspect is kept, a longer side cut evenly at both ends.

  The EXIF orientation is applied. Transparency is dropped, as torchvision's loader does. Raises whatever Pillow raises
  where the bytes are no image.
  """
  if isinstance(image, np.ndarray):
    fits = max(image.shape[:2]) <= fit.long_px and min(image.shape[:2]) <= fit.short_px
    if fits and (image.ndim == 2 or image.shape[2] in (1, channels)):
      pixels = image if image.ndim == 3 else image[:, :, None]
      return np.broadcast_to(pixels, (*pixels.shape[:2], channels))
    return _to_array(Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image), fit, channels)
  if isinstance(image, Image.Image):
    return _to_array(image.copy(), fit, channels)  # whose own stays as it is
  with Image.open(io.BytesIO(image)) as opened:
    return _to_array(opened, fit, channels)


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
  """Returns (height, width) of an image as it is shown, its EXIF orientation applied; nothing is decoded."""
  if isinstance(image, np.ndarray):
    return image.shape[0], image.shape[1]
  with Image.open(io.BytesIO(image)) as opened:
    turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (opened.width, opened.height) if turned else (opened.height, opened.width)


def _to_array(image: Image.Image, fit: Fit, channels: int) -> np.ndarray:
  mode = "RGB" if channels == 3 else "L"
  target = fit.target(*image.size)
  if target != image.size:
    # A JPEG decodes straight to 1/2, 1/4 or 1/8 of its size, never below what is asked for: several times quicker.
    image.draft(mode, target)
  image = _convert(ImageOps.exif_transpose(image), mode)
  target = target if (target[0] > target[1]) == (image.width > image.height) else target[::-1]  # turned by EXIF
  if target != image.size:
    # Antialiased; with reducing_gap, large images shrink by a whole number first, which is quicker.
    image = image.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
  return fit.cut(np.asarray(image).reshape(image.height, image.width, channels))


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
