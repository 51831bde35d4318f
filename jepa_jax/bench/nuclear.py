"""Time and error of the nuclear norm's methods, value and gradient, against what users write today.

Legend: P rows, D columns.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.bench.timing import alternating_ms
from jepa_jax.losses import nuclear_norm
from jepa_jax.losses.nuclear import METHODS

DESCRIPTION = "Time and error of the nuclear norm, value and gradient, by method and shape, against float64."

# What is written without this library: JAX's own derivative of the decomposition.
BASELINES: dict[str, Callable] = {
  "autodiff_svd": lambda m: jnp.sum(jnp.linalg.svd(m, full_matrices=False)[1]),
  "autodiff_norm": lambda m: jnp.linalg.norm(m, "nuc"),
}
FORMS = BASELINES | {name: functools.partial(nuclear_norm, method=name) for name in METHODS}
SIZES = ("128x128", "512x128", "2048x128", "512x512", "512x2048", "2048x512", "1024x1024")
_COLUMNS = ("rows", "dim", "method", "ms", "speedup", "value_error", "gradient_error", "gradient_error_collapsed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`, under their own names."""
  parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="PxD", help="shapes, e.g. 2048x512 4096x4096")
  parser.add_argument("--methods", nargs="+", default=tuple(FORMS), choices=tuple(FORMS), help="what to compare")
  parser.add_argument("--repeats", type=int, default=5, help="timed runs of each method at each shape")


def run(sizes: Sequence[str] = SIZES, methods: Sequence[str] = tuple(FORMS), repeats: int = 5) -> dict:
  """Returns rows of times and errors of value_and_grad, as a dict that JSON can hold; a table goes to stderr.

  ms is the median; the methods take turns, so that a busy machine slows all. speedup is the median over turns of the
  first method's time over this one's. Errors are relative to float64, the gradient's in the Frobenius norm: for uniform
  unit rows, and "collapsed" for unit rows that differ by a tenth from one common direction.
  """
  if repeats < 1 or not methods:
    raise ValueError("repeats must be at least 1, and methods not empty")
  shapes = [_shape(size) for size in sizes]
  if unknown := [name for name in methods if name not in FORMS]:
    raise ValueError(f"unknown methods {unknown}; choose from {', '.join(FORMS)}")
  device = jax.devices()[0]
  rows = [row for shape in shapes for row in _rows(shape, methods, repeats)]
  return {
    "repeats": repeats,
    "rows": rows,
    "platform": device.platform,
    "device_kind": device.device_kind,
    "jax_version": jax.__version__,
  }


def markdown(rows: Sequence[dict]) -> str:
  """Returns the rows of `run` as a Markdown table."""
  lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
  lines += [" | ".join(_cell(row[column]) for column in _COLUMNS) for row in rows]
  return "\n".join(f"| {line} |" for line in lines)


def _cell(value) -> str:
  return str(value) if not isinstance(value, float) else f"{value:.1e}" if abs(value) < 0.01 else f"{value:.2f}"


def _shape(size: str) -> tuple[int, int]:
  numbers = size.lower().split("x")
  if len(numbers) != 2 or not all(n.isdigit() and int(n) for n in numbers):
    raise ValueError(f"a size is written PxD, for example 2048x512, got {size!r}")
  return int(numbers[0]), int(numbers[1])


def _rows(shape: tuple[int, int], methods: Sequence[str], repeats: int) -> list[dict]:
  uniform_PxD, collapsed_PxD = _unit_rows(shape, spread=None), _unit_rows(shape, spread=0.1)
  compiled = {name: jax.jit(jax.value_and_grad(FORMS[name])).lower(uniform_PxD).compile() for name in methods}
  times_ms = alternating_ms(compiled, (jnp.asarray(uniform_PxD),), repeats)
  references = {"": (uniform_PxD, _float64(uniform_PxD)), "_collapsed": (collapsed_PxD, _float64(collapsed_PxD))}
  rows = []
  for name, call in compiled.items():
    row = {"rows": shape[0], "dim": shape[1], "method": name, "ms": round(statistics.median(times_ms[name]), 3)}
    pairs = zip(times_ms[methods[0]], times_ms[name], strict=True)
    row["speedup"] = round(statistics.median(first / this for first, this in pairs), 2)
    for suffix, (m_PxD, (value, polar_PxD)) in references.items():
      got, gradient_PxD = call(m_PxD)
      row[f"value_error{suffix}"] = float(abs(got - value) / value)
      row[f"gradient_error{suffix}"] = float(np.linalg.norm(gradient_PxD - polar_PxD) / np.linalg.norm(polar_PxD))
    rows.append(row)
  print(markdown(rows), file=sys.stderr, flush=True)
  return rows


def _unit_rows(shape: tuple[int, int], spread: float | None) -> np.ndarray:
  """Returns unit rows: uniform on the sphere, or a common direction plus noise of length `spread`."""
  m_PxD = np.random.default_rng(0).standard_normal(shape)
  if spread is not None:
    m_PxD = np.eye(1, shape[1]) + spread / np.sqrt(shape[1]) * m_PxD
  return (m_PxD / np.linalg.norm(m_PxD, axis=1, keepdims=True)).astype(np.float32)


def _float64(m_PxD: np.ndarray) -> tuple[float, np.ndarray]:
  """Returns the nuclear norm and the polar factor by numpy's SVD in float64."""
  u, values, vt = np.linalg.svd(m_PxD.astype(np.float64), full_matrices=False)
  return float(values.sum()), u @ vt
