"""Colour augmentations: jitter, grayscale, blur, solarise; each sampled as numbers, then applied.

Legend: C channels, H, W. Images are channel-first float32 in [0, 1]. Saturation, hue and grayscale are of red, green
and blue: on one channel, as in torchvision, and on those of satellites and microscopes they are identities. The
formulas are torchvision's for float tensors: every operation clips to [0, 1].

Sums are written so that each addition has one product at most (`x + w (y - x)`, not `(1 - w) x + w y`): with two, which
one XLA fuses into a multiply-add changed with the size of a device's share of the batch, and with it the last bit.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.choices import check_choices

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # row 0: the fixed order
RED_WEIGHT, BLUE_WEIGHT = 0.299, 0.114  # Pillow's luma, green has the rest; torchvision's float path says 0.2989
MEAN_STEPS = 2.0**14  # see `_exact_mean`


@dataclasses.dataclass(frozen=True)
class ColorSettings:
  """Strengths and probabilities; every default is "off".

  brightness, contrast, saturation: factors are uniform in [max(0, 1 - s), 1 + s].
  hue: the shift is uniform in [-s, s] turns of the colour circle, s <= 0.5.
  p: probability of the whole jitter.
  order: "random" (torchvision draws a permutation of the four each time) or "fixed" (brightness, contrast, saturation,
    hue).
  blur_p, solarize_p: one probability, or one per view of a group, in turn (BYOL's pair: blur_p = (1.0, 0.1),
    solarize_p = (0.0, 0.2)).
  blur_sigma: range in pixels of the view.
  blur_kernel_px: odd side of the kernel; 0 = about a tenth of the view (SimCLR: 23 at 224 px), at least 3.
  solarize_threshold: values from there up are inverted.
  """

  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0
  p: float = 0.0
  order: Literal["random", "fixed"] = "random"
  grayscale_p: float = 0.0
  blur_p: tuple[float, ...] = (0.0,)
  blur_sigma: tuple[float, float] = (0.1, 2.0)
  blur_kernel_px: int = 0
  solarize_p: tuple[float, ...] = (0.0,)
  solarize_threshold: float = 0.5

  def __post_init__(self):
    check_choices(self)
    for name in ("brightness", "contrast", "saturation"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} is {getattr(self, name)}: a strength is 0 (off) or more")
    if not 0 <= self.hue <= 0.5:
      raise ValueError(f"hue is {self.hue}: it is a share of the colour circle, from 0 (off) to 0.5")
    for name in ("p", "grayscale_p", "blur_p", "solarize_p"):
      value = getattr(self, name)
      values = value if isinstance(value, tuple) else (value,)
      if not values or not all(0 <= v <= 1 for v in values):
        raise ValueError(
          f"{name} is {value}: a probability is from 0 to 1 (blur_p, solarize_p: a non-empty tuple of them)"
        )
    if len(self.blur_sigma) != 2 or not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
      raise ValueError(f"blur_sigma is {self.blur_sigma}: give (low, high) in pixels with 0 < low <= high")
    if self.blur_kernel_px and (self.blur_kernel_px < 1 or self.blur_kernel_px % 2 == 0):
      raise ValueError(f"blur_kernel_px is {self.blur_kernel_px}: give an odd side, or 0 for a tenth of the view")
    if not 0 <= self.solarize_threshold <= 1:
      raise ValueError(f"solarize_threshold is {self.solarize_threshold}: pixels are in [0, 1], so 128 is 0.5")

  @property
  def has_jitter(self) -> bool:
    return self.p > 0 and max(self.brightness, self.contrast, self.saturation, self.hue) > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ColorParams:
  """What the colour augmentation did; all fields of one shape (...), order (..., 4).

  Where the jitter was not applied the factors are 1 and hue is 0, so the numbers always say what was done: differences
  of two views' factors and the destructive operations' flags are IWM's actions.
  """

  brightness: jax.Array
  contrast: jax.Array
  saturation: jax.Array
  hue: jax.Array  # turns of the colour circle
  order: jax.Array  # int32, a permutation of (BRIGHTNESS, CONTRAST, SATURATION, HUE): the order of application
  grayscale: jax.Array  # bool
  blur_sigma: jax.Array  # pixels; 0 = not blurred
  solarize: jax.Array  # bool


def sample_color(key, settings: ColorSettings, view=0) -> ColorParams:
  """Returns one view's colour parameters, fields of shape (); view picks its place in blur_p and solarize_p."""
  u = jax.random.uniform(key, (10,))
  is_jittered = u[0] < settings.p

  def factor(u, strength):
    low, high = max(0.0, 1 - strength), 1 + strength
    return jnp.where(is_jittered, low + (high - low) * u, 1.0)

  order_index = jnp.floor(u[5] * len(ORDERS)).astype(jnp.int32) if settings.order == "random" else 0
  sigma_low, sigma_high = settings.blur_sigma
  return ColorParams(
    brightness=factor(u[1], settings.brightness),
    contrast=factor(u[2], settings.contrast),
    saturation=factor(u[3], settings.saturation),
    hue=jnp.where(is_jittered, settings.hue * (2 * u[4] - 1), 0.0),
    order=jnp.asarray(ORDERS)[order_index],
    grayscale=u[6] < settings.grayscale_p,
    blur_sigma=jnp.where(u[7] < _in_turn(settings.blur_p, view), sigma_low + (sigma_high - sigma_low) * u[8], 0.0),
    solarize=u[9] < _in_turn(settings.solarize_p, view),
  )


