"""Linear layers: flax's in float32; with 16-bit products the same, and gradients of weights summed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.models.linear import Linear, affine
from jepa_jax.models.transformer import MATRIX_INITS
from jepa_jax.models.vit import ViTConfig
from jepa_jax.views import example_keys
from tests.tiny import VIT, tiny_experiment

FORMS = {  # features, shape of x, axes that flax's layer contracts
  "plain": (24, (4, 6, 16), -1),
  "heads out": ((3, 2, 8), (4, 6, 16), -1),
  "heads in": (24, (4, 6, 2, 8), (-2, -1)),
  "a vector": ((2, 8), (16,), -1),
}


def both(form, dtype, init="fan_in", **options):
  features, shape, axis = FORMS[form]
  x = jax.random.normal(jax.random.key(1), shape)
  init = MATRIX_INITS[init]
  ours = Linear(features, dtype, init, num_in=1 if axis == -1 else 2, name="fc", **options)
  return x, ours, nn.DenseGeneral(features, axis, dtype=dtype, kernel_init=init, name="fc")


@pytest.mark.parametrize("init", MATRIX_INITS)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_flaxs_layer_in_float32(form, init):
  x, ours, theirs = both(form, jnp.float32, init)
  params = ours.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(0), x))
  run = lambda layer: jax.value_and_grad(lambda p, x: jnp.sin(layer.apply(p, x)).sum(), argnums=(0, 1))(params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(ours), run(theirs))


@pytest.mark.parametrize("form", FORMS)
def test_in_16_bits_values_are_flaxs_and_weights_have_exact_sums(form):
  x, ours, theirs = both(form, jnp.bfloat16)
  params = ours.init(jax.random.key(0), x)
  y, pull = jax.vjp(ours.apply, params, x)
  y_flax, pull_flax = jax.vjp(theirs.apply, params, x)
  np.testing.assert_array_equal(y.astype(jnp.float32), y_flax.astype(jnp.float32))
  grad = jax.random.normal(jax.random.key(2), y.shape).astype(y.dtype)
  (grads, grad_x), (grads_flax, grad_x_flax) = pull(grad), pull_flax(grad)
  np.testing.assert_array_equal(grad_x, grad_x_flax)

  kernel = params["params"]["kernel"]
  rounded = np.asarray(x.astype(jnp.bfloat16), np.float64).reshape(-1, _inputs(form))
  flat_grad = np.asarray(grad, np.float64).reshape(len(rounded), -1)
  exact = (rounded.T @ flat_grad).reshape(kernel.shape)
  scale = np.abs(exact).max()
  error = lambda g: np.abs(np.asarray(g["params"]["kernel"], np.float64) - exact).max() / scale
  assert error(grads) < 1e-6
  np.testing.assert_allclose(grads["params"]["bias"].ravel(), flat_grad.sum(0), rtol=1e-5, atol=1e-5)
  if len(rounded) > 1:
    assert error(grads_flax) > 1e-4  # what differentiation alone gives


def _inputs(form):
  features, shape, axis = FORMS[form]
  return shape[-1] if axis == -1 else shape[-1] * shape[-2]


def test_as_compute_the_gradients_are_those_of_differentiation():
  x, ours, theirs = both("plain", jnp.bfloat16, weight_grads="compute")
  params = ours.init(jax.random.key(0), x)
  run = lambda layer: jax.grad(lambda p: jnp.square(layer.apply(p, x).astype(jnp.float32)).sum())(params)
  jax.tree.map(np.testing.assert_array_equal, run(ours), run(theirs))


def test_no_bias():
  x, kernel = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((4, 5))
  y, pull = jax.vjp(lambda x, kernel: affine(x, kernel, None, jnp.bfloat16), x, kernel)
  grad_x, grad_kernel = pull(jnp.ones_like(y))
  assert y.dtype == grad_x.dtype == jnp.bfloat16 and grad_kernel.dtype == jnp.float32
  assert (y == 4).all() and (grad_x == 5).all() and (grad_kernel == 3).all()


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_the_sum_of_many_small_gradients_is_not_lost_in_rounding(axis_type):
  """Of 8 devices, each with a share of the batch, the sum is that of one: in bfloat16 it would differ by 1 in 256."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  x = jax.random.normal(jax.random.key(0), (512, 16))
  kernel, bias = jax.random.normal(jax.random.key(1), (16, 32)), jnp.zeros(32)
  loss = lambda kernel, x: jnp.square(affine(x, kernel, bias, jnp.bfloat16).astype(jnp.float32)).sum()
  one = jax.jit(jax.grad(loss))(kernel, x)
  rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
  eight = jax.jit(jax.grad(loss))(jax.device_put(kernel, jax.NamedSharding(mesh, jax.P())), rows)
  np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-5 * float(jnp.abs(one).max()))
  assert (one != one.astype(jnp.bfloat16)).any()  # as a sum that was rounded would be


def test_kernels_may_be_sharded_on_a_mesh_with_explicit_axes():
  mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
  x, kernel = jax.random.normal(jax.random.key(0), (32, 16)), jax.random.normal(jax.random.key(1), (16, 32))
  loss = lambda kernel, x: jnp.square(affine(x, kernel, None, jnp.bfloat16).astype(jnp.float32)).sum()
  put = lambda a, *spec: jax.device_put(a, jax.NamedSharding(mesh, jax.P(*spec)))
  one = jax.jit(jax.grad(loss, argnums=(0, 1)))(kernel, x)
  eight = jax.jit(jax.grad(loss, argnums=(0, 1)))(put(kernel, None, "fsdp"), put(x, "data"))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * float(jnp.abs(a).max())), one, eight
  )


def test_gradients_have_the_type_of_their_parameters_and_float32_has_forward_mode():
  x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5), jnp.bfloat16)
  assert jax.grad(lambda k: affine(x, k, None, jnp.bfloat16).astype(jnp.float32).sum())(kernel).dtype == jnp.bfloat16
  _, tangent = jax.jvp(lambda k: affine(x, k, None, jnp.float32), (jnp.ones((4, 5)),), (jnp.ones((4, 5)),))
  assert (tangent == 4).all() and tangent.shape == (2, 3, 5)


def test_every_kernel_of_a_vit_has_a_gradient_that_was_not_rounded():
  encoder = ViTConfig(image_size=16, patch_size=4, width=32, depth=2, num_heads=2, compute_dtype="bfloat16").make(3)
  x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  variables = encoder.init(jax.random.key(1), x)
  grads = jax.jit(jax.grad(lambda v: jnp.sin(encoder.apply(v, x).pooled_BxD).sum()))(variables)
  kernels = [(path, g) for path, g in jax.tree_util.tree_leaves_with_path(grads) if "kernel" in str(path[-1])]
  assert len(kernels) == 5 and all((g != g.astype(jnp.bfloat16)).any() for _, g in kernels)


def test_views_of_all_sizes_go_through_one_scan():
  run = tiny_experiment(encoder=VIT)
  keys = jax.eval_shape(lambda: example_keys(jax.random.key(0), jnp.arange(run.cfg.batch_size)))
  views = jax.eval_shape(run.objective.views, keys, run.abstract_batch)
  assert len(views.groups) == 2
  state = run.abstract_state
  encode = lambda params, views, keys: run.objective.encode(params, state.model_state, None, views, keys)[0]
  assert str(jax.make_jaxpr(encode)(state.params, views, keys)).count("scan[") == 1
