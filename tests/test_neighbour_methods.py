"""The methods around the JEPA family on the one loop: exact on any mesh and in parts; they learn; their traps."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jepa_jax import losses
from jepa_jax.config import build_config
from jepa_jax.evals.predictor_tuning import answer, variants
from jepa_jax.evals.tuning import Task
from jepa_jax.losses.unit import unit
from jepa_jax.models import ProjectorConfig, make_projector
from jepa_jax.objectives.dino import logits
from jepa_jax.objectives.mae import patches_of
from jepa_jax.objectives.teacher import cosine_momentum
from jepa_jax.optim import OptimConfig, clipped_each, make_optimiser
from jepa_jax.runs import open_run
from jepa_jax.sharding import MeshConfig
from jepa_jax.step import numbers, step_keys
from jepa_jax.train import Start, train
from jepa_jax.views import example_keys
from tests.tiny import MLP, TINY, VIT, run_steps, start_of, tiny_batch, tiny_experiment, tiny_values

TWO = {"global_crops": {"num": 2, "size_px": 16, "scale": (0.3, 1.0)}}
ONE = {"global_crops": {"num": 1, "size_px": 16, "scale": (0.3, 1.0)}}
HEAD = {"hidden": (16,), "out": 8}
METHODS = {
  "vicreg": {"views": TWO, "projector": HEAD},
  "mcr2": {"views": TWO, "projector": HEAD},
  "simclr": {"views": TWO, "projector": HEAD},
  "barlow": {"views": TWO, "projector": HEAD},
  "byol": {"views": TWO, "projector": HEAD, "predictor": HEAD},
  "mocov3": {"views": TWO, "projector": HEAD | {"last_norm": "batch"}, "predictor": HEAD | {"last_norm": "batch"}},
  "dino": {
    "views": TINY["objective"]["views"],
    "projector": HEAD | {"norm": "none", "activation": "gelu"},
    "prototypes": 32,
    "still": 0.0,
  },
  "mae": {"views": ONE, "predictor": {"depth": 1, "width": 16, "num_heads": 2}, "mask_ratio": 0.5},
}
SGD = {"optim__name": "sgd", "optim__lr": 0.05, "optim__warmup": "0steps"}


def settings(method, **changes):
  return {"objective": {"name": method, **METHODS[method], **changes}}


def experiment(method, mesh=None, num_devices=1, **changes):
  return tiny_experiment(mesh, num_devices, **(settings(method) | changes))


def pieces(run, step=0):
  """Returns (state, views, encoded, model state) of the run's first step, made outside of it."""

  @jax.jit
  def encode(state, batch):
    keys, row_B = step_keys(run.key, step), jnp.arange(len(batch["label"]))
    views = run.objective.views(example_keys(keys.views, row_B), batch)
    args = state.params, state.model_state, state.target, views, example_keys(keys.networks, row_B)
    return views, *run.objective.encode(*args)

  state = start_of(run)
  return state, *encode(state, tiny_batch(run, step))


# ------------------------------------------------------------------------------------------------ all of them
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_four_devices_and_four_parts_give_the_parameters_of_one_and_the_loss_falls_on_a_fixed_batch(method):
  """Statistics of BatchNorm, teachers, centres and masks, too; branches are dropped for the student alone.

  The loss falls for views that have much in common: small crops of noise have not.
  """
  changes = SGD | {"encoder": VIT | {"drop_path": 0.2}, "total": "40steps"}
  changes |= {"objective__views__global_crops__scale": (0.9, 1.0)}
  run = experiment(method, **changes)
  compiled = run.compile()
  one, history = run_steps(run, 3, compiled)
  many, other = run_steps(experiment(method, MeshConfig(data=4, fsdp=1), 4, microbatch=4, **changes), 3)
  np.testing.assert_allclose([r["loss"] for r in other], [r["loss"] for r in history], rtol=2e-5)
  trees = [(s.params, s.target, s.model_state) for s in (one, many)]
  for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-5)
  state, batch, rows = start_of(run), tiny_batch(run), []
  for _ in range(40):
    state, metrics = compiled(state, batch, run.key)
    rows.append(numbers(metrics))
  first, last = (np.mean([r["loss"] for r in part]) for part in (rows[:5], rows[-5:]))
  assert last < first and all(np.isfinite(r["loss"]) for r in rows)
  assert rows[-1]["feature_std"] > 0


