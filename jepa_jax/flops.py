"""Matrix FLOPs of a function, read from its jaxpr: exact, whatever the backend, and nothing is compiled or run.

XLA's own `cost_analysis` counts the body of a loop once, so a scanned stack of blocks looks one block deep; here a scan
counts `length` times. Only matrix products and convolutions are counted (2 FLOPs per multiply-add): they are what the
matrix units do and what published peaks are for. Elementwise work is bounded by memory, not by these units.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval


def matrix_peak(size: int = 0, repeats: int = 5) -> float:
  """Returns the best FLOP/s of a square matrix product, all devices together, in the compute dtype of this platform.

  Of random numbers: with ones a GPU draws less power, clocks higher, and no step reaches that peak.
  """
  on_cpu = jax.default_backend() == "cpu"
  size = size or (2048 if on_cpu else 8192)
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32 if on_cpu else jnp.bfloat16)
  product = jax.jit(lambda a, b: a @ b)
  jax.block_until_ready(product(x, x))
  best_s = math.inf
  for _ in range(repeats):
    start_s = time.perf_counter()
    jax.block_until_ready(product(x, x))
    best_s = min(best_s, time.perf_counter() - start_s)
  return 2 * size**3 / best_s * jax.device_count()


def matrix_flops(fn: Callable, *abstract_args: Any) -> int:
  """Returns the FLOPs of the matrix products and convolutions of fn(*abstract_args), over all devices together.

  Counts what is written and read by anything: both passes of a gradient, what remat computes again, a scan `length`
  times, of a `cond` its most expensive branch. Under a mesh, call it inside `jax.set_mesh(mesh)`.

  Args:
    fn: traced, not run; jitted or not.
    abstract_args: arrays or ShapeDtypeStructs.

  Raises:
    ValueError: a `while_loop` with products in it (its length is not known), or a Pallas kernel (opaque to the jaxpr).
  """
  jaxpr = jax.make_jaxpr(fn)(*abstract_args).jaxpr
  # The gradient for an input that has none to give (images) is written, by a rule of our own, and dropped by XLA.
  read, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(read)


def _count(jaxpr: Any) -> int:
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name in _PRODUCTS:
    return _PRODUCTS[name](equation)
  if name in KERNELS:
    return KERNELS[name] * _attention_flops(*(equation.invars[i].aval.shape for i in (0, 1)))
  if name == "cond":
    return max(_count(branch.jaxpr) for branch in params["branches"])
  inner = sum(_count(jaxpr) for jaxpr in _inner_jaxprs(params))
  if name == "scan":
    return params["length"] * inner
  if name == "shard_map":  # its body is written for one shard
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * inner
  if name == "while" and inner:
    raise ValueError("matrix products inside a while_loop: how often they run is not known before; use lax.scan")
  if name == "pallas_call":
    raise ValueError("a Pallas kernel hides its products from the jaxpr; count the version without it")
  return inner


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
  """The bodies of a call (jit, remat, scan, while, custom_vjp ...); rules for derivatives are functions, not bodies."""
  values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
  return [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]


def _dot_flops(equation: Any) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  lhs, out = equation.invars[0].aval, equation.outvars[0].aval
  return 2 * out.size * math.prod(lhs.shape[axis] for axis in contracted)


def _conv_flops(equation: Any) -> int:
  """2 x the products with a real input: taps that fall on padding, or between dilated inputs, cost nothing.

  So a convolution, its gradient for the input and its gradient for the kernel have the same FLOPs.
  """
  lhs, kernel, out = equation.invars[0].aval, equation.invars[1].aval, equation.outvars[0].aval
  p = equation.params
  lhs_spec, kernel_spec, out_spec = p["dimension_numbers"]  # each (batch or output, channels, window ...)
  taps = 1
  for i, axes in enumerate(zip(lhs_spec[2:], kernel_spec[2:], out_spec[2:], strict=True)):
    size, window, positions = lhs.shape[axes[0]], kernel.shape[axes[1]], out.shape[axes[2]]
    start = np.arange(positions)[:, None] * p["window_strides"][i] - p["padding"][i][0]
    place = start + np.arange(window) * p["rhs_dilation"][i]  # in the dilated input
    taps *= int(((place >= 0) & (place % p["lhs_dilation"][i] == 0) & (place < size * p["lhs_dilation"][i])).sum())
  return 2 * out.shape[out_spec[0]] * out.shape[out_spec[1]] * kernel.shape[kernel_spec[1]] * taps


def _attention_flops(q_BxNxHxK: tuple[int, ...], k_BxMxHxK: tuple[int, ...]) -> int:
  """One product of queries and keys, or of their weights and the values, without what a mask may leave out."""
  return 2 * math.prod(q_BxNxHxK) * k_BxMxHxK[1]


# Fused attention, by the primitive's name in the jaxpr -> how many such products: two forward; backward the gradients
# of the weights, values, queries and keys. That it makes the scores once more is its own affair: the count is that of
# the plain form, so that two implementations can be compared.
KERNELS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}
_PRODUCTS = {"dot_general": _dot_flops, "conv_general_dilated": _conv_flops}
