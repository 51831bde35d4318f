"""Checkpoints of other layouts <-> our parameters: strict, numpy only, every array used exactly once.

Tensors are a flat dict {their key: array}; parameters a nested dict as the networks have it, blocks stacked or not.
Legend: P class and register tokens, N patches, D width.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp
import numpy as np

from jepa_jax.models import ViTConfig, sincos_position_embedding
from jepa_jax.models.vit import ViTSize
from jepa_jax.weights.layouts import (
  LAYOUTS,
  PREDICTOR,
  TRANSPOSED,
  TURNS,
  Entry,
  Layout,
  Shape,
  encoder_entries,
  predictor_entries,
)
from jepa_jax.weights.names import LEFT_OUT, respelt

Tree = Any
Tensors = Mapping[str, np.ndarray]
POSITION_TOLERANCE = 1e-5
_STRIP = 16  # rows that are transposed at a time: a cache line of each stays at hand, 2.7 times as fast as all at once
_BLOCK = re.compile(r"blocks_(\d+)/(.+)")


def encoder_from(tensors: Tensors, cfg: ViTConfig, layout: str, ignore: Sequence[str] = (), channels: int = 3) -> Tree:
  """Returns the parameters, float32, of the ViT `cfg` from the tensors of a layout, in any of its spellings.

  Layer scale goes into the layers before it where the config has none: gamma (W x + b) = (gamma W) x + gamma b.
  With pos_embed="sincos" the checkpoint's position embedding must be our constant to 1e-5. `ignore` are patterns of
  keys that may be left unused ("head.*"). ValueError that lists every missing, unused or misshapen key.
  """
  tensors = respelt(layout, without(tensors, ignore))
  tensors = fold_positions(tensors, LAYOUTS[layout], (cfg.image_size // cfg.patch_size) ** 2)
  tensors = tensors if cfg.layer_scale else _fold_scales(tensors, LAYOUTS[layout])
  flat = take(
    encoder_entries(cfg, layout, channels), tensors, LAYOUTS[layout], cfg.size.num_heads, "the encoder", cfg.scan
  )
  if cfg.pos_embed == "sincos":
    _check_position(flat.pop("pos_embed"), f"the encoder's {LAYOUTS[layout].outside['pos_embed']}", learnable=True)
  elif cfg.pos_embed == "learned":
    flat["pos_embed"] = np.asarray(flat["pos_embed"], np.float32)
  return unflatten(flat)


def encoder_to(params: Tree, cfg: ViTConfig, layout: str, channels: int = 3) -> dict[str, np.ndarray]:
  """Returns the tensors, float32, of a layout from the parameters of the ViT `cfg`: the inverse of `encoder_from`.

  A class token has a position of its own elsewhere: it is 0, since ours is a part of the token. timm has none where
  there are registers, too (no_embed_class=True).
  """
  flat, size = unstack(flatten(params)), cfg.size
  grid = cfg.image_size // cfg.patch_size
  if cfg.pos_embed == "sincos":
    flat["pos_embed"] = sincos_position_embedding((grid, grid), size.width)[None]
  tensors = give(encoder_entries(cfg, layout, channels), flat, size.num_heads)
  if cfg.cls_token and cfg.pos_embed != "rope" and not (layout == "timm" and cfg.num_registers):
    key = LAYOUTS[layout].outside["pos_embed"]
    tensors[key] = np.concatenate([np.zeros((1, 1, size.width), np.float32), tensors[key]], axis=1)
  return tensors


def predictor_from(tensors: Tensors, like: Tree, encoder: ViTConfig, ignore: Sequence[str] = ()) -> Tree:
  """Returns the predictor's parameters from Meta's tensors; `like` has the names and shapes that are wanted.

  Its position embedding must be the sin-cos constant of the encoder's grid. ValueError as in `encoder_from`.
  """
  size, num_patches = predictor_size(like), (encoder.image_size // encoder.patch_size) ** 2
  entries = predictor_entries(size, encoder.size.width, num_patches, like["proj"]["kernel"].shape[-1])
  flat = take(entries, without(tensors, ignore), PREDICTOR, size.num_heads, "the predictor")
  _check_position(flat.pop("pos_embed"), "predictor_pos_embed", learnable=False)
  return to_tree(flat, "blocks" in like)


def predictor_to(params: Tree, encoder: ViTConfig) -> dict[str, np.ndarray]:
  """Returns Meta's tensors from the parameters of a predictor on this encoder."""
  size, grid = predictor_size(params), encoder.image_size // encoder.patch_size
  flat = unstack(flatten(params)) | {"pos_embed": sincos_position_embedding((grid, grid), size.width)[None]}
  return give(predictor_entries(size, encoder.size.width, grid**2, len(flat["proj/bias"])), flat, size.num_heads)


