"""Several CPU devices in a process get threads enough; one device and the user's own choice are left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_jax.faked_devices import give_threads

FLAG = "--xla_force_host_platform_device_count"


@pytest.mark.parametrize(
  "environment, threads",
  [
    ({"XLA_FLAGS": f"{FLAG}=8"}, 64),
    ({"XLA_FLAGS": f"{FLAG}=2 --xla_cpu_enable_fast_math=false {FLAG}=16"}, 128),  # XLA takes the last
    ({"JAX_NUM_CPU_DEVICES": "4"}, 32),
    ({"XLA_FLAGS": f"{FLAG}=8", "PJRT_NPROC": "5"}, 5),
    ({"XLA_FLAGS": f"{FLAG}=1"}, None),
    ({"XLA_FLAGS": "--xla_dump_to=there"}, None),
    ({"JAX_NUM_CPU_DEVICES": "-1"}, None),
    ({}, None),
  ],
)
def test_threads_by_what_was_asked_for(monkeypatch, environment, threads):
  monkeypatch.setattr(os, "cpu_count", lambda: 2)
  give_threads(environment)
  assert environment.get("PJRT_NPROC") == (None if threads is None else str(threads))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_command_gives_them_before_jax_has_devices():
  script = """
import contextlib, os
from jepa_jax.__main__ import main
with contextlib.suppress(SystemExit):
  main(["--help"])
import jax
jax.devices()
tasks = os.listdir("/proc/self/task")
print(sum("XLAEigen" in open(f"/proc/self/task/{task}/comm").read() for task in tasks))
"""
  environment = {k: v for k, v in os.environ.items() if k not in ("PJRT_NPROC", "NPROC")} | {"XLA_FLAGS": f"{FLAG}=3"}
  root = Path(__file__).resolve().parent.parent
  done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
  assert done.stdout.split()[-1:] == ["24"], done.stdout + done.stderr
