"""I-JEPA's objective: who sees what, what gets a gradient, its schedules; it learns, and no mesh changes it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import losses
from jepa_jax.config import build_config
from jepa_jax.models import ConvNetConfig, PredictorConfig
from jepa_jax.objectives import make_objective
from jepa_jax.objectives.ijepa import IJEPAConfig
from jepa_jax.optim import OptimConfig, decay_mask, learning_rate, weight_decay
from jepa_jax.sharding import MeshConfig
from jepa_jax.subjects import network_features
from jepa_jax.views import CropSettings, MaskSettings, MultiCropSettings, Pixels, example_keys
from tests.tiny import VIT, run_steps, start_of, tiny_batch, tiny_experiment, tiny_values

ENCODER = VIT | {"patch_size": 4, "pos_embed": "sincos"}
VIEWS = {"global_crops": {"num": 1, "size_px": 16, "scale": (0.3, 1.0)}}
IJEPA = {"name": "ijepa", "views": VIEWS, "masks": {"kind": "uniform"}, "predictor": {"width": 8, "depth": 1}}
N, K = 16, 4
UNEVEN = "size_px=14 is not divisible by patch_size=4; the nearest that are: 12 or 16"


def ijepa_experiment(mesh=None, num_devices=1, objective=None, **changes):
  settings = {"encoder": ENCODER, "objective": IJEPA | (objective or {})} | changes
  return tiny_experiment(mesh, num_devices, **settings)


@pytest.fixture(scope="module")
def networks():
  """The run, its parameters at the start, made different from the target's, and the views of a batch."""
  run = ijepa_experiment()
  state = start_of(run)
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), state.params)
  views = jax.jit(run.objective.views)(example_keys(jax.random.key(3), jnp.arange(16)), tiny_batch(run))
  return run, params, state.target, views


def encoded(run, params, target, views):
  return jax.jit(run.objective.encode)(params, {}, target, views, None)[0]


@pytest.mark.slow
def test_context_never_sees_a_hidden_patch_and_the_target_sees_all(networks):
  run, params, target, views = networks
  hidden_BxN = np.ones((16, N), bool)
  np.put_along_axis(hidden_BxN, np.asarray(views.masks.context_BxK), False, axis=1)
  pixels = np.repeat(np.repeat(hidden_BxN.reshape(16, 4, 4, 1), 4, axis=1), 4, axis=2)
  other = dataclasses.replace(views, images_BxHxWxC=jnp.where(pixels, 7.0, views.images_BxHxWxC))
  a, b = (encoded(run, params, target, v) for v in (views, other))
  np.testing.assert_allclose(a["pair_Bx2xD"][:, 0], b["pair_Bx2xD"][:, 0], atol=1e-6)  # predictions
  assert np.abs(a["pair_Bx2xD"][:, 1] - b["pair_Bx2xD"][:, 1]).max() > 0.01  # targets


def test_blocks_do_not_see_one_another_nor_padding(networks):
  run, params, _, views = networks
  masks = views.masks
  context = jax.random.normal(jax.random.key(0), (16, K, 16))
  predict_fn = jax.jit(run.objective.predict)
  predict = lambda m: np.asarray(predict_fn(params, context, m))
  valid = np.asarray(masks.valid_BxMxT)
  assert not valid.all()
  whole = predict(masks)
  alone = dataclasses.replace(masks, targets_BxMxT=masks.targets_BxMxT[:, :1], valid_BxMxT=masks.valid_BxMxT[:, :1])
  np.testing.assert_allclose(predict(alone)[valid[:, :1]], whole[:, :1][valid[:, :1]], atol=1e-5)
  moved = dataclasses.replace(masks, targets_BxMxT=jnp.where(valid, masks.targets_BxMxT, 0))
  np.testing.assert_allclose(predict(moved)[valid], whole[valid], atol=1e-5)


@pytest.mark.slow
def test_predictions_of_a_union_are_one_sequence(networks):
  run, *_ = networks
  one = ijepa_experiment(objective={"one_pass": True})
  masks, union = (r.objective.masks(example_keys(jax.random.key(1), jnp.arange(8))) for r in (run, one))
  assert union.targets_BxMxT.shape[1] == 1
  for b in range(8):
    blocks = set(np.asarray(masks.targets_BxMxT[b])[np.asarray(masks.valid_BxMxT[b])])
    assert blocks == set(np.asarray(union.targets_BxMxT[b])[np.asarray(union.valid_BxMxT[b])])


