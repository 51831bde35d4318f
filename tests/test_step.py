"""The step is pure, compiles once, donates its state, and its onlookers leave the encoder alone."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.experiment import make_experiment
from jepa_jax.models import EncoderOutput
from jepa_jax.objectives.lejepa import LeJEPA
from jepa_jax.sharding import Rule, replicated
from jepa_jax.step import ProbeConfig, init_state, make_step, numbers, step_keys
from jepa_jax.views import example_keys
from tests.tiny import MLP, optimiser_of, run_steps, start_of, tiny_batch, tiny_experiment


@pytest.fixture(scope="module")
def run():
  return tiny_experiment(encoder=MLP, objective__views__local_crops__num=0)


def params_equal(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_same_state_batch_and_key_give_the_same_bits(run):
  compiled = run.compile()
  (a, history_a), (b, history_b) = run_steps(run, 2, compiled), run_steps(run, 2, compiled)
  assert params_equal(a.params, b.params) and history_a[-1]["loss"] == history_b[-1]["loss"]


def test_loss_falls_on_a_fixed_batch(run):
  compiled, state = run.compile(), start_of(run)
  losses = []
  for _ in range(6):
    state, metrics = compiled(state, tiny_batch(run), run.key)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]


def test_online_probe_leaves_the_encoder_bit_identical(run):
  labels = {"label": jnp.full((run.cfg.batch_size,), 3, jnp.int32)}
  compiled, batch = run.compile(), tiny_batch(run)
  with_labels, _ = compiled(start_of(run), batch, run.key)
  other_labels, _ = compiled(start_of(run), batch | jax.device_put(labels, batch["label"].sharding), run.key)
  fast_probe = make_step(run.objective, optimiser_of(run), ProbeConfig(lr=10.0), run.lr)
  fast, _ = jax.jit(fast_probe)(start_of(run), batch, run.key)
  assert params_equal(with_labels.params, other_labels.params)
  assert params_equal(with_labels.params, fast.params)
  assert not params_equal(with_labels.probe["params"], other_labels.probe["params"])
  assert not params_equal(with_labels.probe["params"], fast.probe["params"])


def test_gradient_without_any_probe_is_the_same(run):
  """The encoder's update restated from the objective alone, with no probe and no statistics in the program."""
  batch, state = tiny_batch(run), start_of(run)

  def update(state, batch):
    keys = step_keys(run.key, state.step)
    row_B = jnp.arange(run.cfg.batch_size)
    views = run.objective.views(example_keys(keys.views, row_B), batch)

    def loss_fn(params):
      keys_B = example_keys(keys.networks, row_B)
      encoded, model_state = run.objective.encode(params, state.model_state, None, views, keys_B)
      return run.objective.loss(params, model_state, None, encoded, keys.loss, jnp.float32(0))[0]

    grads = jax.grad(loss_fn)(state.params)
    return jax.tree.map(jnp.add, state.params, optimiser_of(run).update(grads, state.opt_state, state.params)[0])

  alone = jax.jit(update)(state, batch)
  full, _ = run.compile()(start_of(run), batch, run.key)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(full.params)):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_unlabelled_images_do_not_train_the_probe(run):
  batch = tiny_batch(run)
  unlabelled = batch | {"label": jnp.full_like(batch["label"], -1)}
  state, metrics = run.compile()(start_of(run), unlabelled, run.key)
  assert np.isnan(numbers(metrics)["probe_accuracy"]) and float(jnp.abs(state.probe["params"]["bias"]).max()) == 0


def test_no_recompilation_after_the_first_step(run):
  state = start_of(run)
  step = jax.jit(
    make_step(run.objective, optimiser_of(run), run.cfg.probe, run.lr),
    out_shardings=(run.shardings, replicated(run.mesh)),
  )
  with jax.set_mesh(run.mesh):
    for i in range(4):
      state, _ = step(state, tiny_batch(run, i), run.key)
  assert step._cache_size() == 1


def test_state_is_donated(run):
  state = start_of(run)
  run.compile()(state, tiny_batch(run), run.key)
  assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_weight_average_follows_the_parameters_after_the_optimiser():
  averaged = tiny_experiment(encoder=MLP, objective__views__local_crops__num=0, objective__weight_average=0.75)
  start = jax.device_get(start_of(averaged))
  state, _ = run_steps(averaged, 1)
  assert state.target.keys() == {"encoder"}  # the projector's average nobody would read
  trees = (start.params["encoder"], state.target["encoder"], state.params["encoder"])
  for t0, t1, p1 in zip(*map(jax.tree.leaves, trees), strict=True):
    np.testing.assert_allclose(t1, 0.75 * t0 + 0.25 * p1, rtol=1e-5, atol=1e-7)
  variables = averaged.objective.variables(state.params, state.model_state, state.target)
  assert variables["image"]["params"] is state.target["encoder"]


