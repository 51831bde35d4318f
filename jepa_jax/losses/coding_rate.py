"""Coding rates of MCR2 (arXiv 2006.08558): bits of a set of vectors at a precision, whole and class by class.

Legend: N vectors, B images, V views, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jepa_jax.losses.unit import unit


def coding_rate(z_NxD: jax.Array, eps: float = 0.5) -> jax.Array:
  """Returns R = 1/2 log det(I + D / (N eps) Z'Z) in nats, rows of Z made unit length; a float32 scalar.

  At most k/2 log(1 + D / (k eps)), k = min(N, D), where all k singular values are equal. By Cholesky of the smaller
  side.

  Raises:
    ValueError: z is no matrix, or eps is not above 0.
  """
  if z_NxD.ndim != 2:
    raise ValueError(f"z must be (N, D), got shape {z_NxD.shape}")
  _check_eps(eps)
  return _half_log_det(unit(z_NxD)[0][None], z_NxD.shape[1] / (len(z_NxD) * eps))[0]


def mcr2(z_BxVxD: jax.Array, eps: float = 0.5, class_weight: float = 1.0) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns MCR2's loss w Rc - R where each image is a class and its views the members, and {"rate", "class_rate"}.

  w is class_weight: 1 in the paper's definition. R is `coding_rate` of all B V vectors, Rc the mean over images of that
  of its views, with V in the place of N.

  Raises:
    ValueError: z is not (B, V, D) with at least 2 images and views, or eps is not above 0.
  """
  if z_BxVxD.ndim != 3 or z_BxVxD.shape[1] < 2:
    raise ValueError(f"z must be (B images, V views, D) with V of at least 2, got shape {z_BxVxD.shape}")
  if len(z_BxVxD) < 2:
    raise ValueError("of one image both rates are the same, whatever it is: give a batch of 2 or more")
  _check_eps(eps)
  unit_BxVxD = unit(z_BxVxD)[0]
  _, num_views, width = z_BxVxD.shape
  rate = coding_rate(unit_BxVxD.reshape(-1, width), eps)
  class_rate = jnp.mean(_half_log_det(unit_BxVxD, width / (num_views * eps)))
  return class_weight * class_rate - rate, {"rate": rate, "class_rate": class_rate}


def _half_log_det(z_KxNxD: jax.Array, scale: float) -> jax.Array:
  """Returns 1/2 log det(I + scale Z'Z) of each of K matrices; Z Z' in place of Z'Z where it is smaller."""
  product = "knd,kmd->knm" if z_KxNxD.shape[1] < z_KxNxD.shape[2] else "knd,kne->kde"
  gram = jnp.einsum(product, z_KxNxD, z_KxNxD, precision="highest")
  factor = jnp.linalg.cholesky(jnp.eye(gram.shape[-1]) + scale * gram)
  return jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)


def _check_eps(eps: float) -> None:
  if not eps > 0:
    raise ValueError(f"eps={eps} is a precision above 0, such as .5")
