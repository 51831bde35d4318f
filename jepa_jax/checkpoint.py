"""Saving and restoring with Orbax v1: the only file that imports orbax.

A checkpoint `<workdir>/checkpoints/<step>/` holds three items, nothing twice: `networks` (parameters, moving averages
and what else the networks carry: what evaluation and users load, whole or in part), `training` (what only training
needs besides: optimiser, probe, guard) and `meta` (format, config, versions, time spent; plain JSON).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from jepa_jax import distributed
from jepa_jax.duration import Duration
from jepa_jax.sharding import path_name
from jepa_jax.workdir import CHECKPOINTS, DAMAGED

log = logging.getLogger(__name__)
Tree = Any


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """How often to save, how many of the newest to keep, and every which one to keep for good (0steps: none)."""

  every: Duration = Duration(10, "%")
  keep_last: int = 2
  keep_every: Duration = Duration(0, "steps")

  def __post_init__(self):
    if self.keep_last < 1:
      raise ValueError(f"keep_last={self.keep_last} must be at least 1")
    if self.every.value <= 0:
      raise ValueError(f'every="{self.every}" must be positive')


class CheckpointError(ValueError):
  """A checkpoint that is missing or of another architecture; the message says which and what to do."""


class DamagedCheckpoint(CheckpointError):
  """A checkpoint whose files are truncated or incomplete."""


def _context(partial: bool = False) -> ocp.Context:
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
  context = ocp.Context()
  context.checkpointables.registry = registry
  context.pytree.loading.partial_load = partial
  return context


class Saver:
  """Asynchronous saves into <workdir>/checkpoints. A save that fails is reported and training goes on."""

  def __init__(self, workdir: Path, keep_last: int, keep_every_steps: int = 0):
    keep = [ocp.training.preservation_policies.LatestN(keep_last)]
    if keep_every_steps:
      keep.append(ocp.training.preservation_policies.EveryNSteps(keep_every_steps))
    self.failures: list[str] = []
    self._pending: tuple[int, Any] | None = None
    self._root = epath.Path(workdir) / CHECKPOINTS
    self._context = _context()
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
    with self._context:
      return ocp.training.Checkpointer(
        self._root,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides
        preservation_policy=self._keep,
      )

  def save(self, step: int, networks: Tree, training: Tree, meta: dict[str, Any]) -> None:
    """Starts saving; returns when the arrays are copied off the device, so that they may be donated."""
    self.wait()
    if self.failures:
      self._discard_unfinished()  # what a failed save was still writing when it was reported
    try:
      with self._context:
        items = {"networks": networks, "training": training, "meta": meta}
        response = self._checkpointer.save_checkpointables_async(step, items, force=True)
      self._pending = (step, response)
    except Exception as error:  # a full disk must not cost the run: whatever storage raises is reported alike
      self._report(step, error)

  def wait(self) -> None:
    """Returns when the save under way has ended; its failure is logged, not raised."""
    if self._pending is None:
      return
    (step, response), self._pending = self._pending, None
    try:
      if response is not None:
        response.result()
    except Exception as error:
      self._report(step, error)

  def _report(self, step: int, error: Exception) -> None:
    text = f"CHECKPOINT NOT SAVED at step {step}: {str(error).strip().splitlines()[0] if str(error) else error!r}"
    self.failures.append(text)
    newest = latest_step(self._root.parent)
    with contextlib.suppress(Exception):
      self._checkpointer.close()
    self._checkpointer = self._open()  # a failed one raises the same error at every later save
    self._discard_unfinished()
    log.error(
      "%s. Training goes on; the newest whole checkpoint is step %s. Free disk space in %s", text, newest, self._root
    )

  def close(self) -> None:
    """Waits for the last save and closes."""
    self.wait()
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


def restore(workdir: str | Path, step: int, partial: bool = False, **abstract: Tree) -> dict[str, Tree]:
  """Returns the named items of a checkpoint, e.g. restore(w, 100, networks=abstract_networks, meta=None).

  An abstract tree of ShapeDtypeStructs with shardings decides where every array goes, whatever topology wrote it; with
  `partial` it may name a part of what the item holds, and only that is read. CheckpointError where the checkpoint is
  missing, damaged, or differs in names or shapes (the differences are listed).
  """
  path = checkpoint_path(workdir, step)
  for name, tree in abstract.items():
    if tree is not None:
      _check_same_arrays(path, name, tree, partial)
  with _reading(path), _context(partial):
    return ocp.load_checkpointables(path, abstract)


def read_meta(workdir: str | Path, step: int) -> dict[str, Any]:
  """Returns a checkpoint's `meta`: format, config, step, versions, examples seen, seconds spent."""
  return restore(workdir, step, meta=None)["meta"]


def checkpoint_path(workdir: str | Path, step: int) -> epath.Path:
  """Returns the folder of a checkpoint; CheckpointError lists those there are where it is missing."""
  path = epath.Path(workdir).resolve() / CHECKPOINTS / str(step)
  if not path.exists():
    have = steps(workdir)
    raise CheckpointError(f"no checkpoint of step {step} in {workdir}; there are: {have or 'none'}")
  return path


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
  except (PermissionError, MemoryError, ConnectionError, TimeoutError):
    raise  # says nothing of the files: moving a good checkpoint away would lose progress
  except Exception as error:
    if any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE")):
      raise
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
    others = [s for s in steps(path.parent.parent) if s != int(path.name)]
    raise DamagedCheckpoint(
      f"checkpoint {path} is damaged or incomplete ({type(error).__name__}: {reason}). "
      f"Nothing was changed. Other checkpoints here: {others or 'none'}; evaluation takes another one by --step"
    ) from error


def _check_same_arrays(path: epath.Path, item: str, abstract: Tree, partial: bool) -> None:
  """Compares names and shapes before loading: Orbax' own message does not say which key differs."""
  with _reading(path), _context():
    metadata = ocp.checkpointables_metadata(path).metadata.get(item)
    if metadata is None:
      raise ValueError(f"the description of item {item!r} cannot be read")
    saved = _arrays(metadata)
  wanted = _arrays(abstract)
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
