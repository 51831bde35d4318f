"""Saving and restoring with Orbax v1: the only file that imports orbax.

A checkpoint `<workdir>/checkpoints/<step>/` holds three items, nothing twice: `networks` (parameters, moving averages
and what else the networks carry: what evaluation and users load, whole or in part), `training` (what only training
needs besides: optimiser, probe, guard) and `meta` (format, config, versions, time spent; plain JSON). When it is whole,
checksums.json is written beside them, and what is restored is compared with it first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from jepa_jax import distributed
from jepa_jax.checksums import CHECKSUMS, damage, mark_damaged, write_checksums
from jepa_jax.duration import Duration
from jepa_jax.sharding import path_name
from jepa_jax.workdir import CHECKPOINTS, DAMAGED, read_json

if TYPE_CHECKING:  # imported where it is used: a third of what importing this project takes
  from orbax.checkpoint import v1 as ocp

log = logging.getLogger(__name__)
Tree = Any


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """How often to save, how many of the newest to keep, and every which one to keep for good (0steps: none).

  `verify`: what is restored is compared with the checksums that were written with it.
  """

  every: Duration = Duration(10, "%")
  keep_last: int = 2
  keep_every: Duration = Duration(0, "steps")
  verify: bool = True

  def __post_init__(self):
    if self.keep_last < 1:
      raise ValueError(f"keep_last={self.keep_last} must be at least 1")
    if self.every.value <= 0:
      raise ValueError(f'every="{self.every}" must be positive')


_NOT_OF_FILES = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
_PROBE_S = 5  # of waiting for a save of several processes, between looks whether anything can be written at all
HURRY_S = 10  # for the checksums of a save after which the machine may be gone


class CheckpointError(ValueError):
  """A checkpoint that is missing or of another architecture; the message says which and what to do."""


class SaveFailed(CheckpointError):
  """A save that failed in one of several processes. As of storage that fails: another start may do."""

  errno = errno.EIO


class DamagedCheckpoint(CheckpointError):
  """A checkpoint whose files are truncated, incomplete, or not what was written."""


def _context(partial: bool = False) -> ocp.Context:
  from orbax.checkpoint import v1 as ocp

  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
  context = ocp.Context()
  context.checkpointables.registry = registry
  context.pytree.loading.partial_load = partial
  # Every device that holds a copy saves a part of it, cut by a program of its own, which is compiled at the first save:
  # one for each place and shape. Small arrays are quicker written whole.
  context.array.saving.min_slice_bytes_for_replica_parallel = 2**22
  # zstd takes half of the time of a save, and a twelfth of the size, off weights: their digits are noise.
  context.array.saving.use_compression = False
  return context


class Saver:
  """Asynchronous saves into <workdir>/checkpoints. A save that fails is reported and training goes on.

  With several processes it is a SaveFailed: Orbax would let all wait for 5 to 20 minutes for what never comes.
  """

  def __init__(self, workdir: Path, keep_last: int, keep_every_steps: int = 0, copies: bool = True):
    """copies: numpy arrays may change while they are being saved; where they do not, False saves their memory."""
    from orbax.checkpoint import v1 as ocp

    keep = [ocp.training.preservation_policies.LatestN(keep_last)]
    if keep_every_steps:
      keep.append(ocp.training.preservation_policies.EveryNSteps(keep_every_steps))
    self.failures: list[str] = []
    self._pending: tuple[int, Future] | None = None
    self._pool = ThreadPoolExecutor(1, "checkpoint")
    self._hurry = self._abandoned = False
    self._root = epath.Path(workdir) / CHECKPOINTS
    self._context = _context()
    self._context.memory.deepcopy_host_arrays = copies
    self._keep = ocp.training.preservation_policies.AnyPreservationPolicy(keep)
    self._discard_unfinished()
    self._checkpointer = self._open()

  def _discard_unfinished(self) -> None:
    """Frees the space of saves cut short. Orbax's own clean-up raises where another item is still being written."""
    if distributed.is_primary() and self._root.exists():
      for path in self._root.iterdir():
        if path.is_dir() and ".orbax-checkpoint-tmp" in path.name:
          shutil.rmtree(path, ignore_errors=True)

  def _open(self) -> ocp.training.Checkpointer:
    from orbax.checkpoint import v1 as ocp

    with self._context:
      return ocp.training.Checkpointer(
        self._root,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides
        preservation_policy=self._keep,
      )

  def save(self, step: int, networks: Tree, training: Tree, meta: dict[str, Any], hurry: bool = False) -> None:
    """Starts saving; returns when the arrays are copied off the device, so that they may be donated.

    hurry: this machine will soon be gone: the checksums of the save before are given up, those of this one bounded.
    """
    self._hurry = hurry
    self.wait()
    if self.failures:
      self._discard_unfinished()  # what a failed save was still writing when it was reported
    try:
      with self._context:
        items = {"networks": networks, "training": training, "meta": meta}
        response = self._checkpointer.save_checkpointables_async(step, items, force=True)
      self._pending = (step, self._pool.submit(self._finish, step, response, hurry))
    except Exception as error:  # a full disk must not cost the run: whatever storage raises is reported alike
      self._report(step, error)

  def wait(self) -> None:
    """Returns when the save under way has ended; its failure is logged, not raised."""
    if self._pending is None:
      return
    (step, finished), self._pending = self._pending, None
    try:
      while distributed.num_processes() > 1 and not wait((finished,), _PROBE_S).done:
        self._probe()
      finished.result()
    except Exception as error:
      self._report(step, error)

  def _probe(self) -> None:
    """Raises an OSError where nothing can be written: Orbax does not tell what failed before all its waits are over."""
    path = Path(self._root) / f".probe{distributed.process_id()}"
    try:
      with path.open("wb") as file:
        file.write(bytes(2**20))
        os.fsync(file.fileno())
    finally:
      path.unlink(missing_ok=True)

  def _finish(self, step: int, response: Any, hurry: bool) -> None:
    """Waits until the checkpoint is whole, then adds its checksums: it can do without them, should that fail."""
    if response is not None:
      response.result()
    folder, whole_s = Path(self._root) / str(step), time.monotonic()
    late = lambda: self._hurry and (not hurry or time.monotonic() - whole_s > HURRY_S)
    if distributed.is_primary() and folder.exists():
      try:
        write_checksums(folder, late)
      except OSError as error:
        log.warning("No checksums were written for %s (%s); it is whole", folder, error)

  def _report(self, step: int, error: Exception) -> None:
    text = f"CHECKPOINT NOT SAVED at step {step}: {str(error).strip().splitlines()[0] if str(error) else error!r}"
    self.failures.append(text)
    newest = latest_step(self._root.parent)
    if distributed.num_processes() > 1:
      self._abandoned = True
      raise SaveFailed(
        f"{text}. The others wait for this process's part, so all of them end here; the newest whole checkpoint is "
        f"step {newest}. Free disk space in {self._root} and run again: it resumes"
      ) from error
    with contextlib.suppress(Exception):
      self._checkpointer.close()
    self._checkpointer = self._open()  # a failed one raises the same error at every later save
    self._discard_unfinished()
    log.error(
      "%s. Training goes on; the newest whole checkpoint is step %s. Free disk space in %s", text, newest, self._root
    )

  def close(self) -> None:
    """Waits for the last save and closes; where one of several processes could not save, all waits are given up."""
    if self._abandoned:
      return
    self.wait()
    self._pool.shutdown()
    with contextlib.suppress(Exception):  # reported by wait(); closing a failed save raises it once more
      self._checkpointer.close()


