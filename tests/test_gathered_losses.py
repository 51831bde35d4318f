"""Losses inside shard_map and pmap are those of the global batch, and so are their gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jepa_jax import losses

V, N, F, D, WAYS = 3, 16, 6, 8, 4
DIRECTIONS = losses.slice_directions(jax.random.key(0), D, 32)
# name -> (loss of embeddings (N, V, D), with the devices' axis or None)
LOSSES = {
  "lejepa": lambda z, axis: losses.lejepa(z.swapaxes(0, 1), DIRECTIONS, 2, 0.1, axis_name=axis),
  "sliced": lambda z, axis: (losses.sliced(z.swapaxes(0, 1), DIRECTIONS, axis_name=axis), {}),
  "sigreg": lambda z, axis: (losses.sigreg(z[:, 0], jax.random.key(1), 32, axis_name=axis), {}),
  "anderson_darling": lambda z, axis: (losses.sliced(z[:, 0], DIRECTIONS, losses.anderson_darling, axis), {}),
  "mmcr": lambda z, axis: losses.mmcr(z, lam=0.1, axis_name=axis),
  "mmcr with momentum": lambda z, axis: losses.mmcr(z[:, :2], z[:, 2:], reduction="bound", axis_name=axis),
}


def inputs():
  rng = np.random.default_rng(0)
  return rng.standard_normal((N, V, F)).astype(np.float32), rng.standard_normal((F, D)).astype(np.float32)


def whole(name):
  """Returns (loss, terms), gradient to the weights of the layer before, of the whole batch."""
  x, weight = inputs()
  loss = lambda weight: LOSSES[name](jnp.asarray(x) @ weight, None)
  return jax.value_and_grad(loss, has_aux=True)(jnp.asarray(weight))


def check(name, found):
  (loss, terms), grad = found
  (expected, expected_terms), expected_grad = whole(name)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  for term, value in expected_terms.items():
    np.testing.assert_allclose(terms[term], value, rtol=1e-4, atol=1e-6, err_msg=term)
  np.testing.assert_allclose(grad, expected_grad, rtol=1e-3, atol=1e-5 * float(jnp.abs(expected_grad).max()))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(name, check_vma):
  """The gradient is that of one loss; without JAX's check of what varies, the mean over devices is, as in pmap."""
  x, weight = inputs()
  mesh, spec = Mesh(np.array(jax.devices()[:WAYS]), ("data",)), PartitionSpec

  def of_shard(x, weight):
    loss = lambda weight: LOSSES[name](x @ weight, "data")
    found, grad = jax.value_and_grad(loss, has_aux=True)(weight)
    return found, grad if check_vma else jax.lax.pmean(grad, "data")

  specs = dict(mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec(), check_vma=check_vma)
  check(name, jax.jit(jax.shard_map(of_shard, **specs))(x, weight))


@pytest.mark.parametrize("name", ["lejepa", "mmcr"])
def test_inside_pmap_with_the_mean_of_the_gradients(name):
  x, weight = inputs()

  @functools.partial(jax.pmap, axis_name="batch", in_axes=(0, None), devices=jax.devices()[:WAYS])
  def of_device(x, weight):
    loss = lambda weight: LOSSES[name](x @ weight, "batch")
    found, grad = jax.value_and_grad(loss, has_aux=True)(weight)
    return found, jax.lax.pmean(grad, "batch")

  out = of_device(x.reshape(WAYS, -1, V, F), weight)
  for device in range(WAYS):
    check(name, jax.tree.map(lambda leaf, device=device: leaf[device], out))


def test_without_the_axis_the_loss_of_a_shard_is_another():
  """Why it is asked for: SIGReg grows with the number of samples that it sees."""
  x, weight = inputs()
  z = x[:, 0] @ weight
  assert abs(losses.sliced(z[: N // WAYS], DIRECTIONS) - losses.sliced(z, DIRECTIONS)) > 0.5


@pytest.mark.parametrize("shape", [(256, 2, 8), (64, 10, 8), (32, 8, 8)])
def test_swapped_axes_are_refused(shape):
  z = jnp.ones(shape)
  for loss in (
    lambda z: losses.lejepa(z, DIRECTIONS, 2, 0.1),
    lambda z: losses.sliced(z, DIRECTIONS),
    lambda z: losses.mmcr(z.swapaxes(0, 1)),
  ):
    with pytest.raises(ValueError, match=f"{shape[0]} views of {shape[1]} samples: the first two axes are swapped"):
      loss(z)
    assert np.isfinite(jax.tree.leaves(loss(z.swapaxes(0, 1)))[0])
