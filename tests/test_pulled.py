"""The pull towards the encoder that a run started from: its value, what it does, and that it stays through a resume."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import checkpoint
from jepa_jax.evaluate import evaluate
from jepa_jax.objectives import Imagines, Predicts, Pulled
from jepa_jax.runs import open_run
from jepa_jax.sharding import MeshConfig
from jepa_jax.train import Start, train
from jepa_jax.views import center_view
from tests.tiny import VIT, run_steps, start_of, tiny_batch, tiny_config, tiny_experiment

PULL = {"pull_to_start": 2.0}
RESNET = {"name": "resnet", "variant": "18", "stem": "cifar", "image_size": 16, "width": 8}
CROP = {"views": {"global_crops": {"num": 1, "size_px": 32, "scale": (0.3, 1.0)}}}
PREDICTOR = {"predictor": {"depth": 1, "width": 16, "num_heads": 2}}
PATCHES = {"encoder": VIT | {"image_size": 32, "patch_size": 4}, "data__canvas_px": 32}
IJEPA = PATCHES | {"objective": {"name": "ijepa", "masks": {"kind": "uniform"}} | CROP | PREDICTOR}
START = "start"


def shifted(state, amount: float):
  """The state with an encoder that is no more the one of the start."""
  rng = np.random.default_rng(0)
  moved = jax.tree.map(lambda x: x + amount * rng.normal(size=x.shape).astype(x.dtype), state.params["encoder"])
  return dataclasses.replace(state, params={**state.params, "encoder": moved})


def cosines(run, state, batch):
  """The definition: evaluation's features of the whole image, by the encoder of now and by that of the start."""
  side = run.cfg.encoder.image_size
  view = center_view(batch, (side, side), run.objective.pixels, 1.0, run.objective.interpolation)
  apply = run.objective.networks()["image"].apply_fn
  z, z0 = (
    np.asarray(apply({"params": params, "batch_stats": averages}, view).pooled_BxD, np.float64)
    for params, averages in (
      (state.params["encoder"], state.model_state.get("encoder", {})),
      (state.model_state[START], state.model_state.get("start_averages", {})),
    )
  )
  return (z * z0).sum(1) / np.linalg.norm(z, axis=1) / np.linalg.norm(z0, axis=1)


@pytest.mark.parametrize(
  "changes", [{}, IJEPA, {"encoder": RESNET, "objective__views": None}], ids=["vit", "ijepa", "bn"]
)
def test_loss_is_the_methods_and_the_weight_times_one_minus_the_mean_cosine(changes):
  changes = dict(changes)
  if "objective__views" in changes:
    changes["objective__views"] = {"global_crops": {"num": 2, "size_px": 16, "scale": (0.3, 1.0)}}
  run = tiny_experiment(**changes, **PULL)
  batch, state = tiny_batch(run), shifted(start_of(run), 0.3)
  keys_B = jax.random.split(jax.random.key(0), run.cfg.batch_size)

  @jax.jit
  def both(state, batch):
    """Of the objective and of the one within it, of the same views."""
    views, state_of = run.objective.views(keys_B, batch), (state.params, state.model_state, state.target)
    found = []
    for objective, seen in ((run.objective, views), (run.objective.inner, views[0])):
      encoded, new = objective.encode(*state_of, seen, keys_B)
      found.append(objective.loss(state.params, new, state.target, encoded, run.key, jnp.float32(0)))
    return found

  (loss, (aux, _)), (own, _) = both(state, batch)
  wanted = cosines(run, state, batch).mean()
  assert wanted < 0.99
  np.testing.assert_allclose(aux.metrics["start_cosine"], wanted, atol=1e-5)
  np.testing.assert_allclose(loss, own + 2.0 * (1 - wanted), rtol=1e-5)


def test_first_step_is_as_without_it():
  """Both encoders are the same: the pull is 0, and at the cosine's maximum so is its gradient."""
  pulled, plain = tiny_experiment(**PULL, optim__name="sgd"), tiny_experiment(optim__name="sgd")
  (a, history), (b, without) = run_steps(pulled, 1), run_steps(plain, 1)
  np.testing.assert_allclose(history[0]["start_cosine"], 1, atol=1e-6)
  np.testing.assert_allclose(history[0]["loss"], without[0]["loss"], atol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a.params, b.params)


def test_a_stronger_pull_keeps_the_encoder_nearer():
  near = [run_steps(tiny_experiment(pull_to_start=w), 6)[1][-1]["start_cosine"] for w in (1e-3, 10.0)]
  assert near[0] < near[1] - 1e-3, near


