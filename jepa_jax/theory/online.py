"""The mutual-information bound of `theory.information` inside jit, in float32, for the metrics of a run.

Legend: P images, D width of an embedding.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import scipy  # its parts are loaded when they are used

from jepa_jax.theory.information import log_sphere_area

_NUM_TERMS = 200  # of the hypergeometric series, whose terms fall at least as fast as those of x^n


def information_terms(z1_PxD: jax.Array, z2_PxD: jax.Array) -> dict[str, jax.Array]:
  """Returns "mi_reconstruction" and "mi_entropy", in nats: I[Z1; Z2] is at least their sum, up to the estimate's error.

  Reconstruction is the mean log density of Z1 under a von Mises-Fisher law around Z2, whose concentration is fitted to
  the mean cosine (Banerjee et al., JMLR 2005); entropy the nearest-neighbour estimate on the sphere. Both as in
  `mutual_information_bound`, which is the float64 oracle; here the Bessel function is that of large order (relative
  error of the density below 1 / (4 D)), and neighbours nearer than 3e-4 rad count as that far.
  """
  unit1_PxD, unit2_PxD = _unit(z1_PxD), _unit(z2_PxD)
  num_rows, dim = unit1_PxD.shape
  cosine = jnp.clip(jnp.mean(jnp.sum(unit1_PxD * unit2_PxD, axis=1)), 1e-3, 1 - 1e-5)
  kappa = cosine * (dim - cosine**2) / (1 - cosine**2)
  products_PxP = jnp.matmul(unit1_PxD, unit1_PxD.T, precision="highest") - 3 * jnp.eye(num_rows)
  half_square_P = jnp.clip((1 - products_PxP.max(axis=1)) / 2, 2e-8, 1.0)  # sin^2 of half the angle
  entropy = scipy.special.digamma(num_rows) - scipy.special.digamma(1) + log_sphere_area(dim)
  return {
    "mi_reconstruction": kappa * cosine + _log_normaliser(kappa, dim),
    "mi_entropy": entropy + jnp.mean(_log_cap_share(half_square_P, dim)),
  }


def _unit(z_PxD: jax.Array) -> jax.Array:
  z_PxD = z_PxD.astype(jnp.float32)
  return z_PxD / jnp.maximum(jnp.linalg.norm(z_PxD, axis=1, keepdims=True), 1e-12)


def _log_normaliser(kappa: jax.Array, dim: int) -> jax.Array:
  """log C_D(kappa) = (D/2 - 1) log(kappa) - D/2 log(2 pi) - log I_{D/2 - 1}(kappa), I by Debye's expansion."""
  order = dim / 2 - 1
  root = jnp.sqrt(order**2 + kappa**2)
  share = order / root  # the first correction: 1 + (3 p - 5 p^3) / (24 order), p = order / root
  correction = jnp.log1p((3 - 5 * share**2) / (24 * root))
  log_bessel_less_power = root - order * jnp.log(order + root) - jnp.log(2 * math.pi * root) / 2 + correction
  return -dim / 2 * math.log(2 * math.pi) - log_bessel_less_power


def _log_cap_share(half_square: jax.Array, dim: int) -> jax.Array:
  """Returns the log of the share of the sphere within an angle, given by sin^2(angle / 2): log(betainc(a, 1/2, x) / 2).

  In logs by the series where x = sin^2(angle) is below .9, since the function itself underflows in many dimensions.
  """
  a, b = (dim - 1) / 2, 0.5
  x = jnp.clip(4 * half_square * (1 - half_square), 1e-30, 1 - 1e-7)
  low = jnp.minimum(x, 0.9)
  term = lambda n, carry: (carry[0] + carry[1], carry[1] * low * (a + b + n) / (a + 1 + n))
  series = jax.lax.fori_loop(0, _NUM_TERMS, term, (jnp.zeros_like(x), jnp.ones_like(x)))[0]
  log_low = a * jnp.log(low) + b * jnp.log1p(-low) - math.log(a) - float(scipy.special.betaln(a, b)) + jnp.log(series)
  high = jax.scipy.special.betainc(a, b, x)
  log_share = jnp.where(x < 0.9, log_low, jnp.log(jnp.maximum(high, 1e-37)))
  beyond = half_square > 0.5  # more than a half sphere
  return jnp.where(beyond, jnp.log1p(-jnp.exp(log_share) / 2), log_share - math.log(2))
