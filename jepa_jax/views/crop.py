"""Random resized crop and flip: sampled inside the true image, applied as two small matrix products.

Legend: S canvas side, P output side, C channels; boxes are in pixels of the canvas, whose top-left corner holds the
image. Images inside this room are channel-first float32 in [0, 1] (`x_CxHxW`): with C = 3 as the last axis no CPU or
TPU vectorises. `multi_crop` and `center_view` turn to channel-last once, at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.choices import require_choice

NUM_ATTEMPTS = 10  # torchvision's RandomResizedCrop: ten draws, then the central crop
WEIGHT_STEPS, ROW_STEPS = 2.0**13, 4.0  # steps per unit, see `resize`
Interpolation = Literal["bilinear", "bicubic"]


SizePx = int | tuple[int, int]  # the side of a square, or height and width


def size_hw(size_px: SizePx) -> tuple[int, int]:
  """Returns height and width."""
  return (size_px, size_px) if isinstance(size_px, int) else size_px


MOST_PX = 8192  # of a crop: its positions alone would not fit in memory far above it


@dataclasses.dataclass(frozen=True)
class CropSettings:
  """How many crops of one size, and how they are drawn.

  num: crops per image. size_px: side of the output, its height where width_px is not 0 (a square). scale: range of the
  share of the image's area. ratio: range of width / height of the box over that of the output, drawn log-uniformly.
  """

  num: int
  size_px: int
  scale: tuple[float, float]
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  width_px: int = 0

  @property
  def size_hw(self) -> tuple[int, int]:
    """Height and width of the output."""
    return self.size_px, self.width_px or self.size_px

  @property
  def box_ratio(self) -> tuple[float, float]:
    """Range of width / height of the box."""
    aspect = self.size_hw[1] / max(self.size_px, 1)
    return self.ratio[0] * aspect, self.ratio[1] * aspect

  def __post_init__(self):
    if self.num < 0:
      raise ValueError(f"num is {self.num}: the number of crops is 0 or more")
    if self.num and self.size_px < 1:
      raise ValueError(f"size_px is {self.size_px}: a crop needs a side of at least 1 px")
    if self.width_px < 0:
      raise ValueError(f"width_px is {self.width_px}: the width of a crop, or 0 for a square")
    for name in ("size_px", "width_px"):
      if getattr(self, name) > MOST_PX:
        raise ValueError(f"{name} is {getattr(self, name)}: a crop has a side of at most {MOST_PX:,} px")
    if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
      raise ValueError(f"scale is {self.scale}: give (low, high) shares of the area with 0 < low <= high <= 1")
    if len(self.ratio) != 2 or not 0.01 <= self.ratio[0] <= self.ratio[1] <= 100:
      raise ValueError(f"ratio is {self.ratio}: give (low, high) of width / height with 0.01 <= low <= high <= 100")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CropParams:
  """What a crop did: float32 box in canvas pixels (whole numbers when sampled), bool flip; all of one shape."""

  top: jax.Array
  left: jax.Array
  height: jax.Array
  width: jax.Array
  flip: jax.Array


def sample_crop(key, settings: CropSettings, height, width, flip_p: float = 0.5) -> CropParams:
  """Returns a box inside the true image (height, width) and whether it is flipped; every field has shape ().

  torchvision's RandomResizedCrop without its loop: ten attempts at once, the first that fits wins; where none fits, the
  largest central crop whose ratio is in range.
  """
  u = jax.random.uniform(key, (2 * NUM_ATTEMPTS + 3,))
  u_area, u_ratio, u_top, u_left, u_flip = u[:NUM_ATTEMPTS], u[NUM_ATTEMPTS:-3], u[-3], u[-2], u[-1]
  height, width = jnp.asarray(height, jnp.float32), jnp.asarray(width, jnp.float32)
  low, high = settings.scale
  area = height * width * (low + (high - low) * u_area)
  log_low, log_high = jnp.log(jnp.asarray(settings.box_ratio, jnp.float32))
  ratio = jnp.exp(log_low + (log_high - log_low) * u_ratio)
  box_height, box_width = jnp.round(jnp.sqrt(area / ratio)), jnp.round(jnp.sqrt(area * ratio))
  fits = (box_height > 0) & (box_height <= height) & (box_width > 0) & (box_width <= width)
  first = jnp.argmax(fits)
  central_height, central_width = _central_box(height, width, settings.box_ratio)
  any_fits = fits[first]
  box_height = jnp.where(any_fits, box_height[first], central_height)
  box_width = jnp.where(any_fits, box_width[first], central_width)
  return CropParams(
    top=_place(any_fits, u_top, height - box_height),
    left=_place(any_fits, u_left, width - box_width),
    height=box_height,
    width=box_width,
    flip=u_flip < flip_p,
  )


def enlarged_share(settings: CropSettings, height_B, width_B) -> float:
  """Returns the share of crops, 0 to 1, that have more pixels than the box that they show, expected for such images.

  Of the draws that fit, as `sample_crop` takes them; images so long that none does count as 0.
  """
  middles = (np.arange(64) + 0.5) / 64
  height_Bx1x1, width_Bx1x1 = (np.asarray(side, float)[:, None, None] for side in (height_B, width_B))
  share_1xUx1 = (settings.scale[0] + np.ptp(settings.scale) * middles)[None, :, None]
  low, high = np.log(settings.box_ratio)
  ratio_1x1xR = np.exp(low + (high - low) * middles)[None, None]
  area_BxUx1 = share_1xUx1 * height_Bx1x1 * width_Bx1x1
  fits = (np.sqrt(area_BxUx1 / ratio_1x1xR) <= height_Bx1x1) & (np.sqrt(area_BxUx1 * ratio_1x1xR) <= width_Bx1x1)
  enlarged = (area_BxUx1 < math.prod(settings.size_hw)) & fits
  return float((enlarged.sum((1, 2)) / np.maximum(fits.sum((1, 2)), 1)).mean())


def _central_box(height, width, ratio):
  """Returns (height, width) of the largest box whose width / height lies in the range: torchvision's fallback."""
  low, high = ratio
  too_narrow, too_wide = width < low * height, width > high * height
  box_height = jnp.where(too_narrow, jnp.minimum(jnp.round(width / low), height), height)
  box_width = jnp.where(too_wide, jnp.minimum(jnp.round(height * high), width), width)
  return box_height, box_width