@pytest.mark.parametrize(
  ("method", "changes", "message"),
  [
    ("vicreg", {"views": ONE}, "1 view of each image: VICReg compares two"),
    ("mcr2", {"views": ONE}, "MCR2 compares two"),
    ("simclr", {"views": TINY["objective"]["views"]}, "2 global and 2 local crops, and SimCLR takes 2 global views"),
    ("barlow", {"views": {"global_crops": TWO["global_crops"] | {"num": 3}}}, "Barlow Twins takes 2 global views"),
    ("byol", {"views": ONE}, "BYOL takes 2 global views"),
    ("mocov3", {"views": ONE}, "MoCoV3 takes 2 global views"),
    ("dino", {"views": ONE}, "DINO compares two"),
    ("mae", {"views": TWO}, "masked prediction takes one"),
    ("simclr", {"temperature": 0.0}, "temperature=0.0 divides the logits: above 0"),
    ("mocov3", {"temperature": -1.0}, "temperature=-1.0 divides"),
    ("dino", {"student_temperature": 0.0}, "student_temperature=0.0 divides"),
    ("dino", {"teacher_temperature": (0.04, 0.0)}, "teacher_temperature=0.0 divides"),
    ("dino", {"prototypes": 1}, "prototypes=1 must be at least 2"),
    ("dino", {"still": 2.0}, r"still=2.0 lies in \[0, 1\]"),
    ("dino", {"ema": (0.9, 1.5)}, "are momenta"),
    ("byol", {"ema": (-0.1, 1.0)}, "are momenta"),
    ("byol", {"ema": (1.0, 1.0)}, "are momenta"),
    ("byol", {"predictor": HEAD | {"out": 4}}, "predictor.out=4 must be projector.out=8"),
    ("mcr2", {"eps": 0.0}, "eps=0.0 is a precision above 0"),
    ("mcr2", {"class_weight": 0.0}, "class_weight=0.0 must be above 0"),
    ("barlow", {"lam": -1.0}, "lam=-1.0 is a weight"),
    ("vicreg", {"variance": -1.0}, "are weights: 0"),
    ("mae", {"mask_ratio": 1.0}, "mask_ratio=1.0 is the share that is removed"),
    ("mae", {"predictor": {"depth": 0}}, "the decoder, has a depth of at least 1"),
  ],
)
def test_settings_that_cannot_be_are_named(method, changes, message):
  with pytest.raises(ValueError, match=message):
    build_config(tiny_values(**settings(method, **changes)))


def test_what_the_encoder_cannot_do_is_named():
  with pytest.raises(ValueError, match="mae masks patches"):
    experiment("mae", encoder=MLP)
  with pytest.raises(ValueError, match="mask_ratio=0.9 leaves 0 of 4 patches"):
    tiny_experiment(**settings("mae", mask_ratio=0.9))
  with pytest.raises(ValueError, match="freezes the patch projection of a ViT"):
    tiny_experiment(encoder=MLP, **settings("mocov3", frozen_patches=True))
  for method in ("simclr", "mcr2", "dino"):
    with pytest.raises(ValueError, match=f"config.batch_size=1: {method} compares images"):
      experiment(method, batch_size=1)
  with pytest.raises(ValueError, match="of one image both rates are the same"):
    losses.mcr2(jnp.ones((1, 2, 4)))
  mixer = {"name": "mixer", "image_size": 16, "patch_size": 8, "width": 8, "depth": 1, "token_dim": 8, "channel_dim": 8}
  with pytest.raises(ValueError, match="mae masks patches"):  # it has patches, and takes them all
    experiment("mae", encoder=mixer)
  with pytest.raises(ValueError, match="freezes the patch projection of a ViT"):
    tiny_experiment(encoder=mixer, **settings("mocov3", frozen_patches=True))
  with pytest.raises(ValueError, match="leaves out the class token, which MAE's decoder reads"):
    experiment("mae", encoder=VIT | {"cls_token": True})


