"""The guard skips steps whose loss is not finite or whose gradient is a spike, and changes nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jepa_jax.step import GuardConfig, make_step
from tests.tiny import MLP, optimiser_of, start_of, tiny_batch, tiny_experiment


@pytest.fixture(scope="module")
def run():
  return tiny_experiment(encoder=MLP, objective__views__local_crops__num=0)


class Poisoned:
  """The objective, whose loss is multiplied by what stands in the first pixel: 0 leaves it, 1 is NaN, else a factor."""

  def __init__(self, objective):
    self._objective = objective

  def __getattr__(self, name):
    return getattr(self._objective, name)

  def encode(self, params, state, target, views, keys_B):
    encoded, state = self._objective.encode(params, state, target, views["images"], keys_B)
    return (encoded, views["poison"]), state

  def views(self, keys_B, batch):
    return {"images": self._objective.views(keys_B, batch), "poison": batch["poison"]}

  def loss(self, params, state, target, encoded, key, progress):
    encoded, poison = encoded
    loss, rest = self._objective.loss(params, state, target, encoded, key, progress)
    return loss * poison[0], rest


def steps_with(run, guard: GuardConfig, factors: list[float]):
  step = jax.jit(make_step(Poisoned(run.objective), optimiser_of(run), run.cfg.probe, run.lr, guard=guard))
  state, states, rows = start_of(run), [], []
  for i, factor in enumerate(factors):
    batch = tiny_batch(run, i) | {"poison": jnp.full((run.cfg.batch_size,), factor, jnp.float32)}
    state, metrics = step(state, batch, run.key)
    states.append(state)
    rows.append(metrics)
  return states, rows


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_nan_step_changes_nothing_but_the_step_number_and_is_counted(run):
  states, rows = steps_with(run, GuardConfig(skip_nonfinite=True), [1, float("nan"), 1])
  for name in ("params", "opt_state", "model_state", "probe"):
    assert same(getattr(states[0], name), getattr(states[1], name))
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(getattr(states[2], name)))
  assert [int(s.step) for s in states] == [1, 2, 3]  # the data go on
  assert [int(r["skipped"]) for r in rows] == [0, 1, 1] and [int(r["skipped_in_row"]) for r in rows] == [0, 1, 0]
  assert not same(states[1].params, states[2].params)


def test_a_step_whose_update_is_not_finite_is_skipped_too(run):
  """The loss and the gradient are finite, and of the parameters before the update."""
  explode = optax.GradientTransformation(
    lambda _: (), lambda grads, state, _: (jax.tree.map(lambda g: g / 0, grads), ())
  )
  step = jax.jit(make_step(run.objective, explode, run.cfg.probe, run.lr, guard=GuardConfig(skip_nonfinite=True)))
  before = dataclasses.replace(start_of(run), opt_state=())
  after, metrics = step(before, tiny_batch(run), run.key)
  assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and not np.isfinite(metrics["param_norm"])
  assert same(after.params, before.params) and int(metrics["skipped"]) == 1


@pytest.mark.slow
def test_without_a_bad_step_the_guard_leaves_no_trace():
  """With SGD: AdamW makes whole steps of the rounding of a gradient that is zero, as of a bias before BatchNorm."""
  sgd = {"name": "sgd", "lr": 0.1, "warmup": "0steps"}
  run = tiny_experiment(encoder=MLP, objective__views__local_crops__num=0, optim=sgd)
  plain, _ = steps_with(run, GuardConfig(), [1, 1])
  guarded, _ = steps_with(run, GuardConfig(skip_nonfinite=True, skip_spikes=50.0), [1, 1])
  for a, b in zip(jax.tree.leaves(plain[-1].params), jax.tree.leaves(guarded[-1].params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)  # another program: its rounding differs


@pytest.mark.slow
def test_a_spike_is_skipped_once_the_average_means_something(run):
  guard = GuardConfig(skip_nonfinite=True, skip_spikes=20.0)
  states, rows = steps_with(run, guard, [1e4] + [1] * 60 + [1e4, 1])
  assert int(rows[0]["skipped"]) == 0  # nothing to compare with yet
  assert int(rows[-2]["skipped_in_row"]) == 1 and same(states[-3].params, states[-2].params)
  assert int(rows[-1]["skipped_in_row"]) == 0


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"skip_spikes": 5.0}, "needs skip_nonfinite=True"),
    ({"skip_spikes": 0.5, "skip_nonfinite": True}, "a multiple above 1"),
    ({"max_in_row": 0}, "at least 1"),
  ],
)
def test_settings_that_cannot_be_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    GuardConfig(**settings)
