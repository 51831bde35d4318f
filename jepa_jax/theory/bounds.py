"""How far embeddings are from filling the sphere: MMCR's percent error and its two factors, for any method.

Legend: B images, K views of an image, P rows (one per image), D width of an embedding.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jepa_jax.losses import centroid_metrics, centroids, coding_rate, nuclear_norm

_MOST_PAIRED_ROWS = 4096  # uniformity holds all P x P distances: 67 MB


def pretraining_percent_error(m_PxD: jax.Array, method: str = "auto") -> jax.Array:
  """Returns 1 - |M|_* / sqrt(P min(P, D)) of centroids M, a float32 scalar in [0, 1] (arXiv 2406.09366).

  Args:
    m_PxD: rows of length at most 1: `losses.centroids`, or unit embeddings.
    method: of `losses.nuclear_norm`.

  Raises:
    ValueError: M is not a matrix, or unknown method.
  """
  return _metrics(m_PxD, method)["percent_error"]


def alignment_flatness(m_PxD: jax.Array, method: str = "auto") -> tuple[jax.Array, jax.Array]:
  """Returns |M|_F / sqrt(P) and |M|_* / (|M|_F sqrt(min(P, D))): float32 in [0, 1], their product 1 - percent error.

  Alignment is 1 where the views of every image coincide; flatness is 1 where all singular values are equal, and 0 for
  M = 0. Arguments and errors are those of `pretraining_percent_error`.
  """
  metrics = _metrics(m_PxD, method)
  return metrics["alignment"], metrics["flatness"]


def uniformity(z_PxD: jax.Array, t: float = 2.0) -> jax.Array:
  """Returns log of the mean over pairs of different rows of exp(-t |x - y|^2) for unit rows (arXiv 2005.10242).

  A float32 scalar in [-4 t, 0], lower is more uniform: 0 at collapse, near -2 t for uniform rows in many dimensions.
  Rows are divided by their lengths here; a zero row stays zero.

  Raises:
    ValueError: z is not a matrix of 2..4096 rows (all distances are held at once).
  """
  if z_PxD.ndim != 2 or not 2 <= z_PxD.shape[0] <= _MOST_PAIRED_ROWS:
    raise ValueError(
      f"z must be (P rows, D) with 2 <= P <= {_MOST_PAIRED_ROWS}, got shape {z_PxD.shape}; take a sample"
    )
  num_rows = z_PxD.shape[0]
  unit_PxD = centroids(z_PxD[:, None])
  square_P = jnp.sum(unit_PxD**2, axis=1)
  products_PxP = jnp.matmul(unit_PxD, unit_PxD.T, precision="highest")
  distances_PxP = jnp.maximum(square_P[:, None] + square_P - 2 * products_PxP, 0)
  others_PxP = 1 - jnp.eye(num_rows)
  total = jax.scipy.special.logsumexp(-t * distances_PxP, b=others_PxP)
  return total - math.log(num_rows * (num_rows - 1))


def embedding_metrics(z_BxKxD: jax.Array, method: str = "auto") -> dict[str, jax.Array]:
  """Returns {"percent_error", "alignment", "flatness", "uniformity", "coding_rate"} of any embeddings: float32 scalars.

  The first three are of the centroids of the unit views, 1 - percent_error = alignment flatness: did it fall because
  views disagree, or because directions are missing? Uniformity and coding rate (MCR2's, eps .5, in nats) are those of
  each image's first view. No gradient. For use inside jit every so many steps: it costs the nuclear norm of a B x D
  matrix and a B x B matrix of distances.

  Raises:
    ValueError: z is not (B, K, D), or B is not in 2..4096.
  """
  if z_BxKxD.ndim != 3:
    raise ValueError(f"z must be (B images, K views, D), got shape {z_BxKxD.shape}")
  z_BxKxD = jax.lax.stop_gradient(z_BxKxD)
  of_first = {"uniformity": uniformity(z_BxKxD[:, 0]), "coding_rate": coding_rate(z_BxKxD[:, 0])}
  return _metrics(centroids(z_BxKxD), method) | of_first


def _metrics(m_PxD: jax.Array, method: str) -> dict[str, jax.Array]:
  if m_PxD.ndim != 2:
    raise ValueError(f"m must be (P rows, D), got shape {m_PxD.shape}")
  return centroid_metrics(m_PxD, nuclear_norm(m_PxD, method))
