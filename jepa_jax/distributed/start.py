"""Joining the other processes, and leaving them."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import socket
import sys
from typing import Any, NoReturn

import jax
from jax._src import clusters
from jax._src import distributed as jax_distributed  # the coordination service's client has no public name

from jepa_jax.distributed.meeting import gather, join
from jepa_jax.distributed.watchdog import Watchdog

log = logging.getLogger(__name__)

_watchdog: Watchdog | None = None


def initialise(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout_s: int = 300,
  heartbeat_s: int = 30,
) -> None:
  """Joins this process to the others; call it before anything that touches a device, `shutdown` at the end.

  coordinator is "host:port" of process 0. With all three None, the cluster is asked (TPU pod, SLURM, GKE, Open MPI).
  ValueError for arguments that do not fit together, here or between processes; ConnectionError where process 0
  cannot be reached within timeout_s; TimeoutError that names the processes that did not come.
  """
  global _watchdog
  if _watchdog is not None or coordination_client() is not None:
    raise RuntimeError("distributed.initialise was called before in this process")
  if heartbeat_s < 3 or timeout_s <= 0:
    raise ValueError(f"heartbeat_s={heartbeat_s} must be at least 3 and timeout_s={timeout_s} positive")
  address, num_processes, process_id, local_devices = _resolve(coordinator, num_processes, process_id, timeout_s)
  if num_processes == 1:
    return
  if process_id == 0:
    links = gather(address, num_processes, timeout_s)
  else:
    links = {0: join(address, num_processes, process_id, timeout_s)}
  _watchdog = Watchdog(links, process_id, num_processes, heartbeat_s)
  _watchdog.start()
  atexit.register(_at_exit)
  if jax.config.jax_cpu_collectives_implementation is None:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM from here on; see Preemption
  jax.distributed.initialize(
    address,
    num_processes,
    process_id,
    local_devices,
    cluster_detection_method="deactivate",
    initialization_timeout=timeout_s,
    heartbeat_timeout_seconds=max(100, 4 * heartbeat_s),  # the watchdog speaks first
    shutdown_timeout_seconds=60,  # all arrive together, after their goodbyes
  )
  log.info("Process %d of %d on %s; coordinator %s.", process_id, num_processes, socket.gethostname(), address)


def shutdown() -> None:
  """Ends a run in good order: returns when every process has come here, however long the living take."""
  global _watchdog
  if _watchdog is not None:
    _watchdog.say_goodbye()
    _watchdog = None
  jax.distributed.shutdown()


def abandon(code: int, reason: str) -> NoReturn:
  """Ends this process with `code` after an error of its own; the others end too, naming this process and `reason`.

  They end with EXIT_PEER_LOST, after which another start goes on, or with `code` where it cannot: bad input, a diverged
  loss.
  Where the error came from the loss of another process, the status is EXIT_PEER_LOST instead.
  """
  if _watchdog is None:
    raise SystemExit(code)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):  # a file on a full disk
      stream.flush()
  _watchdog.announce_failure(code, reason)
  os._exit(code)  # not sys.exit: JAX would wait at exit for the others, which wait for this process in a collective


def _at_exit() -> None:
  if _watchdog is not None:
    error = getattr(sys, "last_value", None)
    abandon(1, repr(error) if error else "it ended without distributed.shutdown()")


def process_id() -> int:
  """Returns which process this is; 0 where there is one."""
  return jax_distributed.global_state.process_id


def num_processes() -> int:
  """Returns how many processes there are."""
  return jax_distributed.global_state.num_processes


def is_primary() -> bool:
  """Returns whether this process writes the files that there is one of."""
  return process_id() == 0


def coordination_client() -> Any:
  """Returns the client of JAX's coordination service, or None where there is one process."""
  return jax_distributed.global_state.client


def _resolve(coordinator: str | None, num: int | None, process: int | None, timeout_s: int) -> tuple:
  """Returns (address, number of processes, process id, local device ids or None: all of this host's)."""
  given = {"coordinator": coordinator, "num_processes": num, "process_id": process}
  missing = [name for name, value in given.items() if value is None]
  local_devices = None
  if len(missing) == len(given):
    coordinator, num, process, local_devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, timeout_s
    )
    missing = [name for name, value in zip(given, (coordinator, num, process), strict=True) if value is None]
    if missing:
      raise ValueError(
        f"no cluster was found to tell {', '.join(missing)} (TPU pod, SLURM, GKE, Open MPI): give all three"
      )
  if missing:
    raise ValueError(
      f"{' and '.join(missing)} missing: give coordinator, num_processes and process_id, or none of them"
    )
  assert coordinator is not None and num is not None and process is not None
  if not re.fullmatch(r".+:\d+", coordinator):
    raise ValueError(f'coordinator="{coordinator}" must be "host:port" of process 0, for example 10.0.0.2:1234')
  if not 0 <= process < num:
    raise ValueError(f"process_id={process} must be from 0 to num_processes - 1 = {num - 1}")
  return coordinator, num, process, local_devices
