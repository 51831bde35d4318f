"""Times of compiled functions that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def alternating_ms(
  compiled: Mapping[str, Callable], arguments: tuple, repeats: int, untimed: int = 0
) -> dict[str, list[float]]:
  """Returns the times in ms of a call of each in every turn, after a turn to warm up.

  untimed: calls of each before the timed one of its turn. A step in training follows a step of its own kind; one that
  follows another library's finds its memory given back to the system, and takes a tenth longer.
  """
  times_ms: dict[str, list[float]] = {name: [] for name in compiled}
  for repeat in range(repeats + 1):
    for name, call in compiled.items():
      for _ in range(untimed):
        jax.block_until_ready(call(*arguments))
      start_s = time.perf_counter()
      jax.block_until_ready(call(*arguments))
      if repeat:  # the first is a warm-up
        times_ms[name].append(1e3 * (time.perf_counter() - start_s))
  return times_ms


def num_threads() -> int:
  """Returns how many CPU threads this process may use: JAX takes them all."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def need_torch(who: str) -> Any:
  """Returns `bench.torch_step`, PyTorch set to as many threads as JAX has; ValueError, which begins with `who`, where
  PyTorch is not installed."""
  # Its threads would spin for a while after each of its turns, in the way of the next one.
  os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  try:
    from jepa_jax.bench import torch_step
  except ImportError as error:
    raise ValueError(f"{who} needs PyTorch: pip install torch ({error})") from error
  torch_step.set_threads(num_threads())
  return torch_step
