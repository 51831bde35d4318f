"""Epps-Pulley statistic: how far samples on a line are from N(0, 1), by their characteristic function.

This is the fast form; sigreg.py has the plain formula, `epps_pulley_direct`.
Legend: N samples, M slices (lines), T knots of the integration grid, G groups of samples, `...` leading axes (views).
The fast form uses that the knots are equally spaced: exp(i (first + k step) x) = exp(i first x) exp(i step x)^k, so an
element costs two sines and cosines (one where first = step) and T complex multiplies, whatever T is. A custom gradient
keeps x and two (..., M) arrays per knot; nothing of size N x M x T exists in either direction.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# What a healthy and a dead representation show with the official grid; `expected_under_gaussian` and
# `collapse_per_sample` compute both for any grid.
EXPECTED_GAUSSIAN = 1.05246
COLLAPSE_PER_SAMPLE = 0.40204758

# The fused reduction (CPU) takes 8 groups of 4 lanes of at least 2 samples: with 1, XLA drops the reduction and
# computes every power anew for every knot.
_FUSED_GROUPS, _FUSED_LANES = 8, 4
_FUSED_MULTIPLE = 2 * _FUSED_GROUPS * _FUSED_LANES
_FUSED_MAX_KNOTS = 64  # unrolled: 0.25 s to compile for 16 knots, 0.8 s for 64


@dataclasses.dataclass(frozen=True)
class Grid:
  """Equally spaced positive knots, first + k step for k < count, and the trapezoid rule over them.

  The integrand is even in t, so only t > 0 is kept, with doubled weights, and t = 0, where it is zero, is left out.
  """

  first: float
  step: float
  count: int

  @property
  def knots_T(self) -> np.ndarray:
    return self.first + self.step * np.arange(self.count)

  @property
  def target_T(self) -> np.ndarray:
    """Characteristic function of N(0, 1) at the knots; it is also the window of the integral."""
    return np.exp(-(self.knots_T**2) / 2)

  @property
  def weights_T(self) -> np.ndarray:
    """Trapezoid weights times the Gaussian window."""
    trapezoid_T = np.full(self.count, 2.0 * self.step)
    trapezoid_T[-1] = self.step
    return trapezoid_T * self.target_T


def half_line_grid(t_max: float = 3.0, num_knots: int = 17) -> Grid:
  """Returns the official grid: `num_knots` (odd) knots on [0, t_max], both ends among them."""
  check_half_line(t_max, num_knots)
  step = t_max / (num_knots - 1)
  return Grid(first=step, step=step, count=num_knots - 1)


def full_line_grid(t_max: float, num_knots: int) -> Grid:
  """Returns the positive half of `num_knots` knots on [-t_max, t_max]; an even number has t = 0 between two knots."""
  _check_grid(t_max, num_knots)
  step = 2 * t_max / (num_knots - 1)
  return Grid(first=step if num_knots % 2 else step / 2, step=step, count=num_knots // 2)


def check_half_line(t_max: float, num_knots: int) -> None:
  """Raises a ValueError where `half_line_grid` would."""
  _check_grid(t_max, num_knots)
  if num_knots % 2 == 0:
    raise ValueError(f"num_knots counts both ends of [0, t_max] and must be odd (official: 17), got {num_knots}")


def _check_grid(t_max: float, num_knots: int) -> None:
  if not t_max > 0:
    raise ValueError(f"t_max must be positive, got {t_max}")
  if num_knots < 3:
    raise ValueError(f"num_knots must be at least 3, got {num_knots}")


def epps_pulley(x: jax.Array, t_max: float = 3.0, num_knots: int = 17) -> jax.Array:
  """Returns the Epps-Pulley statistic of every slice in the official convention (LeJEPA, arXiv 2511.08544).

  N sum_k w_k phi_k [(C_k - phi_k)^2 + S_k^2] with C_k, S_k the means of cos(t_k x), sin(t_k x) over all N samples,
  phi_k = exp(-t_k^2/2), and w the trapezoid weights on [0, t_max], doubled. About 1.05 for N(0, 1), `.402 N` for x = 0.

  Args:
    x: (..., N, M), any real dtype. N may be sharded: the means are over all devices, and N is the global count.
    t_max: end of the integration grid.
    num_knots: knots on [0, t_max], odd.

  Returns:
    (..., M) float32. The gradient has x's dtype; only reverse mode is defined.

  Raises:
    ValueError: x has no samples, or the grid makes no sense.
  """
  grid = half_line_grid(t_max, num_knots)
  return as_samples(x).shape[-2] * _distance(as_samples(x), grid)


def epps_pulley_paper(x: jax.Array, t_max: float = 5.0, num_knots: int = 17) -> jax.Array:
  """Returns the statistic of the paper's Algorithm 1: trapezoid of `num_knots` knots on [-t_max, t_max], times N.

  (..., N, M) -> (..., M). For the same t_max it is `epps_pulley` with (num_knots + 1) / 2 knots.
  """
  return as_samples(x).shape[-2] * _distance(as_samples(x), full_line_grid(t_max, num_knots))


def epps_pulley_mean(x: jax.Array, t_max: float = 3.0, num_knots: int = 10) -> jax.Array:
  """Returns the statistic of eb_jepa's "BCS": `num_knots` knots on [-t_max, t_max], *not* multiplied by N.

  (..., N, M) -> (..., M). About 1.05 / N for N(0, 1). `lam_from_bcs` converts the weight that goes with it.
  """
  return _distance(as_samples(x), full_line_grid(t_max, num_knots))


def expected_under_gaussian(t_max: float = 3.0, num_knots: int = 17) -> float:
  """Returns the mean of `epps_pulley` when x ~ N(0, 1), for any N: sum_k W_k (1 - phi_k^2); 1.05246 by default."""
  grid = half_line_grid(t_max, num_knots)
  return float(np.sum(grid.weights_T * (1 - grid.target_T**2)))


def collapse_per_sample(t_max: float = 3.0, num_knots: int = 17) -> float:
  """Returns `epps_pulley` / N of a full collapse, x = 0: sum_k W_k (1 - phi_k)^2; 0.40204758 by default."""
  grid = half_line_grid(t_max, num_knots)
  return float(np.sum(grid.weights_T * (1 - grid.target_T) ** 2))


def as_samples(x: jax.Array, least: int = 1) -> jax.Array:
  """Returns x in float32: a characteristic function in bfloat16 has two digits, fewer than the statistic needs.

  Raises:
    ValueError: x is not (..., N, M), or N is below `least`.
  """
  x = jnp.asarray(x)
  if x.ndim < 2 or x.shape[-2] < least:
    raise ValueError(
      f"x must be (..., N samples, M slices) with N >= {least}, got shape {x.shape}; add an axis: x[:, None]"
    )
  return x.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(1,))  # so that calls outside of jit compile once per shape, too
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _distance(x: jax.Array, grid: Grid) -> jax.Array:
  """Returns sum_k W_k |ECF(t_k) - phi_k|^2 of float32 x: (..., N, M) -> (..., M)."""
  return _distance_forward(x, grid)[0]


def _distance_forward(x, grid):
  cos_TxM, sin_TxM = _ecf_error(x, grid)
  weights_T = grid.weights_T.astype(np.float32)
  value_M = jnp.tensordot(weights_T, cos_TxM**2 + sin_TxM**2, axes=1, precision="highest")
  return value_M, (x, cos_TxM, sin_TxM)


def _distance_backward(grid, residuals, cotangent_M):
  """2/N sum_k W_k t_k [S_k cos(t_k x) - (C_k - phi_k) sin(t_k x)], as the real part of a polynomial in exp(i step x).

  Horner's rule, unrolled: one fused loop over x on every backend. (Clenshaw's has half the multiplies, but measured no
  faster and lost a digit.)
  """
  x, cos_TxM, sin_TxM = residuals
  slope_T = 2 / x.shape[-2] * grid.weights_T * grid.knots_T
  slope_TxM = slope_T.astype(np.float32).reshape((-1,) + (1,) * cotangent_M.ndim) * cotangent_M
  real_Tx1xM, imag_Tx1xM = (slope_TxM * sin_TxM)[..., None, :], (slope_TxM * cos_TxM)[..., None, :]
  step = _unit(grid.step * x)
  sum_ = (real_Tx1xM[-1], imag_Tx1xM[-1])
  for k in range(grid.count - 2, -1, -1):
    real, imag = _multiply(sum_, step)
    sum_ = (real + real_Tx1xM[k], imag + imag_Tx1xM[k])
  return (_multiply(sum_, _unit(grid.first * x))[0],)


_distance.__wrapped__.defvjp(_distance_forward, _distance_backward)


def _ecf_error(x: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
  """Returns the means over samples of cos(t_k x) - phi_k and sin(t_k x), each (T, ..., M).

  phi is subtracted before the sum: what is summed then has mean near zero, and float32 sums lose little to cancellation
  (closer to float64 than `epps_pulley_direct`). Samples are summed inside groups, then over the groups: where a sharded
  batch spreads the groups over devices, one all-reduce serves all knots.
  """
  scanned, fused = functools.partial(_sums_scanned, grid), functools.partial(_sums_fused, grid)
  if x.shape[-2] % _FUSED_MULTIPLE == 0 and grid.count <= _FUSED_MAX_KNOTS:
    sums_2xTxM = jax.lax.platform_dependent(x, cpu=fused, default=scanned)
  else:
    sums_2xTxM = scanned(x)
  cos_TxM, sin_TxM = sums_2xTxM / x.shape[-2]
  return cos_TxM, sin_TxM


def _sums_scanned(grid: Grid, x: jax.Array) -> jax.Array:
  """Returns the sums over samples of cos(t_k x) - phi_k and of sin(t_k x), (2, T, ..., M), by a loop over the knots.

  The loop carries exp(i t_k x): a few kernels per knot and six arrays of x's size, plain reductions that every backend
  compiles well. 256 groups, so that 256-way data parallelism has no collective inside the loop.
  """
  x = _grouped(x, math.gcd(x.shape[-2], 256))
  step = _unit(grid.step * x)

  def sum_and_advance(power, target):
    return _multiply(power, step), (jnp.sum(power[0] - target, axis=-2), jnp.sum(power[1], axis=-2))

  _, sums = jax.lax.scan(sum_and_advance, _unit(grid.first * x), grid.target_T.astype(np.float32))
  return jnp.sum(jnp.stack(sums), axis=-2)


def _sums_fused(grid: Grid, x: jax.Array) -> jax.Array:
  """Returns what `_sums_scanned` does from one reduction with 2 T results, which XLA's CPU backend fuses whole.

  Nothing of x's size is stored. That reduction is scalar code, unless several samples are written out side by side for
  LLVM to pack into vectors: with 4 it takes half the time of 1, and a quarter of the loop's. CPU only: a reduction with
  32 results may want more shared memory than a GPU block has (not measured). N must be a multiple of 64.
  """
  x = _grouped(x, _FUSED_GROUPS)
  lanes = jnp.split(x, _FUSED_LANES, axis=-2)
  steps, powers = [_unit(grid.step * x) for x in lanes], [_unit(grid.first * x) for x in lanes]
  terms = []
  for target in grid.target_T.astype(np.float32):
    terms += [sum(real for real, _ in powers) - len(lanes) * target, sum(imag for _, imag in powers)]
    powers = [_multiply(power, step) for power, step in zip(powers, steps, strict=True)]
  zeros = (np.float32(0),) * len(terms)
  sums = jax.lax.reduce(tuple(terms), zeros, lambda a, b: tuple(map(jnp.add, a, b)), (x.ndim - 2,))
  return jnp.sum(jnp.stack([jnp.stack(sums[0::2]), jnp.stack(sums[1::2])]), axis=-2)


def _grouped(x: jax.Array, num_groups: int) -> jax.Array:
  """Returns x (..., N, M) as (..., G, N/G, M)."""
  *leading, num_samples, num_slices = x.shape
  return x.reshape(*leading, num_groups, num_samples // num_groups, num_slices)


def _unit(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns exp(i angle) as (real, imaginary)."""
  return jnp.cos(angle), jnp.sin(angle)


def _multiply(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Returns a b for complex numbers as pairs: XLA fuses pairs better than complex64, and TPUs have no complex units."""
  return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]
