"""Mutual information of two views on the sphere, from below: reconstruction + entropy, in nats.

I[Z1; Z2] >= E log q(Z1 | Z2) + H[Z1] for any density q (arXiv 2307.10907; for MMCR 2406.09366): views that coincide
maximise the first term, a uniform distribution the second. On the host, in float64: for evaluations.
Legend: P samples, D width of an embedding.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # its parts are loaded when they are used


def log_sphere_area(dim: int) -> float:
  """Returns the log of the area of the unit sphere in `dim` dimensions: the largest entropy on it, in nats."""
  return math.log(2) + dim / 2 * math.log(math.pi) - float(scipy.special.gammaln(dim / 2))


def log_von_mises_fisher(cosine: np.ndarray, dim: int, kappa: float) -> np.ndarray:
  """Returns the log density kappa cosine + log C_D(kappa) of the von Mises-Fisher law, in nats, of cosine's shape.

  It is with respect to the area of the unit sphere in `dim` dimensions. log C_D(kappa) = (D/2 - 1) log(kappa) -
  D/2 log(2 pi) - log I_{D/2 - 1}(kappa), the Bessel function by its power series, whose terms are all positive.

  Raises:
    ValueError: dim < 2 or kappa not in (0, 1e5].
  """
  if dim < 2 or not 0 < kappa <= 1e5:
    raise ValueError(f"dim must be at least 2 and kappa in (0, 1e5], got {dim} and {kappa}")
  order, k = dim / 2 - 1, np.arange(100 + 2 * math.ceil(kappa))
  # log I minus order log(kappa/2), which cancels against (D/2 - 1) log(kappa)
  series = scipy.special.logsumexp(
    2 * k * math.log(kappa / 2) - scipy.special.gammaln(k + 1) - scipy.special.gammaln(k + order + 1)
  )
  return kappa * np.asarray(cosine) + order * math.log(2) - dim / 2 * math.log(2 * math.pi) - series


def sphere_entropy(z_PxD: np.ndarray, neighbour: int = 1) -> float:
  """Returns the Kozachenko-Leonenko estimate of the differential entropy on the unit sphere, in nats.

  psi(P) - psi(k) + mean log A(t_i), A the area of the cap whose angular radius t_i is that of row i's k-th nearest
  neighbour (Li, Mnatsakanov and Andrew, Entropy 13(3), 2011, here with the cap's exact area, so that it is unbiased for
  uniform rows at any P and D). -inf where rows coincide. All P x P products are held at once.

  Args:
    z_PxD: samples; each is divided by its length.
    neighbour: k, smaller than P.

  Raises:
    ValueError: z is not a matrix of at least 2 dimensions, holds zero or non-finite rows, or k is not in 1..P - 1.
  """
  unit_PxD = _unit(z_PxD)
  num_samples, dim = unit_PxD.shape
  if not 1 <= neighbour < num_samples:
    raise ValueError(f"neighbour must be in 1..{num_samples - 1} for {num_samples} samples, got {neighbour}")
  cosine_PxP = unit_PxD @ unit_PxD.T
  np.fill_diagonal(cosine_PxP, -np.inf)
  nearest_P = np.argpartition(-cosine_PxP, neighbour - 1, axis=1)[:, neighbour - 1]
  half_chord_P = np.linalg.norm(unit_PxD - unit_PxD[nearest_P], axis=1) / 2  # an arc cosine has 1e-8 of angle only
  areas_P = log_sphere_area(dim) + _log_cap_share(half_chord_P, dim)
  return float(scipy.special.digamma(num_samples) - scipy.special.digamma(neighbour) + np.mean(areas_P))


def mutual_information_bound(
  z1_PxD: np.ndarray, z2_PxD: np.ndarray, kappa: float, neighbour: int = 1
) -> dict[str, float]:
  """Returns {"reconstruction", "entropy", "bound"}, their sum: a lower bound of I[Z1; Z2] in nats, as floats.

  reconstruction is the mean of log q(z1 | z2), q the von Mises-Fisher law around z2: maximal where views coincide.
  entropy is `sphere_entropy` of Z1. As the entropy is an estimate, so is the bound.

  Args:
    z1_PxD: embeddings of one view of every image; rows are divided by their lengths.
    z2_PxD: embeddings of another view, in the same order.
    kappa: concentration of q, any positive number is valid; the tightest is near c (D - c^2) / (1 - c^2), c the mean
      cosine of the pairs (Banerjee et al., JMLR 2005).
    neighbour: k of the entropy's estimate.

  Raises:
    ValueError: shapes differ, or what `sphere_entropy` and `log_von_mises_fisher` refuse.
  """
  if np.shape(z1_PxD) != np.shape(z2_PxD):
    raise ValueError(f"z1 and z2 must be pairs of rows, got shapes {np.shape(z1_PxD)} and {np.shape(z2_PxD)}")
  unit1_PxD, unit2_PxD = _unit(z1_PxD), _unit(z2_PxD)
  cosine_P = np.sum(unit1_PxD * unit2_PxD, axis=1)
  reconstruction = float(np.mean(log_von_mises_fisher(cosine_P, unit1_PxD.shape[1], kappa)))
  entropy = sphere_entropy(unit1_PxD, neighbour)
  return {"reconstruction": reconstruction, "entropy": entropy, "bound": reconstruction + entropy}


def _unit(z_PxD: np.ndarray) -> np.ndarray:
  z_PxD = np.asarray(z_PxD).astype(np.float64)
  if z_PxD.ndim != 2 or z_PxD.shape[1] < 2:
    raise ValueError(f"z must be (P samples, D >= 2), got shape {z_PxD.shape}")
  length_P = np.linalg.norm(z_PxD, axis=1)
  if not np.all(np.isfinite(length_P) & (length_P > 0)):
    bad = np.flatnonzero(~(np.isfinite(length_P) & (length_P > 0)))
    raise ValueError(f"{len(bad)} rows have no direction (zero or not finite), the first: {bad[:8].tolist()}")
  return z_PxD / length_P[:, None]


def _log_cap_share(half_chord: np.ndarray, dim: int) -> np.ndarray:
  """Returns the log of the share of the sphere within an angle, given by sin(angle / 2): log(betainc(...) / 2).

  Far from the equator the incomplete beta function underflows in high dimensions (angles below 45 degrees at
  D = 2048): there by its hypergeometric series, in logs.
  """
  a, b = (dim - 1) / 2, 0.5
  square = np.clip(4 * half_chord**2 * (1 - half_chord**2), 0, 1)  # sin^2 of the angle
  share = scipy.special.betainc(a, b, square)
  with np.errstate(divide="ignore", invalid="ignore"):
    series = a * np.log(square) + b * np.log1p(-square) - math.log(a) - scipy.special.betaln(a, b)
    log_small = np.where(share > 1e-200, np.log(share), series + np.log(scipy.special.hyp2f1(a + b, 1, a + 1, square)))
    beyond = half_chord**2 > 0.5  # more than a half sphere
    return np.where(beyond, np.log1p(-share / 2), log_small - math.log(2))