def steps(workdir: str | Path) -> list[int]:
  """Returns the steps of the finished checkpoints, oldest first. A save in progress is not among them."""
  root = epath.Path(workdir) / CHECKPOINTS
  if not root.exists():
    return []
  return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and p.is_dir())


def latest_step(workdir: str | Path) -> int | None:
  """Returns the newest step, or None where there is no checkpoint."""
  return max(steps(workdir), default=None)


def restore(
  workdir: str | Path, step: int, partial: bool = False, verify: bool = True, **abstract: Tree
) -> dict[str, Tree]:
  """Returns the named items of a checkpoint, e.g. restore(w, 100, networks=abstract_networks, meta=None).

  An abstract tree of ShapeDtypeStructs with shardings decides where every array goes, whatever topology wrote it; with
  `partial` it may name a part of what the item holds, and only that is read. With `verify` the files of these items are
  compared with their checksums first, where there are any. CheckpointError where the checkpoint is missing, damaged, or
  differs in names or shapes (the differences are listed).
  """
  from orbax.checkpoint import v1 as ocp

  path = checkpoint_path(workdir, step)
  if verify:
    check_whole(workdir, step, tuple(abstract))
  for name, tree in abstract.items():
    if tree is not None:
      _check_same_arrays(path, name, tree, partial)
  with _reading(path), _context(partial):
    return ocp.load_checkpointables(path, abstract)


def read_meta(workdir: str | Path, step: int, verify: bool = True) -> dict[str, Any]:
  """Returns a checkpoint's `meta`: format, config, step, versions, examples seen, seconds spent."""
  return restore(workdir, step, verify=verify, meta=None)["meta"]


