"""Barriers, what processes agree on, the check of the shared folder: by JAX's coordination service, not collectives."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jepa_jax.distributed.start import coordination_client, is_primary, num_processes, process_id

_num_calls: Counter[str] = Counter()  # every barrier and exchange has keys of its own, equal in all processes


def barrier(name: str, timeout_s: float) -> None:
  """Returns when all processes are here; TimeoutError names the barrier and the processes that did not come."""
  if coordination_client() is None:
    return
  try:
    coordination_client().wait_at_barrier(_new_key(name), int(timeout_s * 1000))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    names = re.search(r"timed out task names:\s*((?:\d+\s+)+)", str(error))
    missing = f"process {', '.join(names[1].split())} did not come" if names else "not all processes came"
    raise TimeoutError(f"barrier '{name}': {missing} within {timeout_s} s; see the logs of the others") from error


def from_primary(name: str, make: Callable[[], str], timeout_s: float) -> str:
  """Returns what process 0 makes, on every process, once it is there."""
  if (client := coordination_client()) is None:
    return make()
  key = _new_key(name)
  if is_primary():
    client.key_value_set(key, value := make())
    return value
  return _get(client, key, name, 0, timeout_s)


def from_all(name: str, value: str, timeout_s: float) -> list[str]:
  """Returns what every process brings, in their order, on every process."""
  if (client := coordination_client()) is None:
    return [value]
  key = _new_key(name)
  client.key_value_set(f"{key}/{process_id()}", value)
  return [_get(client, f"{key}/{i}", name, i, timeout_s) for i in range(num_processes())]


def _get(client: Any, key: str, name: str, process: int, timeout_s: float) -> str:
  """Returns what a process has set; TimeoutError, which is worth another start, that names it where it did not."""
  try:
    return client.blocking_key_value_get(key, int(timeout_s * 1000))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    raise TimeoutError(f"'{name}': process {process} did not come within {timeout_s:g} s; see its log") from error


def check_same(what: str, value: str, timeout_s: float = 300) -> None:
  """Raises a ValueError, on every process, that shows the values of all where they are not the same."""
  found = from_all("check_same", f"{value} on host {socket.gethostname()}", timeout_s)
  if len({text.rpartition(" on host ")[0] for text in found}) > 1:
    lines = "\n".join(f"  process {i}: {text}" for i, text in enumerate(found))
    raise ValueError(f"the processes do not have the same {what}:\n{lines}")


def check_shared(folder: str | Path, timeout_s: float = 60) -> None:
  """Returns when every process has seen, in its own `folder`, a file that process 0 wrote; nothing of it stays.

  ValueError, on every process, that names those that do not see it. Creates the folder where it is missing.
  """
  if (client := coordination_client()) is None:
    return
  key, folder, limit_ms = _new_key("check_shared"), Path(folder), int(timeout_s * 1000)
  if is_primary():
    problems, probe = [], folder / f".shared-{uuid.uuid4().hex}"
    try:
      folder.mkdir(parents=True, exist_ok=True)
      probe.write_text(key)
      client.key_value_set(f"{key}/probe", probe.name)
      problems = [_verdict(client, f"{key}/verdict/{i}", i, limit_ms) for i in range(1, num_processes())]
    except OSError as error:
      problems = [f"process 0 cannot write there ({error.strerror})"]
      client.key_value_set(f"{key}/probe", "")
    finally:
      with contextlib.suppress(OSError):
        probe.unlink()
    result = "; ".join(filter(None, problems))
    client.key_value_set(f"{key}/result", result)
  else:
    try:
      name = client.blocking_key_value_get(f"{key}/probe", limit_ms)
    except jax.errors.JaxRuntimeError as error:
      raise TimeoutError(f"process 0 did not come to check {folder} within {timeout_s} s; see its log") from error
    found = _appears(folder / name, min(10, timeout_s / 2)) if name else True
    client.key_value_set(f"{key}/verdict/{process_id()}", "" if found else socket.gethostname())
    # process 0 waits for every verdict in turn, so its word can come much later than limit_ms
    result = client.blocking_key_value_get(f"{key}/result", limit_ms * num_processes())
  if result:
    raise ValueError(
      f"{folder} is not one folder for all processes: {result}. Put it on a file system that every host mounts at the "
      "same path, for example NFS, Filestore or Lustre"
    )


def _verdict(client: Any, key: str, process: int, limit_ms: int) -> str:
  try:
    host = client.blocking_key_value_get(key, limit_ms)
  except jax.errors.JaxRuntimeError:
    return f"process {process} does not answer"
  return f"process {process} (host {host}) does not see what process 0 ({socket.gethostname()}) wrote" if host else ""


def _appears(path: Path, timeout_s: float) -> bool:
  """Returns whether path is there; network file systems show a new file to other hosts with some seconds' delay."""
  deadline_s = time.monotonic() + timeout_s
  while True:
    with contextlib.suppress(OSError):
      if path.name in os.listdir(path.parent):
        return True
    if time.monotonic() > deadline_s:
      return False
    time.sleep(0.2)


def _new_key(name: str) -> str:
  _num_calls[name] += 1
  return f"jepa_jax/{name}/{_num_calls[name]}"
