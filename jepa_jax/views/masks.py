"""I-JEPA's masks: which patches the context encoder sees and which blocks are predicted, static in shape, from a key.

Legend: B examples, H, W sides of the patch grid, N = H W patches, K context patches, M target blocks, T slots of a
target (the largest block), R tries, X = M + 1 blocks (the context's is the last), S block sizes. A block is
(top, left, height, width) in patches; patches are numbered in raster order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.choices import check_choices

Kind = Literal["official", "uniform", "random", "quadrants", "block"]
NUM_TRIES = 5  # official at 14x14: 1 % of the images need a second
# What the official collator leaves of the context: it cuts all images of a process to the shortest. For 128 images the
# median of this cut is 51 +- 1 at 14x14 and 67 +- 1 at 16x16; at 28x28 it is 234, and 273 is that of 16 images.
OFFICIAL_BUDGET = {(14, 14): 51, (16, 16): 67, (28, 28): 273}
BUDGET_SHARE = 0.62
SIZE_STEPS = 2**16  # block sizes are drawn from a table of this many equally likely draws


@dataclasses.dataclass(frozen=True)
class MaskSettings:
  """How masks are drawn. Scales are shares of the grid, aspects are height / width, both as (low, high).

  kind:
  - official: the law of the I-JEPA code. One number sets scale and aspect of all targets of an image, the last row and
    column are in no block, and the context is its block without the targets, cut in raster order to K patches.
  - uniform: scale and aspect (log-uniform) drawn apart for each target, all positions; the context is a random K of the
    patches in its block and in no target. context_scale (1, 1) is the whole grid.
  - block: one large target, drawn as in uniform (such as num_targets=1, target_scale=(.6, .6)); a random K of the rest.
  - random: K random patches, the rest is the target. quadrants: one random quarter of the grid against the other three
    (odd sides: quarters differ by a row or a column). Neither reads scales, aspects and num_targets.

  num_context_patches: K, or 0 for a rule. official, uniform: what the cut of the official code leaves, 51 at 14x14, 67
  at 16x16, 273 at 28x28; on other grids, and with other scales, .62 (as at 14x14) of the mean number of patches in the
  context block and in no target. random: half. quadrants: the smallest quarter. block: all but the largest block.
  """

  kind: Kind = "uniform"
  num_targets: int = 4
  target_scale: tuple[float, float] = (0.15, 0.2)
  target_aspect: tuple[float, float] = (0.75, 1.5)
  context_scale: tuple[float, float] = (0.85, 1.0)
  num_context_patches: int = 0

  def __post_init__(self):
    check_choices(self)
    if self.num_targets < 1:
      raise ValueError(f"num_targets is {self.num_targets}: at least one target block is needed")
    if self.kind == "block" and self.num_targets != 1:
      raise ValueError(
        f"num_targets is {self.num_targets} but kind is 'block', one large block: set num_targets=1 and a large"
        " target_scale such as (0.6, 0.6), or kind='uniform' for several"
      )
    for name in ("target_scale", "context_scale"):
      scale = getattr(self, name)
      if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"{name} is {scale}: give (low, high) shares of the grid with 0 < low <= high <= 1")
    if len(self.target_aspect) != 2 or not 0 < self.target_aspect[0] <= self.target_aspect[1]:
      raise ValueError(
        f"target_aspect is {self.target_aspect}: give (low, high) of height / width with 0 < low <= high"
      )
    if self.num_context_patches < 0:
      raise ValueError(
        f"num_context_patches is {self.num_context_patches}: give a number of patches, or 0 for the rule"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
  """Patches by number in raster order.

  context_BxK: int32, ascending, K different patches, none in a target. targets_BxMxT: int32, ascending; slots beyond
  the block repeat its last patch and are False in valid_BxMxT (bool).
  """

  context_BxK: jax.Array
  targets_BxMxT: jax.Array
  valid_BxMxT: jax.Array


def sample_masks(keys_B, grid_hw: tuple[int, int], settings: MaskSettings) -> Masks:
  """Returns the masks of B images on a grid of patches, one key per image: see `Masks`; sizes as `mask_shape` says.

  Raises the ValueErrors of `mask_shape`, when traced. Everything is drawn per image, also the block sizes that the
  official collator draws once per batch: an image's masks are then the same whatever microbatch or device it is in.
  The law per image is the official one; only sizes are no longer equal within a batch.
  """
  shape = mask_shape(grid_hw, settings)
  if settings.kind == "random":
    return jax.vmap(lambda key: _random_masks(key, grid_hw, shape))(keys_B)
  draw_fn = _draw_quadrants if settings.kind == "quadrants" else _draw_blocks

  def sample(key):
    blocks_RxXx4, u_N = draw_fn(key, grid_hw, settings)
    return _masks_of_blocks(blocks_RxXx4, u_N, grid_hw, shape)

  return jax.vmap(sample)(keys_B)


def union_targets(masks: Masks, num_patches: int) -> Masks:
  """Returns the masks with one target (M = 1), the union of the blocks, T = min(M T, N - K): to predict in one pass."""
  _, num_targets, num_slots = masks.targets_BxMxT.shape
  num_union = min(num_targets * num_slots, num_patches - masks.context_BxK.shape[1])

  def union(targets_MxT, valid_MxT):
    in_target_N = jnp.zeros(num_patches, bool).at[targets_MxT].max(valid_MxT)
    order_N = _patches_in_order(~in_target_N)  # the union first, ascending
    slot_T = jnp.minimum(jnp.arange(num_union), jnp.sum(in_target_N) - 1)
    return order_N[slot_T][None], (slot_T == jnp.arange(num_union))[None]

  targets_Bx1xT, valid_Bx1xT = jax.vmap(union)(masks.targets_BxMxT, masks.valid_BxMxT)
  return Masks(masks.context_BxK, targets_Bx1xT, valid_Bx1xT)


# ------------------------------------------------------------------------------------------------------------- drawing
def _draw_blocks(key, grid_hw, settings: MaskSettings):
  """Returns R tries of M targets and a context block, int32 (R, X, 4), and the numbers (N,) that order patches."""
  official, num_targets, grid = settings.kind == "official", settings.num_targets, np.array(grid_hw)
  # One generator call for everything: each one costs compile time.
  num_sizes = 2 if official else num_targets + 1
  num_place = NUM_TRIES * (num_targets + 1) * 2
  u = jax.random.uniform(key, (num_sizes + num_place + (0 if official else grid.prod()),))
  targets_Mx2 = jnp.broadcast_to(_draw_sizes(u[: num_sizes - 1], *_target_sizes(grid_hw, settings)), (num_targets, 2))
  context_1x2 = _draw_sizes(u[num_sizes - 1 : num_sizes], *_context_sizes(grid_hw, settings))
  size_Xx2 = jnp.concatenate([targets_Mx2, context_1x2])
  num_positions_Xx2 = grid - size_Xx2 + (0 if official else 1)  # the official randint excludes the last one
  u_RxXx2 = u[num_sizes : num_sizes + num_place].reshape(NUM_TRIES, num_targets + 1, 2)
  corner_RxXx2 = jnp.minimum((u_RxXx2 * num_positions_Xx2).astype(jnp.int32), num_positions_Xx2 - 1)  # u n can be n
  blocks_RxXx4 = jnp.concatenate([corner_RxXx2, jnp.broadcast_to(size_Xx2, corner_RxXx2.shape)], axis=-1)
  # The last resort has all targets in one place: this leaves at least N - T patches, so some try always fits.
  blocks_RxXx4 = blocks_RxXx4.at[-1, :num_targets].set(blocks_RxXx4[-1, 0])
  return blocks_RxXx4, jnp.zeros(grid.prod()) if official else u[num_sizes + num_place :]


def _draw_quadrants(key, grid_hw, settings: MaskSettings):
  """Returns one try of three quarters as targets and the fourth as context (1, 4, 4), and random numbers (N,)."""
  del settings
  rows, columns = ([(0, side // 2), (side // 2, side - side // 2)] for side in grid_hw)
  blocks_4x4 = jnp.array([(top, left, h, w) for top, h in rows for left, w in columns], jnp.int32)
  u = jax.random.uniform(key, (1 + grid_hw[0] * grid_hw[1],))
  first = (u[0] * 4).astype(jnp.int32)
  return blocks_4x4[(first + jnp.arange(4)) % 4][None], u[1:]


def _random_masks(key, grid_hw, shape) -> Masks:
  """Returns the masks of one image: K random patches, and all others as one target."""
  num_context, _, num_slots = shape
  order_N = _patches_in_order(jnp.zeros(grid_hw[0] * grid_hw[1]), jax.random.uniform(key, (grid_hw[0] * grid_hw[1],)))
  targets_T = jnp.sort(order_N[num_context:])
  return Masks(jnp.sort(order_N[:num_context]), targets_T[None], jnp.ones((1, num_slots), bool))


def _masks_of_blocks(blocks_RxXx4, u_N, grid_hw, shape) -> Masks:
  """Returns the masks of one image from the first try that leaves K visible patches in the context block.

  Where none does, from the one with most visible, filled up with patches outside the context block. Of more than K,
  those of lowest u_N in [0, 1) are kept, of equals the first.
  """
  num_context, num_targets, num_slots = shape
  top, left, height, width = jnp.moveaxis(blocks_RxXx4[..., None], -2, 0)
  row, column = jnp.arange(grid_hw[0]), jnp.arange(grid_hw[1])
  in_rows_RxXxH = (row >= top) & (row < top + height)
  in_columns_RxXxW = (column >= left) & (column < left + width)
  inside_RxXxN = (in_rows_RxXxH[..., :, None] & in_columns_RxXxW[..., None, :]).reshape(*blocks_RxXx4.shape[:2], -1)
  free_RxN = ~jnp.any(inside_RxXxN[:, :num_targets], axis=1)
  visible_RxN = free_RxN & inside_RxXxN[:, num_targets]
  # argmax takes the first of equals, so no more than K count; the last resort comes after all others.
  num_visible_R = jnp.minimum(jnp.sum(visible_RxN, axis=1), num_context).at[NUM_TRIES - 1 :].set(0)
  chosen = jnp.argmax(jnp.where(jnp.sum(free_RxN, axis=1) >= num_context, num_visible_R, -1))
  priority_N = jnp.where(visible_RxN[chosen], 0, jnp.where(free_RxN[chosen], 1, 2))
  context_K = jnp.sort(_patches_in_order(priority_N, u_N)[:num_context])
  top, left, height, width = blocks_RxXx4[chosen, :num_targets].T[..., None]
  slot_T = jnp.arange(num_slots)
  slot_MxT = jnp.minimum(slot_T, height * width - 1)
  targets_MxT = (top + slot_MxT // width) * grid_hw[1] + left + slot_MxT % width
  return Masks(context_K, targets_MxT.astype(jnp.int32), slot_MxT == slot_T)


def _patches_in_order(priority_N, u_N=0.0):
  """Returns the patch numbers int32 (N,) by priority (0, 1, 2), then u in [0, 1), then number.

  One sort of single integers: no ties, and on a CPU it takes a sixth of the time of an argsort.
  """
  patch_N = jnp.arange(len(priority_N), dtype=jnp.uint32)
  patch_bits = max(1, (len(priority_N) - 1).bit_length())
  u_bits = 30 - patch_bits
  u_N = (jnp.asarray(u_N) * 2**u_bits).astype(jnp.uint32)
  packed_N = (priority_N.astype(jnp.uint32) << 30) | (u_N << patch_bits) | patch_N
  return (jnp.sort(packed_N) & (2**patch_bits - 1)).astype(jnp.int32)


def _draw_sizes(u_M, size_Sx2, probability_S):
  """Returns one (height, width) per number in [0, 1): int32 (M, 2)."""
  index_M = jnp.sum(u_M[:, None] >= jnp.asarray(np.cumsum(probability_S)[:-1], jnp.float32), axis=1)
  return jnp.asarray(size_Sx2, jnp.int32)[index_M]


# -------------------------------------------------------------------------------------------------- laws, on the host
def _target_sizes(grid_hw, settings: MaskSettings):
  """Returns the sizes that targets can have, (S, 2), and their probabilities (S,)."""
  return _block_sizes(grid_hw, settings.kind == "official", settings.target_scale, settings.target_aspect)


def _context_sizes(grid_hw, settings: MaskSettings):
  """Returns the sizes that the context block can have, (S, 2), and their probabilities (S,)."""
  if settings.kind == "official":
    return _block_sizes(grid_hw, True, settings.context_scale, (1.0, 1.0))
  # The grid's own aspect, so that scale 1 is all of it.
  scale, aspect = settings.context_scale if settings.kind == "uniform" else (1.0, 1.0), grid_hw[0] / grid_hw[1]
  return _block_sizes(grid_hw, False, scale, (aspect, aspect))


@functools.lru_cache
def _block_sizes(grid_hw, official: bool, scale, aspect):
  """Returns the block sizes of a law, (S, 2), and their probabilities (S,): those of SIZE_STEPS equal steps of u.

  A table makes the largest block, which sets the shapes, exact: rounding on the device cannot give another.
  """
  num_patches = grid_hw[0] * grid_hw[1]
  if official:  # one u for both
    u = (np.arange(SIZE_STEPS) + 0.5) / SIZE_STEPS
    area = np.floor(num_patches * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    low, high = 0, np.array(grid_hw) - 1
  else:
    side = round(SIZE_STEPS**0.5)
    u = (np.arange(side) + 0.5) / side
    area = np.repeat(num_patches * (scale[0] + u * (scale[1] - scale[0])), side)
    ratio = np.tile(aspect[0] * (aspect[1] / aspect[0]) ** u, side)
    low, high = 1, np.array(grid_hw)
  size = np.clip(np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=1))), low, high).astype(np.int64)
  size_Sx2, counts_S = np.unique(size, axis=0, return_counts=True)
  return size_Sx2, counts_S / counts_S.sum()


@functools.lru_cache
def mask_shape(grid_hw: tuple[int, int], settings: MaskSettings) -> tuple[int, int, int]:
  """Returns (K, M, T): context patches, target blocks, slots of a target.

  Raises ValueError when the settings do not fit on this grid (height, width in patches), with what would.
  """
  num_patches, asked = grid_hw[0] * grid_hw[1], settings.num_context_patches
  if settings.kind == "random":
    rule, most, why = num_patches // 2, num_patches - 1, "all but one, for the target"
    num_targets, num_slots = 1, num_patches - (asked or rule)
  elif settings.kind == "quadrants":
    rule = most = (grid_hw[0] // 2) * (grid_hw[1] // 2)
    why = "the smallest quarter"
    num_targets, num_slots = 3, -(-grid_hw[0] // 2) * -(-grid_hw[1] // 2)
  else:
    num_targets, num_slots = settings.num_targets, _largest_target(grid_hw, settings)
    rule = most = num_patches - num_slots
    why = f"all but the largest target of target_scale {settings.target_scale}"
    if settings.kind != "block":
      mean = _mean_visible(grid_hw, settings)
      rule = _budget(grid_hw, settings, mean)
      if mean < most:  # beyond it most draws would be rejected, and those kept have targets that overlap
        most = int(mean)
        why = (
          f"the mean that num_targets={num_targets} of target_scale={settings.target_scale} leave of the context block"
        )
        why += f" (context_scale {settings.context_scale}); smaller or fewer targets leave more"
  where = f"on a grid of {grid_hw[0]}x{grid_hw[1]} patches (image size / patch size)"
  if most < 1:
    raise ValueError(f"no patch is left for the context {where}: kind is {settings.kind!r} and this is {why}")
  if not 1 <= (asked or rule) <= most:
    raise ValueError(f"num_context_patches is {asked or rule} {where}: it can be 1 to {most}, {why}")
  return asked or rule, num_targets, num_slots


def _budget(grid_hw, settings: MaskSettings, mean_visible: float) -> int:
  """Returns the K that num_context_patches = 0 stands for, see `MaskSettings`."""
  published = dataclasses.replace(settings, kind="uniform", num_context_patches=0) == MaskSettings()
  if published and grid_hw in OFFICIAL_BUDGET:
    return OFFICIAL_BUDGET[grid_hw]
  return max(1, round(BUDGET_SHARE * mean_visible))


def _largest_target(grid_hw, settings: MaskSettings) -> int:
  """Returns the number of patches of the largest target."""
  size_Sx2, _ = _target_sizes(grid_hw, settings)
  if size_Sx2.min() < 1:
    raise ValueError(
      f"target_scale {settings.target_scale}, target_aspect {settings.target_aspect}: a target has no patches on"
      f" a grid of {grid_hw[0]}x{grid_hw[1]} patches: make the patches smaller, target_scale larger, or kind='uniform'"
    )
  return int(size_Sx2.prod(axis=1).max())


def _mean_visible(grid_hw, settings: MaskSettings) -> float:
  """Returns the mean number of patches in the context block and in no target."""

  def covered(size_Sx2):  # probability that a patch is in a block, by size: (S, H, W)
    sides = []
    for axis, side in enumerate(grid_hw):
      length_Sx1, patch = size_Sx2[:, axis, None], np.arange(side)
      num_positions = side - length_Sx1 + (settings.kind != "official")
      first, last = np.maximum(patch - length_Sx1 + 1, 0), np.minimum(patch, num_positions - 1)
      sides.append(np.maximum(last - first + 1, 0) / num_positions)
    return sides[0][:, :, None] * sides[1][:, None, :]

  (target_Sx2, target_S), (context_Sx2, context_S) = _target_sizes(grid_hw, settings), _context_sizes(grid_hw, settings)
  free_SxHxW = 1 - covered(target_Sx2)
  if settings.kind == "official":
    free_HxW = np.tensordot(target_S, free_SxHxW**settings.num_targets, 1)
  else:
    free_HxW = np.tensordot(target_S, free_SxHxW, 1) ** settings.num_targets
  return float(np.sum(free_HxW * np.tensordot(context_S, covered(context_Sx2), 1)))
