"""MMCR on the one loop: it learns, its momentum variant starts as the plain one, no mesh changes it."""

import jax
import numpy as np
import pytest

from jepa_jax import losses
from jepa_jax.config import build_config
from jepa_jax.sharding import MeshConfig
from jepa_jax.step import numbers
from tests.tiny import MLP, TINY, run_steps, start_of, tiny_batch, tiny_experiment

MMCR = {
  "name": "mmcr",
  "projector": {"hidden": (32,), "out": 8},
  "views": TINY["objective"]["views"] | {"local_crops": {"num": 0, "size_px": 0, "scale": (0.05, 0.3)}},
}
SGD = {"optim__name": "sgd", "optim__lr": 0.01, "optim__warmup": "0steps"}


def mmcr_experiment(mesh=None, num_devices=1, **changes):
  return tiny_experiment(mesh, num_devices, **({"encoder": MLP, "objective": MMCR} | changes))


@pytest.fixture(scope="module")
def plain():
  run = mmcr_experiment(**SGD)
  return run, *run_steps(run, 3)


def test_loss_falls_on_a_fixed_batch_and_is_bounded():
  run = mmcr_experiment(optim__lr=1e-2, total="40steps")
  compiled, state, rows = run.compile(), start_of(run), []
  for _ in range(40):
    state, metrics = compiled(state, tiny_batch(run), run.key)
    rows.append(numbers(metrics))
  for name in ("loss", "percent_error"):
    first, last = (np.mean([r[name] for r in part]) for part in (rows[:5], rows[-5:]))
    assert last < first
  assert all(r["loss"] >= -losses.nuclear_norm_bound(16, 8) for r in rows)
  for r in rows:
    np.testing.assert_allclose(1 - r["percent_error"], r["alignment"] * r["flatness"], rtol=1e-5)


@pytest.mark.slow
def test_momentum_variant_starts_as_the_plain_one_and_then_averages_the_networks(plain):
  """Target = copy at the start, so the centroids are the same; the gradient is half, since half of it is online."""
  run = mmcr_experiment(objective=MMCR | {"momentum": 0.75}, **SGD)
  start = jax.device_get(start_of(run))
  state, rows = run_steps(run, 1)
  np.testing.assert_allclose(rows[0]["loss"], plain[2][0]["loss"], rtol=1e-5)
  np.testing.assert_allclose(rows[0]["grad_norm"], plain[2][0]["grad_norm"] / 2, rtol=1e-4)
  for old, average, new in zip(*(jax.tree.leaves(t) for t in (start.params, state.target, state.params)), strict=True):
    np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, atol=1e-6)
  variables = run.objective.variables(state.params, state.model_state, state.target)
  assert variables["image"]["params"] is state.params["encoder"]


@pytest.mark.slow
def test_eight_devices_and_microbatches_give_the_parameters_of_one(plain):
  changes = SGD | {"objective": MMCR | {"momentum": 0.9, "lam": 0.1}}
  one, _ = run_steps(mmcr_experiment(**changes), 2)
  many, _ = run_steps(mmcr_experiment(MeshConfig(data=2, fsdp=4), 8, microbatch=2, **changes), 2)
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_lars_recipe_of_the_paper_moves_every_parameter():
  lars = {"optim": {"name": "lars", "lr": 0.6, "lr_batch": 256, "weight_decay": 1e-6, "warmup": "0steps"}}
  run = mmcr_experiment(**lars)
  before = jax.device_get(start_of(run).params)
  state, rows = run_steps(run, 2)
  assert np.isfinite(rows[-1]["loss"])
  assert all(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params)))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"lam": -1.0}, "lam=-1.0 must be 0"),
    ({"momentum": 1.0}, r"momentum=1.0 lies in \[0, 1\)"),
    ({"views": MMCR["views"] | {"global_crops": {"num": 1, "size_px": 16, "scale": (0.3, 1.0)}}}, "at least 2"),
    ({"nuclear": "gram"}, "must be one of auto, svd"),
    ({"name": "mcmr"}, "did you mean 'mmcr'"),
  ],
)
def test_settings_that_cannot_be_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    build_config(TINY | {"encoder": MLP, "objective": MMCR | changes})
