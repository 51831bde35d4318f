"""The training views of a batch, and the one evaluation view: uint8 canvases in, normalised float32 images out.

Legend: B batch, V views, S canvas side, H, W view's sides, C channels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jepa_jax.choices import check_choices, require_choice
from jepa_jax.streams import stream
from jepa_jax.views.color import ColorParams, ColorSettings, apply_color, sample_color
from jepa_jax.views.crop import (
  CropParams,
  CropSettings,
  Interpolation,
  SizePx,
  apply_crop,
  resize,
  resize_weights,
  sample_crop,
  size_hw,
)


class Pixels(NamedTuple):
  """What the pixels of a data set are normalised with, one number per channel, of values in [0, 1]."""

  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def channels(self) -> int:
    return len(self.mean)


@dataclasses.dataclass(frozen=True)
class MultiCropSettings:
  """Global and local crops of every image and their colours."""

  global_crops: CropSettings
  local_crops: CropSettings = CropSettings(num=0, size_px=0, scale=(0.05, 0.3))
  flip_p: float = 0.5
  color: ColorSettings = ColorSettings()
  interpolation: Interpolation = "bilinear"

  def __post_init__(self):
    check_choices(self)
    if self.global_crops.num < 1:
      raise ValueError(f"global_crops.num is {self.global_crops.num}: at least one global crop is needed")
    if not 0 <= self.flip_p <= 1:
      raise ValueError(f"flip_p is {self.flip_p}: a probability is from 0 to 1")

  @property
  def groups(self) -> tuple[CropSettings, ...]:
    """The crops by size: global first, then local if there are any."""
    return (self.global_crops, self.local_crops) if self.local_crops.num else (self.global_crops,)

  @property
  def num_views(self) -> int:
    return sum(group.num for group in self.groups)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ViewParams:
  """What was done to the views of one group; every leaf begins with (B, V)."""

  crop: CropParams
  color: ColorParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
  """The views of a batch by size, global first, and what was done to them.

  groups: tuple of float32 (B, V, H, W, C). params: tuple of ViewParams, one per group.
  """

  groups: tuple[jax.Array, ...]
  params: tuple[Any, ...]


def example_keys(key, row_B):
  """Returns one key per example (B,), from its row in the global batch: the same on any number of devices and parts."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_B)


def view_keys(keys_B, group: int, num_views: int):
  """Returns one key per example and view (B, V) of a group of views, for what is random inside a network."""
  return jax.vmap(lambda key: jax.random.split(stream(key, f"views {group}"), num_views))(keys_B)


def sample_views(key, height, width, settings: MultiCropSettings) -> tuple[ViewParams, ...]:
  """Returns the parameters of all views of one image (height, width): one ViewParams per group, leaves (V, ...)."""
  # One split for the views of all groups: fewer generator calls to compile.
  crop_keys_V, color_keys_V = (jax.random.split(stream(key, name), settings.num_views) for name in ("crops", "colors"))
  params, first = [], 0
  for crops in settings.groups:
    crop_keys, color_keys = (keys_V[first : first + crops.num] for keys_V in (crop_keys_V, color_keys_V))
    sample_crop_fn = functools.partial(sample_crop, settings=crops, height=height, width=width, flip_p=settings.flip_p)
    sample_color_fn = lambda k, view: sample_color(k, settings.color, view)
    color = jax.vmap(sample_color_fn)(color_keys, jnp.arange(crops.num))
    params.append(ViewParams(crop=jax.vmap(sample_crop_fn)(crop_keys), color=color))
    first += crops.num
  return tuple(params)


def apply_views(
  canvas_SxSxC, params: tuple[ViewParams, ...], settings: MultiCropSettings, pixels: Pixels
) -> tuple[jax.Array, ...]:
  """Returns one image's normalised views, one (V, H, W, C) per group."""
  groups = []
  for crops, group in zip(settings.groups, params):
    x_VxCxHxW = apply_crop(canvas_SxSxC, group.crop, crops.size_hw, settings.interpolation)
    x_VxCxHxW = jax.vmap(lambda x, p: apply_color(x, p, settings.color))(x_VxCxHxW, group.color)
    groups.append(normalize(jnp.moveaxis(x_VxCxHxW, 1, -1), pixels))
  return tuple(groups)


def multi_crop(keys_B, batch: dict[str, jax.Array], settings: MultiCropSettings, pixels: Pixels) -> Views:
  """Returns the views of a batch: canvas uint8 (B, S, S, C), height and width int32 (B,).

  An example's views depend on its key (see `example_keys`) and its pixels only; devices exchange nothing.
  """
  canvas_BxSxSxC = batch["canvas"]
  check_channels(canvas_BxSxSxC.shape[-1], pixels)
  params = jax.vmap(lambda k, h, w: sample_views(k, h, w, settings))(keys_B, batch["height"], batch["width"])
  groups = jax.vmap(lambda canvas, p: apply_views(canvas, p, settings, pixels))(canvas_BxSxSxC, params)
  return Views(groups=groups, params=params)


def center_view(
  batch: dict[str, jax.Array],
  size_px: SizePx,
  pixels: Pixels,
  crop_fraction: float = 1.0,
  interpolation: Interpolation = "bilinear",
):
  """Returns the evaluation view of a batch, float32 (B, H, W, C), normalised; no randomness.

  The image is resized (aspect kept, antialiased) so that its shorter side is size_px / crop_fraction, and the central
  square is cut; one resize of a box does both. crop_fraction .875 is the usual 256 -> 224. Of a size (height, width) it
  is the largest box of that shape in the image, times crop_fraction, that is shown.
  """
  if not 0 < crop_fraction <= 1:
    raise ValueError(f"crop_fraction is {crop_fraction}: the share of the shorter side that is kept is in (0, 1]")
  require_choice("interpolation", interpolation, get_args(Interpolation))
  check_channels(batch["canvas"].shape[-1], pixels)
  height_px, width_px = size_hw(size_px)
  aspect = width_px / height_px

  def view(canvas_SxSxC, height, width):
    height, width = height.astype(jnp.float32), width.astype(jnp.float32)
    box_height = crop_fraction * jnp.minimum(height, width / aspect)

    def weights(length, side, side_px):  # the filter may read the image beyond the box, as "resize, then crop" does
      clip = (jnp.zeros(()), length)
      return resize_weights((length - side) / 2, side, clip, side_px, canvas_SxSxC.shape[0], interpolation)[None]

    rows, columns = weights(height, box_height, height_px), weights(width, box_height * aspect, width_px)
    return jnp.moveaxis(resize(canvas_SxSxC, rows, columns)[0], 0, -1)

  return normalize(jax.vmap(view)(batch["canvas"], batch["height"], batch["width"]), pixels)


def normalize(x, pixels: Pixels):
  """Returns (x - mean) / std over the last axis; x in [0, 1]."""
  return (x - jnp.asarray(pixels.mean, x.dtype)) * (1 / jnp.asarray(pixels.std, x.dtype))


def check_channels(num_channels: int, pixels: Pixels) -> None:
  """Raises ValueError when the images do not have the channels that mean and std are for."""
  if num_channels != pixels.channels:
    raise ValueError(
      f"the images have {num_channels} channels but data.mean and data.std have {pixels.channels}: give one number per "
      "channel"
    )
