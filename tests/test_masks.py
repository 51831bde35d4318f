"""I-JEPA's masks: the laws of the official sampler against a simulation, and what every kind promises."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jepa_jax import views

GRIDS = [(4, 4), (6, 6), (8, 8), (14, 14), (7, 9), (16, 16)]
BLOCK = views.MaskSettings("block", num_targets=1, target_scale=(0.6, 0.6))
KEYS = jax.random.split(jax.random.key(0), 3)
KINDS = {kind: views.MaskSettings(kind) for kind in ("official", "uniform", "random", "quadrants")} | {"block": BLOCK}


@functools.cache
def sampler(grid_hw, settings):
  return jax.jit(lambda keys: views.sample_masks(keys, grid_hw, settings))


@functools.cache
def draw(grid_hw, settings, num=4096, seed=0) -> views.Masks:
  masks = sampler(grid_hw, settings)(jax.random.split(jax.random.key(seed), num))
  return jax.tree.map(np.asarray, masks)


def one_hot(patches_BxK, num_patches):
  """Returns bool (B, N), which patches are among those of an image."""
  out = np.zeros((len(patches_BxK), num_patches), bool)
  np.put_along_axis(out, patches_BxK, True, axis=1)
  return out


def in_targets(masks, num_patches):
  return one_hot(masks.targets_BxMxT.reshape(len(masks.targets_BxMxT), -1), num_patches)


def target_sides(masks, width):
  """Returns (B, M, 2): height and width of the targets, from the patches that are valid."""
  last = np.max(np.where(masks.valid_BxMxT, masks.targets_BxMxT, -1), axis=2)
  first = masks.targets_BxMxT[:, :, 0]
  return np.stack([last // width - first // width, last % width - first % width], axis=-1) + 1


# -------------------------------------------------------------------------------- the official sampler in plain numpy
def official_size(rng, side, scale, aspect):
  u = rng.random()
  area = int(side * side * (scale[0] + u * (scale[1] - scale[0])))
  ratio = aspect[0] + u * (aspect[1] - aspect[0])
  height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
  return min(height, side - 1), min(width, side - 1)


def official_batch(rng, side, batch_size):
  """Returns the target sides, which all images of a batch share, and the patches of context and targets (B, N)."""
  size = official_size(rng, side, (0.15, 0.2), (0.75, 1.5))
  context_size = official_size(rng, side, (0.85, 1.0), (1.0, 1.0))
  context, target = np.zeros((2, batch_size, side, side), bool)
  for image in range(batch_size):
    for mask, (h, w), count in ((context, context_size, 1), (target, size, 4)):
      for _ in range(count):
        top, left = rng.integers(0, side - h), rng.integers(0, side - w)
        mask[image, top : top + h, left : left + w] = True
  return size, (context & ~target).reshape(batch_size, -1), target.reshape(batch_size, -1)


@functools.cache
def official(side, batch_size, num_batches):
  """Returns target sides (batches, 2), visible patches and target patches (batches, B, N) of the official sampler."""
  rng = np.random.default_rng(0)
  return tuple(map(np.array, zip(*[official_batch(rng, side, batch_size) for _ in range(num_batches)])))


# ----------------------------------------------------------------------------------------------------------- official
OFFICIAL = KINDS["official"]


def test_official_target_shapes_on_the_usual_grid():
  sides = target_sides(draw((14, 14), OFFICIAL, 20_000), 14)
  assert (sides == sides[:, :1]).all()  # one size for the targets of an image
  shapes, counts = np.unique(sides[:, 0], axis=0, return_counts=True)
  published = {(5, 6): 0.265, (6, 5): 0.126, (6, 6): 0.218, (7, 5): 0.364, (8, 5): 0.026}
  assert [tuple(shape) for shape in shapes] == sorted(published)
  # Five standard errors of a share of 20 000 are .017.
  np.testing.assert_allclose(counts / 20_000, [published[tuple(shape)] for shape in shapes], atol=0.015)


@pytest.mark.parametrize("side", [14, 16, 28])
def test_official_laws_per_image(side):
  """Sizes and positions of the targets have the official law: shares of shapes, size of their union, where they are.

  With a context of one patch, so that nothing is drawn again.
  """
  num_patches = side * side
  masks = draw((side, side), dataclasses.replace(OFFICIAL, num_context_patches=1), 20_000)
  sizes, visible, targets = official(side, 1, 6000)
  code = lambda sides: sides[..., 0] * 100 + sides[..., 1]
  drawn, wanted = code(target_sides(masks, side)[:, 0]), code(sizes)
  shapes = np.union1d(drawn, wanted)
  shares = [(values[:, None] == shapes).mean(0) for values in (drawn, wanted)]
  assert np.abs(shares[0] - shares[1]).max() < 0.025
  union, wanted_union = in_targets(masks, num_patches).sum(1), targets[:, 0].sum(1)
  levels = [1, 10, 50, 90, 99]
  quantiles = np.percentile(union, levels), np.percentile(wanted_union, levels)
  np.testing.assert_allclose(*quantiles, atol=2 + 0.01 * num_patches)
  where = in_targets(masks, num_patches).mean(0) - targets[:, 0].mean(0)
  assert np.abs(where).max() < 0.03
  # The closed form that budgets are checked against.
  with pytest.raises(ValueError, match=r"can be 1 to \d+, the mean") as error:
    views.mask_shape((side, side), dataclasses.replace(OFFICIAL, num_context_patches=num_patches))
  assert int(re.findall(r"1 to (\d+)", str(error.value))[0]) == pytest.approx(visible.sum(2).mean(), rel=0.015)


@pytest.mark.parametrize("side, batch_size, error", [(14, 128, 2), (16, 128, 3), (28, 16, 10)])
def test_the_context_budget_is_what_the_official_cut_leaves(side, batch_size, error):
  """The collator cuts a batch to its shortest context; at 28x28 the budget is that of 16 images per process."""
  _, visible, _ = official(side, batch_size, 200)
  budget = views.mask_shape((side, side), OFFICIAL)[0]
  assert np.median(visible.sum(2).min(1)) == pytest.approx(budget, abs=error)
  if side < 28:
    assert budget == pytest.approx(0.26 * side**2, abs=1)


def test_official_context_by_row():
  """The cut in raster order leaves the lower rows nearly unseen; the last row and column are never in a block."""
  context = one_hot(draw((14, 14), OFFICIAL, 20_000).context_BxK, 196).reshape(-1, 14, 14)
  published = [0.74, 0.60, 0.48, 0.37, 0.27, 0.21, 0.19, 0.19, 0.20, 0.20, 0.15, 0.07, 0.02, 0.00]
  np.testing.assert_allclose(context.mean((0, 2)), published, atol=0.03)
  _, visible, _ = official(14, 128, 200)
  shortest = visible.sum(2).min(1)[:, None, None]
  cut = visible & (np.cumsum(visible, axis=2) <= shortest)
  # The official budget varies from batch to batch, ours is its median.
  np.testing.assert_allclose(context.mean(0), cut.mean((0, 1)).reshape(14, 14), atol=0.04)


@pytest.mark.parametrize("side", [14, 16])
def test_official_never_uses_the_last_row_and_column(side):
  masks = draw((side, side), OFFICIAL, 20_000)
  for patches in (masks.context_BxK, masks.targets_BxMxT):
    assert (patches // side).max() == side - 2 and (patches % side).max() == side - 2


def test_official_context_is_the_first_visible_patches():
  masks = draw((14, 14), OFFICIAL, 20_000)
  visible = ~in_targets(masks, 196).reshape(-1, 14, 14)
  visible[:, 13], visible[:, :, 13] = False, False  # the context block is always 13x13 in the corner
  first = np.argsort(~visible.reshape(-1, 196), axis=1, kind="stable")[:, :51]
  np.testing.assert_array_equal(masks.context_BxK, first)


# ------------------------------------------------------------------------------------------------ every kind and grid
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid_hw", GRIDS)
def test_masks_keep_their_promises(kind, grid_hw):
  """Exactly K different patches in raster order, none in a target; targets are rectangles, padded with their own."""
  settings, num_patches = KINDS[kind], grid_hw[0] * grid_hw[1]
  num_context, num_targets, num_slots = views.mask_shape(grid_hw, settings)
  masks = draw(grid_hw, settings)
  context, targets, valid = masks.context_BxK, masks.targets_BxMxT, masks.valid_BxMxT
  assert context.shape == (4096, num_context) and context.dtype == np.int32
  assert targets.shape == valid.shape == (4096, num_targets, num_slots) and targets.dtype == np.int32
  assert (np.diff(context, axis=1) > 0).all() and context.min() >= 0 and context.max() < num_patches
  assert targets.min() >= 0 and targets.max() < num_patches
  assert not (one_hot(context, num_patches) & in_targets(masks, num_patches)).any()
  assert valid[:, :, 0].all() and (np.diff(valid.astype(int), axis=2) <= 0).all()
  assert ((np.diff(targets, axis=2) > 0) == valid[:, :, 1:]).all()  # ascending, then the last one again
  assert (np.diff(targets, axis=2)[~valid[:, :, 1:]] == 0).all()
  assert valid.sum(2).max() == num_slots  # T is the largest block that occurs, not a bound
  if kind != "random":
    assert (target_sides(masks, grid_hw[1]).prod(-1) == valid.sum(2)).all()


@pytest.mark.parametrize("grid_hw", [(4, 4), (7, 9), (16, 16)])
def test_uniform_reaches_every_patch(grid_hw):
  num_patches = grid_hw[0] * grid_hw[1]
  masks = draw(grid_hw, KINDS["uniform"])
  context, target = one_hot(masks.context_BxK, num_patches).mean(0), in_targets(masks, num_patches).mean(0)
  assert context.min() > 0.03 and target.min() > 0.02  # least: the middle, the corners
  for share in (context, target):  # none is preferred for coming first, unlike in the raster cut
    np.testing.assert_allclose(share, share[::-1], atol=0.05)


def test_uniform_draws_scale_and_aspect_apart():
  """Scale uniform, aspect log-uniform, uncorrelated, one draw per target; official: one number for both."""
  settings = views.MaskSettings("uniform", num_targets=2)
  sides = target_sides(draw((40, 40), settings, 2048), 40).astype(float)
  area, log_aspect = sides.prod(-1) / 1600, np.log(sides[..., 0] / sides[..., 1])
  assert area.mean() == pytest.approx(0.175, abs=0.002) and area.std() == pytest.approx(0.05 / 12**0.5, abs=0.002)
  assert log_aspect.mean() == pytest.approx(np.log(0.75 * 1.5) / 2, abs=0.02)
  assert log_aspect.std() == pytest.approx(np.log(2) / 12**0.5, abs=0.015)
  assert abs(np.corrcoef(area.ravel(), log_aspect.ravel())[0, 1]) < 0.06
  assert abs(np.corrcoef(area.T)[0, 1]) < 0.08
  sides = target_sides(draw((28, 28), OFFICIAL, 20_000), 28)[:, 0].astype(float)
  assert np.corrcoef(sides.prod(-1), sides[:, 0] / sides[:, 1])[0, 1] > 0.8


@pytest.mark.parametrize(
  "settings",
  [
    views.MaskSettings("uniform", num_targets=12, num_context_patches=11),
    views.MaskSettings("official", num_context_patches=21),
    views.MaskSettings("uniform", context_scale=(0.4, 0.4), num_context_patches=9),
  ],
  ids=["targets over nearly everything", "raster cut", "small context block"],
)
def test_context_is_exact_at_the_largest_budget(settings):
  """Where many draws leave fewer than K patches, they are drawn again, and at last filled up: there are always K."""
  with pytest.raises(ValueError, match=f"can be 1 to {settings.num_context_patches}, the mean"):
    views.mask_shape((8, 8), dataclasses.replace(settings, num_context_patches=settings.num_context_patches + 1))
  masks = draw((8, 8), settings, 20_000)
  assert (np.diff(masks.context_BxK, axis=1) > 0).all()
  assert not (one_hot(masks.context_BxK, 64) & in_targets(masks, 64)).any()


def test_quadrants_split_the_grid():
  masks = draw((14, 14), KINDS["quadrants"])
  assert masks.valid_BxMxT.all()
  assert (one_hot(masks.context_BxK, 196) ^ in_targets(masks, 196)).all()
  corner, counts = np.unique(masks.context_BxK[:, 0], return_counts=True)
  assert corner.tolist() == [0, 7, 98, 105] and np.abs(counts / 4096 - 0.25).max() < 0.04


def test_random_splits_the_grid_at_random():
  masks = draw((14, 14), KINDS["random"])
  assert masks.context_BxK.shape[1] == 98 and masks.valid_BxMxT.all()
  context = one_hot(masks.context_BxK, 196)
  assert (context ^ in_targets(masks, 196)).all()
  assert np.abs(context.mean(0) - 0.5).max() < 0.04
  assert np.abs(np.corrcoef(context.T) - np.eye(196) + (1 - np.eye(196)) / 195).max() < 0.09


def test_block_has_one_large_target_and_its_complement():
  masks = draw((14, 14), BLOCK)
  sides = target_sides(masks, 14)
  assert 0.55 < sides.prod(-1).mean() / 196 < 0.65
  context = one_hot(masks.context_BxK, 196).mean(0)
  assert context[[0, 13, 182, 195]].min() > 0.8 and context.reshape(14, 14)[6:8, 6:8].max() == 0


# ------------------------------------------------------------------------------------------------------------- union
@pytest.mark.parametrize("kind, grid_hw", [("official", (14, 14)), ("uniform", (7, 9)), ("quadrants", (7, 9))])
def test_union_has_every_target_patch_once(kind, grid_hw):
  num_patches = grid_hw[0] * grid_hw[1]
  masks = draw(grid_hw, KINDS[kind])
  union = jax.tree.map(np.asarray, jax.jit(views.union_targets, static_argnums=1)(masks, num_patches))
  _, num_targets, num_slots = masks.targets_BxMxT.shape
  assert union.targets_BxMxT.shape == (4096, 1, min(num_targets * num_slots, num_patches - masks.context_BxK.shape[1]))
  assert union.targets_BxMxT.dtype == np.int32
  np.testing.assert_array_equal(union.context_BxK, masks.context_BxK)
  np.testing.assert_array_equal(in_targets(union, num_patches), in_targets(masks, num_patches))
  np.testing.assert_array_equal(union.valid_BxMxT.sum((1, 2)), in_targets(masks, num_patches).sum(1))
  steps, valid = np.diff(union.targets_BxMxT, axis=2), union.valid_BxMxT[:, :, 1:]
  assert (steps[valid] > 0).all() and (steps[~valid] == 0).all()


# --------------------------------------------------------------------------------------------- keys, devices, programs
def test_masks_depend_on_their_own_key_only():
  keys = jax.random.split(jax.random.key(0), 4096)
  whole = draw((8, 8), KINDS["uniform"])
  part = sampler((8, 8), KINDS["uniform"])(keys[5:9])
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[5:9], b), whole, part)
  other = draw((8, 8), KINDS["uniform"], seed=1)
  assert (whole.context_BxK != other.context_BxK).any(1).mean() > 0.99
  assert len(np.unique(whole.context_BxK, axis=0)) > 4000


def test_sharded_masks_are_the_same_without_communication():
  def both(keys):
    masks = views.sample_masks(keys, (8, 8), OFFICIAL)
    return masks, views.union_targets(masks, 64)

  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  keys = jax.random.split(jax.random.key(0), 16)
  sharded = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))
  compiled = jax.jit(both, out_shardings=NamedSharding(mesh, PartitionSpec("data"))).lower(sharded).compile()
  hlo = compiled.as_text() or ""
  assert hlo and not [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if f" {op}(" in hlo]
  jax.tree.map(np.testing.assert_array_equal, compiled(sharded), jax.jit(both)(keys))


def test_one_program_for_all_steps():
  sample_fn = jax.jit(lambda key: views.sample_masks(jax.random.split(key, 4), (6, 6), OFFICIAL))
  shapes = {jax.tree.map(jnp.shape, sample_fn(jax.random.fold_in(jax.random.key(0), step))) for step in range(50)}
  assert sample_fn._cache_size() == 1 and len(shapes) == 1


# ------------------------------------------------------------------------------------------------------------ picture
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_grid_shows_context_and_targets(channels):
  patch_px, grid_hw = 3, (4, 6)
  masks = jax.tree.map(lambda x: x[:5], draw(grid_hw, views.MaskSettings("quadrants"), num=8))
  pixels = views.Pixels((0.5,) * channels, (0.25,) * channels)
  images = np.random.default_rng(0).choice([-2.0, 2.0], (5, 12, 18, channels))  # black and white
  grid = views.masks_grid(images, masks, patch_px, pixels, num_images=2)
  assert grid.shape == (2 * 14 + 2, 5 * 20 + 2, 3) and grid.dtype == np.uint8
  cells = grid[2:].reshape(2, 14, -1, 3)[:, :12, 2:].reshape(2, 12, 5, 20, 3)[:, :, :, :18]
  cells = np.moveaxis(cells, 2, 1)  # image, column, height, width, channel
  np.testing.assert_array_equal(cells[:, 0], np.broadcast_to(images[:2] * 63.75 + 127.5, cells[:, 0].shape))
  untouched = np.isin(cells, (0, 255)).all(-1).reshape(2, 5, 4, patch_px, 6, patch_px).all((3, 5)).reshape(2, 5, 24)
  assert untouched[:, 0].all()
  np.testing.assert_array_equal(untouched[:, 1], one_hot(masks.context_BxK[:2], 24))
  for m in range(3):
    np.testing.assert_array_equal(untouched[:, 2 + m], one_hot(masks.targets_BxMxT[:2, m], 24))


# ------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: views.MaskSettings("multiblock"), "official, uniform, random, quadrants, block"),
    (lambda: views.MaskSettings(num_targets=0), "num_targets is 0"),
    (lambda: views.MaskSettings("block"), "set num_targets=1 and a large target_scale"),
    (lambda: views.MaskSettings(target_scale=(0.2, 0.1)), "target_scale"),
    (lambda: views.MaskSettings(target_scale=(0.2,)), "target_scale"),
    (lambda: views.MaskSettings(context_scale=(0.5, 1.5)), "context_scale"),
    (lambda: views.MaskSettings(target_aspect=(0.0, 1.0)), "target_aspect"),
    (lambda: views.MaskSettings(num_context_patches=-1), "num_context_patches is -1"),
    (lambda: views.mask_shape((1, 1), views.MaskSettings()), "no patch is left for the context on a grid of 1x1"),
    (lambda: views.mask_shape((2, 2), OFFICIAL), "a target has no patches on a grid of 2x2"),
    (lambda: views.mask_shape((1, 8), KINDS["quadrants"]), "no patch is left .* 1x8 .* quarter"),
    (lambda: views.mask_shape((1, 1), KINDS["random"]), "no patch is left .* all but one"),
    (lambda: views.mask_shape((8, 8), views.MaskSettings(target_scale=(1.0, 1.0))), "no patch is left .* target_scale"),
    (lambda: views.mask_shape((8, 8), views.MaskSettings(num_targets=80)), "no patch is left .* num_targets=80"),
    (lambda: views.mask_shape((14, 14), views.MaskSettings(num_context_patches=120)), "is 120 .* 14x14 .* 1 to 89"),
    (lambda: views.mask_shape((14, 14), dataclasses.replace(BLOCK, num_context_patches=90)), "1 to 75, all but the"),
    (lambda: views.mask_shape((14, 14), views.MaskSettings("quadrants", num_context_patches=50)), "1 to 49"),
    (lambda: views.mask_shape((4, 4), views.MaskSettings("random", num_context_patches=16)), "1 to 15"),
    (lambda: views.sample_masks(None, (2, 2), OFFICIAL), "smaller, target_scale larger, or kind='uniform'"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("kind", ["official", "uniform"])
def test_grids_from_4_to_64_work(kind):
  """Shapes follow from the settings; a target has about a fifth of the patches, the context a fifth to a third."""
  for side in (4, 5, 9, 21, 32, 64):
    num_context, num_targets, num_slots = views.mask_shape((side, side), KINDS[kind])
    assert 0.15 < num_context / side**2 < 0.36 and num_targets == 4 and 0.15 < num_slots / side**2 < 0.3
    masks = jax.eval_shape(lambda keys: views.sample_masks(keys, (side, side), KINDS[kind]), KEYS)  # noqa: B023
    assert masks.context_BxK.shape == (3, num_context) and masks.targets_BxMxT.shape == (3, num_targets, num_slots)