def test_start_stays_what_it_was_and_exactness_holds_over_devices_and_microbatches():
  changes = PULL | {"optim__name": "sgd", "optim__lr": 0.1}
  one, history = run_steps(tiny_experiment(**changes), 3)
  first = start_of(tiny_experiment(**changes)).params["encoder"]
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(one.model_state[START]), jax.device_get(first))
  other = tiny_experiment(MeshConfig(data=2, fsdp=2, tensor=2), num_devices=8, **changes, microbatch=4)
  state, there = run_steps(other, 3)
  np.testing.assert_allclose([m["loss"] for m in history], [m["loss"] for m in there], rtol=2e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one.params, state.params)


def test_methods_stay_what_they_can_do():
  """Protocols that evaluation asks for are found in the wrapped objective, in every Python."""
  run = tiny_experiment(**IJEPA, **PULL)
  assert isinstance(run.objective, Pulled) and isinstance(run.objective, Predicts)
  colors = {"color": {"brightness": 0.4, "p": 1.0}}
  iwm = IJEPA["objective"] | {"name": "iwm", "source": colors["color"], "predictor": PREDICTOR["predictor"]}
  world_model = tiny_experiment(
    **PATCHES | {"objective": iwm, "data__channels": 3, "data__mean": (0.5,) * 3} | {"data__std": (0.5,) * 3}, **PULL
  )
  assert isinstance(world_model.objective, Imagines)
  assert not isinstance(tiny_experiment(**PULL).objective, Predicts)


def test_a_run_begins_resumes_and_is_evaluated(tmp_path):
  source, pulled = tmp_path / "source", tmp_path / "pulled"
  train(tiny_config(total="2steps"), source)
  here = tiny_config(seed=1, **PULL)
  train(here, tmp_path / "whole", Start(init_from=str(source)))
  train(here, pulled, Start(init_from=str(source)))
  start = open_run(source).read({"params": {"encoder": tiny_experiment().abstract_state.params["encoder"]}})
  kept = {"state": {START: tiny_experiment(**PULL).abstract_state.model_state[START]}}
  for step in checkpoint.steps(pulled):
    found = open_run(pulled, step).read(kept)["state"][START]
    jax.tree.map(np.testing.assert_array_equal, found, start["params"]["encoder"])
  shutil.rmtree(pulled / "checkpoints" / "6")  # it goes on from step 4
  (pulled / "complete.json").unlink(missing_ok=True)
  train(here, pulled)
  networks = {"params": tiny_experiment(**PULL).abstract_state.params}
  a, b = (open_run(folder, 6).read(networks) for folder in (tmp_path / "whole", pulled))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert evaluate(str(pulled), None, {}, ("knn",), baselines=False, show=False).row
  with pytest.raises(ValueError, match="pull_to_start=0.0, and it was 2.0 up to step 6"):
    train(tiny_config(seed=1, total="8steps"), pulled, Start(accept_change=True))


@pytest.mark.parametrize(
  ("changes", "start", "message"),
  [
    ({}, {}, "nothing says which that is: --init-from"),
    ({}, {"init_from": "x", "init_what": "projector"}, "with the encoder in --init-what"),
    ({"pull_to_start": -1.0}, {}, "pull_to_start=-1.0 weighs a part of the loss: 0 .off. or more"),
  ],
)
def test_without_a_start_it_is_refused(tmp_path, changes, start, message):
  with pytest.raises(ValueError, match=message):
    train(tiny_config(**PULL | changes), tmp_path / "run", Start(**start))


def test_gradient_is_that_of_the_features_now_alone():
  """By finite differences of the definition, along one direction; the start is a constant."""
  run = tiny_experiment(**PULL, objective__lam=0.0)
  state, batch = shifted(start_of(run), 0.2), tiny_batch(run)
  keys = jax.random.split(jax.random.key(0), run.cfg.batch_size)

  @jax.jit
  def pull(encoder, start):
    own = {**state.model_state, START: start}
    params = {**state.params, "encoder": encoder}
    views = run.objective.views(keys, batch)
    return 2.0 * (1 - run.objective.encode(params, own, None, views, keys)[0][1].mean())

  here, there = state.params["encoder"], state.model_state[START]
  assert not any(np.any(x) for x in jax.tree.leaves(jax.grad(pull, argnums=1)(here, there)))
  grad = jax.grad(pull)(here, there)
  size = 1e-2 / float(jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(grad))))
  at = lambda t: float(pull(jax.tree.map(lambda x, g: x + t * size * g, here, grad), there))
  slope = sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(grad)) * size
  np.testing.assert_allclose((at(1) - at(-1)) / 2, slope, rtol=2e-2)
