"""Threads enough for several CPU devices in one process, which is how meshes are tried without accelerators.

XLA gives a process as many threads as it has cores or devices, and a collective holds a thread until all devices have
come to it. A device may start collectives that do not depend on each other in any order, and several at once: on a
machine of few cores some devices wait in one, the others in another, no thread is left, and after 40 seconds the
process is ended by "Termination timeout for collective permute" (eight devices on two cores, a mesh with two sharded
axes, JAX 0.10.2: two of three runs of 60 steps; with 16 threads or more none of 2,000 steps). The number of threads
is read when the first device is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

_PER_DEVICE = 8  # idle threads cost nothing that could be measured
_FLAG = re.compile(r"--?xla_force_host_platform_device_count[= ](\d+)")


def give_threads(environment: MutableMapping[str, str] = os.environ) -> None:
  """Sets PJRT_NPROC where several CPU devices are asked for, and nobody has set it; call it before JAX has devices."""
  flags = _FLAG.findall(environment.get("XLA_FLAGS", ""))
  devices = flags[-1] if flags else environment.get("JAX_NUM_CPU_DEVICES", "")
  if devices.isdecimal() and int(devices) > 1 and not {"PJRT_NPROC", "NPROC"} & set(environment):
    environment["PJRT_NPROC"] = str(max(_PER_DEVICE * int(devices), os.cpu_count() or 1))