def predictor_size(params: Tree) -> ViTSize:
  """Returns width, depth, heads and hidden width of a predictor's (abstract) parameters."""
  flat = {key: leaf.shape for key, leaf in flatten(params).items()}
  if "blocks/attn/qkv/kernel" in flat:
    depth, width, _, heads, _ = flat["blocks/attn/qkv/kernel"]
    return ViTSize(width, depth, heads, flat["blocks/mlp/fc1/kernel"][-1])
  width, _, heads, _ = flat["blocks_0/attn/qkv/kernel"]
  depth = sum(key.endswith("attn/qkv/kernel") for key in flat)
  return ViTSize(width, depth, heads, flat["blocks_0/mlp/fc1/kernel"][-1])


def measure(shapes: Mapping[str, Shape], names: Layout) -> dict[str, int]:
  """Returns depth, width, mlp_dim, patch_size, ... as far as these shapes show them."""
  block = re.compile(re.escape(names.block).replace(re.escape("{}"), r"(\d+)"))
  found = {"depth": 1 + max((int(m[1]) for m in map(block.match, shapes) if m), default=-1)}
  seconds = [part for part in (names.inside["mlp/fc2"], names.gated.get("mlp/fc2")) if isinstance(part, str)]
  fc2 = next((part for part in seconds if f"{names.block.format(0)}{part}.weight" in shapes), "")
  places = {
    "width": (f"{names.block.format(0)}{names.inside['norm1']}.weight", 0),
    "mlp_dim": (f"{names.block.format(0)}{fc2}.weight", 1),
    "channels": (names.outside.get("patch_embed", "") + ".weight", 1),
    "patch_size": (names.outside.get("patch_embed", "") + ".weight", 2),
    "encoder_width": (names.outside.get("embed", "") + ".weight", 1),
    "positions": (names.outside.get("pos_embed", ""), 1),
    "num_registers": (names.outside.get("registers", ""), 1),
  }
  return found | {name: shapes[key][i] for name, (key, i) in places.items() if i < len(shapes.get(key, ()))}


def compare(wanted: Mapping[str, Shape], given: Mapping[str, Shape], what: str, notes: Sequence[str] = ()) -> None:
  """Raises one ValueError that lists every key that is missing, not used, or of another shape."""
  lines = list(notes)
  lines += [f"missing in the checkpoint: {key} {wanted[key]}" for key in wanted if key not in given]
  lines += [f"in the checkpoint, but not used: {key} {given[key]}" for key in given if key not in wanted]
  lines += [
    f"{key}: {given[key]} in the checkpoint, {shape} wanted"
    for key, shape in wanted.items()
    if given.get(key, shape) != shape
  ]
  if lines:
    raise ValueError(f"{what} of the checkpoint does not fit the config:\n  " + "\n  ".join(lines))


def is_sincos(pos_1xNxD: np.ndarray) -> bool:
  """Returns whether this is the sin-cos constant of a square grid, to 1e-5 or to the digits that its dtype has."""
  ours_NxD = _sincos_like(pos_1xNxD)
  return ours_NxD is not None and _gap(pos_1xNxD, ours_NxD) <= _tolerance(pos_1xNxD)


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
  """Returns {"blocks/norm1/scale": leaf} of a nested dict."""
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  return {k: v for key, sub in tree.items() for k, v in flatten(sub, f"{prefix}/{key}".lstrip("/")).items()}


