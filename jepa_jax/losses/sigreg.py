"""SIGReg (LeJEPA, arXiv 2511.08544): embeddings are Gaussian along every direction. Plain formula first.

Legend: V views, N samples, D width of an embedding, M slices (directions), T knots t, `...` leading axes (views).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.losses.directions import slice_directions
from jepa_jax.losses.ecf import as_samples, check_half_line, epps_pulley
from jepa_jax.losses.gathered import AxisName, check_axes, gathered, of_all

Statistic = Callable[[jax.Array], jax.Array]  # (..., N, M) -> (..., M)


def sigreg_plain(z: jax.Array, directions_DxM: jax.Array, t_max: float = 3.0, num_knots: int = 17) -> jax.Array:
  """Returns SIGReg of z (..., N, D) along unit columns, a float32 scalar, by its definition: the oracle of `sliced`."""
  x = jnp.matmul(z, directions_DxM, precision="highest")
  return jnp.mean(epps_pulley_direct(x, t_max, num_knots))


def epps_pulley_direct(x: jax.Array, t_max: float = 3.0, num_knots: int = 17) -> jax.Array:
  """Returns N times the integral of |ECF(t) - exp(-t^2/2)|^2 exp(-t^2/2) over |t| <= t_max: (..., N, M) -> (..., M).

  ECF(t) is the mean of exp(i t x) over the samples. This form stores (..., N, M, T), T times its input, and has JAX's
  own gradient, forward mode included.
  """
  check_half_line(t_max, num_knots)
  x, t_T = as_samples(x), np.linspace(0, t_max, num_knots, dtype=np.float32)
  gaussian_T = np.exp(-(t_T**2) / 2)  # the characteristic function of N(0, 1); it also weighs the integral
  cos_MxT = jnp.mean(jnp.cos(x[..., None] * t_T), axis=-3)
  sin_MxT = jnp.mean(jnp.sin(x[..., None] * t_T), axis=-3)
  distance_MxT = (cos_MxT - gaussian_T) ** 2 + sin_MxT**2
  return x.shape[-2] * 2 * jnp.trapezoid(distance_MxT * gaussian_T, t_T)  # 2: t < 0 adds what t > 0 adds


# --- The same, faster: `epps_pulley` takes one sine and one cosine per element, whatever T is (ecf.py). ---


def sigreg(
  z: jax.Array,
  key: jax.Array,
  num_slices: int = 1024,
  statistic: Statistic = epps_pulley,
  directions: str = "gaussian",
  axis_name: AxisName = None,
) -> jax.Array:
  """Returns SIGReg of embeddings z (..., N, D) along fresh directions; near 1.05 when z is a standard Gaussian.

  This is the official convention: leading axes (views) are tested one by one, then averaged. For the convention of
  stable-pretraining give it `pooled_views(z)`. axis_name: see `sliced`; the key is the same on all devices.
  """
  return sliced(z, slice_directions(key, z.shape[-1], num_slices, directions), statistic, axis_name)


def sliced(
  z: jax.Array, directions_DxM: jax.Array, statistic: Statistic = epps_pulley, axis_name: AxisName = None
) -> jax.Array:
  """Returns the mean of `statistic` over all slices and leading axes, a float32 scalar.

  Args:
    z: embeddings (..., N, D); each leading axis (a view) is tested on its own.
    directions_DxM: unit columns, as from `slice_directions`.
    statistic: (..., N, M) -> (..., M): `epps_pulley` or any function of `jepa_jax.losses.univariate`.
    axis_name: of the devices that share the N samples, inside of `jax.shard_map` and `jax.pmap`: all samples are
      gathered, so the value is that of the global batch. Under `jit` an array is global, and None is right.

  Raises:
    ValueError: the widths differ, or views and samples are swapped.
  """
  if z.ndim < 2 or directions_DxM.ndim != 2 or z.shape[-1] != directions_DxM.shape[0]:
    raise ValueError(f"z must be (..., N, D) and directions (D, M), got {z.shape} and {directions_DxM.shape}")
  z = gathered(z, -2, axis_name)
  if z.ndim == 3:
    check_axes(*z.shape[:2], wanted="(V views, N samples, D)")
  # bfloat16 products here would shift the statistic: TPUs use them for float32 unless told otherwise.
  x = jnp.matmul(z.astype(jnp.float32), directions_DxM.astype(jnp.float32), precision="highest")
  return of_all(jnp.mean(statistic(x)), axis_name)


def pooled_views(z_VxNxD: jax.Array) -> jax.Array:
  """Returns all views as samples of one set, (N V, D): stable-pretraining's convention, about V times larger.

  The sample stays the major axis, so a batch that is sharded stays where it is.
  """
  return jnp.swapaxes(z_VxNxD, -3, -2).reshape(*z_VxNxD.shape[:-3], -1, z_VxNxD.shape[-1])
