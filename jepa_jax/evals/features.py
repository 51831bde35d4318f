"""Features of every image of a split, made once on all devices and hosts, kept on disk, read back in pieces.

Memory holds one batch, whatever the size of the data set. With several processes each makes a part of the rows, process
0 joins the parts; the others go on to what comes next.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
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
ABOUT = ("label", "index")  # columns of the rows that are kept beside their features
HALF_LIMIT = 6e4  # what is larger is no number in half precision
MINUTE_S, DAY_S = 60, 24 * 3600
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
  memory_gb: float,
  again: bool = False,
) -> Features:
  """Returns the features of every image that decodes, from `folder` where they are there; makes them there otherwise.

  features_fn(variables, batch) -> {"pooled": (B, D), "probe": (B, F)}, without "probe" where it is the same. `half`
  keeps them in half precision. folder is named after all that they depend on; with `again` they are made anew. Where
  the disk has no room, or may not be written to, they stay in memory if memory_gb allows, else that is a ValueError.
  With several processes only process 0 gets them: the others, no rows.
  """
  found = None if again or not distributed.is_primary() else _found(folder)
  # One word for all: whether there is anything to make, and what the parts of this evaluation are called.
  token = distributed.from_primary("features", lambda: "" if found else uuid.uuid4().hex[:8], timeout_s=DAY_S)
  if not token:
    return found or NO_ROWS
  process = distributed.process_id()
  edges = np.linspace(0, len(images), distributed.num_processes() + 1).astype(int)
  rows_N = np.arange(edges[process], edges[process + 1])
  shapes = jax.eval_shape(features_fn, variables, images.empty_rows(1))
  dtype = np.dtype(np.float16 if half else np.float32)
  widths = {name: x.shape[1] for name, x in shapes.items()}
  store = _Store(folder, token, title, len(rows_N), widths, dtype, memory_gb)
  batch_size = -(-batch_size // batch_ways(mesh)) * batch_ways(mesh)
  progress = Progress(log.info, f"{title}: image", len(rows_N))
  for out, about_B, real_B in _batches(features_fn, variables, images, rows_N, mesh, batch_size):
    store.add(out, about_B, np.flatnonzero(real_B))
    progress.at(store.count)
  return store.finished()


NO_ROWS = Features(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32), *(np.empty(0, np.int32),) * 2)


def _found(folder: Path) -> Features | None:
  try:
    return read_features(folder)
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError) as error:
    log.warning("%s cannot be read (%s); its features are made again", folder, error)
    return None


def read_features(folder: Path) -> Features:
  """Returns finished features, mapped into memory: nothing is read before it is asked for."""
  rows = read_json(folder / _DONE)["rows"]
  read = lambda name, **how: np.load(folder / f"{name}.npy", **how)[:rows]
  pooled = read("pooled", mmap_mode="r")
  probe = read("probe", mmap_mode="r") if (folder / "probe.npy").exists() else pooled
  return Features(pooled, probe, read("label"), read("index"))


class _Store:
  """Where one process writes its rows as they come: files in a folder beside `folder`, or memory where that fails."""

  def __init__(self, folder: Path, token: str, title: str, rows: int, widths: dict[str, int], dtype, memory_gb: float):
    self.count, self._folder, self._token, self._title, self._dtype = 0, folder, token, title, dtype
    self._part: Path | None = part_of(folder, token, distributed.process_id())
    shapes = {name: (rows, width) for name, width in widths.items()}
    try:
      if distributed.is_primary():
        _sweep(folder)
      self._part.mkdir(parents=True)
      self._lock = _locked(self._part)
      self._arrays = {name: _new_array(self._part / f"{name}.npy", dtype, shape) for name, shape in shapes.items()}
    except OSError as error:
      size_gb = rows * sum(widths.values()) * dtype.itemsize / 1e9
      if size_gb > memory_gb or distributed.num_processes() > 1:
        raise ValueError(
          f"{title}: its features take {size_gb:.2f} GB, and {folder.parent} cannot hold them ({error}). Make room "
          "there, raise evals.memory_gb to keep them in memory, or take less: evals.precision='float16' halves them"
        ) from error
      log.warning("Features not kept on disk: %s. The evaluation goes on in memory", error)
      shutil.rmtree(self._part, ignore_errors=True)
      self._part, self._arrays = None, {name: np.empty(shape, dtype) for name, shape in shapes.items()}
    self._about = {name: np.full(rows, -1, np.int32) for name in ABOUT}

  def add(self, out: dict[str, np.ndarray], about_B: dict[str, np.ndarray], places: np.ndarray) -> None:
    """Appends the rows at these places of a batch."""
    rows = slice(self.count, self.count + len(places))
    for name, x in out.items():
      largest = np.abs(x[places]).max(initial=0)
      if self._dtype == np.float16 and largest > HALF_LIMIT:
        raise ValueError(
          f"{self._title}: a feature is {largest:.3g}, too large for half precision; set evals.precision='float32'"
        )
      self._arrays[name][rows] = x[places]
    for name, column in self._about.items():
      column[rows] = about_B[name][places]
    self.count += len(places)

  def finished(self) -> Features:
    """Returns the features of all processes, once all of them have come here."""
    if self._part is None:
      pooled = self._arrays["pooled"][: self.count]
      probe = self._arrays["probe"][: self.count] if "probe" in self._arrays else pooled
      return Features(pooled, probe, *(self._about[name][: self.count] for name in ABOUT))
    for array in self._arrays.values():
      array.flush()
    for name, column in self._about.items():
      np.save(self._part / f"{name}.npy", column)
    write_json(self._part / _DONE, {"rows": self.count})
    distributed.barrier("made", timeout_s=DAY_S)
    if distributed.is_primary():
      _join(self._folder, [part_of(self._folder, self._token, i) for i in range(distributed.num_processes())])
    distributed.barrier("joined", timeout_s=DAY_S)
    os.close(self._lock)
    return read_features(self._folder) if distributed.is_primary() else NO_ROWS


def part_of(folder: Path, token: str, process: int) -> Path:
  """Returns where a process writes its part of the features of `folder`; `token` stands for the evaluation."""
  return folder.with_name(f".{folder.name}.{token}.part{process}")


def _locked(path: Path) -> int:
  """Returns an open folder that is locked while this process lives, where the file system can do that."""
  opened = os.open(path, os.O_RDONLY)
  with contextlib.suppress(OSError):
    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
  return opened


def _sweep(folder: Path) -> None:
  """Removes the parts that evaluations left behind which were killed; another one may be at work on the same features.

  Those that no living process has locked, or, where nothing can be locked, that are older than a day.
  """
  for part in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
    with contextlib.suppress(FileNotFoundError):
      age_s, opened = time.time() - part.stat().st_mtime, os.open(part, os.O_RDONLY)
      try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left_behind = age_s > MINUTE_S  # younger: its process may be about to lock it
      except BlockingIOError:
        left_behind = False
      except OSError:
        left_behind = age_s > DAY_S
      os.close(opened)
      if left_behind:
        shutil.rmtree(part, ignore_errors=True)


def _batches(features_fn, variables, images, rows_N, mesh, batch_size) -> Iterator[tuple[dict, dict, np.ndarray]]:
  """Yields (features, labels and indices, which rows count) of the batches in order; the next one is on its way."""
  about: list[tuple[dict[str, np.ndarray], np.ndarray]] = []

  def host_batches():
    for _, batch, real_B in row_batches(images, rows_N, batch_size):
      about.append(({name: batch[name] for name in ABOUT}, real_B))
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
  with contextlib.suppress(FileNotFoundError):  # damaged, made again, or made meanwhile by another evaluation
    folder.rename(old := first.with_suffix(".old"))
    shutil.rmtree(old, ignore_errors=True)
  first.rename(folder)
  for part in parts[1:]:
    shutil.rmtree(part, ignore_errors=True)


def _new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
  """Returns a new array in a file whose room on disk is taken at once: a full disk would end the process later on."""
  array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
  if hasattr(os, "posix_fallocate") and array.nbytes:
    with open(path, "r+b") as file:
      os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
  return array


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
