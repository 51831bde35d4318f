"""One device = eight devices, whatever the mesh; and the compiled program moves no more than one weight at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_jax import losses
from jepa_jax.plan.hlo import collectives
from jepa_jax.sharding import (
  MeshConfig,
  batch_ways,
  check_batch,
  constrain,
  make_mesh,
  merge_rows,
  report,
  split_rows,
)
from tests.networks import TINY, images, normal, random_variables
from tests.tiny import run_steps, tiny_experiment

MESHES = {
  "dp": MeshConfig(),
  "dp x fsdp": MeshConfig(data=2, fsdp=4),
  "dp x fsdp x tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}


# Plain SGD, because AdamW's first steps move a parameter whose gradient is rounding noise as far as any other.
SGD = {"optim__name": "sgd", "optim__lr": 0.1}


@pytest.fixture(scope="module")
def single():
  return run_steps(tiny_experiment(**SGD), 3)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def sharded(request):
  run = tiny_experiment(MESHES[request.param], num_devices=8, **SGD)
  compiled = run.compile()
  return run, compiled, run_steps(run, 3, compiled)


@pytest.mark.slow
def test_losses_and_parameters_after_three_steps_equal_the_single_devices(single, sharded):
  state, history = single
  _, _, (state_8, history_8) = sharded
  for a, b in zip(history, history_8):
    for key in ("loss", "inv", "sigreg", "grad_norm", "probe_loss", "feature_std"):
      np.testing.assert_allclose(a[key], b[key], rtol=2e-5, err_msg=key)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(state_8.params)):
    np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))


def test_largest_collective_is_no_bigger_than_the_largest_parameter(sharded):
  run, compiled, _ = sharded
  largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.abstract_state.params))
  views = 16 * 2 * 16 * 16 * 4  # what must never travel: the batch's global views
  found = collectives(compiled.as_text(), run.mesh.size)
  assert found, "a sharded step without any collective cannot have a global loss"
  assert max(c.largest_bytes for c in found) <= largest < views


def test_parameters_and_their_moments_are_split_under_fsdp():
  run = tiny_experiment(MeshConfig(data=1, fsdp=8), num_devices=8)
  state = run.init()
  kernel = state.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
  moment = state.opt_state[1][0].mu["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 8 == kernel.size == moment.addressable_shards[0].data.size * 8


def test_report_names_the_largest_parameters_and_bytes_per_device():
  run = tiny_experiment(MeshConfig(data=1, fsdp=8), num_devices=8)
  text = report(run.abstract_state.params, num_rows=3)
  assert "mlp/fc" in text and "fsdp" in text and "MB per device" in text and "smaller" in text


@pytest.mark.parametrize(
  "mesh, message",
  [
    (MeshConfig(data=3), "does not multiply out to the 8 devices"),
    (MeshConfig(data=-1, fsdp=3), "does not multiply out to the 8 devices"),
    (MeshConfig(data=-1, fsdp=-1), "at most one is -1"),
    (MeshConfig(data=0), "every axis is positive"),
  ],
)
def test_mesh_that_does_not_multiply_out_is_an_error(mesh, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(mesh)


def test_tensor_axis_that_spans_hosts_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  monkeypatch.setattr(jax, "local_device_count", lambda: 2)
  with pytest.raises(ValueError, match="tensor=4 spans hosts of 2 devices"):
    make_mesh(MeshConfig(data=-1, tensor=4))


def test_batch_that_does_not_divide_names_the_nearest():
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  check_batch(64, mesh)
  with pytest.raises(ValueError, match="the nearest: 56 or 64"):
    check_batch(60, mesh)
  with pytest.raises(ValueError, match="the nearest: 8"):
    check_batch(5, mesh)


def test_collectives_are_read_from_the_program_text():
  text = """
ENTRY %main (x: f32[2,8]) -> f32[] {
  %a = f32[16,8]{1,0} all-gather(f32[2,8]{1,0} %x), dimensions={0}
  %b = (f32[4]{0}, bf16[100]{0}) all-reduce(f32[4] %y, bf16[100] %z), to_apply=%add
  %c = f32[] add(f32[] %p, f32[] %q)
}
"""
  assert [(c.kind, c.largest_bytes) for c in collectives(text, 8)] == [("all-gather", 512), ("all-reduce", 200)]


def callers_mesh(*names):
  return jax.make_mesh((2, 4), names, axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("names", [("x", "y"), ("data", "y")], ids=str)
def test_losses_and_encoders_are_the_same_under_a_mesh_of_the_callers_own(names):
  mmcr = jax.value_and_grad(lambda z: losses.mmcr(z, lam=0.5, method="newton_schulz")[0])
  encode = lambda variables, x: TINY.make(3).apply(variables, x).pooled_BxD
  z_BxKxD, variables, x = normal(0, 16, 3, 8), random_variables(TINY), images(8)
  (value, gradient), pooled_BxD = jax.jit(mmcr)(z_BxKxD), jax.jit(encode)(variables, x)
  with jax.set_mesh(mesh := callers_mesh(*names)):
    rows = NamedSharding(mesh, P(names))
    value_8, gradient_8 = jax.jit(mmcr)(jax.device_put(z_BxKxD, rows))
    pooled_8 = jax.jit(encode)(variables, jax.device_put(x, rows))
  assert float(value_8) == pytest.approx(float(value), rel=1e-5)
  np.testing.assert_allclose(gradient_8, gradient, atol=1e-5 * np.abs(gradient).max())
  np.testing.assert_allclose(pooled_8, pooled_BxD, rtol=1e-4, atol=1e-5)


def test_only_the_axes_of_ours_that_a_mesh_has_constrain():
  x = np.zeros((8, 8), np.float32)
  place = lambda x: constrain(x, "batch", "mlp")
  with jax.set_mesh(mesh := callers_mesh("x", "y")):
    by_column = jax.device_put(x, NamedSharding(mesh, P(None, "y")))
    assert constrain(by_column, "batch", None) is by_column and batch_ways(mesh) == 1
    parts = split_rows(jnp.arange(8), 4)
    np.testing.assert_array_equal(merge_rows(parts), np.arange(8))
  with jax.set_mesh(mesh := callers_mesh("data", "y")):
    by_column = jax.device_put(x, NamedSharding(mesh, P(None, "y")))
    assert jax.jit(place)(by_column).sharding.is_equivalent_to(NamedSharding(mesh, P("data", "y")), 2)
    assert batch_ways(mesh) == 2
