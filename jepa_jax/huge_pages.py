"""Asks glibc's allocator for huge pages: a step on a CPU otherwise has the kernel clear thousands of fresh pages.

glibc reads its settings once, when a process starts. So the command starts itself again, as the same process (exec),
before anything else is imported. Nothing is done where it could not help: on other systems, with an older glibc, where
the kernel gives huge pages to everybody or to nobody. Nor where somebody else started Python and runs us in it (a
launcher, a debugger, coverage): that is theirs to start again. JEPA_KEEP_MALLOC=1 leaves everything as it is.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

KEEP = "JEPA_KEEP_MALLOC"
_TUNABLES, _HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_FIRST_GLIBC = (2, 35)
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never": the one that holds


def restart_with_huge_pages(execute: Callable[..., object] = os.execve) -> None:
  """Does not return where a start with another allocator setting helps; call it before JAX is imported."""
  environment = wanted(os.environ)
  if environment is None or not sys.executable or not _is_our_command() or sys.gettrace() is not None:
    return
  sys.stdout.flush()
  sys.stderr.flush()
  with contextlib.suppress(OSError):  # it works without, too
    execute(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _is_our_command() -> bool:
  """Whether this process is `python -m jepa_jax ...`, and no -m stands before that one, or the script `jepa-jax`."""
  before = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]  # what is ours to read follows
  if len(before) == 2 and Path(before[1]).name == "jepa-jax":
    return True
  return before[-2:] == ["-m", __package__] and before.index("-m") == len(before) - 2


def wanted(environment: Mapping[str, str]) -> dict[str, str] | None:
  """Returns the environment to start with, or None: this one is right, or another would not help."""
  tunables = environment.get(_TUNABLES, "")
  if sys.platform != "linux" or environment.get(KEEP) or _HUGE in tunables or not _supported():
    return None
  return {**environment, _TUNABLES: ":".join(filter(None, (tunables, f"{_HUGE}=1")))}


def _supported() -> bool:
  library, version = platform.libc_ver()
  numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
  try:
    return library == "glibc" and numbers >= _FIRST_GLIBC and "[madvise]" in _KERNEL.read_text()
  except OSError:
    return False
