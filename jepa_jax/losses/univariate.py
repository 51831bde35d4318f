"""Univariate tests of N(0, 1) that LeJEPA (arXiv 2511.08544) compares with Epps-Pulley; for `sliced`'s `statistic=`.

Every function takes (..., N, M), any real dtype, and returns (..., M) float32, smaller where x is closer to N(0, 1).
Legend: N samples, M slices. They are for study on one device: the sorted ones gather a sharded axis, and moments have
gradients that grow like a power of x. Epps-Pulley is the one to train with.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # its parts are loaded when they are used
from jax.scipy.stats import norm

from jepa_jax.losses.ecf import as_samples

# Mean and variance of g^k, g ~ N(0, 1), for k = 1..4.
_MOMENT_MEANS = (0.0, 1.0, 0.0, 3.0)
_MOMENT_VARIANCES = (1.0, 2.0, 15.0, 96.0)


def vcreg(x: jax.Array) -> jax.Array:
  """Returns N mean^2 / s^2 + (N - 1) (s^2 - 1)^2 / 2, s^2 the unbiased variance: about 2 for N(0, 1).

  Blind to everything past the second moment. Infinite for a constant x. Needs N >= 2.
  """
  x = as_samples(x, 2)
  num_samples = x.shape[-2]
  variance = jnp.var(x, axis=-2, ddof=1)
  return num_samples * jnp.mean(x, axis=-2) ** 2 / variance + (num_samples - 1) * (variance - 1) ** 2 / 2


def extended_jarque_bera(x: jax.Array) -> jax.Array:
  """Returns `vcreg` + N/6 (skew^2 + (kurtosis - 3)^2 / 4), about 4 for N(0, 1); the second term is Jarque-Bera's."""
  x = as_samples(x, 2)
  centred = x - jnp.mean(x, axis=-2, keepdims=True)
  variance = jnp.mean(centred**2, axis=-2)
  skew = jnp.mean(centred**3, axis=-2) / variance**1.5
  kurtosis = jnp.mean(centred**4, axis=-2) / variance**2
  return vcreg(x) + x.shape[-2] / 6 * (skew**2 + (kurtosis - 3) ** 2 / 4)


def cramer_von_mises(x: jax.Array) -> jax.Array:
  """Returns 1/N sum_i ((2i - 1) / 2N - Phi(x_(i)))^2, Phi the normal distribution function.

  The official code's scale: the textbook's statistic is N times this + 1 / 12N.
  """
  x = jnp.sort(as_samples(x, 1), axis=-2)
  return jnp.mean((_ranks(x) - norm.cdf(x)) ** 2, axis=-2)


def watson(x: jax.Array) -> jax.Array:
  """Returns `cramer_von_mises` - (mean Phi(x) - 1/2)^2, which does not see a shift of the distribution function."""
  return cramer_von_mises(x) - (jnp.mean(norm.cdf(as_samples(x, 1)), axis=-2) - 0.5) ** 2


def anderson_darling(x: jax.Array) -> jax.Array:
  """Returns -N - 1/N sum_i (2i - 1) [log Phi(x_(i)) + log Phi(-x_(N+1-i))], about 1 for N(0, 1)."""
  x = jnp.sort(as_samples(x, 1), axis=-2)
  num_samples = x.shape[-2]
  # 2i - 1 = 2N rank, so the sum is twice a mean times N; log Phi is exact in the tails, where log(Phi) is not.
  return -num_samples - 2 * num_samples * jnp.mean(
    _ranks(x) * (norm.logcdf(x) + norm.logcdf(-jnp.flip(x, axis=-2))), axis=-2
  )


def shapiro_wilk(x: jax.Array) -> jax.Array:
  """Returns 1 - |cos(a, x_sorted)|, a the expected order statistics of N(0, 1) by Blom's approximation; in [0, 1].

  Blind to scale, and 1 - the square root of Shapiro-Francia's W when the mean is zero. Not defined for x = 0.
  """
  x = jnp.sort(as_samples(x, 2), axis=-2)
  num_samples = x.shape[-2]
  expected = scipy.special.ndtri((np.arange(1, num_samples + 1) - 0.375) / (num_samples + 0.25))
  expected = (expected / np.linalg.norm(expected)).astype(np.float32)[:, None]
  return 1 - jnp.abs(jnp.sum(expected * x, axis=-2)) / jnp.linalg.norm(x, axis=-2)


def vasicek_entropy(x: jax.Array, window: int | None = None) -> jax.Array:
  """Returns the divergence of x from N(0, 1) with Vasicek's estimate H of the entropy: log(2 pi)/2 + mean(x^2)/2 - H.

  H = mean log(N / 2m (x_(i+m) - x_(i-m))), ends repeated, m = `window` or floor(sqrt(N) + 1/2). H is biased low, so the
  value is a little above zero for N(0, 1). Equal samples are held 1e-12 apart: ties would give infinity. Needs N >= 3.
  """
  x = jnp.sort(as_samples(x, 3), axis=-2)
  num_samples = x.shape[-2]
  m = math.floor(math.sqrt(num_samples) + 0.5) if window is None else window
  if not 1 <= m < num_samples / 2:
    raise ValueError(f"window must be in 1..{(num_samples - 1) // 2} for {num_samples} samples, got {m}")
  place = np.arange(num_samples)
  above = jnp.take(x, np.minimum(place + m, num_samples - 1), axis=-2)
  below = jnp.take(x, np.maximum(place - m, 0), axis=-2)
  entropy = jnp.mean(jnp.log(num_samples / (2 * m) * jnp.maximum(above - below, 1e-12)), axis=-2)
  return 0.5 * math.log(2 * math.pi) + jnp.mean(x**2, axis=-2) / 2 - entropy


def moments(x: jax.Array) -> jax.Array:
  """Returns N sum_{k=1..4} (mean x^k - E g^k)^2 / Var(g^k), g ~ N(0, 1): 4 on average for N(0, 1), whatever N is.

  The scale of each moment is ours, so that all four weigh the same under N(0, 1).
  """
  x = as_samples(x, 1)
  errors = [
    (jnp.mean(x ** (k + 1), axis=-2) - mean) ** 2 / variance
    for k, (mean, variance) in enumerate(zip(_MOMENT_MEANS, _MOMENT_VARIANCES, strict=True))
  ]
  return x.shape[-2] * jnp.sum(jnp.stack(errors), axis=0)


def sliced_wasserstein(x: jax.Array) -> jax.Array:
  """Returns the mean over samples of (x_(i) - q_i)^2, q_i the normal quantile of (i - 1/2)/N.

  That is the squared 2-Wasserstein distance to N(0, 1), whose quantile function is taken at N points; `sliced` makes
  the sliced distance of it.
  """
  x = jnp.sort(as_samples(x, 1), axis=-2)
  return jnp.mean((x - scipy.special.ndtri(_ranks(x).astype(np.float64)).astype(np.float32)) ** 2, axis=-2)


def _ranks(x: jax.Array) -> np.ndarray:
  """Returns (2i - 1) / 2N as (N, 1): the middle of the i-th of N equal steps of a distribution function."""
  num_samples = x.shape[-2]
  return ((np.arange(num_samples) + 0.5) / num_samples).astype(np.float32)[:, None]
