"""Losses inside `jax.shard_map` and `jax.pmap`, where a function sees one device's rows; and axes that are swapped.

Under `jit` with a sharded batch nothing of this is needed: an array is the global one.
"""

from __future__ import annotations

import jax

AxisName = str | tuple[str, ...] | None
_MANY, _TIMES = 32, 4  # as many views, and so many times the samples, are no views


def gathered(z: jax.Array, axis: int, axis_name: AxisName) -> jax.Array:
  """Returns the rows of all devices along `axis`, in their order; z itself without an axis_name."""
  return z if axis_name is None else jax.lax.all_gather(z, axis_name, axis=axis % z.ndim, tiled=True)


def of_all(loss: jax.Array, axis_name: AxisName) -> jax.Array:
  """Returns a loss of gathered rows as one number of all devices, so that its gradient is that of the global loss.

  Every device computes the same loss. With the mean over devices, what `jax.grad` gives inside of `jax.shard_map` is
  the gradient of one loss; inside of `jax.pmap` (and with check_vma=False) the mean over devices of the gradients is.
  """
  return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def check_axes(num_views: int, num_samples: int, wanted: str) -> None:
  """Raises a ValueError where views and samples are surely swapped: very many views of very few samples."""
  if num_views >= _MANY and num_views >= _TIMES * num_samples:
    raise ValueError(
      f"{num_views} views of {num_samples} samples: the first two axes are swapped. z is {wanted}; give "
      "jnp.swapaxes(z, 0, 1)"
    )
