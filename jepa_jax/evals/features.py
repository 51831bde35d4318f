"""Features of every image of a split, made once on all devices and hosts, kept on disk, read back in pieces.

Memory holds one batch, whatever the size of the data set. With several processes each makes a part of the rows, process
0 joins the parts; the others go on to what comes next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jepa_jax import distributed
from jepa_jax.data import ImageSet, prefetch_to_device, row_batches
from jepa_jax.evals.base import Features
from jepa_jax.evals.blocks import Progress
from jepa_jax.sharding import batch_sharding, batch_ways
from jepa_jax.workdir import read_json, write_json

log = logging.getLogger(__name__)
Tree = Any
PIECES = ("pooled", "probe")
HALF_LIMIT = 6e4  # what is larger is no number in half precision
_DONE = "done.json"


def make_features(
  folder: Path,
  title: str,
  features_fn: Callable[[Tree, Tree], dict[str, jax.Array]],
  variables: Tree,
  images: ImageSet,
  mesh: Mesh,
  batch_size: int,
  half: bool,
) -> Features:
  """Returns the features of every image that decodes, from `folder` where they are there; makes them there otherwise.

  features_fn(variables, batch) -> {"pooled": (B, D), "probe": (B, F)}, without "probe" where it is the same. `half` keeps them in half precision. folder is
  named after all that they depend on (`digest`). ValueError where the disk has no room for them.
  """
  if not (folder / _DONE).exists():
    _make(folder, title, features_fn, variables, images, mesh, batch_size, half)
  return read_features(folder)


def read_features(folder: Path) -> Features:
  """Returns finished features, mapped into memory: nothing is read before it is asked for."""
  rows = read_json(folder / _DONE)["rows"]
  paths = [folder / f"{name}.npy" for name in PIECES]
  pooled, probe = (np.load(path if path.exists() else paths[0], mmap_mode="r")[:rows] for path in paths)
  return Features(pooled, probe, np.load(folder / "label.npy")[:rows])


def _make(folder, title, features_fn, variables, images, mesh, batch_size, half) -> None:
  num_processes, process = distributed.num_processes(), distributed.process_id()
  edges = np.linspace(0, len(images), num_processes + 1).astype(int)
  rows_N = np.arange(edges[process], edges[process + 1])
  batch_size = -(-batch_size // batch_ways(mesh)) * batch_ways(mesh)
  part = folder.with_name(f".{folder.name}.part{process}")
  shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
  part.mkdir(parents=True)
  widths = {name: x.shape[1] for name, x in jax.eval_shape(features_fn, variables, images.empty_rows(1)).items()}
  dtype = np.float16 if half else np.float32
  _check_disk(folder.parent, len(rows_N) * sum(widths.values()) * np.dtype(dtype).itemsize, title)
  arrays = {name: _new_array(part / f"{name}.npy", dtype, (len(rows_N), width)) for name, width in widths.items()}
  labels_N = np.full(len(rows_N), -1, np.int32)
  count, progress = 0, Progress(log.info, f"{title}: image", len(rows_N))
  for out, label_B, real_B in _batches(features_fn, variables, images, rows_N, mesh, batch_size):
    real_B = np.flatnonzero(real_B)
    for name, x in out.items():
      arrays[name][count : count + len(real_B)] = _stored(x[real_B], dtype, title)
    labels_N[count : count + len(real_B)] = label_B[real_B]
    count += len(real_B)
    progress.at(count)
  for array in arrays.values():
    array.flush()
  np.save(part / "label.npy", labels_N)
  write_json(part / _DONE, {"rows": count})
  distributed.barrier(f"features {folder.name}", timeout_s=24 * 3600)
  if process == 0:
    _join(folder, [folder.with_name(f".{folder.name}.part{i}") for i in range(num_processes)])
  distributed.barrier(f"joined {folder.name}", timeout_s=24 * 3600)


def _batches(features_fn, variables, images, rows_N, mesh, batch_size) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
  """Yields (features, labels, which rows count) of the batches in order; the next is on its way meanwhile."""
  about: list[tuple[np.ndarray, np.ndarray]] = []

  def host_batches():
    for _, batch, real_B in row_batches(images, rows_N, batch_size):
      about.append((batch["label"], real_B))
      yield batch

  with prefetch_to_device(host_batches(), batch_sharding(mesh)) as batches:
    for i, batch in enumerate(batches):
      out = jax.device_get(features_fn(variables, batch))
      yield out, *about[i]
      about[i] = None  # type: ignore[call-overload]


def _join(folder: Path, parts: list[Path]) -> None:
  """Appends the other parts to the first, which then takes its place."""
  first, counts = parts[0], [read_json(part / _DONE)["rows"] for part in parts]
  if len(parts) > 1:
    for path in sorted(first.glob("*.npy")):
      pieces = [np.load(part / path.name, mmap_mode="r") for part in parts]
      joined = _new_array(first / f"{path.stem}.joined", pieces[0].dtype, (sum(counts), *pieces[0].shape[1:]))
      start = 0
      for piece, count in zip(pieces, counts):
        joined[start : start + count] = piece[:count]
        start += count
      joined.flush()
      (first / f"{path.stem}.joined").replace(path)
    write_json(first / _DONE, {"rows": sum(counts)})
  shutil.rmtree(folder, ignore_errors=True)
  first.rename(folder)
  for part in parts[1:]:
    shutil.rmtree(part, ignore_errors=True)


def _new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
  return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _stored(x: np.ndarray, dtype: Any, title: str) -> np.ndarray:
  if dtype == np.float16 and np.abs(x).max(initial=0) > HALF_LIMIT:
    raise ValueError(
      f"{title}: a feature is {np.abs(x).max():.3g}, too large for half precision; set evals.precision='float32'"
    )
  return x.astype(dtype)


def _check_disk(folder: Path, num_bytes: int, title: str) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(folder).free
  if num_bytes > free:
    raise ValueError(
      f"{title}: its features take {num_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free. Free some, or "
      "take less: evals.precision='float16' halves them, data.max_train takes fewer images"
    )


def weights_digest(weights: Tree) -> str:
  """Returns a digest of every weight."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(weights):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def digest(value: Any) -> str:
  """Returns ten letters that stand for plain nested values."""
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def of_output(apply_fn: Callable[[Tree, jax.Array], Any]) -> Callable[[Tree, jax.Array], dict[str, jax.Array]]:
  """Returns (variables, inputs) -> the features of a network's output, float32; no "probe" where that is "pooled"."""

  def features(variables: Tree, inputs: jax.Array) -> dict[str, jax.Array]:
    out = apply_fn(variables, inputs)
    found = {"pooled": out.pooled_BxD.astype(jnp.float32)}
    return found if out.probe_BxF is out.pooled_BxD else found | {"probe": out.probe_BxF.astype(jnp.float32)}

  return features


def of_pixels(_: Tree, images_BxHxWxC: jax.Array) -> dict[str, jax.Array]:
  """Returns the pixels themselves as features."""
  return {"pooled": images_BxHxWxC.reshape(len(images_BxHxWxC), -1)}