def _place(is_random, u, room):
  """Returns the first pixel of a box that can move over room + 1 positions; the middle where it is not random."""
  # u < 1, but u * (room + 1) can round up to room + 1 in float32.
  return jnp.where(is_random, jnp.minimum(jnp.floor(u * (room + 1)), room), jnp.floor(room / 2))


def _kernel(d, interpolation: str):
  """Returns the value of Pillow's reconstruction filter at distance |d| (source pixels, widened when shrinking)."""
  d = jnp.abs(d)
  if interpolation == "bilinear":
    return jnp.maximum(1 - d, 0)
  a = -0.5
  near = ((a + 2) * d - (a + 3)) * d * d + 1
  far = (((d - 5) * d + 8) * d - 4) * a
  return jnp.where(d < 1, near, jnp.where(d < 2, far, 0))


def resize_weights(start, length, clip, size_px: int, canvas_px: int, interpolation: str, flip=False):
  """Returns the (P, S) matrix that resamples pixels [start, start + length) of one axis to P pixels, antialiased.

  The filter reads only whole pixels of `clip` = (first, end) and its weights are normalised there, as Pillow does at an
  image's border; flip reverses the output. `jax.image.scale_and_translate` clips at the array's border only: it would
  mix the canvas's empty margin, or what lies outside the crop, into the view.
  """
  i = jnp.arange(size_px, dtype=jnp.float32)
  i = jnp.where(flip, size_px - 1 - i, i)[:, None]
  pixel = jnp.arange(canvas_px, dtype=jnp.float32)[None, :]
  scale = length / size_px
  center = start + (i + 0.5) * scale
  weights_PxS = _kernel((pixel + 0.5 - center) / jnp.maximum(scale, 1), interpolation)
  inside = (pixel >= jnp.floor(clip[0])) & (pixel < jnp.ceil(clip[1]))
  weights_PxS = jnp.where(inside, weights_PxS, 0)
  # The sum is far from 0 for any box of a pixel or more; an empty image (padding of a batch) gives zeros, not NaN.
  weights_PxS = weights_PxS / jnp.maximum(jnp.sum(weights_PxS, axis=1, keepdims=True), 1e-6)
  return jnp.round(weights_PxS * WEIGHT_STEPS) / WEIGHT_STEPS


def resize(canvas_SxSxC, weights_y_VxPxS, weights_x_VxPxS):
  """Returns V resampled views (V, C, P, P) (or of other height and width), float32 in [0, 1], of one uint8 canvas.

  All views share the first product, so the canvas is read (and converted to float) once. Weights are in steps of 2^-13
  and what is between the products in steps of a quarter grey level (Pillow: a whole one), so that every sum fits
  float32's 24 bits: it is exact in any order, and the views do not depend on how XLA tiles the products for the share
  of the batch that a device holds.
  """
  x_SxCxS = jnp.swapaxes(canvas_SxSxC, 1, 2).astype(jnp.float32)
  # The default precision, bfloat16 on TPU and TF32 on GPU, is off by grey levels. This is cheap beside an encoder.
  precision = jax.lax.Precision.HIGHEST
  rows_VxPxCxS = jnp.einsum("vps,scw->vpcw", weights_y_VxPxS, x_SxCxS, precision=precision)
  rows_VxPxCxS = jnp.clip(jnp.round(rows_VxPxCxS * ROW_STEPS) / ROW_STEPS, 0, 255)  # bicubic overshoots
  x_VxPxCxP = jnp.einsum("vpcw,vqw->vpcq", rows_VxPxCxS, weights_x_VxPxS, precision=precision)
  return jnp.clip(jnp.swapaxes(x_VxPxCxP, 1, 2) / 255, 0, 1)


def apply_crop(canvas_SxSxC, params: CropParams, size_px: SizePx, interpolation: str = "bilinear"):
  """Returns the V crops (V, C, H, W), float32 in [0, 1], of one uint8 canvas (S, S, C); params has fields (V,).

  Equal to Pillow's `image.crop(box).resize((W, H), resample)`, then the flip, to the roundings: about a grey level.
  """
  require_choice("interpolation", interpolation, get_args(Interpolation))
  canvas_px, (height_px, width_px) = canvas_SxSxC.shape[0], size_hw(size_px)

  def weights(start, length, flip, side_px):
    clip = (start, start + length)
    return resize_weights(start, length, clip, side_px, canvas_px, interpolation, flip)

  rows, columns = (functools.partial(weights, side_px=side_px) for side_px in (height_px, width_px))
  weights_y_VxPxS = jax.vmap(rows)(params.top, params.height, jnp.zeros_like(params.flip))
  weights_x_VxPxS = jax.vmap(columns)(params.left, params.width, params.flip)
  return resize(canvas_SxSxC, weights_y_VxPxS, weights_x_VxPxS)
