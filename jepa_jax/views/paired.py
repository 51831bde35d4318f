"""IWM's views (arXiv 2403.00504): one crop seen as a target and as a source, and the action that leads from it to that.

Legend: B batch, C channels, H, W view's sides, A = 7 numbers of an action.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.streams import stream
from jepa_jax.views.color import ColorParams, ColorSettings, apply_color, sample_color
from jepa_jax.views.crop import apply_crop, sample_crop
from jepa_jax.views.multi_crop import MultiCropSettings, Pixels, check_channels, normalize

SourceFrom = Literal["target", "image"]
ACTIONS = ("brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")
NUM_ACTIONS = len(ACTIONS)
# What one unit of each number is worth, so that numbers drawn at the paper's strengths (.4, .4, .2, .1) have a standard
# deviation of about 1 (saturation .5): the paper does not say how it scales them.
ACTION_SCALE = np.array([4, 4, 4, 16, 1, 1, 1], np.float32)
# The paper's strengths. Always applied, or a fifth of a bank of jitters would be equal pictures; in one order, so that
# the action says all that was done.
PAPER_JITTER = ColorSettings(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=1.0, order="fixed")
LEAST_FACTOR = 0.05  # a factor of 0 leaves nothing to come back from: its logarithm is cut here


def action(source: ColorParams, target: ColorParams) -> jax.Array:
  """Returns the action (..., A) that turns a view with the colours of `source` into one with those of `target`.

  In the order of ACTIONS, times ACTION_SCALE:
  - brightness, contrast, saturation: log(target's factor / source's factor), so that doing one action and then another
    adds up, and undoing it is its negative (exact for brightness without clipping, nearly so for the others);
  - hue: target's less source's shift, in turns of the colour circle, in [-1/2, 1/2);
  - grayscale, blur, solarise: 1 where the source has it and the target has not (it is to be undone), -1 the other way.
  Equal colours give zeros: the null action.
  """
  log_ratio = lambda t, s: jnp.log(jnp.maximum(t, LEAST_FACTOR)) - jnp.log(jnp.maximum(s, LEAST_FACTOR))
  shift = target.hue - source.hue
  numbers = [log_ratio(getattr(target, n), getattr(source, n)) for n in ("brightness", "contrast", "saturation")]
  numbers.append(shift - jnp.floor(shift + 0.5))
  for s, t in ((source.grayscale, target.grayscale), (source.blur_sigma > 0, target.blur_sigma > 0)):
    numbers.append(s.astype(jnp.float32) - t.astype(jnp.float32))
  numbers.append(source.solarize.astype(jnp.float32) - target.solarize.astype(jnp.float32))
  return jnp.stack(numbers, axis=-1) * ACTION_SCALE


def undo_scale(action_A) -> dict[str, float]:
  """Returns {name: number} of one action in readable units: factors, turns of the colour circle, flags 1, 0, -1."""
  numbers = np.asarray(action_A, np.float64) / ACTION_SCALE
  return {
    name: float(np.exp(x) if name in ("brightness", "contrast", "saturation") else x)
    for name, x in zip(ACTIONS, numbers)
  }


def no_color(shape: tuple[int, ...] = ()) -> ColorParams:
  """Returns the parameters, fields of this shape, that leave an image as it is."""
  one, zero, no = jnp.ones(shape), jnp.zeros(shape), jnp.zeros(shape, bool)
  order = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (*shape, 4))
  return ColorParams(one, one, one, zero, order, grayscale=no, blur_sigma=zero, solarize=no)


def has_actions(target: ColorSettings, source: ColorSettings, source_from: SourceFrom) -> bool:
  """Returns whether source and target ever differ."""
  destructive = max(source.grayscale_p, *source.blur_p, *source.solarize_p) > 0
  return source.has_jitter or destructive or (source_from == "image" and target.has_jitter)


def sample_pair(key, target: ColorSettings, source: ColorSettings) -> tuple[ColorParams, ColorParams]:
  """Returns the colour parameters of one target and of what is done to its source, fields of shape ()."""
  return sample_color(stream(key, "target"), target), sample_color(stream(key, "source"), source)


def paired_views(
  keys_B,
  batch: dict[str, jax.Array],
  settings: MultiCropSettings,
  pixels: Pixels,
  source: ColorSettings,
  source_from: SourceFrom = "target",
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (source, target (B, H, W, C) normalised, action (B, A)) of a batch of canvases.

  Both show the same crop, flipped or not. The target has the jitter of settings.color. The source has the colours of
  `source`, put on top of the target's ("target": the action then undoes just these) or on the crop itself ("image":
  the action undoes these and does the target's). An example's views depend on its key and its pixels only.
  """
  check_channels(batch["canvas"].shape[-1], pixels)
  crops = settings.global_crops

  def one(key, canvas_SxSxC, height, width):
    crop = sample_crop(stream(key, "crops"), crops, height, width, settings.flip_p)
    crop = jax.tree.map(lambda x: jnp.asarray(x)[None], crop)
    x_CxHxW = apply_crop(canvas_SxSxC, crop, crops.size_hw, settings.interpolation)[0]
    target_params, source_params = sample_pair(stream(key, "colors"), settings.color, source)
    target_CxHxW = apply_color(x_CxHxW, target_params, settings.color)
    source_CxHxW = apply_color(target_CxHxW if source_from == "target" else x_CxHxW, source_params, source)
    action_A = action(source_params, no_color() if source_from == "target" else target_params)
    final = lambda x_CxHxW: normalize(jnp.moveaxis(x_CxHxW, 0, -1), pixels)
    return final(source_CxHxW), final(target_CxHxW), action_A

  return jax.vmap(one)(keys_B, batch["canvas"], batch["height"], batch["width"])
