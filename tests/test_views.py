"""Crops and views against Pillow and torchvision's formulas, their statistics, their independence of the devices."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageOps
from scipy.stats import ks_2samp

from jepa_jax import views
from jepa_jax.views import crop as crop_lib
from tests.canvases import CANVAS_PX, COLOR, PIXELS, RAW, SETTINGS, SIZES, make_batch, make_image

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GREY = np.zeros((1, 8, 8, 1), np.uint8)


def to_uint8_range(views_VxCxPxP):
  return np.moveaxis(np.asarray(views_VxCxPxP), 1, -1) * 255


def crop_params(boxes, flips):
  top, left, height, width = jnp.asarray(boxes, jnp.float32).T
  return views.CropParams(top, left, height, width, jnp.asarray(flips))


@pytest.fixture(scope="module")
def drawn():
  """Parameters of 4096 images of 30 x 40 pixels."""
  sample = jax.vmap(lambda key: views.sample_views(key, 30, 40, SETTINGS))
  return jax.jit(sample)(jax.random.split(jax.random.key(1), 4096))


@pytest.fixture(scope="module")
def multi_crop_fn():
  keys = lambda key, batch: views.example_keys(key, jnp.arange(len(batch["canvas"])))
  return jax.jit(lambda key, batch: views.multi_crop(keys(key, batch), batch, SETTINGS, PIXELS))


# ------------------------------------------------------------------------------------------------- crop and resize
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size_px", [8, 48])
def test_crop_equals_pillow_crop_and_resize(interpolation, size_px):
  height, width = 33, 29
  image = make_image(height, width)
  if interpolation == "bicubic":  # it overshoots, and Pillow clips between its passes, in an order of its own
    image = 64 + image // 2
  canvas = np.full((CANVAS_PX, CANVAS_PX, 3), 255, np.uint8)  # a white margin would show
  canvas[:height, :width] = image
  boxes = [(0, 0, 33, 29), (3, 5, 20, 17), (20, 1, 13, 28), (30, 25, 1, 3)]
  flips = [False, True, False, True]
  out = jax.jit(lambda c, p: views.apply_crop(c, p, size_px, interpolation))(canvas, crop_params(boxes, flips))
  for view, (top, left, h, w), flip in zip(to_uint8_range(out), boxes, flips):
    pil = (
      Image.fromarray(image).crop((left, top, left + w, top + h)).resize((size_px, size_px), RESAMPLE[interpolation])
    )
    pil = ImageOps.mirror(pil) if flip else pil
    # Pillow rounds to a level after each of its two passes (.5 each), we to a quarter after the first (.125).
    np.testing.assert_allclose(view, np.asarray(pil), atol=1.15 if interpolation == "bilinear" else 1.3)


def test_center_view_equals_pillow_resize_of_a_box():
  batch = {k: v[:5] for k, v in make_batch().items()}
  out = jax.jit(lambda b: views.center_view(b, 12, RAW, crop_fraction=0.8))(batch)
  for i, (height, width) in enumerate(SIZES[:5]):
    image = Image.fromarray(batch["canvas"][i, :height, :width])
    side = 0.8 * min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    pil = image.resize((12, 12), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    np.testing.assert_allclose(np.asarray(out[i]) * 255, np.asarray(pil), atol=1.15)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_that_are_no_squares_equal_pillows(interpolation):
  """A crop of 12 x 20 px, and the evaluation view of that shape: the largest box of it, times crop_fraction."""
  rng = np.random.default_rng(0)
  canvas = rng.integers(64, 192, (48, 48, 3), np.uint8)  # within what bicubic, which overshoots, keeps in range
  params = crop_params([(3, 5, 30, 40)], [False])
  found = to_uint8_range(crop_lib.apply_crop(jnp.asarray(canvas), params, (12, 20), interpolation))[0]
  resample = RESAMPLE[interpolation]
  pillows = Image.fromarray(canvas).crop((5, 3, 45, 33)).resize((20, 12), resample)
  assert found.shape == (12, 20, 3) and np.abs(found - np.asarray(pillows, np.float32)).max() <= 1.3
  batch = {"canvas": canvas[None], "height": np.array([30]), "width": np.array([48])}
  identity = views.Pixels((0.0,) * 3, (1.0,) * 3)
  view = np.asarray(views.center_view(batch, (12, 20), identity, 0.8, interpolation))[0] * 255
  side_h = 0.8 * min(30, 48 * 12 / 20)
  box = ((48 - side_h * 20 / 12) / 2, (30 - side_h) / 2, (48 + side_h * 20 / 12) / 2, (30 + side_h) / 2)
  pillows = Image.fromarray(canvas[:30]).resize((20, 12), resample, box=box)
  assert np.abs(view - np.asarray(pillows, np.float32)).max() <= 1.3
  square = views.center_view(batch, 16, identity, 0.8, interpolation)
  np.testing.assert_array_equal(square, views.center_view(batch, (16, 16), identity, 0.8, interpolation))


def test_boxes_have_the_shape_of_what_is_made_of_them():
  """ratio is over that of the output: nothing is squeezed by more than it says, and a square is as it was."""
  wide = views.CropSettings(1, 16, (0.2, 0.9), width_px=32)
  keys = jax.random.split(jax.random.key(0), 2000)
  boxes = jax.vmap(lambda key: views.sample_crop(key, wide, 200, 400))(keys)
  squeezed = np.asarray(boxes.width / boxes.height) / 2
  assert 0.74 < squeezed.min() < 0.8 and 1.25 < squeezed.max() < 1.35
  one, other = (jax.vmap(lambda k, s=s: views.sample_crop(k, s, 90, 70))(keys) for s in (
    views.CropSettings(1, 16, (0.2, 0.9)), views.CropSettings(1, 16, (0.2, 0.9), width_px=16)))  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, one, other)
  for changes, message in {("width_px", -1): "width_px is -1", ("width_px", 10**5): "at most 8,192"}.items():
    with pytest.raises(ValueError, match=message):
      views.CropSettings(1, 16, (0.2, 0.9), **dict([changes]))


def test_empty_image_gives_finite_views():
  weights = crop_lib.resize_weights(jnp.zeros(()), jnp.zeros(()), (0, 0), 4, 8, "bilinear")
  np.testing.assert_array_equal(weights, 0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_circle_stays_a_circle(shape):
  """The canvas is square, the image is not: a square crop must not squash it."""
  height, width = shape
  y, x = np.mgrid[:CANVAS_PX, :CANVAS_PX] + 0.5
  circle = np.hypot(y - height / 2, x - width / 2) < 9
  canvas = np.repeat(np.where(circle, 255, 0)[..., None], 3, -1).astype(np.uint8)
  settings = views.CropSettings(num=1, size_px=32, scale=(1.0, 1.0), ratio=(1.0, 1.0))
  params = jax.jit(lambda k: views.sample_crop(k, settings, height, width))(jax.random.key(0))
  assert (float(params.height), float(params.width)) == (24, 24)
  batch = {"canvas": canvas[None], "height": np.array([height]), "width": np.array([width])}
  crop = np.asarray(jax.jit(lambda c, p: views.apply_crop(c, p, 32))(canvas, jax.tree.map(lambda p: p[None], params)))
  center = np.asarray(jax.jit(lambda b: views.center_view(b, 32, RAW))(batch))
  for view in (crop[0, 0], center[0, :, :, 0]):
    i = np.arange(32) + 0.5
    mass = view.sum()
    spread_y = (view.sum(1) * (i - 16) ** 2).sum() / mass
    spread_x = (view.sum(0) * (i - 16) ** 2).sum() / mass
    assert spread_y == pytest.approx(spread_x, rel=1e-3)
    assert spread_x == pytest.approx((9 * 32 / 24) ** 2 / 4, rel=0.03)


# ---------------------------------------------------------------------------------------------------------- sampling
def torchvision_box(rng, height, width, scale, ratio):
  """RandomResizedCrop.get_params, restated with numpy."""
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = np.exp(rng.uniform(*np.log(ratio)))
    w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
  h, w = height, width
  if width / height < ratio[0]:
    h = round(width / ratio[0])
  elif width / height > ratio[1]:
    w = round(height * ratio[1])
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("group", [0, 1])
def test_boxes_follow_torchvision(drawn, group):
  crop, crops = drawn[group].crop, SETTINGS.groups[group]
  box = np.stack([np.asarray(f) for f in (crop.top, crop.left, crop.height, crop.width)], -1).reshape(-1, 4)
  np.testing.assert_array_equal(box, np.round(box))
  assert (box[:, :2] >= 0).all() and (box[:, 2:] >= 1).all()
  assert (box[:, 0] + box[:, 2] <= 30).all() and (box[:, 1] + box[:, 3] <= 40).all()
  rng = np.random.default_rng(0)
  expected = np.array([torchvision_box(rng, 30, 40, crops.scale, crops.ratio) for _ in range(len(box))])
  for quantity in (
    lambda b: b[:, 2] * b[:, 3] / 1200,
    lambda b: np.log(b[:, 3] / b[:, 2]),
    lambda b: b[:, 0] / 30,
    lambda b: b[:, 1] / 40,
  ):
    # Distance of the distributions, 8192 draws each: one law passes .0255 once in a hundred times. Quantiles of pixels
    # have ties, which a single draw decides. In float64, or equal sizes would not be ties.
    assert ks_2samp(quantity(box.astype(np.float64)), quantity(expected.astype(np.float64))).statistic < 0.0255


@pytest.mark.parametrize("size_px", [8, 16, 20, 24, 40])
def test_the_share_of_enlargements_is_that_of_the_boxes(drawn, size_px):
  crops = dataclasses.replace(SETTINGS.global_crops, size_px=size_px)
  box = drawn[0].crop
  counted = np.mean(np.asarray(box.height * box.width) < size_px**2)
  assert views.enlarged_share(crops, np.full(4, 30), np.full(4, 40)) == pytest.approx(counted, abs=0.03)


def test_extreme_aspects_fall_back_to_the_central_crop():
  settings = views.CropSettings(num=1, size_px=8, scale=(1.0, 1.0))
  sample_fn = jax.jit(lambda height, width: views.sample_crop(jax.random.key(0), settings, height, width))
  for size in [(40, 4), (4, 40), (39, 6), (1, 1)]:
    params = sample_fn(*size)
    box = tuple(float(f) for f in (params.top, params.left, params.height, params.width))
    assert box == torchvision_box(np.random.default_rng(0), *size, settings.scale, settings.ratio)


def test_colour_statistics(drawn):
  def rate(flags, p):
    flags = np.asarray(flags)
    assert flags.mean() == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / flags.size))

  color = drawn[0].color
  jittered = np.asarray(color.brightness) != 1
  rate(drawn[0].crop.flip, 0.5)
  rate(jittered, 0.5)
  rate(color.grayscale, 0.2)
  rate(np.asarray(color.blur_sigma) > 0, 0.5)
  rate(color.solarize, 0.2)
  for name, strength, middle in (("brightness", 0.4, 1), ("contrast", 0.4, 1), ("saturation", 0.2, 1), ("hue", 0.1, 0)):
    value = np.asarray(getattr(color, name)) - middle
    assert (value[~jittered] == 0).all()
    assert np.abs(value).max() == pytest.approx(strength, rel=0.01) and np.abs(value).max() <= strength + 1e-6
    assert value[jittered].std() == pytest.approx(strength / np.sqrt(3), rel=0.05)  # uniform
  sigma = np.asarray(color.blur_sigma)[np.asarray(color.blur_sigma) > 0]
  assert sigma.min() >= 0.1 and sigma.max() <= 2.0 and sigma.mean() == pytest.approx(1.05, abs=0.04)
  order, counts = np.unique(np.asarray(color.order).reshape(-1, 4), axis=0, return_counts=True)
  np.testing.assert_array_equal(order, list(itertools.permutations(range(4))))
  assert (np.abs(counts / 8192 - 1 / 24) < 4 * np.sqrt(1 / 24 / 8192)).all()


def test_probabilities_in_turn():
  settings = dataclasses.replace(COLOR, blur_p=(1.0, 0.0), solarize_p=(0.0, 1.0))
  params = jax.jit(jax.vmap(lambda v: views.sample_color(jax.random.key(0), settings, v)))(jnp.arange(4))
  np.testing.assert_array_equal(params.blur_sigma > 0, [True, False, True, False])
  np.testing.assert_array_equal(params.solarize, [False, True, False, True])


# -------------------------------------------------------------------------------------------------------- multi-crop
def test_multi_crop_does_what_its_params_say(multi_crop_fn):
  """The params are an oracle: where no colour operation was drawn, Pillow makes the same view."""
  batch = make_batch(repeats=2)
  out = multi_crop_fn(jax.random.key(3), batch)
  assert [g.shape for g in out.groups] == [(16, 2, 16, 16, 3), (16, 2, 8, 8, 3)]
  num_checked = 0
  for group, params in zip(out.groups, out.params):
    images = (np.asarray(group) * PIXELS.std + PIXELS.mean) * 255
    assert images.min() > -0.01 and images.max() < 255.01
    for i, v in np.ndindex(images.shape[:2]):
      crop, color = jax.tree.map(lambda p, i=i, v=v: p[i, v], (params.crop, params.color))
      if color.brightness != 1 or color.grayscale or color.blur_sigma > 0 or color.solarize:
        continue
      left, top = int(crop.left), int(crop.top)
      box = (left, top, left + int(crop.width), top + int(crop.height))
      assert box[2] <= batch["width"][i] and box[3] <= batch["height"][i]
      pil = Image.fromarray(batch["canvas"][i]).crop(box).resize(images.shape[2:4], Image.Resampling.BILINEAR)
      pil = ImageOps.mirror(pil) if crop.flip else pil
      np.testing.assert_allclose(images[i, v], np.asarray(pil), atol=1.15)
      num_checked += 1
  assert num_checked >= 5


def test_views_do_not_depend_on_the_devices(multi_crop_fn):
  """On 1, 2 and 8 devices the draws are the same and pixels differ by rounding alone: XLA vectorises another number of
  rows otherwise. The compiled program exchanges nothing."""
  batch, key = make_batch(repeats=2), jax.random.key(3)
  expected = multi_crop_fn(key, batch)
  for num_devices in (2, 8):
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])
    sharded_batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    sharded_key = jax.device_put(key, NamedSharding(mesh, PartitionSpec()))
    compiled = multi_crop_fn.lower(sharded_key, sharded_batch).compile()
    collectives = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", compiled.as_text())
    assert not collectives
    sharded = compiled(sharded_key, sharded_batch)
    for leaf in jax.tree.leaves(sharded):
      assert leaf.sharding.shard_shape(leaf.shape)[0] == 16 // num_devices
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), sharded, expected)


def test_keys_decide_the_views(multi_crop_fn):
  batch = make_batch(repeats=2)
  first, again, other = (multi_crop_fn(jax.random.key(k), batch).groups[0] for k in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (np.abs(first - other).max((1, 2, 3, 4)) > 0.1).all()
  assert np.abs(first[0] - first[8]).max() > 0.1  # two copies of one size, but different keys
  assert np.abs(first[:, 0] - first[:, 1]).max() > 0.1


def test_views_grid(multi_crop_fn):
  batch = make_batch(repeats=2)
  out = multi_crop_fn(jax.random.key(3), batch)
  grid = views.views_grid(batch, out, PIXELS, num_images=3)
  assert grid.shape == (3 * 18 + 2, 5 * 18 + 2, 3) and grid.dtype == np.uint8
  view = (np.asarray(out.groups[0][1, 0]) * PIXELS.std + PIXELS.mean) * 255
  np.testing.assert_allclose(grid[20:36, 20:36], view, atol=0.51)
  local = (np.asarray(out.groups[1][0, 1]) * PIXELS.std + PIXELS.mean) * 255
  np.testing.assert_allclose(grid[6:14, 78:86], local, atol=0.51)


# ---------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: views.CropSettings(1, 8, (0.0, 1.0)), "scale"),
    (lambda: views.CropSettings(1, 8, (0.5, 0.3)), "scale"),
    (lambda: views.CropSettings(1, 8, (0.5, 1.1)), "scale"),
    (lambda: views.CropSettings(1, 8, (0.5, 1.0), ratio=(2.0, 1.0)), "ratio"),
    (lambda: views.CropSettings(-1, 8, (0.5, 1.0)), "num is -1"),
    (lambda: views.CropSettings(1, 0, (0.5, 1.0)), "size_px is 0"),
    (lambda: views.ColorSettings(p=1.5), "p is 1.5"),
    (lambda: views.ColorSettings(blur_p=(0.5, -1.0)), "blur_p"),
    (lambda: views.ColorSettings(hue=0.6), "hue"),
    (lambda: views.ColorSettings(contrast=-0.1), "contrast"),
    (lambda: views.ColorSettings(order="torchvision"), "random, fixed"),
    (lambda: views.ColorSettings(blur_sigma=(0.0, 2.0)), "blur_sigma"),
    (lambda: views.ColorSettings(blur_kernel_px=4), "odd"),
    (lambda: views.ColorSettings(solarize_threshold=128), "128 is 0.5"),
    (lambda: dataclasses.replace(SETTINGS, global_crops=views.CropSettings(0, 8, (0.5, 1.0))), "at least one global"),
    (lambda: dataclasses.replace(SETTINGS, flip_p=-0.1), "flip_p"),
    (lambda: dataclasses.replace(SETTINGS, interpolation="nearest"), "bilinear, bicubic"),
    (
      lambda: views.multi_crop(None, {"canvas": GREY}, SETTINGS, PIXELS),
      "1 channels but data.mean and data.std have 3",
    ),
    (lambda: views.center_view({"canvas": GREY}, 8, PIXELS), "1 channels but data.mean and data.std have 3"),
    (lambda: views.center_view(make_batch(), 8, PIXELS, crop_fraction=1.5), "crop_fraction"),
    (lambda: views.center_view(make_batch(), 8, PIXELS, interpolation="nearest"), "one of bilinear, bicubic"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