def _in_turn(p, view):
  p = jnp.asarray(p, jnp.float32).reshape(-1)
  return p[view % len(p)]


def apply_color(x_CxHxW, params: ColorParams, settings: ColorSettings):
  """Returns the image after jitter, grayscale, blur and solarise, in torchvision's usual order; same shape, in [0, 1].

  What the settings never draw is not compiled.
  """
  if settings.has_jitter:
    x_CxHxW = apply_jitter(x_CxHxW, params, settings.order)
  if settings.grayscale_p > 0:
    x_CxHxW = apply_grayscale(x_CxHxW, params.grayscale)
  if np.max(settings.blur_p) > 0:
    kernel_px = settings.blur_kernel_px or blur_kernel_px(x_CxHxW.shape[-1])
    x_CxHxW = apply_blur(x_CxHxW, params.blur_sigma, kernel_px)
  if np.max(settings.solarize_p) > 0:
    x_CxHxW = apply_solarize(x_CxHxW, params.solarize, settings.solarize_threshold)
  return x_CxHxW


def has_color(x_CxHxW) -> bool:
  """Returns whether the channels are red, green and blue: there are three."""
  return x_CxHxW.shape[0] == 3


def gray(x_CxHxW):
  """Returns the luma (1, H, W); of other channels than red, green and blue their mean."""
  if x_CxHxW.shape[0] == 1:
    return x_CxHxW
  if not has_color(x_CxHxW):
    return jnp.mean(x_CxHxW, axis=0, keepdims=True)
  r, g, b = x_CxHxW[0:1], x_CxHxW[1:2], x_CxHxW[2:3]
  return g + RED_WEIGHT * (r - g) + BLUE_WEIGHT * (b - g)


def _exact_mean(x_1xHxW):
  """Returns the mean of values in [0, 1], the same in any order of summation, so on any number of devices.

  Values, then the columns' means, are rounded to steps of 2^-14, so that float32 sums of up to 2^10 of them are exact.
  """
  steps_W = jnp.round(jnp.mean(jnp.round(x_1xHxW * MEAN_STEPS), axis=(0, 1)))
  return jnp.mean(steps_W) / MEAN_STEPS


def _blend(x, base, factor):
  """Returns factor * x + (1 - factor) * base, clipped; x itself, exactly, where factor is 1."""
  return jnp.clip(x + (1 - factor) * (base - x), 0, 1)


def adjust_brightness(x_CxHxW, factor):
  """Returns the image times factor, clipped."""
  return _blend(x_CxHxW, 0.0, factor)


def adjust_contrast(x_CxHxW, factor):
  """Returns the image blended with the mean of its luma, clipped."""
  return _blend(x_CxHxW, _exact_mean(gray(x_CxHxW)), factor)


def adjust_saturation(x_CxHxW, factor):
  """Returns the image blended with its luma, clipped; the image itself when it has no colour."""
  return _blend(x_CxHxW, gray(x_CxHxW), factor) if has_color(x_CxHxW) else x_CxHxW


def adjust_hue(x_CxHxW, shift):
  """Returns the image with its hue turned by `shift` of the colour circle; the image itself when it has no colour.

  HSV without sectors: with value v, chroma c and hue h in sixths, channel n is `v - c clip(min(k, 4 - k), 0, 1)`,
  `k = (n + h) mod 6`, n = 5, 3, 1 for red, green, blue. Branch-free, so vectorised.
  """
  if not has_color(x_CxHxW):
    return x_CxHxW
  r, g, b = x_CxHxW[0:1], x_CxHxW[1:2], x_CxHxW[2:3]
  value = jnp.maximum(jnp.maximum(r, g), b)
  chroma = value - jnp.minimum(jnp.minimum(r, g), b)
  inverse = 1 / jnp.where(chroma == 0, 1, chroma)
  # Which channel is the largest is asked with >=, not value == r: a recomputed maximum may differ in its last bit.
  red_sector, green_sector = (r >= g) & (r >= b), g >= b
  hue = jnp.where(red_sector, (g - b) * inverse, jnp.where(green_sector, 2 + (b - r) * inverse, 4 + (r - g) * inverse))
  hue = hue + jax.lax.optimization_barrier(6 * shift)

  def channel(n):
    k = n + hue
    k = k - 6 * jnp.floor(k / 6)
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  return jnp.concatenate([channel(5.0), channel(3.0), channel(1.0)], axis=0)


