"""Augmentations as pure functions on device: `sample(key, settings) -> params`, `apply(image, params)`."""

from jepa_jax.views.color import ColorParams, ColorSettings, apply_color, sample_color
from jepa_jax.views.crop import CropParams, CropSettings, Interpolation, apply_crop, enlarged_share, sample_crop
from jepa_jax.views.grid import masks_grid, views_grid
from jepa_jax.views.masks import Masks, MaskSettings, mask_shape, sample_masks, union_targets
from jepa_jax.views.multi_crop import (
  MultiCropSettings,
  Pixels,
  ViewParams,
  Views,
  apply_views,
  center_view,
  example_keys,
  multi_crop,
  normalize,
  sample_views,
  view_keys,
)
from jepa_jax.views.paired import (
  ACTIONS,
  NUM_ACTIONS,
  PAPER_JITTER,
  action,
  has_actions,
  no_color,
  paired_views,
  undo_scale,
)

__all__ = [
  "ACTIONS",
  "NUM_ACTIONS",
  "PAPER_JITTER",
  "action",
  "has_actions",
  "no_color",
  "paired_views",
  "undo_scale",
  "ColorParams",
  "ColorSettings",
  "CropParams",
  "CropSettings",
  "Interpolation",
  "MaskSettings",
  "Masks",
  "MultiCropSettings",
  "Pixels",
  "ViewParams",
  "Views",
  "apply_color",
  "apply_crop",
  "apply_views",
  "center_view",
  "example_keys",
  "mask_shape",
  "masks_grid",
  "multi_crop",
  "normalize",
  "sample_color",
  "enlarged_share",
  "sample_crop",
  "sample_masks",
  "sample_views",
  "union_targets",
  "view_keys",
  "views_grid",
]