def test_lars_on_a_vit_is_warned_of_where_it_collapses(caplog):
  for method, encoder, told in (
    ("byol", VIT, True),
    ("barlow", VIT, True),
    ("barlow", MLP, False),
    ("vicreg", VIT, False),
  ):
    caplog.clear()
    experiment(method, encoder=encoder, optim__name="lars", optim__lr=0.123)
    assert ("is known to collapse" in caplog.text) == told


# ------------------------------------------------------------------------------------------------ teachers
def test_at_the_start_the_teacher_says_what_the_student_does():
  run = experiment("byol")
  state, _, encoded, model_state = pieces(run)
  (pooled, _), teacher = encoded
  np.testing.assert_allclose(pooled, teacher, rtol=1e-6)
  loss, (aux, _) = run.objective.loss(state.params, model_state, state.target, encoded, run.key, jnp.float32(0))
  predictor = {"params": state.params["predictor"], "batch_stats": state.model_state["predictor"]}
  prediction, _ = run.objective.predictor.apply(predictor, aux.views_BxKxD, train=True, mutable=["batch_stats"])
  assert float(loss) == pytest.approx(float(losses.byol(prediction, aux.views_BxKxD)[0]), rel=1e-5)


@pytest.mark.parametrize("method", ["byol", "mocov3", "dino"])
def test_no_gradient_reaches_a_teacher(method):
  run = experiment(method)
  state, views, _, _ = pieces(run)
  keys_B = jax.random.split(jax.random.key(0), 16)

  def loss(target, params):
    encoded, model_state = run.objective.encode(params, state.model_state, target, views, keys_B)
    return run.objective.loss(params, model_state, target, encoded, run.key, jnp.float32(0))[0]

  of_teacher, of_student = jax.jit(jax.grad(loss, (0, 1)))(state.target, state.params)
  assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(of_teacher))
  assert float(optax.tree.norm(of_student)) > 1e-4


def test_simsiam_is_byol_without_a_teacher_whose_targets_have_no_gradient():
  run = experiment("byol", **{"objective__target": "online"})
  state, views, encoded, model_state = pieces(run)
  assert state.target is None and encoded[1] is None and run.objective.ema_schedule is None
  (pooled, probe), _ = encoded

  def loss(x):
    return run.objective.loss(state.params, model_state, None, ((x, probe), None), run.key, jnp.float32(0))[0]

  def stopped(x):  # the same with the targets as constants
    z, _ = run.objective.project(state.params, state.model_state, pooled)
    mine, _ = run.objective.project(state.params, state.model_state, x)
    variables = {"params": state.params["predictor"], "batch_stats": state.model_state["predictor"]}
    return losses.byol(run.objective.predictor.apply(variables, mine, train=True, mutable=["batch_stats"])[0], z)[0]

  np.testing.assert_allclose(jax.jit(jax.grad(loss))(pooled), jax.jit(jax.grad(stopped))(pooled), rtol=1e-4, atol=1e-8)
  bare = experiment("byol", **{"objective__target": "online", "objective__predictor": {"hidden": ()}})
  assert "predictor" not in start_of(bare).params