def checkpoint_path(workdir: str | Path, step: int) -> epath.Path:
  """Returns the folder of a checkpoint; CheckpointError lists those there are where it is missing."""
  path = epath.Path(workdir).resolve() / CHECKPOINTS / str(step)
  if not path.exists():
    have = steps(workdir)
    raise CheckpointError(f"no checkpoint of step {step} in {workdir}; there are: {have or 'none'}")
  return path


def check_whole(
  workdir: str | Path, step: int, items: tuple[str, ...] = ("",), share: tuple[int, int] = (0, 1)
) -> bool:
  """Returns whether the checkpoint has checksums; DamagedCheckpoint names the files of these items that differ.

  share: (i, n) has every n-th block of them compared, from the i-th on.
  """
  path = checkpoint_path(workdir, step)
  try:
    found = damage(Path(path), items, share)
  except FileNotFoundError as error:  # removed by the run meanwhile, or by somebody
    found = [str(error)]
  if found:
    listed = "; ".join(found[:5]) + (f" and {len(found) - 5} more files" if len(found) > 5 else "")
    raise _damaged(path, f"{listed}; if nothing else is wrong, remove its {CHECKSUMS}: it is then read as it is")
  return found is not None


def check_readable(workdir: str | Path, step: int, items: tuple[str, ...]) -> None:
  """Raises DamagedCheckpoint where `meta`, or the description of one of these items, cannot be read; no array is."""
  path = checkpoint_path(workdir, step)
  read_meta(workdir, step)
  for item in items:
    _saved_arrays(path, item)


def check_meta_file(workdir: str | Path, step: int) -> None:
  """Raises DamagedCheckpoint where the file of `meta` is no JSON. Without Orbax, whose loads wait for all processes."""
  path = checkpoint_path(workdir, step)
  try:
    read_json(Path(path) / "meta" / "data.json")
  except (FileNotFoundError, NotADirectoryError, ValueError) as error:
    raise _damaged(path, str(error)) from error


def mark(workdir: str | Path, step: int, error: DamagedCheckpoint) -> None:
  """Has the next start find what this process, of several, saw only while it loaded."""
  mark_damaged(Path(checkpoint_path(workdir, step)), f"it could not be loaded: {error}")


def set_aside(workdir: str | Path, step: int) -> epath.Path:
  """Moves a damaged checkpoint to <workdir>/checkpoints_damaged/<step> (nothing is deleted) and returns that path."""
  target = epath.Path(workdir).resolve() / DAMAGED / f"{step}-{int(time.time())}"
  target.parent.mkdir(exist_ok=True)
  checkpoint_path(workdir, step).rename(target)
  return target


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
  try:
    yield
  # These say nothing of the files, and moving a good checkpoint away would lose progress: memory, the storage, and
  # what JAX tells of devices and of other processes that were lost.
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    if isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
      raise
    if any(sign in str(error) for sign in _NOT_OF_FILES):
      raise
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
    raise _damaged(path, f"{type(error).__name__}: {reason}") from error


def _damaged(path: epath.Path, reason: str) -> DamagedCheckpoint:
  others = [s for s in steps(path.parent.parent) if s != int(path.name)]
  return DamagedCheckpoint(
    f"checkpoint {path} is damaged or incomplete ({reason}). Nothing was changed. Other checkpoints here: "
    f"{others or 'none'}; evaluation takes another one by --step"
  )


def _saved_arrays(path: epath.Path, item: str) -> dict[str, tuple[int, ...]]:
  from orbax.checkpoint import v1 as ocp

  with _reading(path), _context():
    metadata = ocp.checkpointables_metadata(path).metadata.get(item)
    if metadata is None:
      raise ValueError(f"the description of item {item!r} cannot be read")
    return _arrays(metadata)


def _check_same_arrays(path: epath.Path, item: str, abstract: Tree, partial: bool) -> None:
  """Compares names and shapes before loading: Orbax' own message does not say which key differs."""
  saved, wanted = _saved_arrays(path, item), _arrays(abstract)
  lines = [f"  missing in the checkpoint: {k} {wanted[k]}" for k in sorted(wanted.keys() - saved.keys())]
  if not partial:
    lines += [f"  only in the checkpoint: {k} {saved[k]}" for k in sorted(saved.keys() - wanted.keys())]
  both = sorted(wanted.keys() & saved.keys())
  lines += [f"  {k}: {saved[k]} in the checkpoint, {wanted[k]} here" for k in both if saved[k] != wanted[k]]
  if lines:
    raise CheckpointError(f"{path}/{item} is of another architecture:\n" + "\n".join(lines))


def _arrays(tree: Tree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {path_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
