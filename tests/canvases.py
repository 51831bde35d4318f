"""Canvases of images of several sizes and settings of their views, for the tests of the augmentations."""

import numpy as np

from jepa_jax import views
from jepa_jax.data.config import IMAGENET_MEAN, IMAGENET_STD

PIXELS = views.Pixels(IMAGENET_MEAN, IMAGENET_STD)
RAW = views.Pixels((0.0,) * 3, (1.0,) * 3)
SIZES = [(30, 40), (40, 30), (22, 40), (40, 40), (17, 13), (40, 5), (9, 9), (31, 28)]  # true height, width
CANVAS_PX = 40
COLOR = views.ColorSettings(
  0.4, 0.4, 0.2, 0.1, p=0.5, grayscale_p=0.2, blur_p=(0.5,), blur_kernel_px=5, solarize_p=(0.2,)
)
SETTINGS = views.MultiCropSettings(
  global_crops=views.CropSettings(num=2, size_px=16, scale=(0.3, 1.0)),
  local_crops=views.CropSettings(num=2, size_px=8, scale=(0.05, 0.3)),
  color=COLOR,
)


def make_image(height, width, seed=0, noise=20):
  """Returns a uint8 image with edges, gradients and noise: every path of the filters is used."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width]
  base = 127 + 80 * np.sin(0.3 * x[..., None] + 0.2 * y[..., None] + np.arange(3) * 2.0)
  base[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 60)
  return np.clip(base + rng.normal(0, noise, base.shape), 0, 255).astype(np.uint8)


def make_batch(repeats=1):
  sizes = SIZES * repeats
  canvas = np.zeros((len(sizes), CANVAS_PX, CANVAS_PX, 3), np.uint8)
  for i, (height, width) in enumerate(sizes):
    canvas[i, :height, :width] = make_image(height, width, seed=i)
  height, width = np.array(sizes, np.int32).T
  return {"canvas": canvas, "height": height, "width": width}