def apply_jitter(x_CxHxW, params: ColorParams, order: str = "random"):
  """Returns the jittered image; order "random" follows params.order, "fixed" the four as they are named.

  Under vmap a switch per slot computes all four operations in all four slots. Brightness, contrast and saturation are
  one blend with different bases, so here hue is computed once, with three blends before and three after it, of which
  three are off (factor 1, exact). CPU time for 1024 views of 32 px: 33 ms; a switch 52 ms, the fixed order 19 ms.
  """
  if order == "fixed":
    x = adjust_contrast(adjust_brightness(x_CxHxW, params.brightness), params.contrast)
    return adjust_hue(adjust_saturation(x, params.saturation), params.hue)
  factors = jnp.stack([params.brightness, params.contrast, params.saturation, jnp.ones_like(params.hue)])
  hue_slot = jnp.argmax(params.order == HUE)

  def blend(x, slot, is_on):
    op = params.order[slot]
    luma = gray(x)
    base = jnp.where(op == CONTRAST, _exact_mean(luma), jnp.where(op == SATURATION, luma, 0.0))
    factor = jnp.where(is_on, factors[op], 1.0)
    if not has_color(x):
      factor = jnp.where(op == SATURATION, 1.0, factor)
    return _blend(x, base, factor)

  x = x_CxHxW
  for slot in range(3):
    x = blend(x, slot, slot < hue_slot)
  x = adjust_hue(x, params.hue)
  for slot in range(1, 4):
    x = blend(x, slot, slot > hue_slot)
  return x


def apply_grayscale(x_CxHxW, is_gray):
  """Returns the luma in every channel where is_gray; the image itself when it has no colour."""
  return jnp.where(is_gray, gray(x_CxHxW), x_CxHxW) if has_color(x_CxHxW) else x_CxHxW


def apply_solarize(x_CxHxW, is_solarized, threshold: float = 0.5):
  """Returns the image with every value from threshold up inverted, where is_solarized."""
  return jnp.where(is_solarized & (x_CxHxW >= threshold), 1 - x_CxHxW, x_CxHxW)


def blur_kernel_px(size_px: int) -> int:
  """Returns SimCLR's kernel side: the odd number next to a tenth of the view (23 at 224 px), at least 3."""
  return max(3, size_px // 20 * 2 + 1)


def apply_blur(x_CxHxW, sigma, kernel_px: int):
  """Returns the Gaussian blur with sigma pixels (0: the image, exactly), reflected at the border as in torchvision."""
  radius = kernel_px // 2
  if radius >= min(x_CxHxW.shape[1:]):
    raise ValueError(
      f"blur_kernel_px is {kernel_px}: its radius must be less than the view's side, {x_CxHxW.shape[1:]}"
    )
  offset = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
  is_on = sigma > 0
  taps = jnp.where(is_on, jnp.exp(-0.5 * (offset / jnp.where(is_on, sigma, 1)) ** 2), offset == 0)
  taps = taps / jnp.sum(taps)
  return _convolve(_convolve(x_CxHxW, taps, axis=2), taps, axis=1)


def _convolve(x_CxHxW, taps, axis: int):
  """Returns the convolution along one axis: the image plus weighted differences to its shifts (taps sum to 1)."""
  size, radius = x_CxHxW.shape[axis], len(taps) // 2
  pad = [(0, 0)] * 3
  pad[axis] = (radius, radius)
  # The barriers keep XLA from fusing the padding (and what came before) into every tap: 2-5 times faster on CPU for
  # kernels of 7 px and more. A banded matrix product took 2-6 times as long as this.
  x = jax.lax.optimization_barrier(jnp.pad(x_CxHxW, pad, mode="reflect"))
  center = total = jax.lax.slice_in_dim(x, radius, radius + size, axis=axis)
  for i in (i for i in range(len(taps)) if i != radius):
    total = total + taps[i] * (jax.lax.slice_in_dim(x, i, i + size, axis=axis) - center)
  return jax.lax.optimization_barrier(total)
