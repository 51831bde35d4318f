"""Colour operations against Pillow and torchvision's formulas."""

import colorsys
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jepa_jax import views
from jepa_jax.views import color as color_lib
from tests.canvases import COLOR, make_image


def channel_first(image):
  return np.moveaxis(image, -1, 0).astype(np.float32) / 255


def channel_last_255(x):
  return np.moveaxis(np.asarray(x), 0, -1) * 255


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.8])
@pytest.mark.parametrize(
  "adjust_fn, enhancer",
  [
    (color_lib.adjust_brightness, ImageEnhance.Brightness),
    (color_lib.adjust_contrast, ImageEnhance.Contrast),
    (color_lib.adjust_saturation, ImageEnhance.Color),
  ],
)
def test_blends_equal_pillow(adjust_fn, enhancer, factor):
  image = make_image(20, 24)
  expected = enhancer(Image.fromarray(image)).enhance(factor)
  out = adjust_fn(channel_first(image), factor)
  # Pillow truncates the blend (1 level) and rounds the luma it blends with (half a level, times |1 - factor|).
  np.testing.assert_allclose(channel_last_255(out), np.asarray(expected), atol=1.0 + 0.6 * abs(1 - factor) + 1e-3)


def np_gray(x):
  return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]


def np_hue(x, shift):
  """torchvision's adjust_hue (its _rgb2hsv and _hsv2rgb) restated, in float64."""
  r, g, b = x.astype(np.float64)
  high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
  is_gray, chroma = high == low, high - low
  s = chroma / np.where(is_gray, 1, high)
  divisor = np.where(is_gray, 1, chroma)
  rc, gc, bc = (high - r) / divisor, (high - g) / divisor, (high - b) / divisor
  h = (high == r) * (bc - gc) + ((high == g) & (high != r)) * (2 + rc - bc)
  h = h + ((high != g) & (high != r)) * (4 + gc - rc)
  h = (np.fmod(h / 6 + 1, 1) + shift) % 1
  i = np.floor(h * 6)
  f = h * 6 - i
  p, q, t = high * (1 - s), high * (1 - s * f), high * (1 - s * (1 - f))
  sector = [(high, t, p), (q, high, p), (p, high, t), (p, q, high), (t, p, high), (high, p, q)]
  return np.stack([np.choose(i.astype(int) % 6, [s[c] for s in sector]) for c in range(3)])


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.23])
def test_hue_equals_torchvision(shift):
  x = channel_first(make_image(16, 16, noise=60))
  x[:, :4] = x[:1, :4]  # grey pixels have no hue
  out = np.asarray(color_lib.adjust_hue(x, shift))
  np.testing.assert_allclose(out, np_hue(x, shift), atol=2e-6)
  h, s, v = colorsys.rgb_to_hsv(*x[:, 9, 9])
  np.testing.assert_allclose(out[:, 9, 9], colorsys.hsv_to_rgb((h + shift) % 1, s, v), atol=2e-6)


def np_jitter(x, order, factors):
  for op in order:
    factor = factors[op]
    if op == color_lib.HUE:
      x = np_hue(x, factor)
    else:
      base = {color_lib.BRIGHTNESS: 0, color_lib.CONTRAST: np_gray(x).mean(), color_lib.SATURATION: np_gray(x)}[op]
      x = np.clip(factor * x + (1 - factor) * base, 0, 1)
  return x


def test_jitter_in_every_order():
  """All 24 orders of torchvision's ColorJitter; the factors are strong, so that clipping makes the order matter."""
  x = channel_first(make_image(12, 12))
  factors = (1.5, 0.6, 1.7, 0.15)
  one = jnp.ones(24)
  params = views.ColorParams(
    *(f * one for f in factors), jnp.asarray(color_lib.ORDERS), one > 2, blur_sigma=0 * one, solarize=one > 2
  )
  out = jax.jit(jax.vmap(color_lib.apply_jitter, in_axes=(None, 0)))(x, params)
  expected = np.stack([np_jitter(x.astype(np.float64), order, factors) for order in color_lib.ORDERS])
  assert np.abs(expected - expected[0]).max() > 0.1
  np.testing.assert_allclose(out, expected, atol=2e-5)
  fixed = color_lib.apply_jitter(x, jax.tree.map(lambda p: p[5], params), "fixed")
  np.testing.assert_allclose(fixed, expected[0], atol=2e-5)


@pytest.mark.parametrize("kernel_px, sigma", [(3, 0.1), (5, 1.3), (9, 2.0)])
def test_blur_equals_torchvision(kernel_px, sigma):
  x = channel_first(make_image(14, 12))
  radius = kernel_px // 2
  taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  taps /= taps.sum()
  padded = np.pad(x, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
  window = np.lib.stride_tricks.sliding_window_view(padded, (kernel_px, kernel_px), axis=(1, 2))
  expected = np.einsum("chwij,i,j->chw", window, taps, taps)
  np.testing.assert_allclose(color_lib.apply_blur(x, sigma, kernel_px), expected, atol=1e-6)
  np.testing.assert_array_equal(color_lib.apply_blur(x, 0.0, kernel_px), x)


def test_blur_kernel():
  assert [color_lib.blur_kernel_px(s) for s in (224, 96, 32)] == [23, 9, 3]
  with pytest.raises(ValueError, match="blur_kernel_px is 9"):
    color_lib.apply_blur(jnp.zeros((3, 4, 4)), 1.0, 9)


def test_solarize_and_grayscale_equal_pillow():
  image = make_image(16, 16)
  x, pil = channel_first(image), Image.fromarray(image)
  out = color_lib.apply_solarize(x, True)
  np.testing.assert_allclose(channel_last_255(out), np.asarray(ImageOps.solarize(pil, 128)), atol=1e-3)
  out = color_lib.apply_grayscale(x, True)
  np.testing.assert_allclose(channel_last_255(out)[..., 0], np.asarray(pil.convert("L")), atol=0.6)
  np.testing.assert_array_equal(out[0], out[2])
  np.testing.assert_array_equal(color_lib.apply_solarize(x, False), x)
  np.testing.assert_array_equal(color_lib.apply_grayscale(x, False), x)


def test_one_channel():
  """Brightness and contrast act, saturation, hue and grayscale do not; both orders agree."""
  x = channel_first(make_image(10, 10))[:1]
  params = views.ColorParams(1.2, 0.5, 1.9, 0.3, jnp.arange(4), jnp.array(True), jnp.zeros(()), jnp.array(False))
  params = jax.tree.map(jnp.asarray, params)
  expected = np.clip(1.2 * x, 0, 1)
  expected = 0.5 * expected + 0.5 * expected.mean()
  settings = dataclasses.replace(COLOR, blur_p=(0.0,), solarize_p=(0.0,))
  for order in ("random", "fixed"):
    out = views.apply_color(x, params, dataclasses.replace(settings, order=order))
    np.testing.assert_allclose(out, expected, atol=2e-5)  # the mean is rounded, so that its sum is exact