def test_loss_of_a_perfect_prediction_is_zero_and_every_block_counts_alike():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
  valid = jnp.array([[[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]] * 2, bool)
  for kind in ("smooth_l1", "l1", "l2"):
    assert float(jnp.abs(losses.prediction_loss(x, x, valid, kind)).max()) == 0
  # one patch of the second block is wrong by 3 everywhere: smooth-L1 2.5, a third of the image's loss
  wrong = x.at[0, 1, 0].add(3.0)
  padded = wrong.at[:, 1, 1:].add(100.0)
  np.testing.assert_allclose(losses.prediction_loss(padded, x, valid), [2.5 / 3, 0], atol=1e-6)
  np.testing.assert_allclose(losses.prediction_loss(padded, x, valid, "l2"), [3.0, 0], atol=1e-5)
  np.testing.assert_allclose(losses.prediction_error(jnp.array([0.5, -2.0]), jnp.zeros(2)), [0.125, 1.5])
  with pytest.raises(ValueError, match="smooth_l1, l1, l2"):
    losses.prediction_error(x, x, "huber")


@pytest.mark.slow
def test_stop_gradient_and_moving_average_keep_the_targets_out_of_the_gradient(networks):
  """With the target's path held fixed the gradient is the same; without the stop it is another."""
  run, params, _, views = networks

  def gradient(**changes):
    objective = make_objective(dataclasses.replace(run.cfg.objective, **changes), run.cfg.encoder, run.objective.pixels)
    target = params if objective.cfg.target == "ema" else None
    return jax.jit(jax.grad(lambda p: objective.encode(p, {}, target, views, None)[0]["loss_B"].mean()))(params)

  ema, stopped, free = gradient(), gradient(target="online"), gradient(target="online", stop_gradient=False)
  difference = lambda a, b: max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
  assert difference(ema, stopped) < 1e-6
  assert difference(stopped, free) > 1e-4


@pytest.mark.slow
def test_target_starts_as_a_copy_and_follows_by_the_schedule_and_the_loss_falls():
  run = ijepa_experiment(
    objective={"ema": (0.5, 1.0)}, total="48steps", optim={"lr": 3e-3, "warmup": "2steps", "ipe_scale": 1.25}
  )
  compiled, state, rows = run.compile(), start_of(run), []
  for step in range(48):
    old = jax.device_get(state)
    if not step:
      assert old.target.keys() == {"encoder"}  # nothing reads an average of the predictor
      jax.tree.map(np.testing.assert_array_equal, old.params["encoder"], old.target["encoder"])
    state, metrics = compiled(state, tiny_batch(run), run.key)
    rows.append(float(metrics["prediction_loss"]))
    momentum = 0.5 + 0.5 * step / 60
    np.testing.assert_allclose(metrics["momentum"], momentum, rtol=1e-6)
    averages, news = (jax.tree.leaves(jax.device_get(tree["encoder"])) for tree in (state.target, state.params))
    for average, before, new in zip(averages, jax.tree.leaves(old.target["encoder"]), news, strict=True):
      np.testing.assert_allclose(average, momentum * before + (1 - momentum) * new, atol=1e-6)
  variables = run.objective.variables(state.params, state.model_state, state.target)
  assert variables["image"]["params"] is state.target["encoder"]
  assert np.mean(rows[-10:]) < 0.8 * np.mean(rows[:5])


def test_schedules_are_the_official_ones():
  """Steps from 1; warm-up from .2 to 1 times the peak; cosines stretched by ipe_scale; weight decay from .04 to .4."""
  cfg = OptimConfig(
    lr=1e-3, start_lr=0.2, final_lr=1e-3, weight_decay=0.04, final_weight_decay=10.0, ipe_scale=1.25,
    warmup=build_config(tiny_values()).optim.warmup,
  )  # fmt: skip
  lr, decay = learning_rate(cfg, 2048, 40, 1.0), weight_decay(cfg, 40)
  np.testing.assert_allclose(lr(0), 2e-4 + 8e-4 / 2, rtol=1e-6)  # warm-up of 2 steps
  np.testing.assert_allclose(lr(1), 1e-3, rtol=1e-6)
  cosine = lambda t: 0.5 * (1 + math.cos(math.pi * t))
  np.testing.assert_allclose(lr(39), 1e-6 + (1e-3 - 1e-6) * cosine(38 / 48), rtol=1e-5)
  np.testing.assert_allclose([decay(0), decay(39)], [0.4 - 0.36 * cosine(t / 50) for t in (1, 40)], rtol=1e-5)
  assert weight_decay(OptimConfig(weight_decay=0.3), 40) == 0.3


def test_only_matrices_and_the_mask_token_decay(networks):
  run, params, *_ = networks
  flat = {
    jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(decay_mask(params, run.objective.rules))
  }
  assert flat["['predictor']['mask_token']"]
  assert all(decays == ("kernel" in name or "mask_token" in name) for name, decays in flat.items())
  assert not any("pos" in name for name in flat)


@pytest.mark.slow
def test_eight_devices_and_microbatches_give_the_parameters_of_one():
  """The form in which everything differs from the moving average; that one is tested with the world model on top."""
  objective = {"target": "online", "lam": 0.1, "sigreg_on": "tokens", "one_pass": True}
  sgd = {"optim": {"name": "sgd", "lr": 0.1, "warmup": "0steps"}}
  one, rows = run_steps(ijepa_experiment(objective=objective, **sgd), 2)
  many, _ = run_steps(ijepa_experiment(MeshConfig(data=2, fsdp=4), 8, objective, microbatch=2, **sgd), 2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, many.params)
  assert rows[1]["context_ratio"] == K / N and rows[1]["token_std"] > 0 and abs(rows[1]["cosine"]) <= 1


def test_views_that_are_no_squares_have_a_grid_of_their_shape_and_are_evaluated():
  wide = {"views": {"global_crops": VIEWS["global_crops"] | {"size_px": 8, "width_px": 24}}}
  run = ijepa_experiment(objective=wide, evals__view_px=8, evals__view_width_px=16)
  assert run.objective.grid_hw == (2, 6)
  _, metrics = run.step_fn(run.init(), tiny_batch(run), run.key)
  assert np.isfinite(metrics["loss"])
  keys_B, batch = example_keys(run.key, jnp.arange(run.cfg.batch_size)), tiny_batch(run)
  assert jax.eval_shape(run.objective.views, keys_B, batch).images_BxHxWxC.shape[1:3] == (8, 24)
  assert run.cfg.view_hw == (8, 16)
  seen = jax.eval_shape(network_features(None, run, run.cfg.view_hw, 1.0), {}, batch)
  assert seen["pooled"].shape[1] == 8 * 16
  with pytest.raises(ValueError, match="views.global_crops.width_px=22 is not divisible by patch_size=4"):
    ijepa_experiment(objective={"views": {"global_crops": VIEWS["global_crops"] | {"width_px": 22}}})


def test_cost_falls_with_masking():
  """Masked patches never enter the encoder: fewer kept patches, fewer products."""
  flops = [
    ijepa_experiment(objective={"masks": {"kind": "random", "num_context_patches": k}}).matrix_flops() for k in (4, 8)
  ]
  assert flops[0] < 0.9 * flops[1]


@pytest.mark.slow
def test_without_a_predictor_the_mean_of_the_context_is_the_prediction(networks):
  run = ijepa_experiment(objective={"predictor": {"depth": 0, "width": 8}})
  params, _ = jax.jit(run.objective.init)(jax.random.key(0), tiny_batch(run))
  assert set(params) == {"encoder"}
  context = jax.random.normal(jax.random.key(0), (16, K, 16))
  prediction = jax.jit(run.objective.predict)(params, context, networks[3].masks)
  np.testing.assert_allclose(prediction, jnp.broadcast_to(context.mean(1)[:, None, None], prediction.shape), rtol=1e-6)


@pytest.mark.parametrize(
  "objective, encoder, message",
  [
    ({"views": VIEWS | {"global_crops": {"num": 2, "size_px": 16, "scale": (0.3, 1.0)}}}, {}, "1 crop"),
    ({"views": VIEWS | {"global_crops": {"num": 1, "size_px": 14, "scale": (0.3, 1.0)}}}, {}, UNEVEN),
    ({"masks": {"kind": "uniform", "num_context_patches": 15}}, {}, "num_context_patches is 15"),
    ({"masks": {"kind": "official", "target_scale": (0.01, 0.02)}}, {}, "no patches on a grid of 4x4"),
    ({"predictor": {"width": 20, "depth": 1}}, {"num_heads": 8}, "predictor's width=20 is not divisible"),
    ({"stop_gradient": False}, {}, "target='online'"),
    ({"lam": 0.1}, {}, "in place of the moving average"),
  ],
)  # fmt: skip
def test_bad_input_is_told_before_anything_is_compiled(objective, encoder, message):
  with pytest.raises(ValueError, match=message):
    ijepa_experiment(objective=objective, encoder=ENCODER | encoder)


def test_an_encoder_without_patches_is_refused():
  views = MultiCropSettings(global_crops=CropSettings(1, 16, (0.3, 1.0)))
  with pytest.raises(ValueError, match='encoder.name="vit"'):
    make_objective(IJEPAConfig(views, MaskSettings(), PredictorConfig()), ConvNetConfig(), Pixels((0.5,), (0.5,)))
