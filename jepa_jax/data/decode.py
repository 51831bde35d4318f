"""From encoded bytes or pixels to one uint8 image that fits the canvas. C channels."""

from __future__ import annotations

import dataclasses
import functools
import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

_LINEAR = 1.5  # a bilinear resize looks at two pixels a side, and would skip some beyond


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

  The EXIF orientation is applied. Transparency is dropped, as torchvision's loader does. With other channels than one
  or three an image is an array, or a file of so many bands (TIFF; a PNG with transparency has four). Raises whatever
  Pillow or tifffile raise where the bytes are no image.
  """
  if channels not in (1, 3):
    return _of_bands(image if isinstance(image, np.ndarray) else _read_bands(image), fit, channels)
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


_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how a file begins, in either order of bytes, BigTIFF too


def _read_bands(image: Any) -> np.ndarray:
  """Returns the pixels (h, w, C) or (C, h, w) of a picture, or of a TIFF file, of more bands than Pillow knows."""
  if isinstance(image, Image.Image):
    return np.asarray(image)
  if image[:4] not in _TIFF:
    with Image.open(io.BytesIO(image)) as opened:
      return np.asarray(ImageOps.exif_transpose(opened))
  try:
    import tifffile
  except ImportError as error:
    raise ValueError("TIFF files of many bands are read by tifffile: pip install tifffile imagecodecs") from error
  with tifffile.TiffFile(io.BytesIO(image)) as opened:
    return opened.asarray()


def upper_byte(pixels: np.ndarray) -> np.ndarray:
  """Returns pixels of 16 bits as uint8, by their upper eight; others as they are."""
  is_16_bit = pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2  # in either order of its bytes
  return (pixels >> 8).astype(np.uint8) if is_16_bit else pixels


def _of_bands(pixels: np.ndarray, fit: Fit, channels: int) -> np.ndarray:
  """Returns an array of many channels that is as large as `fit` says, each scaled by itself."""
  pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
  if pixels.ndim == 3 and pixels.shape[2] != channels == pixels.shape[0]:
    pixels = np.moveaxis(pixels, 0, 2)
  if pixels.ndim != 3 or pixels.shape[2] != channels:
    raise ValueError(f"it is {pixels.shape}, and data.channels is {channels}: (h, w, {channels})")
  pixels = upper_byte(pixels)
  if pixels.dtype != np.uint8:
    raise ValueError(f"its pixels are {pixels.dtype}, whose range it does not say: store it with 8 or 16 bits")
  target = fit.target(pixels.shape[1], pixels.shape[0])
  if target != (pixels.shape[1], pixels.shape[0]):
    bands = [_scaled(Image.fromarray(np.ascontiguousarray(pixels[:, :, i])), target) for i in range(channels)]
    pixels = np.stack(bands, axis=2)
  return fit.cut(pixels)


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
  pixels = _scaled(image, target)
  return fit.cut(pixels.reshape(*pixels.shape[:2], channels))


def _scaled(image: Image.Image, target: tuple[int, int]) -> np.ndarray:
  """Returns the pixels of a grey or RGB image at this (width, height).

  Down to two thirds by OpenCV's bilinear resize, which is ten times as quick as Pillow's and, though not antialiased,
  no farther from Lanczos than Pillow's bilinear. By more it would skip pixels: there Pillow's bicubic, antialiased;
  with reducing_gap, large images shrink by a whole number first.
  """
  if target == image.size:
    return np.asarray(image)
  if max(image.width / target[0], image.height / target[1]) < _LINEAR:
    return _cv2().resize(np.asarray(image), target, interpolation=_cv2().INTER_LINEAR)
  return np.asarray(image.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0))


@functools.cache
def _cv2() -> Any:
  import cv2

  cv2.setNumThreads(1)  # images are decoded by many threads already
  return cv2


def _convert(image: Image.Image, mode: str) -> Image.Image:
  if image.mode == mode:
    return image
  if image.mode.startswith("I;16"):
    # Pillow clips 16-bit greys at 255 instead of scaling them.
    image = Image.fromarray(upper_byte(np.asarray(image)))
  elif image.mode in ("I", "F"):  # Pillow would clip at 0 and 255: white or black
    kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
    raise ValueError(f"its pixels are {kind}, whose range the file does not say: store it with 8 or 16 bits")
  elif image.mode == "P" and "transparency" in image.info:
    image = image.convert("RGBA")
  return image.convert(mode)