def unflatten(flat: Mapping[str, Any]) -> Tree:
  """Returns the nested dict of {"blocks/norm1/scale": leaf}."""
  tree: dict[str, Any] = {}
  for key, leaf in flat.items():
    *parents, name = key.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def unstack(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns "blocks/x" (L, ...) as "blocks_0/x", "blocks_1/x", ...; what has no stacked blocks as it is."""
  blocks = {key: leaf for key, leaf in flat.items() if key.startswith("blocks/")}
  singles = {f"blocks_{i}/{k[7:]}": layer for k, leaf in blocks.items() for i, layer in enumerate(np.asarray(leaf))}
  return {key: leaf for key, leaf in flat.items() if key not in blocks} | singles


def stack(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns "blocks_0/x", "blocks_1/x", ... stacked along axis 0 as "blocks/x": the inverse of `unstack`."""
  layers: dict[str, dict[int, Any]] = {}
  for key, leaf in flat.items():
    if match := _BLOCK.fullmatch(key):
      layers.setdefault(f"blocks/{match[2]}", {})[int(match[1])] = leaf
  rest = {key: leaf for key, leaf in flat.items() if not _BLOCK.fullmatch(key)}
  return rest | {key: np.stack([by_depth[i] for i in sorted(by_depth)]) for key, by_depth in layers.items()}


def to_tree(flat: Mapping[str, np.ndarray], scan: bool) -> Tree:
  return unflatten(stack(flat) if scan else flat)


def without(tensors: Tensors, ignore: Sequence[str]) -> dict[str, np.ndarray]:
  unmatched = [pattern for pattern in ignore if not any(fnmatchcase(key, pattern) for key in tensors)]
  idle = [pattern for pattern in unmatched if pattern not in LEFT_OUT]  # those were left out when it was read
  if idle:
    raise ValueError(f"nothing in the checkpoint is called {', '.join(idle)}; leave it out of what to ignore")
  return {key: x for key, x in tensors.items() if not any(fnmatchcase(key, pattern) for pattern in ignore)}


def take(
  entries: list[Entry], tensors: Tensors, names: Layout, heads: int, what: str, scan: bool = False
) -> dict[str, np.ndarray]:
  """Returns {our name: array}, blocks stacked or not, float32 but for the position embedding, which is still to be
  compared."""
  wanted = {key: entry.shape for entry in entries for key in entry.theirs}
  given = {key: tuple(x.shape) for key, x in tensors.items()}
  theirs, ours = measure(given, names), measure(wanted, names)
  notes = [
    f"{name}: the checkpoint has {theirs[name]}, the config {ours[name]}"
    for name in ours.keys() & theirs.keys()
    if theirs[name] != ours[name]
  ]
  compare(wanted, given, what, sorted(notes))
  return take_entries(entries, tensors, heads, what, scan)


def take_entries(
  entries: list[Entry], tensors: Tensors, heads: int, what: str, scan: bool = False
) -> dict[str, np.ndarray]:
  """Returns what `take` does, of tensors whose names and shapes are known to be those of the entries."""
  flat: dict[str, np.ndarray] = {}
  depth = 1 + max((int(m[1]) for entry in entries if (m := _BLOCK.fullmatch(entry.ours))), default=-1)
  for entry in entries:
    parts = [tensors[key] for key in entry.theirs]
    check_numbers(dict(zip(entry.theirs, parts, strict=True)), what)
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    turned = TURNS[entry.turn][0](whole, heads)
    block = _BLOCK.fullmatch(entry.ours) if scan else None
    if block:  # into its place: what is not held twice need not fit twice
      name = f"blocks/{block[2]}"
      place = flat.setdefault(name, np.empty((depth, *turned.shape), np.float32))[int(block[1])]
    elif entry.ours == "pos_embed":
      flat[entry.ours] = place = turned
    else:
      flat[entry.ours] = place = np.empty(turned.shape, np.float32)
    if place is not turned:
      _put(place, turned, whole if entry.turn in TRANSPOSED else None)
    let_go(parts[0])
  return flat


def _put(place: np.ndarray, turned: np.ndarray, matrix: np.ndarray | None) -> None:
  """Copies what was turned into its place; that is the transpose of `matrix`, where there is one, in another shape."""
  if matrix is None:
    place[...] = turned
    return
  rows = place.reshape(matrix.shape[1], matrix.shape[0])
  for i in range(0, len(matrix), _STRIP):
    rows[:, i : i + _STRIP] = matrix[i : i + _STRIP].T


def let_go(x: np.ndarray) -> None:
  """Gives back the memory of the file that this array is mapped from, if it is; what is read again comes anew."""
  base: Any = x
  while isinstance(base, np.ndarray):
    base = base.base
  if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
    base.madvise(mmap.MADV_DONTNEED)


def check_numbers(tensors: Tensors, what: str) -> None:
  for key, x in tensors.items():
    if x.dtype.kind in "biuc":
      raise ValueError(f"{what}: {key} is {x.dtype}, no floating-point numbers: quantised weights are not read")
    if not np.isfinite(np.asarray(x, np.float32)).all():
      raise ValueError(f"{what}: {key} holds NaN or infinite numbers: the run that wrote it had diverged")


def give(entries: list[Entry], flat: Mapping[str, Any], heads: int) -> dict[str, np.ndarray]:
  if idle := flat.keys() - {entry.ours for entry in entries}:
    raise ValueError(f"this layout has no place for {', '.join(sorted(idle))}")
  tensors = {}
  for entry in entries:
    array = TURNS[entry.turn][1](np.asarray(flat[entry.ours], np.float32), heads)
    parts = np.split(array, len(entry.theirs))
    tensors |= {key: np.ascontiguousarray(part) for key, part in zip(entry.theirs, parts, strict=True)}
  return tensors


def fold_positions(tensors: Tensors, names: Layout, num_patches: int) -> Tensors:
  """Returns tensors without positions of the class and register tokens.

  Our ViT adds positions to the patches only: those of the other tokens go into the tokens, whose sum with them is all
  that the network sees.
  """
  pos = tensors.get(names.outside.get("pos_embed", ""))
  prefix = [key for name in ("cls_token", "registers") if (key := names.outside.get(name, "")) in tensors]
  if pos is not None and pos.shape[1] == 1 + num_patches:
    prefix = prefix[:1]  # DINOv2's registers have no positions
  num_prefix = sum(tensors[key].shape[1] for key in prefix)
  if pos is None or not num_prefix or pos.shape[1] != num_prefix + num_patches:
    return tensors
  folded, start = dict(tensors), 0
  for key in prefix:
    num = tensors[key].shape[1]
    folded[key] = tensors[key].astype(np.float32) + pos[:, start : start + num].astype(np.float32)
    start += num
  return folded | {names.outside["pos_embed"]: pos[:, num_prefix:]}


def _fold_scales(tensors: Tensors, names: Layout) -> Tensors:
  folded = dict(tensors)
  inside = {stem: part for stem, part in names.inside.items() if isinstance(part, str)}
  for stem, branch in {"ls1": "attn/proj", "ls2": "mlp/fc2"}.items():
    end = names.scales.get(stem, " ")
    for key in [key for key in tensors if key.endswith("." + end)]:
      block, gamma = key.removesuffix(end), np.asarray(folded.pop(key), np.float32)
      linear = next(
        (n for n in (block + inside[branch], block + str(names.gated.get(branch))) if f"{n}.weight" in tensors), ""
      )
      if linear:
        folded[f"{linear}.weight"] = gamma[:, None] * np.asarray(tensors[f"{linear}.weight"], np.float32)
        folded[f"{linear}.bias"] = gamma * np.asarray(tensors[f"{linear}.bias"], np.float32)
  return folded


def _check_position(pos_1xNxD: np.ndarray, what: str, learnable: bool) -> None:
  if is_sincos(pos_1xNxD):
    return
  ours_NxD = _sincos_like(pos_1xNxD)
  assert ours_NxD is not None, "the shape was compared before"
  swapped_NxD = np.roll(ours_NxD, ours_NxD.shape[1] // 2, axis=1)
  why = f"the largest difference is {_gap(pos_1xNxD, ours_NxD):.3g}"
  if _gap(pos_1xNxD, swapped_NxD) <= _tolerance(pos_1xNxD):
    why = "its halves are in the order [y | x], as V-JEPA has them, and not I-JEPA's [x | y]"
  if not pos_1xNxD.any():
    why = "it is all zeros, as transformers 5 leaves it in a new ViTMAEForPreTraining: fill it first"
  hint = "; set encoder.pos_embed='learned' to take it as a parameter" if learnable else ""
  raise ValueError(f"{what} is not the sin-cos constant that our network adds: {why}{hint}")


def _sincos_like(pos_1xNxD: np.ndarray) -> np.ndarray | None:
  num, width = pos_1xNxD.shape[1:]
  grid = round(np.sqrt(num))
  return sincos_position_embedding((grid, grid), width) if grid**2 == num and width % 4 == 0 else None


def _gap(pos_1xNxD: np.ndarray, ours_NxD: np.ndarray) -> float:
  return float(np.abs(pos_1xNxD[0].astype(np.float32) - ours_NxD).max())


def _tolerance(pos: np.ndarray) -> float:
  return max(POSITION_TOLERANCE, float(jnp.finfo(pos.dtype).eps))
