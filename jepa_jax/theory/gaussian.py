"""How far embeddings are from N(0, I), without slices and without a grid: closed forms, in float64 on the host.

Legend: N samples, D width.
"""

from __future__ import annotations

import numpy as np
import scipy  # its parts are loaded when they are used


def sliced_epps_pulley(z_NxD: np.ndarray) -> float:
  """Returns what SIGReg (LeJEPA, arXiv 2511.08544) tends to with infinitely many slices and knots: about 1.059 for
  N(0, I).

  N sqrt(2 pi) [mean_jk f(|z_j - z_k|^2 / 2) - sqrt(2) mean_j f(|z_j|^2 / 4) + 1 / sqrt(3)], f(x) = 1F1(1/2; D/2; -x):
  the mean over all directions of the exact Epps-Pulley integral. N times .409 at a full collapse.

  Raises:
    ValueError: z is not (N, D) with N of at least 1.
  """
  z_NxD = _as_samples(z_NxD, 1)
  num, width = z_NxD.shape
  f = lambda x: scipy.special.hyp1f1(0.5, width / 2, -x)
  square_N = (z_NxD**2).sum(1)
  pairs = (num + 2 * f(scipy.spatial.distance.pdist(z_NxD, "sqeuclidean") / 2).sum()) / num**2
  return float(num * np.sqrt(2 * np.pi) * (pairs - np.sqrt(2) * f(square_N / 4).mean() + 1 / np.sqrt(3)))


def energy_distance(z_NxD: np.ndarray) -> float:
  """Returns 2 E|z - g| - E|z - z'| - E|g - g'| for g ~ N(0, I): 0 on average for N(0, I), above it for all else.

  The energy distance of Szekely and Rizzo (2013), unbiased: pairs of different samples only, so it may lie a little
  below 0. Nothing here is trained on it. (2 - sqrt(2)) E|g| where all z are 0.

  Raises:
    ValueError: z is not (N, D) with N of at least 2.
  """
  z_NxD = _as_samples(z_NxD, 2)
  width = z_NxD.shape[1]
  mean_norm = np.sqrt(2) * np.exp(scipy.special.gammaln((width + 1) / 2) - scipy.special.gammaln(width / 2))  # E|g|
  to_gaussian = _mean_distance((z_NxD**2).sum(1), width).mean()
  between = scipy.spatial.distance.pdist(z_NxD).mean()
  return float(2 * to_gaussian - between - np.sqrt(2) * mean_norm)


def _mean_distance(square_N: np.ndarray, width: int) -> np.ndarray:
  """Returns E|z - g| for |z|^2 = square_N, g ~ N(0, I): E|g| 1F1(-1/2; D/2; -|z|^2 / 2), as an integral.

  SciPy's hyp1f1 gives infinity for these arguments from D = 128 on (1.17.1; -1/2, 64, -50). E sqrt(X) is the integral
  of (1 - E exp(-tX)) t^(-3/2) over t > 0, divided by 2 sqrt(pi); with 2t / (1 + 2t) = sin^2 it is one over half a
  period, where the midpoint rule converges like an exponential.
  """
  num_knots = 256 + int(8 * np.sqrt(square_N.max() + width))
  u_K = np.sin((np.arange(num_knots) + 0.5) * np.pi / (2 * num_knots)) ** 2
  total_N = np.zeros(len(square_N))
  for u in u_K:  # one knot at a time: no array of N x K
    total_N -= np.expm1(width / 2 * np.log1p(-u) - square_N * u / 2) / u
  return np.sqrt(2 / np.pi) * total_N * np.pi / (2 * num_knots)


def _as_samples(z_NxD: np.ndarray, least: int) -> np.ndarray:
  z_NxD = np.asarray(z_NxD, np.float64)
  if z_NxD.ndim != 2 or len(z_NxD) < least:
    raise ValueError(f"z must be (N, D) with N of at least {least}, got shape {z_NxD.shape}")
  return z_NxD
