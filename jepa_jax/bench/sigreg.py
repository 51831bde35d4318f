"""Time and memory of SIGReg, forward and backward: the recurrence against two transcendentals per knot."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.bench.timing import alternating_ms, need_torch
from jepa_jax.losses import epps_pulley, epps_pulley_direct, slice_directions, sliced

DESCRIPTION = "Time and memory of SIGReg, value and gradient: the fast statistic against the direct one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`, under their own names."""
  parser.add_argument("--num-samples", type=int, default=1024, help="samples N in a batch")
  parser.add_argument("--num-slices", type=int, default=1024, help="slices M")
  parser.add_argument("--dim", type=int, default=512, help="width D of the embeddings")
  parser.add_argument("--repeats", type=int, default=10, help="timed runs of each form")
  parser.add_argument("--torch", action="store_true", help="beside them PyTorch, by the formula as the paper has it")


def run(
  num_samples: int = 1024, num_slices: int = 1024, dim: int = 512, repeats: int = 10, torch: bool = False
) -> dict:
  """Returns median times in ms, temporary memory in bytes and direct/fast ratios, as a dict that JSON can hold.

  `sigreg` is value and gradient of `sliced` with respect to z, the two projections' matmuls included; `statistic` is
  value and gradient with respect to the projections alone. The forms take turns, so that a busy machine slows all. With
  `torch` a third form of `sigreg` is PyTorch's: a sine and a cosine for each sample, slice and knot.
  """
  if min(num_samples, num_slices, dim, repeats) < 1:
    raise ValueError("num_samples, num_slices, dim and repeats must be at least 1")
  z_key, slice_key = jax.random.split(jax.random.key(0))
  z_NxD = jax.random.normal(z_key, (num_samples, dim))
  directions_DxM = slice_directions(slice_key, dim, num_slices)
  projected_NxM = jnp.matmul(z_NxD, directions_DxM, precision="highest")
  forms = {"fast": epps_pulley, "direct": epps_pulley_direct}
  sigreg = {name: functools.partial(sliced, statistic=form) for name, form in forms.items()}
  alone = {name: lambda x, form=form: jnp.mean(form(x)) for name, form in forms.items()}
  rivals = _torch(z_NxD, directions_DxM) if torch else {}
  device = jax.devices()[0]
  return {
    "num_samples": num_samples,
    "num_slices": num_slices,
    "dim": dim,
    "repeats": repeats,
    "sigreg": _compare(sigreg, rivals, (z_NxD, directions_DxM), repeats),
    "statistic": _compare(alone, {}, (projected_NxM,), repeats),
    "platform": device.platform,
    "device_kind": device.device_kind,
    "jax_version": jax.__version__,
  }


def _torch(z_NxD: jax.Array, directions_DxM: jax.Array) -> dict[str, Callable]:
  """Returns {"torch": value and gradient with respect to z in PyTorch}; it takes what it is called with for granted."""
  torch_step = need_torch("--torch")
  import torch

  from jepa_jax.bench import torch_multiview

  tensor = lambda x: torch.from_numpy(np.array(x)).to(torch_step.device_name())
  z, directions = tensor(z_NxD).requires_grad_(True), tensor(directions_DxM)

  def call(*_) -> None:
    value = torch_multiview.sigreg(z, directions, t_max=3.0, num_knots=17)
    torch_step.wait(*torch.autograd.grad(value, z))

  return {"torch": call}


def _compare(functions: dict[str, Callable], others: dict[str, Callable], arguments: tuple, repeats: int) -> dict:
  """Returns times and temporary memory of value_and_grad of each function, and the ratios to `fast`."""
  compiled = {name: jax.jit(jax.value_and_grad(f)).lower(*arguments).compile() for name, f in functions.items()}
  times_ms = alternating_ms({**compiled, **others}, arguments, repeats)
  result = {f"{name}_ms": round(statistics.median(times), 3) for name, times in times_ms.items()}
  memory = {name: c.memory_analysis() for name, c in compiled.items()}
  result |= {f"{name}_temp_bytes": m.temp_size_in_bytes if m else None for name, m in memory.items()}
  times_over = lambda name: statistics.median(a / b for a, b in zip(times_ms[name], times_ms["fast"], strict=True))
  result["speedup"] = round(times_over("direct"), 2)
  return result | {f"{name}_over_fast": round(times_over(name), 2) for name in others}
