"""A picture of the views and masks: what to look at before anything is trained."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.views.masks import Masks
from jepa_jax.views.multi_crop import Pixels, Views

GAP_PX = 2
GAP_GRAY = 128
HIDDEN_SHARE = 0.15  # of a hidden patch's own pixels that shines through, so that one sees what is hidden


class Drawn(NamedTuple):
  """A picture of columns, uint8 (H, W, 3), and what each of them shows."""

  picture: np.ndarray
  titles: tuple[str, ...]


def views_titles(views: Views) -> tuple[str, ...]:
  """Returns what the columns of `views_grid` show."""
  kinds = ("view", "local") if len(views.groups) == 1 else ("global", "local")
  of_group = lambda kind, group: [f"{kind} {v + 1}" for v in range(group.shape[1])]
  found = [title for kind, group in zip(kinds, views.groups) for title in of_group(kind, group)]
  return ("image", *found)


def masks_titles(masks: Masks, has_source: bool) -> tuple[str, ...]:
  """Returns what the columns of `masks_grid` show."""
  targets = masks.targets_BxMxT.shape[1]
  blocks = ["to predict"] if targets == 1 else [f"to predict, {i + 1}" for i in range(targets)]
  return (*(("target view", "source view") if has_source else ("image",)), "seen", *blocks)


def views_grid(batch, views: Views, of: Pixels, num_images: int = 8) -> np.ndarray:
  """Returns uint8 (H, W, 3): one row per image, first its canvas, then its global and local views, with grey gaps.

  Cells are as large as a global view; smaller views sit in the middle of theirs, the canvas is resized.
  """
  num_images = min(num_images, batch["canvas"].shape[0])
  cell_px = max(group.shape[2] for group in views.groups)
  canvas = np.asarray(batch["canvas"][:num_images], np.float32) / 255
  shape = (num_images, cell_px, cell_px, canvas.shape[-1])
  columns = [np.asarray(jax.image.resize(jnp.asarray(canvas), shape, "bilinear"))]
  for group in views.groups:
    images = pixels(group[:num_images], of)
    columns += [images[:, v] for v in range(images.shape[1])]
  return tile(columns)


def masks_grid(
  images_BxHxWxC, masks: Masks, patch_size: int, of: Pixels, num_images: int = 8, source_BxHxWxC=None
) -> np.ndarray:
  """Returns uint8 (H, W, 3): one row per image, first the image, then its context and each target, the rest greyed out.

  images_BxHxWxC: normalised, as the encoder gets them; patch_size in px. Where the context is taken from another view,
  source_BxHxWxC, that one stands before it.
  """
  images = pixels(images_BxHxWxC[:num_images], of)
  source = images if source_BxHxWxC is None else pixels(source_BxHxWxC[:num_images], of)
  height, width = images.shape[1] // patch_size, images.shape[2] // patch_size
  # Padded slots repeat a patch of their block: they change nothing.
  columns = [images] if source_BxHxWxC is None else [images, source]
  shown = [(source, masks.context_BxK), *((images, places) for places in jnp.moveaxis(masks.targets_BxMxT, 1, 0))]
  for view, shown_BxK in shown:
    shown_BxN = np.zeros((len(images), height * width), bool)
    np.put_along_axis(shown_BxN, np.asarray(shown_BxK[:num_images]), True, axis=1)
    is_shown = shown_BxN.reshape(-1, height, width, 1).repeat(patch_size, axis=1).repeat(patch_size, axis=2)
    columns.append(np.where(is_shown, view, HIDDEN_SHARE * view + (1 - HIDDEN_SHARE) * GAP_GRAY / 255))
  return tile(columns)


def pixels(images, of: Pixels) -> np.ndarray:
  """Returns normalised images (..., C) as float32 in [0, 1] where they were before."""
  return np.asarray(images, np.float32) * np.asarray(of.std, np.float32) + np.asarray(of.mean, np.float32)


def as_rgb(image: np.ndarray) -> np.ndarray:
  """Returns what is shown of an image (h, w, C) as (h, w, 3): the first three channels, of one or two the first."""
  return image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)


def tile(columns) -> np.ndarray:
  """Returns uint8 (H, W, 3) from columns of images (rows, h, w, C) in [0, 1], each in the middle of its cell."""
  cell_height, cell_width = np.max([images.shape[1:3] for images in columns], axis=0)
  height, width = len(columns[0]) * (cell_height + GAP_PX) + GAP_PX, len(columns) * (cell_width + GAP_PX) + GAP_PX
  grid = np.full((height, width, 3), GAP_GRAY, np.uint8)
  for column, images in enumerate(columns):
    for row, image in enumerate(images):
      y = row * (cell_height + GAP_PX) + GAP_PX + (cell_height - image.shape[0]) // 2
      x = column * (cell_width + GAP_PX) + GAP_PX + (cell_width - image.shape[1]) // 2
      grid[y : y + image.shape[0], x : x + image.shape[1]] = np.rint(np.clip(as_rgb(image), 0, 1) * 255)
  return grid