@pytest.mark.slow
def test_feature_statistics_leave_the_encoder_bit_identical(run):
  batch = tiny_batch(run)
  measured, never = (
    jax.jit(make_step(run.objective, optimiser_of(run), ProbeConfig(spectrum_every=n), run.lr))(
      start_of(run), batch, run.key
    )
    for n in (1, 10**6)
  )
  assert not np.isnan(numbers(measured[1])["rankme"]) and np.isnan(numbers(never[1])["rankme"])
  assert params_equal(measured[0].params, never[0].params)


@pytest.mark.slow
def test_objective_takes_a_module_of_the_users_own():
  """Anything with init and apply that maps a batch to vectors: here a strided convolution written on the spot."""

  class Mine(nn.Module):
    rules = (Rule(r"kernel$", (None, None, None, "embed"), decays=True), Rule(r"bias$"))

    @nn.compact
    def __call__(self, images_BxHxWxC, train=False):
      x = nn.relu(nn.Conv(8, (4, 4), (4, 4))(images_BxHxWxC)).mean((1, 2))
      return EncoderOutput(x, None, x)

  base = tiny_experiment(encoder=MLP, objective__views__local_crops__num=0)
  mine = LeJEPA(base.cfg.objective, Mine(), base.objective.pixels)
  batch = tiny_batch(base)
  state = init_state(base.key, batch, mine, optimiser_of(base), base.cfg.probe, 10)
  step = jax.jit(make_step(mine, optimiser_of(base), base.cfg.probe, base.lr))
  losses = []
  for _ in range(4):
    state, metrics = step(state, batch, base.key)
    losses.append(float(metrics["loss"]))
  assert state.params["encoder"].keys() == {"Conv_0"} and losses[-1] < losses[0]


def test_average_of_weights_refuses_an_encoder_with_batch_norm():
  resnet = {"name": "resnet", "variant": "18", "stem": "cifar", "width": 8, "image_size": 16}
  with pytest.raises(ValueError, match="weight_average=0.9 with an encoder that has BatchNorm"):
    tiny_experiment(encoder=resnet, objective__views__local_crops__num=0, objective__weight_average=0.9)


def test_rankme_is_measured_on_its_steps_only():
  run = tiny_experiment(encoder=MLP, objective__views__local_crops__num=0, probe__spectrum_every=2)
  _, history = run_steps(run, 4)
  assert [np.isnan(h["rankme"]) for h in history] == [True, False, True, False]
  assert 1 <= history[1]["rankme"] <= 16 and all(h["feature_std"] > 0 for h in history)
  never = tiny_experiment(encoder=MLP, objective__views__local_crops__num=0, probe__spectrum_every=0)
  assert run_steps(never, 1)[1][0].keys().isdisjoint({"rankme", "uniformity"})


@pytest.mark.parametrize(
  "encoder",
  [
    pytest.param(
      {"name": "resnet", "variant": "18", "stem": "cifar", "width": 8, "image_size": 16},
      marks=pytest.mark.slow,
      id="resnet",
    ),
    pytest.param({"name": "convnet", "widths": (8, 16), "image_size": 16}, id="convnet"),
  ],
)
def test_objective_takes_any_encoder(encoder):
  run = tiny_experiment(encoder=encoder, objective__views__local_crops__num=0)
  state, history = run_steps(run, 2)
  assert np.isfinite(history[-1]["loss"])
  if encoder["name"] == "resnet":  # running statistics move with the state
    averages = (s.model_state["encoder"] for s in (state, start_of(run)))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), *averages)
    assert all(jax.tree.leaves(moved))


def test_state_is_frozen(run):
  with pytest.raises(dataclasses.FrozenInstanceError):
    start_of(run).step = 3


@pytest.mark.slow
def test_a_healthy_step_holds_no_nan():
  """JAX_DEBUG_NANS=1 raises at the first program that returns one: what was not measured must not look like it."""
  run = tiny_experiment(encoder=MLP, objective__views__local_crops__num=0, probe__spectrum_every=50)
  unlabelled = tiny_batch(run) | {"label": jnp.full(run.cfg.batch_size, -1)}
  _, metrics = run.compile()(start_of(run), unlabelled, run.key)
  assert all(np.isfinite(value) for value in metrics.values())
  named = numbers(metrics)
  assert np.isnan(named["rankme"]) and np.isnan(named["probe_loss"]) and np.isfinite(named["loss"])


def test_the_same_settings_and_mesh_are_one_experiment_and_a_list_in_the_settings_is_no_error(run):
  again = lambda cfg: make_experiment(cfg, run.mesh, 64, 10)
  assert again(run.cfg) is again(run.cfg) is not again(dataclasses.replace(run.cfg, seed=1))
  with_list = dataclasses.replace(run.cfg, encoder=dataclasses.replace(run.cfg.encoder, widths=[32, 16]))
  assert again(with_list) is not again(with_list)