def test_a_teacher_drops_no_paths():
  run = experiment("byol", encoder=VIT | {"drop_path": 0.5})
  _, _, ((pooled, _), teacher), _ = pieces(run)
  assert float(jnp.abs(pooled - teacher).max()) > 1e-3
  still = run.objective.encoder.clone(drop_path=0.0)
  state, views = start_of(run), pieces(run)[1]
  plain = still.apply({"params": state.params["encoder"]}, views.groups[0].reshape(-1, 16, 16, 1)).pooled_BxD
  np.testing.assert_allclose(teacher.reshape(plain.shape), plain, rtol=1e-5, atol=1e-6)


def test_the_momentum_follows_a_cosine_and_the_teacher_moves_by_it():
  momentum = cosine_momentum((0.99, 1.0))
  np.testing.assert_allclose([momentum(p) for p in (0.0, 0.5, 1.0)], [0.99, 0.995, 1.0], rtol=1e-6)
  run = experiment("mocov3")
  before = start_of(run)
  state, history = run_steps(run, 1)
  mixed = jax.tree.map(lambda t, p: 0.99 * t + 0.01 * p, before.target["projector"], state.params["projector"])
  for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(state.target["projector"]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  assert history[0]["momentum"] == pytest.approx(0.99)


def test_a_frozen_patch_projection_keeps_its_start_and_the_rest_moves():
  run = tiny_experiment(**settings("mocov3", frozen_patches=True) | {"optim__weight_decay": 0.5})
  before, (after, _) = start_of(run).params["encoder"], run_steps(run, 2)
  for name, moved in (("patch_embed", False), ("blocks", True)):
    pairs = zip(jax.tree.leaves(before[name]), jax.tree.leaves(after.params["encoder"][name]), strict=True)
    assert any(np.abs(a - b).max() > 0 for a, b in pairs) == moved
  kernel, most = before["patch_embed"]["kernel"], (6 / (8 * 8 + 16)) ** 0.5  # Xavier's, of 64 pixels to 16
  assert 0.9 * most < np.abs(kernel).max() <= most


@pytest.mark.slow
def test_with_batchnorm_in_the_encoder_a_teacher_has_its_own_statistics_and_the_student_is_evaluated():
  resnet = {"name": "resnet", "variant": "18", "stem": "cifar", "width": 4, "image_size": 16}
  run = experiment("dino", encoder=resnet)
  state, views, encoded, new = pieces(run)
  flat = views.groups[0].reshape(-1, *views.groups[0].shape[2:])
  variables = {"params": state.target["encoder"], "batch_stats": state.model_state["encoder"]}
  out, _ = run.objective.encoder.apply(variables, flat, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(encoded[1].reshape(out.pooled_BxD.shape), out.pooled_BxD, rtol=1e-4, atol=1e-5)
  assert run.objective.variables(state.params, new, state.target)["image"]["params"] is state.params["encoder"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "shown"), [("byol", "params"), ("dino", "target")])
def test_another_run_starts_from_the_encoder_that_is_evaluated_and_a_killed_one_goes_on(method, shown, tmp_path):
  values = settings(method) | {"encoder": MLP, "total": "4steps"}
  values["objective__views"] = TWO
  train(build_config(tiny_values(**values)), tmp_path / "whole")
  train(build_config(tiny_values(**(values | {"checkpoint__keep_last": 3}))), tmp_path / "killed")
  shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
  train(build_config(tiny_values(**(values | {"checkpoint__keep_last": 3}))), tmp_path / "killed")
  read = lambda name: open_run(tmp_path / name).networks(open_run(tmp_path / name).experiment())
  whole, again = jax.device_get((read("whole"), read("killed")))
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)  # teacher and centre, too
  still = values | {"total": "1steps", "optim__lr": 1e-30, "optim__weight_decay": 0.0}
  train(build_config(tiny_values(**still)), tmp_path / "from", Start(init_from=str(tmp_path / "whole")))
  taken = jax.device_get(read("from"))["params"]["encoder"]
  for a, b in zip(jax.tree.leaves(taken), jax.tree.leaves(whole[shown]["encoder"]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-7)
  assert any(
    np.abs(a - b).max() > 1e-6
    for a, b in zip(*(jax.tree.leaves(whole[part]["encoder"]) for part in ("params", "target")), strict=True)
  )


# ------------------------------------------------------------------------------------------------ DINO
def test_the_centre_moves_after_the_loss_by_the_teachers_mean():
  run = experiment("dino")
  state, _, encoded, model_state = pieces(run)
  loss, (_, new) = run.objective.loss(state.params, model_state, state.target, encoded, run.key, jnp.float32(0))
  z, _ = run.objective.project(state.target, state.model_state, encoded[1])
  kernel = state.target["prototypes"]["kernel"]
  teacher = unit(z)[0] @ (kernel / jnp.linalg.norm(kernel, axis=0))
  np.testing.assert_allclose(new["centre"], 0.1 * teacher.mean((0, 1)), rtol=1e-4, atol=1e-7)
  student, _ = run.objective.project(state.params, state.model_state, encoded[0][0])
  by_hand = losses.dino(logits(student, kernel), teacher, jnp.zeros(32), 0.1, 0.04)[0]
  assert float(loss) == pytest.approx(float(by_hand), rel=1e-5) and student.shape[1] == 4  # small views, too


def test_prototypes_and_their_moments_begin_after_their_share_of_the_schedule_and_temperatures_rise():
  adam = {"optim__weight_decay": 0.5, "optim__lr": 1e-3, "optim__warmup": "0steps", "optim__schedule": "constant"}
  run = tiny_experiment(**settings("dino", still=0.3, warmup=0.5) | adam)
  kernels = [np.asarray(start_of(run).params["prototypes"]["kernel"])]
  assert 0.9 * 8**-0.5 < np.abs(kernels[0]).max() <= 8**-0.5  # as torch's linear layers begin
  kernels += [np.asarray(run_steps(run, n)[0].params["prototypes"]["kernel"]) for n in (1, 2, 3)]
  assert (kernels[1] == kernels[0]).all() and (kernels[2] == kernels[0]).all()  # of 6 steps 0 and 1: no decay either
  moved = np.abs(kernels[3] - kernels[2])
  np.testing.assert_allclose(np.median(moved), 1e-3, rtol=0.05)  # the first step of Adam, not its third
  _, history = run_steps(run, 5)
  assert [r["teacher_temperature"] for r in history] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07], rel=1e-5)


