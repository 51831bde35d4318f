"""How many directions a set of features uses, and how much: label-free signs of collapse.

Legend: N samples, D width of a feature.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jepa_jax.sharding import constrain


def rankme(z_NxD: jax.Array, method: str = "svd") -> jax.Array:
  """Returns RankMe (Garrido et al., arXiv 2210.02885), the effective rank: a float32 scalar in [1, min(N, D)].

  exp(-sum_k p_k log p_k) with p the singular values of Z, which is not centred, divided by their sum.

  Args:
    z_NxD: features, any real dtype; 0 for Z = 0.
    method: "svd" is right to 1e-4 for any spectrum: for evaluations. It gathers a sharded Z on every device.
      "gram" takes the eigenvalues of the smaller of Z^T Z and Z Z^T: a Z with its N >= D samples sharded stays where it
      is and only D x D numbers meet, so it is for the train step. Squaring hides singular values below about 3e-4 of
      the largest: within 1 % where they decay like k^-3 or slower, but 1.2 and not 1 at full collapse (N = D = 512).

  Raises:
    ValueError: z is not a matrix, or unknown method.
  """
  if z_NxD.ndim != 2:
    raise ValueError(f"z must be (N samples, D), got shape {z_NxD.shape}")
  z_NxD = z_NxD.astype(jnp.float32)
  if method == "svd":
    values_K = jnp.linalg.svd(z_NxD, compute_uv=False)
  elif method == "gram":
    wide = z_NxD.shape[0] < z_NxD.shape[1]
    product = "nd,md->nm" if wide else "nd,ne->de"
    gram_KxK = jnp.einsum(product, z_NxD, z_NxD, precision="highest")
    gram_KxK = constrain(gram_KxK, None, None)  # else XLA spreads the eigenvalue solver's loops over the whole pod
    values_K = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram_KxK), 0))
  else:
    raise ValueError(f"method must be 'svd' or 'gram', got {method!r}")
  total = jnp.sum(values_K)
  share_K = values_K / jnp.where(total == 0, 1, total)
  return jnp.where(total == 0, 0, jnp.exp(jnp.sum(jax.scipy.special.entr(share_K))))  # where Z holds a NaN it is one


def feature_std(z_NxD: jax.Array) -> jax.Array:
  """Returns the mean over the D features of their standard deviation over the N samples (biased), a float32 scalar.

  0 at full collapse; sqrt(1/D) for uniform unit vectors; 1 for LeJEPA's target.
  """
  return jnp.mean(jnp.std(z_NxD.astype(jnp.float32), axis=0))
