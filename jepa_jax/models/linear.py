"""Linear layers whose weights have gradients in float32, also where products are of 16 bits.

Left to differentiation, a weight that is cast to bfloat16 has a bfloat16 gradient: rounded, then summed over chips in
bfloat16, and, as a cast stands between, once for each use of the weight (LeJEPA has one for each size of its views).

Legend: x (..., in), y (..., out), where in and out are one axis or several.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

WeightGrads = Literal["float32", "compute"]


class Linear(nn.Module):
  """x -> x kernel + bias in `dtype`; the kernel (in, out) has as many axes as those of x that it takes and it makes.

  Parameters, their names and initial values are those of flax's DenseGeneral. weight_grads: "float32", or "compute": in
  dtype, as differentiation gives them; it matters where dtype is of 16 bits.
  """

  features: int | tuple[int, ...]
  dtype: Any
  kernel_init: Callable[..., jax.Array]
  num_in: int = 1  # how many last axes of x
  use_bias: bool = True
  weight_grads: WeightGrads = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs = x.shape[x.ndim - self.num_in :]
    features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
    flat = (math.prod(inputs), math.prod(features))  # an initialiser that counts inputs must see them as one axis
    kernel = self.param("kernel", lambda key: self.kernel_init(key, flat, jnp.float32).reshape(*inputs, *features))
    bias = self.param("bias", nn.initializers.zeros, features) if self.use_bias else None
    return affine(x, kernel, bias, self.dtype, self.num_in, self.weight_grads)


def affine(
  x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: Any, num_in: int = 1, grads: WeightGrads = "float32"
) -> jax.Array:
  """Returns x kernel + bias in dtype; the first num_in axes of the kernel are the last ones of x.

  With 16-bit products and float32 gradients of weights there are no derivatives in forward mode (jax.jvp).
  """
  x = x.astype(dtype)
  if x.dtype.itemsize < 4:
    return (_affine_exact if grads == "float32" else _affine)(x, kernel, bias, num_in)
  # One axis of rows, for the gradient too: over several XLA's CPU backend would transpose, and copy, all of x first. A
  # TPU's pads the last axes to tiles, where merging axes is a copy itself: there the axes stay as they are.
  leading, inputs = x.shape[: x.ndim - num_in], x.shape[x.ndim - num_in :]
  y = _affine(x.reshape(-1, *inputs), kernel, bias, num_in)
  return y.reshape(*leading, *y.shape[1:])


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, num_in: int) -> jax.Array:
  y = _contract(x, x.ndim - num_in, kernel.astype(x.dtype), 0, num_in)
  return y if bias is None else y + bias.astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, num_in: int):
  return _affine(x, kernel, bias, num_in), (x, kernel, bias)


def _backward(num_in: int, kept: tuple[jax.Array, jax.Array, jax.Array | None], grad: jax.Array):
  x, kernel, bias = kept
  leading = x.ndim - num_in
  # On a caller's own mesh with such axes JAX asks where the result is to lie.
  explicit = jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
  as_of = lambda like: {"out_sharding": jax.typeof(like).sharding} if explicit else {}
  grad_x = _contract(grad, leading, kernel.astype(x.dtype), num_in, kernel.ndim - num_in, **as_of(x))
  product = lambda a, b: _contract(a, 0, b, 0, leading, preferred_element_type=jnp.float32, **as_of(kernel))
  in_float32 = lambda a, b: product(a.astype(jnp.float32), b.astype(jnp.float32))
  # XLA's CPU backend has no product of two bfloat16 arrays that is float32, but for some shapes.
  grad_kernel = jax.lax.platform_dependent(x, grad, cpu=in_float32, default=product)
  grad_bias = None if bias is None else grad.sum(range(leading), dtype=jnp.float32).astype(bias.dtype)
  return grad_x, grad_kernel.astype(kernel.dtype), grad_bias


def _contract(a: jax.Array, of_a: int, b: jax.Array, of_b: int, num: int, **options: Any) -> jax.Array:
  """Returns the product over `num` axes of each, from these on."""
  axes = tuple(range(of_a, of_a + num)), tuple(range(of_b, of_b + num))
  return jax.lax.dot_general(a, b, (axes, ((), ())), **options)


_affine_exact = jax.custom_vjp(_affine, nondiff_argnums=(3,))
_affine_exact.defvjp(_forward, _backward)