def test_the_length_of_a_prototype_means_nothing():
  z, kernel = np.random.RandomState(0).randn(3, 2, 4), np.random.RandomState(1).randn(4, 5)
  scaled = kernel * np.array([1, 2, 3, 0.1, 7.0])
  np.testing.assert_allclose(logits(2 * z, scaled), logits(z, kernel), rtol=1e-5)


def test_the_teacher_is_evaluated():
  run = experiment("dino")
  state, _ = run_steps(run, 2)
  found = run.objective.variables(state.params, state.model_state, state.target)["image"]["params"]
  assert found is state.target["encoder"]


# ------------------------------------------------------------------------------------------------ MAE
def test_removed_patches_alone_count_and_the_loss_is_that_of_the_library():
  run = experiment("mae")
  state, views, encoded, _ = pieces(run)
  masks, images = views.masks, views.images_BxHxWxC
  num = run.objective.num_patches
  assert masks.context_BxK.shape[1] == num // 2 and masks.targets_BxMxT.shape[1:] == (1, num - num // 2)
  seen = run.objective.encoder.apply({"params": state.params["encoder"]}, images, keep_BxK=masks.context_BxK)
  answers = run.objective.predict(state.params, seen.tokens_BxNxD, masks)[:, 0]
  whole = np.zeros((len(images), num, 64), np.float32)
  removed = np.zeros((len(images), num), np.float32)
  for b, places in enumerate(np.asarray(masks.targets_BxMxT[:, 0])):
    whole[b, places], removed[b, places] = answers[b], 1
  expected, terms = losses.mae(whole, losses.patch_targets(patches_of(images, 8)), removed)
  assert float(encoded["loss_B"].mean()) == pytest.approx(float(expected), rel=1e-5) and terms["masked"] == 0.5
  # What the encoder says does not change with what it has not seen.
  noise = jnp.where(_spread(removed, 8) > 0, 9.0, images)
  again = run.objective.encoder.apply({"params": state.params["encoder"]}, noise, keep_BxK=masks.context_BxK)
  np.testing.assert_allclose(again.tokens_BxNxD, seen.tokens_BxNxD, rtol=1e-6)


