"""Whole images, seen in windows: what dense evaluation shows an encoder, and the way back to the pixels of labels.

The image is scaled so that its shorter side has `short_px` pixels; windows of one size slide over it, the last of every
axis flush with its end. Legend: B images, S canvas side, V windows, P Q window height and width, G H its grid of
patches, C classes or channels. Coordinates are pixels of the canvas, whose top-left corner holds the image.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jepa_jax.views.crop import CropParams, Interpolation, apply_crop, resize, resize_weights
from jepa_jax.views.multi_crop import Pixels, check_channels, normalize

VOID = 255  # of label maps: no class


@dataclasses.dataclass(frozen=True)
class Windows:
  """Where windows lie on images of which the longer side is at most `aspect` times the shorter.

  Attributes:
    short_px: to which the shorter side of the image is scaled.
    size_hw: height and width of a window. Where they differ, images of that orientation are seen.
    stride: how far windows are apart, at most the side of one.
    aspect: the longest image over its shorter side.
  """

  short_px: int
  size_hw: tuple[int, int]
  stride: int
  aspect: float

  def __post_init__(self):
    if min(self.size_hw) > self.short_px:
      raise ValueError(f"a window of {self.size_hw} px does not lie within images of {self.short_px} px: lower it")
    if not 1 <= self.stride <= min(self.size_hw):
      raise ValueError(f"stride={self.stride} leaves pixels between windows of {self.size_hw} px: 1 to their side")

  @property
  def counts(self) -> tuple[int, int]:
    """How many windows there are along the shorter and the longer side, on the longest images."""
    along = lambda length, window: 1 + max(0, math.ceil((length - window) / self.stride - 1e-6))
    return along(self.short_px, min(self.size_hw)), along(self.short_px * self.aspect, max(self.size_hw))

  @property
  def num(self) -> int:
    return math.prod(self.counts)


class Boxes(NamedTuple):
  """Where the windows of an image lie: float32 (V,) each; `valid` bool (V,), False for what repeats the last window."""

  top: jax.Array
  left: jax.Array
  height: jax.Array
  width: jax.Array
  valid: jax.Array


def window_boxes(height: jax.Array, width: jax.Array, of: Windows) -> Boxes:
  """Returns the windows of an image of this size (numbers); a shorter one than the longest repeats its last window."""
  height, width = height.astype(jnp.float32), width.astype(jnp.float32)
  short, long = jnp.minimum(height, width), jnp.maximum(height, width)
  pixel = short / of.short_px  # of the scaled image, in pixels of the canvas

  def starts(count: int, window: int, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    wanted, last = jnp.arange(count) * of.stride * pixel, jnp.maximum(length - window * pixel, 0)
    return jnp.minimum(wanted, last), (wanted < last + of.stride * pixel - 1e-3) | (wanted == 0)

  num_short, num_long = of.counts
  short_start, short_valid = starts(num_short, min(of.size_hw), short)
  long_start, long_valid = starts(num_long, max(of.size_hw), long)
  short_start, long_start = jnp.repeat(short_start, num_long), jnp.tile(long_start, num_short)
  is_wide = width >= height
  return Boxes(
    top=jnp.where(is_wide, short_start, long_start),
    left=jnp.where(is_wide, long_start, short_start),
    height=jnp.broadcast_to(of.size_hw[0] * pixel, (of.num,)),
    width=jnp.broadcast_to(of.size_hw[1] * pixel, (of.num,)),
    valid=jnp.repeat(short_valid, num_long) & jnp.tile(long_valid, num_short),
  )


def image_windows(batch, of: Windows, pixels: Pixels, interpolation: Interpolation = "bilinear") -> jax.Array:
  """Returns the windows of a batch, normalised, float32 (B, V, P, Q, C); what one holds beyond its image is black."""
  check_channels(batch["canvas"].shape[-1], pixels)

  def view(canvas_SxSxC, height, width):
    boxes, side = window_boxes(height, width, of), canvas_SxSxC.shape[0]

    def weights(start, length, clip, size_px):
      return resize_weights(start, length, (jnp.zeros(()), clip.astype(jnp.float32)), size_px, side, interpolation)

    y_VxPxS = jax.vmap(lambda a, b: weights(a, b, height, of.size_hw[0]))(boxes.top, boxes.height)
    x_VxQxS = jax.vmap(lambda a, b: weights(a, b, width, of.size_hw[1]))(boxes.left, boxes.width)
    return jnp.moveaxis(resize(canvas_SxSxC, y_VxPxS, x_VxQxS), 1, -1)

  return normalize(jax.vmap(view)(batch["canvas"], batch["height"], batch["width"]), pixels)


def label_windows(batch, of: Windows) -> jax.Array:
  """Returns the classes of the windows' pixels, uint8 (B, V, P, Q): of each the one at its centre, VOID beyond the
  image and in windows that repeat the last one."""

  def view(label_map_SxS, height, width):
    boxes = window_boxes(height, width, of)
    nearest = functools.partial(nearest_classes, label_map_SxS, size_hw=of.size_hw)
    classes_VxPxQ = jax.vmap(nearest)(boxes.top, boxes.left, boxes.height, boxes.width)
    return jnp.where(boxes.valid[:, None, None], classes_VxPxQ, VOID)

  return jax.vmap(view)(batch["label_map"], batch["height"], batch["width"])


def nearest_classes(label_map_SxS, top, left, height, width, size_hw, flip=False) -> jax.Array:
  """Returns the classes (P, Q) of a box of a label map, of each pixel the one at its centre; VOID beyond the map."""
  side = label_map_SxS.shape[0]

  def places(start, length, size_px, flip):
    i = jnp.arange(size_px)
    i = jnp.where(flip, size_px - 1 - i, i)
    # A hair inside: a centre on the edge of two pixels belongs to the second, whatever the rounding of the start.
    return jnp.floor(start + (i + 0.5) * (length / size_px) + 1e-3).astype(jnp.int32)

  y_P, x_Q = places(top, height, size_hw[0], False), places(left, width, size_hw[1], flip)
  inside = ((y_P >= 0) & (y_P < side))[:, None] & ((x_Q >= 0) & (x_Q < side))[None, :]
  return jnp.where(inside, label_map_SxS[jnp.clip(y_P, 0, side - 1)][:, jnp.clip(x_Q, 0, side - 1)], VOID)


def crop_with_labels(batch, params: CropParams, size_px: int, pixels: Pixels, interpolation: Interpolation):
  """Returns one crop of every image (B, P, P, C), normalised, and the classes of its pixels (B, P, P): moved alike.

  params has fields (B,). Of an image pixels are interpolated, of a label map the nearest is taken.
  """

  def view(canvas_SxSxC, label_map_SxS, p: CropParams):
    one = jax.tree.map(lambda x: x[None], p)
    image_CxPxP = apply_crop(canvas_SxSxC, one, size_px, interpolation)[0]
    box = p.top, p.left, p.height, p.width
    return jnp.moveaxis(image_CxPxP, 0, -1), nearest_classes(label_map_SxS, *box, (size_px, size_px), p.flip)

  images, classes = jax.vmap(view)(batch["canvas"], batch["label_map"], params)
  return normalize(images, pixels), classes


def enlarged(grid_xGxHxC: jax.Array, size_hw: tuple[int, int]) -> jax.Array:
  """Returns a grid (..., G, H, C) at the size of its window, (..., P, Q, C): bilinear, as `between`."""
  grid_hw = grid_xGxHxC.shape[-3:-1]
  y_PxG, x_QxH = (between(jnp.arange(n) + 0.5, 0.0, float(n), g)[0] for n, g in zip(size_hw, grid_hw))
  return jnp.einsum("pg,...ghc,qh->...pqc", y_PxG, grid_xGxHxC, x_QxH, precision=jax.lax.Precision.HIGHEST)


def between(at: jax.Array, start, length, grid: int) -> tuple[jax.Array, jax.Array]:
  """Returns the weights (A, grid) of a grid over [start, start + length) at places (A,), and which lie inside.

  Bilinear between the centres of the grid, constant beyond the first and the last (half-pixel centres, as
  align_corners=False). Nothing is smoothed, however dense the grid.
  """
  place = jnp.clip((at - start) / length * grid - 0.5, 0, grid - 1)
  weights = jnp.maximum(1 - jnp.abs(place[:, None] - jnp.arange(grid)), 0)
  return weights, (at >= start) & (at < start + length)


def on_pixels(grid_VxGxHxC: jax.Array, height, width, of: Windows, canvas_px: int) -> tuple[jax.Array, jax.Array]:
  """Returns the mean over windows of what each says of a pixel, (S, S, C), and in how many windows it lies, (S, S).

  grid_VxGxHxC: what the windows of one image of this size say of their patches, such as logits.
  """
  boxes, at = window_boxes(height, width, of), jnp.arange(canvas_px) + 0.5
  _, grid_h, grid_w, _ = grid_VxGxHxC.shape
  y_VxSxG, in_y_VxS = jax.vmap(lambda a, b: between(at, a, b, grid_h))(boxes.top, boxes.height)
  x_VxSxH, in_x_VxS = jax.vmap(lambda a, b: between(at, a, b, grid_w))(boxes.left, boxes.width)
  y_VxSxG *= (in_y_VxS & boxes.valid[:, None])[..., None]
  x_VxSxH *= in_x_VxS[..., None]
  precision = jax.lax.Precision.HIGHEST
  rows_VxSxHxC = jnp.einsum("vsg,vghc->vshc", y_VxSxG, grid_VxGxHxC.astype(jnp.float32), precision=precision)
  summed_SxSxC = jnp.einsum("vshc,vth->stc", rows_VxSxHxC, x_VxSxH, precision=precision)
  count_SxS = jnp.einsum(
    "vs,vt->st", (in_y_VxS & boxes.valid[:, None]).astype(jnp.float32), in_x_VxS.astype(jnp.float32)
  )
  return summed_SxSxC / jnp.maximum(count_SxS, 1)[..., None], count_SxS
