"""Who trains in a workdir: one process at a time, by a file that its holder keeps fresh.

The file says who (host, process, since when) and counts beats. On the holder's own machine whether it lives is seen at
once; from another machine, or from another container, whose process numbers say nothing here, by whether the count
goes on. Nobody's clock is compared with anybody's, and a holder that is gone is replaced without a human.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jepa_jax import distributed
from jepa_jax.workdir import HOLDER, read_json, write_json

log = logging.getLogger(__name__)
BEAT_S = 5.0  # between two beats
LEASE_S = 30.0  # a holder that has not beaten for so long is gone; network file systems show a write within seconds


class WorkdirHeld(ValueError):
  """Another process trains in this workdir; the message names it."""


class WorkdirLost(WorkdirHeld):
  """Another process has taken this workdir over: this one was silent for longer than the lease."""


class Holder:
  """Holds a workdir from `with Holder(workdir):` on until the end of the block; `check` says whether it still does.

  Raises:
    WorkdirHeld: at the start, where a living process holds it. It takes up to `lease_s` to know that of a process that
      is not on this machine.
  """

  def __init__(self, workdir: Path, beat_s: float = BEAT_S, lease_s: float = LEASE_S):
    self._path, self._beat_s, self._lease_s = Path(workdir) / HOLDER, beat_s, lease_s
    self._id, self._ended = uuid.uuid4().hex, threading.Event()
    self._beats = 0
    self._since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self._thread = threading.Thread(target=self._keep_beating, name="jepa_jax holder", daemon=True)

  def __enter__(self) -> Holder:
    self._is_new = not self._path.parent.exists()
    self._path.parent.mkdir(parents=True, exist_ok=True)
    while not self._create() and not self._take_over(self._one_that_is_gone()):
      pass
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._ended.set()
    self._thread.join()
    if self._read().get("id") == self._id:
      self._path.unlink(missing_ok=True)
    if self._is_new:  # nothing was written: what was refused leaves no folder
      with contextlib.suppress(OSError):
        self._path.parent.rmdir()

  def check(self) -> None:
    """Raises WorkdirLost where another process has taken the workdir over."""
    found = self._read() if self._thread.is_alive() else {}  # only process 0 holds
    if found.get("id", self._id) != self._id:  # a file that is gone or cannot be read says nothing of another
      raise WorkdirLost(
        f"{self._path.parent} was taken over by {_named(found)}, since this process gave no sign of life for "
        f"{self._lease_s:g} s (suspended, or cut off from its file system). Nothing more is written"
      )

  def _create(self) -> bool:
    """Writes the file unless there is one; returns whether it is ours."""
    if self._path.is_dir():
      raise WorkdirHeld(f"{self._path} is a folder, where the file that says who trains here belongs: move it away")
    temporary = self._path.with_name(f".{HOLDER}.{self._id[:8]}.tmp")
    temporary.write_text(json.dumps(self._about()))
    try:
      os.link(temporary, self._path)  # fails where the name exists, on NFS too
      return True
    except FileExistsError:
      return False
    except OSError:  # no hard links here (FUSE mounts of buckets): the last who writes a free name has it
      if self._path.exists():
        return False
      temporary.replace(self._path)
      time.sleep(min(1.0, self._beat_s))
      return self._read().get("id") == self._id
    finally:
      temporary.unlink(missing_ok=True)

  def _one_that_is_gone(self) -> dict[str, Any]:
    """Returns what the file of a holder says that is gone; WorkdirHeld where it lives."""
    found = self._read()
    if found.get("machine") != _this_machine():
      self._watch(found)
    elif _is_alive(found):
      raise self._held(found)
    return found

  def _take_over(self, gone: dict[str, Any]) -> bool:
    """Puts our file in place of that of a holder that is gone; returns whether it did.

    Who makes the mark, which has the name of the one that is gone, may: of many who come at once, one.
    """
    name = "".join(c for c in str(gone.get("id", "")) if c.isalnum())[:32]
    mark = self._path.with_name(f".{HOLDER}.{name}.gone")
    try:
      os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
      time.sleep(self._beat_s)
      if self._read() == gone and not self._still_there(mark):
        mark.unlink(missing_ok=True)
      return False
    try:
      if not gone or self._read() != gone:
        return False
      write_json(self._path, self._about())
      return True
    finally:
      mark.unlink(missing_ok=True)

  def _still_there(self, mark: Path) -> bool:
    """Whether someone is taking over just now, and did not die of it."""
    with contextlib.suppress(FileNotFoundError):
      before = mark.stat().st_ino
      time.sleep(self._lease_s)
      return mark.stat().st_ino != before
    return True

  def _watch(self, first: dict[str, Any]) -> None:
    deadline_s = time.monotonic() + self._lease_s
    log.info("%s: waiting %g s to see whether %s is alive", self._path, self._lease_s, _named(first))
    while time.monotonic() < deadline_s:
      time.sleep(min(self._beat_s / 2, 1.0))
      now = self._read()
      if now != first:
        if now:
          raise self._held(now)
        return  # it has ended

  def _held(self, found: dict[str, Any]) -> WorkdirHeld:
    return WorkdirHeld(
      f"{self._path.parent} is being trained in by {_named(found)}. Nothing was changed. Choose another --workdir, or "
      "stop that process (SIGTERM lets it save)"
    )

  def _about(self) -> dict[str, Any]:
    return {
      "id": self._id,
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "started": _start_of(os.getpid()),
      "machine": _this_machine(),
      "since": self._since,
      "beats": self._beats,
      "last": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

  def _read(self) -> dict[str, Any]:
    return _read(self._path)

  def _keep_beating(self) -> None:
    while not self._ended.wait(self._beat_s):
      with contextlib.suppress(OSError):  # a file system that hangs or is full: `check` and the others will see
        if self._read().get("id", self._id) == self._id:  # else whoever has it now must not be written over
          self._beats += 1
          write_json(self._path, self._about())


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[Holder]:
  """Holds a workdir for this process, or for all processes that train together: process 0 holds it for them.

  WorkdirHeld, in every process, where a living process outside of them holds it.
  """
  with contextlib.ExitStack() as stack:
    holder = Holder(workdir)

    def take() -> str:
      try:
        stack.enter_context(holder)
      except WorkdirHeld as error:
        return str(error)
      return ""

    if refused := distributed.from_primary("holder", take, timeout_s=300):
      raise WorkdirHeld(refused)
    yield holder


def _read(path: Path) -> dict[str, Any]:
  """Returns what the file says: {} where there is none, something without an id where it is none of ours."""
  try:
    return read_json(path) or {"unreadable": "{}"}
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    return {"unreadable": str(error)}


def _named(found: dict[str, Any]) -> str:
  who = f"process {found.get('pid', '?')} on host {found.get('host', '?')}"
  return f"{who} since {found.get('since', '?')} (last sign of life {found.get('last', '?')})"


def _this_machine() -> str:
  """Returns where a process number means something: the start of this kernel, and the container's space of numbers."""
  boot, pids = socket.gethostname(), ""
  with contextlib.suppress(OSError):
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pids = os.readlink("/proc/self/ns/pid")
  return f"{boot} {pids}"


def _start_of(pid: int) -> str:
  """Returns when the process started, in the kernel's ticks: a number of a process that has ended is given again.

  "" where the kernel does not say; "ended" for one that is dead and not yet waited for.
  """
  with contextlib.suppress(OSError, IndexError):
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "ended" if state == "Z" else fields[18]
  return ""


def _is_alive(found: dict[str, Any]) -> bool:
  try:
    os.kill(int(found.get("pid", 0)), 0)
  except (ProcessLookupError, ValueError, TypeError):
    return False
  except PermissionError:
    pass  # somebody else's, but there
  return found.get("started", "") == _start_of(int(found["pid"]))