def _spread(removed_BxN, patch):
  grid = np.asarray(removed_BxN).reshape(-1, 2, 2)
  return np.repeat(np.repeat(grid, patch, 1), patch, 2)[..., None]


def test_a_patch_is_its_rows_of_pixels_of_channels():
  image = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
  patches = patches_of(jnp.asarray(image), 2)
  np.testing.assert_array_equal(patches[1, 2], image[1, 2:4, 0:2].reshape(-1))


def test_the_decoder_is_the_predictor_that_can_be_reused():
  run = experiment("mae")
  state = start_of(run)
  tokens = jnp.ones((3, 4, 16))
  answered = jax.eval_shape(lambda p: answer(run.objective, p, tokens), state.params["predictor"])
  assert answered.shape == (3, 4, run.objective.answer_width)
  task = Task(np.zeros(4, int), np.zeros(4, int), 3)
  for name, networks in variants(run.objective, state.params, None, (task,), 0).items():
    trained, images = networks.trained, jnp.ones((2, 16, 16, 1))
    of = lambda t, f, x, networks=networks: networks.forward_fn(t, f, x, 0)
    assert jax.eval_shape(of, trained, networks.frozen, images).shape == (2, 3), name


# ------------------------------------------------------------------------------------------------ what they brought
def test_a_projector_may_end_in_batchnorm_without_scale_and_bias():
  projector = make_projector(ProjectorConfig(hidden=(), out=6, last_norm="batch"))
  x = 3 + 2 * np.random.RandomState(0).randn(64, 3, 5).astype(np.float32)
  variables = projector.init(jax.random.key(0), x)
  assert set(variables["params"]["layers_0"]) == {"kernel"} and "last_norm" not in variables["params"]
  z, _ = projector.apply(variables, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(z.reshape(-1, 6).mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(z.reshape(-1, 6).std(0), 1, rtol=1e-4)


def test_clipping_may_be_turned_on_for_a_run_under_way():
  run = experiment("vicreg")
  params = start_of(run).params
  of = lambda **clip: make_optimiser(OptimConfig(**clip), lambda _: 1.0, 4, run.objective.rules).init(params)
  plain = jax.tree.structure(of())
  assert plain == jax.tree.structure(of(clip_each=3.0)) == jax.tree.structure(of(clip_norm=3.0))


def test_each_parameter_is_clipped_by_its_own_length_and_stacked_blocks_one_by_one():
  grads = {"encoder": {"blocks": {"kernel": np.array([[3.0, 4], [0.3, 0.4]])}, "bias": np.array([30.0, 40])}}
  found = clipped_each(grads, 1.0)["encoder"]
  np.testing.assert_allclose(found["blocks"]["kernel"], [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
  np.testing.assert_allclose(found["bias"], [0.6, 0.8], rtol=1e-6)
  zeros = clipped_each({"a": np.zeros(3)}, 1.0)["a"]
  assert np.isfinite(zeros).all()
  run = experiment("dino")
  cfg = OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_each=0.5)
  optimiser = make_optimiser(cfg, lambda _: 1.0, 4, run.objective.rules)
  params = start_of(run).params
  updates, _ = optimiser.update(jax.tree.map(lambda x: 100 * jnp.ones_like(x), params), optimiser.init(params), params)
  assert float(optax.tree.norm(updates["prototypes"])) == pytest.approx(0.5, rel=1e-5)
