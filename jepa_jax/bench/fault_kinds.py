"""What `bench faults` does to a run: each kind of fault, and how many of it a deck holds."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jepa_jax.bench.disturbed import (
  DIVERGED,
  EVERY,
  INPUT_ERROR,
  KILLED,
  NUM_IMAGES,
  STEPS,
  STORAGE_FAILED,
  TERMINATED,
  Child,
  Disturbed,
  require,
)
from jepa_jax.checksums import CHECKSUMS
from jepa_jax.data.sources.folder import FolderSource
from jepa_jax.distributed import EXIT_PREEMPTED
from jepa_jax.experiment import Experiment

# Runs a command in which the n-th image that is read fails once, as a network disk does.
WITH_EIO = """
import sys
from jepa_jax.__main__ import main
from jepa_jax.bench.fault_kinds import fail_once
fail_once(int(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""
# Runs a command in which the state and the loss of the n-th step of this start are NaN.
WITH_NAN = """
import sys
from jepa_jax.__main__ import main
from jepa_jax.bench.fault_kinds import poison
poison(int(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""


def poison(call: int) -> None:
  """From now on, in this process, the `call`-th step that is made gives a NaN loss and a NaN state, once."""

  class Poisoned:
    def __init__(self, compiled):
      self.compiled, self.calls = compiled, 0

    def __call__(self, state, batch, key):
      self.calls += 1
      state, metrics = self.compiled(state, batch, key)
      if self.calls != call:
        return state, metrics
      broken = lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x
      return jax.tree.map(broken, state), metrics | {"loss": metrics["loss"] * jnp.nan}

  compile_ = Experiment.compile
  Experiment.compile = lambda self: Poisoned(compile_(self))


def fail_once(call: int) -> None:
  """From now on, in this process, the `call`-th image that is read raises the disk's error, once."""
  calls, read = itertools.count(1), FolderSource.__getitem__

  def failing(self, index: int) -> dict:
    if next(calls) == call:
      raise OSError(errno.EIO, "Input/output error")
    return read(self, index)

  FolderSource.__getitem__ = failing


# ------------------------------------------------------- faults; each returns False where the run ended before it came
def _kill_in_step(trial: Disturbed) -> bool:
  child = trial.train()
  happened = trial.advance(child)
  time.sleep(trial.rng.uniform(0, 0.02))
  return trial.stop(child, signal.SIGKILL) == KILLED and happened


def _kill_in_save(trial: Disturbed) -> bool:
  child = trial.train()
  happened = trial.advance(child) and child.until(lambda: bool(trial.unfinished_saves))
  time.sleep(trial.rng.uniform(0, 0.2))  # a save takes about so long
  return trial.stop(child, signal.SIGKILL) == KILLED and happened


def _kill_at_start(trial: Disturbed) -> bool:
  child = _start_part_way(trial)
  return trial.stop(child, signal.SIGKILL) == KILLED


def _start_part_way(trial: Disturbed) -> Child:
  """Starts the run and returns at a random moment before its first step; on a machine idler than before, just after."""
  child, moment = trial.train(), time.monotonic() + trial.rng.uniform(0, trial.reference.startup_s)
  child.until(lambda: time.monotonic() > moment or child.first_step_s is not None)
  return child


def _kill_in_evaluation(trial: Disturbed) -> bool:
  if not _has_checkpoints(trial, 1):
    return False
  said = trial.rng.choice(["", "raw pixels: ", "random encoder: ", "lejepa, step "])  # before the row is computed
  child = trial.reference.start("eval", f"--workdir={trial.workdir}")
  child.until(lambda: said in child.text)
  time.sleep(trial.rng.uniform(0, 0.3 if said else trial.reference.startup_s / 2))
  status = child.end(signal.SIGKILL)
  trial.check()
  require(status in (0, KILLED), f"evaluation ended with {status}:\n{child.text}")
  return status == KILLED


def _terminate(trial: Disturbed) -> bool:
  child = trial.train()
  happened = trial.advance(child)
  if trial.rng.random() < 0.5:  # some supervisors say it twice
    child.process.send_signal(signal.SIGTERM)
    time.sleep(trial.rng.uniform(0, 0.1))
  status = trial.stop(child, signal.SIGTERM, may_lose=0)
  require(status in (0, EXIT_PREEMPTED), f"SIGTERM: ended with {status}:\n{child.text}")
  return status == EXIT_PREEMPTED and happened


def _terminate_at_start(trial: Disturbed) -> bool:
  child = _start_part_way(trial)
  return trial.stop(child, signal.SIGTERM) in (EXIT_PREEMPTED, TERMINATED)  # the latter before it listens: importing


def _terminate_then_kill(trial: Disturbed) -> bool:
  child = trial.train()
  happened = trial.advance(child)
  child.process.send_signal(signal.SIGTERM)
  time.sleep(trial.rng.uniform(0, 0.4))
  return trial.stop(child, signal.SIGKILL) != 0 and happened


def _terminate_in_save(trial: Disturbed) -> bool:
  child = trial.train()
  happened = trial.advance(child) and child.until(lambda: bool(trial.unfinished_saves))
  time.sleep(trial.rng.uniform(0, 0.3))
  status = trial.stop(child, signal.SIGTERM, may_lose=0)
  require(status in (0, EXIT_PREEMPTED), f"SIGTERM in a save: ended with {status}:\n{child.text}")
  return status == EXIT_PREEMPTED and happened


def _second_trainer(trial: Disturbed) -> bool:
  child = trial.train()
  happened = trial.advance(child)
  child.process.send_signal(signal.SIGSTOP)  # else it would have ended before the second one is ready to look
  if happened and child.process.poll() is None:
    second = trial.train()
    trial.starts -= 1
    status = second.end()
    refused = status == INPUT_ERROR and "is being trained in" in second.text
    require(refused, f"two masters: {status}\n{second.text}")
  child.process.send_signal(signal.SIGCONT)
  return trial.stop(child, signal.SIGKILL) == KILLED and happened


def _other_data(trial: Disturbed) -> bool:
  if not _has_checkpoints(trial, 1):
    return False
  folder = trial.reference.folder / "images" / "train"
  extra = folder / "class1" / "one_more.png"
  shutil.copy(next((folder / "class1").glob("*.png")), extra)
  try:
    child = trial.train()
    trial.starts -= 1
    status = child.end()
    refused = INPUT_ERROR in child.statuses and "the training images are not those" in child.text
    require(refused, f"other data: ended with {status}:\n{child.text}")
  finally:
    extra.unlink()
  return True


def _failing_read(trial: Disturbed) -> bool:
  child = trial.train(before=("-c", WITH_EIO, str(trial.rng.integers(1, sum(NUM_IMAGES.values())))))
  happened = trial.advance(child)
  said = "trying again" in child.text
  return trial.stop(child, signal.SIGKILL) == KILLED and happened and said


def _damage_run_file(trial: Disturbed) -> bool:
  if not _has_checkpoints(trial, 1):
    return False
  path = trial.workdir / trial.rng.choice(["config.json", "goodput.json"])
  data = path.read_bytes()
  garbage = (b"", b"[]", b"null", data[: trial.rng.integers(len(data) + 1)], trial.rng.bytes(100))
  path.write_bytes(garbage[trial.rng.integers(len(garbage))])
  child = trial.train()
  happened = trial.advance(child)
  return trial.stop(child, signal.SIGKILL) == KILLED and happened


def _flip_bit(trial: Disturbed) -> bool:
  def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[trial.rng.integers(len(data))] ^= 1 << trial.rng.integers(8)
    path.write_bytes(data)

  return _damage(trial, flip, needs_checksums=True)


def _zero(trial: Disturbed) -> bool:
  def zero(path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = trial.rng.integers(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)

  return _damage(trial, zero, needs_checksums=True)


def _truncate(trial: Disturbed) -> bool:
  return _damage(trial, lambda path: os.truncate(path, trial.rng.integers(path.stat().st_size)))


def _delete(trial: Disturbed) -> bool:
  return _damage(trial, Path.unlink)


def _damage(trial: Disturbed, damage: Callable[[Path], None], needs_checksums: bool = False) -> bool:
  newest = lambda: trial.workdir / "checkpoints" / str(trial.newest)
  if not _has_checkpoints(trial, 2):
    return False
  if needs_checksums and not (newest() / CHECKSUMS).exists():  # it was killed between a save and its checksums
    child = trial.train()
    child.until(lambda: child.first_step_s is not None)
    trial.stop(child, signal.SIGTERM)
    if trial.newest == STEPS:
      return False
  files = sorted(path for path in newest().rglob("*") if path.is_file() and path.stat().st_size)
  damage(files[trial.rng.integers(len(files))])
  trial.broken = trial.newest
  return True


def _has_checkpoints(trial: Disturbed, num: int) -> bool:
  """Lets the run go on until it has so many, all of them sound; returns False where it ended."""
  while trial.broken is not None or trial.num_sound < num:
    child, goal = trial.train(), trial.newest + (num - trial.num_sound) * EVERY
    child.until(lambda: child.first_step_s is not None and trial.newest >= goal)  # noqa: B023
    trial.stop(child, signal.SIGKILL)
  return trial.newest < STEPS


def _fill_disk(trial: Disturbed) -> bool:
  child = trial.train()
  happened = trial.advance(child)
  nothing_fits = trial.rng.random() < 0.5  # else everything but a checkpoint does, and after a while that, too
  _limit_files(child.primary.pid, 0 if nothing_fits else 200_000)
  if trial.several:  # one of them cannot save: all of them end
    trial.stop(child, may_lose=STEPS)
    return happened and STORAGE_FAILED in child.statuses
  times = trial.rng.integers(1, 5)
  happened = happened and child.until(lambda: child.text.count("CHECKPOINT NOT SAVED") >= times)
  if not nothing_fits:
    _limit_files(child.primary.pid, resource.RLIM_INFINITY)
    newest = trial.newest
    child.until(lambda: trial.newest > newest)
  time.sleep(trial.rng.uniform(0, 0.5))
  trial.stop(child, signal.SIGKILL, may_lose=STEPS)
  return happened


def _limit_files(pid: int, size_bytes: int) -> None:
  """Makes every write of a process past this place of a file fail, as on a full disk."""
  with contextlib.suppress(ProcessLookupError):  # it has ended
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


def _break_image(trial: Disturbed) -> bool:
  path = trial.reference.bad_image
  garbage = (b"", b"<html>404 Not Found</html>", b"\x89PNG\r\n\x1a\n" + trial.rng.bytes(200), trial.rng.bytes(1000))
  size = path.stat().st_size  # of another size it would be other data, which a run does not go on with
  path.write_bytes(garbage[trial.rng.integers(len(garbage))][:size].ljust(size, b"\0"))
  return True


def _nan_batch(trial: Disturbed) -> bool:
  call = trial.rng.integers(1, 2 * EVERY + 1)
  child = trial.train(before=("-c", WITH_NAN, str(call)))
  status = trial.stop(child)
  if status == 0:  # it made fewer steps
    return False
  require(DIVERGED in child.statuses and "not finite at step" in child.text, f"NaN: ended with {status}:\n{child.text}")
  return True


def _damage_compile_cache(trial: Disturbed) -> bool:
  files = sorted(path for path in trial.reference.cache.iterdir() if path.name.startswith(("jit_step", "jit__lambda")))
  path = files[trial.rng.integers(len(files))]
  os.truncate(path, trial.rng.integers(path.stat().st_size))  # JAX does not write it at once or not at all
  child = trial.train()
  happened = trial.advance(child)
  path.unlink()  # JAX would compile it anew at every start, and not repair it
  return trial.stop(child, signal.SIGKILL) == KILLED and happened


# Name -> (how many of them in a deck, which is drawn to its end and then shuffled anew; what happens).
KINDS: dict[str, tuple[int, Callable[[Disturbed], bool]]] = {
  "kill in a step": (3, _kill_in_step),
  "kill in a save": (3, _kill_in_save),
  "kill at start": (2, _kill_at_start),
  "kill in evaluation": (1, _kill_in_evaluation),
  "SIGTERM": (2, _terminate),
  "SIGTERM at start": (1, _terminate_at_start),
  "SIGTERM, then kill": (1, _terminate_then_kill),
  "truncated checkpoint file": (2, _truncate),
  "deleted checkpoint file": (2, _delete),
  "flipped bit": (2, _flip_bit),
  "zeroed bytes": (1, _zero),
  "SIGTERM in a save": (2, _terminate_in_save),
  "second trainer": (1, _second_trainer),
  "other data": (1, _other_data),
  "failing read": (1, _failing_read),
  "damaged run file": (1, _damage_run_file),
  "truncated compile cache": (1, _damage_compile_cache),
  "full disk": (1, _fill_disk),
  "corrupt image": (1, _break_image),
  "NaN batch": (1, _nan_batch),
}
# A stopped process of several is missed by the others before a second trainer has come.
OF_ONE_PROCESS = {"second trainer"}
if not hasattr(resource, "prlimit"):  # Linux only
  del KINDS["full disk"]
