"""Random directions to slice embeddings along. Legend: D width of an embedding, M slices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# (2^23 integers + 1/2) / 2^23 are exact in float32 and never 0 or 1, where the normal quantile is infinite.
_SOBOL_BITS = 23


def slice_directions(key: jax.Array, dim: int, num_slices: int, kind: str = "gaussian") -> jax.Array:
  """Returns `num_slices` random directions as unit columns (dim, num_slices), float32.

  Fold the step into the key: slices that change every step matter more than many slices (arXiv 2511.08544, fig. 7).

  Args:
    key: the same key gives the same directions on every device.
    dim: width of the embeddings.
    num_slices: number of directions.
    kind: "gaussian", the official code's normalised normal vectors; or "sobol", the paper's Appendix D: scrambled Sobol
      points, moved by a digital shift drawn from the key, through the normal quantile, normalised. In high dimensions
      some coordinates of Sobol points stay alike, scrambled or not; the key also says which ones these are.

  Raises:
    ValueError: unknown kind, or a count below one.
  """
  if dim < 1 or num_slices < 1:
    raise ValueError(f"dim and num_slices must be at least 1, got dim={dim}, num_slices={num_slices}")
  if kind == "gaussian":
    normal_DxM = jax.random.normal(key, (dim, num_slices), jnp.float32)
  elif kind == "sobol":
    shift_Dx1 = jax.random.bits(key, (dim, 1), jnp.uint32) >> (32 - _SOBOL_BITS)
    place_D = jax.random.permutation(jax.random.fold_in(key, 1), dim)
    points_DxM = (jnp.asarray(_sobol_points(dim, num_slices))[place_D] ^ shift_Dx1).astype(jnp.float32)
    normal_DxM = jax.scipy.special.ndtri((points_DxM + 0.5) / 2**_SOBOL_BITS)
  else:
    raise ValueError(f"slice directions must be 'gaussian' or 'sobol', got {kind!r}")
  return normal_DxM / jnp.linalg.norm(normal_DxM, axis=0, keepdims=True)


@functools.lru_cache(maxsize=8)
def _sobol_points(dim: int, num_slices: int) -> np.ndarray:
  """Returns the first scrambled Sobol points (D, M) as integers below 2^23: a constant of the compiled program.

  The scramble is fixed because plain Sobol points fill high dimensions badly; the shift makes them new at every call.
  """
  from scipy.stats import qmc  # half a second at every start of those who never ask for it

  points_MxD = qmc.Sobol(dim, scramble=True, rng=0).random_base2(int(np.ceil(np.log2(num_slices))))[:num_slices]
  return (points_MxD.T * 2**_SOBOL_BITS).astype(np.uint32)
