"""A batch that goes through the encoder in parts gives the gradient of the whole: same parameters, less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.plan.hlo import collectives
from jepa_jax.sharding import MeshConfig, make_mesh, merge_rows, split_rows
from tests.tiny import MLP, VIT, run_steps, start_of, tiny_batch, tiny_experiment

# SGD: Adam divides by the gradient's own size, and so turns the rounding of a gradient near 0 into a step of full size.
SGD = {"optim__name": "sgd", "optim__lr": 0.05, "optim__warmup": "0steps"}
DROPPED = {"encoder": VIT | {"drop_path": 0.3}}


def final_params(microbatch: int, mesh: MeshConfig | None = None, num_devices: int = 1, **changes):
  run = tiny_experiment(mesh, num_devices, microbatch=microbatch, **(SGD | changes))
  state, history = run_steps(run, 3)
  return jax.device_get(state.params), history


@pytest.fixture(scope="module")
def whole():
  return final_params(1, **DROPPED)


def assert_same(ours, whole, tolerance: float = 1e-5):
  for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(whole[0]), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance)
  for row_a, row_b in zip(ours[1], whole[1], strict=True):
    np.testing.assert_allclose(row_a["loss"], row_b["loss"], rtol=1e-5)


@pytest.mark.slow
def test_parts_give_the_parameters_of_the_whole_batch(whole):
  """Views, drop path, the projector's BatchNorm and SIGReg's statistics are those of the whole batch of 16."""
  assert_same(final_params(8, **DROPPED), whole)


@pytest.mark.slow
def test_parts_on_a_mesh_give_the_parameters_of_one_device(whole):
  assert_same(final_params(2, MeshConfig(data=4, fsdp=2), 8, **DROPPED), whole)


def test_parts_take_rows_of_every_device_and_move_none():
  mesh = make_mesh(MeshConfig(data=8))
  x = np.arange(32 * 4096).reshape(32, 4096).astype(np.float32)
  sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
  with jax.set_mesh(mesh):
    compiled = jax.jit(lambda x: (split_rows(x, 4), merge_rows(split_rows(x, 4)))).lower(sharded).compile()
  parts, merged = compiled(sharded)
  assert not collectives(compiled.as_text(), mesh.size)
  assert parts.shape == (4, 8, 4096) and np.array_equal(merged, x)
  np.testing.assert_array_equal(parts[0], x[::4])  # the first of each device's four rows


def test_naive_accumulation_would_be_another_objective():
  """What the two passes buy: the mean of the microbatches' own gradients points elsewhere, because SIGReg and
  BatchNorm are statistics of the batch."""
  run = tiny_experiment(encoder=MLP, objective__views__local_crops__num=0, objective__lam=0.5)
  state, batch = start_of(run), tiny_batch(run)

  def loss(params, rows):
    part = jax.tree.map(lambda x: x[rows], batch)
    keys = jax.random.split(run.key, 16)[rows]
    views = run.objective.views(keys, part)
    encoded, model_state = run.objective.encode(params, state.model_state, None, views, keys)
    return run.objective.loss(params, model_state, None, encoded, run.key, jnp.float32(0))[0]

  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree["encoder"])])
  grad = jax.jit(jax.grad(loss))
  full = flat(grad(state.params, np.arange(16)))
  naive = np.mean([flat(grad(state.params, np.arange(4 * i, 4 * i + 4))) for i in range(4)], axis=0)
  cosine = full @ naive / (np.linalg.norm(full) * np.linalg.norm(naive))
  assert cosine < 0.95


@pytest.mark.slow
def test_parts_take_less_memory():
  big = {"encoder": VIT | {"patch_size": 4}, "batch_size": 64, "objective__views__local_crops__num": 0}
  temporaries = [
    tiny_experiment(microbatch=parts, **big).compile().memory_analysis().temp_size_in_bytes for parts in (1, 8)
  ]
  assert temporaries[1] < 0.5 * temporaries[0]


def test_batch_norm_in_the_encoder_is_refused_unless_accepted_by_name():
  resnet = {"name": "resnet", "variant": "18", "stem": "cifar", "image_size": 16, "width": 4}
  with pytest.raises(ValueError, match="statistics of each microbatch.*change_objective_to_batch_norm_per_microbatch"):
    tiny_experiment(encoder=resnet, microbatch=2)
  tiny_experiment(encoder=resnet, microbatch=2, change_objective_to_batch_norm_per_microbatch=True)


@pytest.mark.parametrize("microbatch, message", [(0, "at least 1 part"), (3, "3 microbatches; the nearest: 15 or 18")])
def test_numbers_of_parts_that_cannot_be(microbatch, message):
  with pytest.raises(ValueError, match=message):
    tiny_experiment(encoder=MLP, microbatch=microbatch)
