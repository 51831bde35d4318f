"""Mesh, logical axes, and the rules that say where arrays live and which of them decay."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Parameters and activations speak the same names, so one table moves both.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
}


class Rule(NamedTuple):
  """What holds of the arrays of a network whose names match: where they live, and whether weight decay pulls on them.

  Attributes:
    pattern: regular expression, searched in the name below the network: "attn/qkv/kernel", or "" for what is one array.
    axes: logical axes (LOGICAL_AXES) of its LAST dimensions; those before them (stacked blocks) stay whole. () is an
      array that every device holds whole.
    decays: whether weight decay applies; running statistics and queues, which no optimiser sees, leave it False.
    optional: only some variants of the network have it; every other rule must match something.
  """

  pattern: str
  axes: tuple[str | None, ...] = ()
  decays: bool = False
  optional: bool = False


# Network name -> its rules. The network's own file holds them; an objective brings those of what it adds. First match
# decides. Optimiser moments and moving averages live where their parameter does.
Rules = Mapping[str, tuple[Rule, ...]]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; -1 takes what the others leave. The batch is split over data x fsdp."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> Mesh:
  """Returns the mesh; a ValueError says which sizes do multiply out."""
  devices = jax.devices() if devices is None else devices
  sizes = [cfg.data, cfg.fsdp, cfg.tensor]
  if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
    raise ValueError(f"mesh {_shape(sizes)}: every axis is positive, and at most one is -1 (what the others leave)")
  rest = int(np.prod([s for s in sizes if s != -1]))
  if len(devices) % rest or (-1 not in sizes and rest != len(devices)):
    raise ValueError(
      f"mesh {_shape(sizes)} does not multiply out to the {len(devices)} devices here; "
      f"set one axis to -1, and let the product of the others divide {len(devices)}"
    )
  sizes = [len(devices) // rest if s == -1 else s for s in sizes]
  if jax.process_count() > 1 and jax.local_device_count() % sizes[2]:
    raise ValueError(  # hosts would hold replicas of the same rows of the batch, but each reads rows of its own
      f"mesh {_shape(sizes)}: tensor={sizes[2]} spans hosts of {jax.local_device_count()} devices; "
      "choose a divisor of that number"
    )
  return Mesh(_arrange(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _arrange(sizes: list[int], devices: list[Any]) -> np.ndarray:
  """Returns the devices as an array of these sizes: near neighbours along the inner axes, slices along `data`.

  `jax.make_mesh` refuses several slices, and on all TPUs but v5e every mesh that splits a side of the torus.
  """
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  if sizes[0] % slices:
    raise ValueError(
      f"mesh {_shape(sizes)}: only `data` may reach over the {slices} slices (their network is slow), so {slices} must "
      f"divide it; for example fsdp={sizes[1] * sizes[0] // slices}, data={slices}"
    )
  inner = (sizes[0] // slices, *sizes[1:])
  return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)


def _shape(sizes: list[int]) -> str:
  return " x ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes))


def path_name(path: tuple[Any, ...]) -> str:
  """Returns a tree path as "encoder/blocks/attn/qkv/kernel"."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Returns x with a sharding constraint, one logical name (or None) per axis.

  x itself where no mesh is set, or a mesh of the caller's own that has no axis of ours, or whose axes are Explicit:
  there shardings are part of the types, and follow from what the caller put in.
  """
  mesh = jax.sharding.get_abstract_mesh()
  ours = [kind for name, kind in zip(mesh.axis_names, mesh.axis_types) if name in MESH_AXES]
  if mesh.size == 1 or not ours or any(kind != AxisType.Auto for kind in ours):
    return x
  return jax.lax.with_sharding_constraint(x, _spec(names, x.shape, mesh))


def _spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> P:
  """Logical names -> PartitionSpec; an axis that its mesh axes do not divide stays whole.

  Mesh axes that a caller's own mesh does not have are left out; where none is left, that axis is not constrained.
  """

  def part(name, size):
    axes = tuple(a for a in LOGICAL_AXES[name] if a in mesh.shape) if name else ()
    if name and not axes:
      return P.UNCONSTRAINED
    if not axes or size % math.prod(mesh.shape[a] for a in axes):
      return None
    return axes[0] if len(axes) == 1 else axes

  names = (None,) * (len(shape) - len(names)) + tuple(names)
  return P(*(part(name, size) for name, size in zip(names, shape)))


def batch_ways(mesh: Any) -> int:
  """Returns over how many groups of devices a batch is split; 1 on a mesh that has no axis of ours."""
  return math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"] if axis in mesh.shape)


def local_shards(mesh: Mesh) -> tuple[int, ...]:
  """Returns which of the `batch_ways` blocks of a batch's rows this process holds, ascending.

  Not always neighbours: on a torus the devices of a host can be far apart along the mesh.
  """
  places = batch_sharding(mesh).addressable_devices_indices_map((batch_ways(mesh),))
  return tuple(sorted({int(index[0].start or 0) for index in places.values() if index}))


def check_batch(batch_size: int, mesh: Mesh, microbatch: int = 1) -> None:
  """Raises a ValueError that names the nearest batch sizes where batch_size does not divide over data x fsdp."""
  ways = batch_ways(mesh)
  if batch_size % (ways * microbatch):
    low = batch_size // (ways * microbatch) * ways * microbatch
    near = " or ".join(str(b) for b in (low, low + ways * microbatch) if b)
    parts = f" and {microbatch} microbatches" if microbatch > 1 else ""
    raise ValueError(
      f"batch_size={batch_size} does not divide over data x fsdp = {ways} ways{parts}; the nearest: {near}"
    )


def split_rows(tree: Any, parts: int) -> Any:
  """Returns leaves (parts, B / parts, ...) of leaves (B, ...); each part takes equally many rows of every device."""
  mesh = jax.sharding.get_abstract_mesh()
  ways = 1 if mesh.empty else batch_ways(mesh)

  def split(x):
    x = x.reshape(ways, parts, -1, *x.shape[1:]).swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])
    return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  return jax.tree.map(split, tree)


def merge_rows(tree: Any) -> Any:
  """Returns leaves (B, ...) of leaves (parts, B / parts, ...), in the order that `split_rows` was given."""
  mesh = jax.sharding.get_abstract_mesh()
  ways = 1 if mesh.empty else batch_ways(mesh)

  def merge(x):
    rest = x.shape[2:]
    x = x.reshape(x.shape[0], ways, -1, *rest).swapaxes(0, 1).reshape(-1, *rest)
    return constrain(x, "batch", *(None,) * (x.ndim - 1))

  return jax.tree.map(merge, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: axis 0 over data x fsdp."""
  return NamedSharding(mesh, P(LOGICAL_AXES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def find_rule(name: str, rules: Rules) -> Rule:
  """Returns the rule of an array "network/name/below/it"; a ValueError says where to write one where there is none."""
  network, _, below = name.partition("/")
  for rule in rules.get(network, ()):
    if re.search(rule.pattern, below):
      return rule
  known = ", ".join(rule.pattern or "(the array itself)" for rule in rules.get(network, ())) or "none"
  raise ValueError(
    f"no rule says where {name!r} lives and whether it decays: add a Rule for {below or network!r} to the rules of "
    f"{network!r}, beside the network that makes it or in the objective's `rules` (there are: {known})"
  )


def tree_shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
  """Returns a tree of NamedShardings for {network: arrays}; ValueError for an array that no rule matches."""

  def choose(path, leaf):
    return NamedSharding(mesh, _spec(find_rule(path_name(path), rules).axes, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(choose, tree)


def check_rules(trees: Sequence[Any], rules: Rules) -> None:
  """Raises a ValueError for rules that match nothing here: a renamed parameter would be whole without a word."""
  names = [path_name(path) for tree in trees for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  used = {(name.partition("/")[0], find_rule(name, rules)) for name in names}
  idle = [
    f"{network}: {rule.pattern}"
    for network, of_network in rules.items()
    for rule in of_network
    if not rule.optional and (network, rule) not in used
  ]
  if idle:
    raise ValueError(f"rules that match no array: {', '.join(idle)}; correct or remove them, or set optional=True")


def local_bytes(leaf: Any) -> int:
  """Returns the bytes that one device holds of an (abstract) array with a sharding."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def report(abstract_params: Any, num_rows: int = 5) -> str:
  """Returns a text table of the largest parameters: name, shape, bytes per device, sharding, and the total."""
  rows = []
  leaves = jax.tree_util.tree_flatten_with_path(abstract_params)[0]
  for path, leaf in leaves:
    name = path_name(path)
    local = local_bytes(leaf)
    shape, spec = ("x".join(map(str, leaf.shape)), ", ".join(str(s or "-") for s in leaf.sharding.spec))
    rows.append((local, leaf.size, f"  {name:32s} {shape:18s} {local / 1e6:8.3f} MB  ({spec})"))
  total, count = sum(r[0] for r in rows), sum(r[1] for r in rows)
  largest = [r[2] for r in sorted(rows, reverse=True)[:num_rows]]
  more = [f"  ... and {len(rows) - num_rows} smaller"] if len(rows) > num_rows else []
  return "\n".join([*largest, *more, f"{count / 1e6:.2f} M parameters, {total / 1e6:.2f} MB per device"])
