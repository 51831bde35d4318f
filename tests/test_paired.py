"""IWM's views and actions: the action says exactly how source and target differ, and nothing else does differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import views
from jepa_jax.views import paired
from jepa_jax.views.color import ColorSettings, adjust_brightness, apply_color, sample_color
from tests.canvases import PIXELS, SETTINGS, make_batch

JITTER = ColorSettings(0.4, 0.4, 0.2, 0.1, p=1.0)
FULL = dataclasses.replace(JITTER, p=0.8, grayscale_p=0.2, blur_p=(0.2,), solarize_p=(0.1,))
ONE_CROP = dataclasses.replace(
  SETTINGS, global_crops=views.CropSettings(1, 16, (0.3, 1.0)), local_crops=views.CropSettings(0, 0, (0.1, 0.3)),
  color=dataclasses.replace(JITTER, p=0.8),
)  # fmt: skip
KEYS = views.example_keys(jax.random.key(7), jnp.arange(8))


def colors(settings, num=4096, seed=0):
  return jax.vmap(lambda key: sample_color(key, settings))(jax.random.split(jax.random.key(seed), num))


def test_equal_views_have_the_null_action_and_swapped_ones_its_negative():
  a, b = colors(FULL, seed=0), colors(FULL, seed=1)
  np.testing.assert_array_equal(views.action(a, a), 0)
  np.testing.assert_allclose(views.action(a, b), -views.action(b, a), atol=1e-6)
  np.testing.assert_array_equal(views.action(views.no_color(), views.no_color()), np.zeros(7))


def test_actions_one_after_the_other_add_up():
  a, b, c = (colors(JITTER, seed=i) for i in range(3))
  np.testing.assert_allclose(views.action(a, b) + views.action(b, c), views.action(a, c), atol=1e-5)


def test_numbers_are_documented_ones_in_readable_units():
  target = dataclasses.replace(views.no_color(), brightness=jnp.float32(1.3), hue=jnp.float32(-0.05))
  source = dataclasses.replace(
    views.no_color(), saturation=jnp.float32(0.5), blur_sigma=jnp.float32(1.0), solarize=jnp.array(True)
  )
  asked = views.undo_scale(views.action(source, target))
  expected = {"brightness": 1.3, "contrast": 1, "saturation": 2, "hue": -0.05, "grayscale": 0, "blur": 1, "solarize": 1}
  assert asked == pytest.approx(expected, abs=1e-6)
  assert views.undo_scale(views.action(target, source))["blur"] == -1
  none_left = dataclasses.replace(views.no_color(), brightness=jnp.float32(0.0))
  assert np.isfinite(views.action(none_left, views.no_color())).all()


def test_hue_is_taken_the_short_way_round():
  turn = lambda h: dataclasses.replace(views.no_color(), hue=jnp.float32(h))
  np.testing.assert_allclose(views.action(turn(0.4), turn(-0.4))[3] / paired.ACTION_SCALE[3], 0.2, atol=1e-6)


def test_scale_makes_the_papers_actions_about_unit_variance():
  std = np.asarray(views.action(views.no_color((4096,)), colors(JITTER))).std(axis=0)
  np.testing.assert_allclose(std[[0, 1, 3]], 1, atol=0.1)
  assert 0.4 < std[2] < 0.6


def test_brightness_of_the_target_is_recovered_from_the_source_by_the_action():
  """Dark enough that nothing clips: the factor in the action, applied to the source, is the target."""
  only_brightness = ColorSettings(brightness=0.4, p=1.0)
  x = jnp.asarray(np.random.default_rng(0).uniform(0.05, 0.5, (3, 8, 8)), jnp.float32)
  for seed in range(5):
    source, target = (jax.tree.map(lambda v: v[0], colors(only_brightness, 1, seed + i)) for i in (0, 10))
    factor = views.undo_scale(views.action(source, target))["brightness"]
    again = adjust_brightness(apply_color(x, source, only_brightness), factor)
    np.testing.assert_allclose(again, apply_color(x, target, only_brightness), atol=1e-5)


@pytest.mark.parametrize("source_from", ["target", "image"])
def test_without_colours_of_its_own_the_source_is_what_it_starts_from(source_from):
  source, target, action = views.paired_views(KEYS, make_batch(), ONE_CROP, PIXELS, ColorSettings(), source_from)
  if source_from == "target":
    np.testing.assert_array_equal(source, target)
    np.testing.assert_array_equal(action, 0)
  else:  # the crop itself; the action does what the target's jitter did
    plain = dataclasses.replace(ONE_CROP, color=ColorSettings())
    np.testing.assert_array_equal(source, views.paired_views(KEYS, make_batch(), plain, PIXELS, ColorSettings())[1])
    jittered = np.abs(np.asarray(source - target)).max(axis=(1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(np.abs(np.asarray(action)).max(axis=1) > 1e-3, jittered)
    assert 0 < jittered.sum() <= 8


def test_target_keeps_its_colours_and_the_source_is_made_from_them():
  source, target, action = views.paired_views(KEYS, make_batch(), ONE_CROP, PIXELS, FULL)
  assert source.shape == target.shape == (8, 16, 16, 3) and action.shape == (8, views.NUM_ACTIONS)
  other = dataclasses.replace(FULL, hue=0.3)
  other_source, same_target, _ = views.paired_views(KEYS, make_batch(), ONE_CROP, PIXELS, other)
  np.testing.assert_array_equal(target, same_target)
  assert np.abs(np.asarray(source - other_source)).max() > 0.01
  gray = np.ptp(np.asarray(source) * PIXELS.std + PIXELS.mean, axis=-1).max(axis=(1, 2)) < 1e-5
  np.testing.assert_array_equal(gray[np.asarray(action)[:, 4] == 1], True)


@pytest.mark.slow
def test_views_of_an_example_depend_on_its_key_and_pixels_only():
  whole = views.paired_views(KEYS, make_batch(), ONE_CROP, PIXELS, FULL)
  part = views.paired_views(KEYS[3:5], {k: v[3:5] for k, v in make_batch().items()}, ONE_CROP, PIXELS, FULL)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3:5], b, atol=1e-6), whole, part)


@pytest.mark.parametrize(
  ("target", "source", "source_from", "expected"),
  [
    (JITTER, ColorSettings(), "target", False),
    (JITTER, ColorSettings(), "image", True),
    (ColorSettings(), JITTER, "target", True),
    (ColorSettings(), ColorSettings(blur_p=(0.2,)), "target", True),
    (ColorSettings(), ColorSettings(brightness=0.4, p=0.0), "image", False),
  ],
)
def test_whether_there_are_actions_at_all(target, source, source_from, expected):
  assert views.has_actions(target, source, source_from) == expected
