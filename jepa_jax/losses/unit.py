"""Vectors divided by their length, with a value and a gradient also where the length is zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

TINY = np.finfo(np.float32).tiny  # what is smaller is flushed to zero on most devices


def unit(z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns z / |z| along the last axis in float32, zero where z is zero, and which rows are zero.

  Each row is first divided by its largest element, so squares neither overflow nor vanish; as the direction does not
  depend on that number, it needs no gradient.
  """
  z = z.astype(jnp.float32)
  size = jax.lax.stop_gradient(jnp.max(jnp.abs(z), axis=-1, keepdims=True))
  zero = size < TINY
  z = jnp.where(zero, 0, z / jnp.where(zero, 1, size))
  return z / length(z, at_zero=1)[..., None], zero[..., 0]


def length(x: jax.Array, at_zero: float) -> jax.Array:
  """Returns |x| along the last axis; `at_zero` and gradient zero where its square is zero in float32."""
  square = jnp.sum(x**2, axis=-1)
  return jnp.where(square == 0, at_zero, jnp.sqrt(jnp.where(square == 0, 1, square)))
