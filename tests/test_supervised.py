"""The supervised yardstick and the mixer: closed forms, what is refused, one device = eight, one part = four."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from jepa_jax.config import build_config
from jepa_jax.data import open_images
from jepa_jax.experiment import make_experiment
from jepa_jax.models import MixerConfig
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.study import architectures, trials
from jepa_jax.study.tables import Result
from jepa_jax.study.variants import Variant
from tests.tiny import MLP, TINY, run_steps, tiny_config, tiny_experiment

HEAD = {"hidden": (), "out": 10}
VIEWS = {"global_crops": {"num": 2, "size_px": 16, "scale": (0.3, 1.0)}}
SUPERVISED = {"name": "supervised", "projector": HEAD, "views": VIEWS}
MIXER = {"name": "mixer", "image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "token_dim": 8, "channel_dim": 32}
FEATURES_BxVxF = np.random.default_rng(0).standard_normal((8, 2, 16)).astype(np.float32)


def loss_of(run, label_B, smoothing_params=None):
  params, state = run.objective.init(jax.random.key(0), run.init_batch())
  params = jax.tree.map(np.zeros_like, params) if smoothing_params is None else params
  encoded = FEATURES_BxVxF, FEATURES_BxVxF, np.asarray(label_B, np.int32)
  value, (aux, _) = run.objective.loss(params, state, None, encoded, jax.random.key(0), 0.0)
  return float(value), aux.metrics


def test_a_head_of_zeros_costs_the_logarithm_of_the_number_of_classes():
  run = tiny_experiment(objective=SUPERVISED, encoder=MLP)
  value, metrics = loss_of(run, np.arange(8))
  assert value == pytest.approx(np.log(10), rel=1e-6) and float(metrics["train_accuracy"]) == pytest.approx(12.5)


def test_smoothed_cross_entropy_is_that_of_the_formula_and_rows_without_a_label_do_not_count():
  run = tiny_experiment(objective=SUPERVISED | {"label_smoothing": 0.2}, encoder=MLP)
  params, _ = run.objective.init(jax.random.key(0), run.init_batch())
  (layer,) = params["projector"].values()
  logits = FEATURES_BxVxF.astype(np.float64) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  label_B = np.array([3, -1, 0, 9, -1, 2, 2, 5])
  known = label_B >= 0
  target = np.eye(10)[label_B] * 0.8 + 0.02
  expected = -(target[:, None] * log_p).sum(-1)[known].mean()
  assert loss_of(run, label_B, "own")[0] == pytest.approx(expected, rel=1e-5)
  assert loss_of(run, -np.ones(8))[0] == 0


@pytest.mark.parametrize("changes", [{"num_devices": 8}, {"microbatch": 4}], ids=str)
def test_eight_devices_and_four_parts_train_alike(changes):
  base = {"objective": SUPERVISED, "encoder": MLP}
  _, one = run_steps(tiny_experiment(**base), 2)
  _, other = run_steps(tiny_experiment(**base, **changes), 2)
  assert [m["loss"] for m in other] == pytest.approx([m["loss"] for m in one], rel=1e-5)


def test_the_number_of_classes_is_that_of_the_data():
  cfg, mesh = tiny_config(objective=SUPERVISED, encoder=MLP), make_mesh(MeshConfig(), jax.devices()[:1])
  with pytest.raises(ValueError, match=r"projector.out=10 is the number of classes .* images have 7: set it to that"):
    make_experiment(cfg, mesh, 64, 7)
  with pytest.raises(ValueError, match="learns from labels, and the training images have none"):
    make_experiment(cfg, mesh, 64, 0)
  with pytest.raises(ValueError, match=r"label_smoothing=1.0 lies in \[0, 1\)"):
    tiny_config(objective=SUPERVISED | {"label_smoothing": 1.0}, encoder=MLP)


def test_a_mixer_trains_under_another_objective_and_on_eight_devices():
  views = {name: value for name, value in TINY["objective"]["views"].items() if name != "local_crops"}
  base = {"objective": TINY["objective"] | {"views": views}, "encoder": MIXER}
  _, one = run_steps(tiny_experiment(**base), 2)
  _, eight = run_steps(tiny_experiment(MeshConfig(data=2, fsdp=2, tensor=2), 8, **base), 2)
  assert [m["loss"] for m in eight] == pytest.approx([m["loss"] for m in one], rel=1e-4)


def test_a_mixer_mixes_positions_and_reads_one_size():
  net = MixerConfig(image_size=16, patch_size=8, width=16, depth=1, token_dim=8, channel_dim=32).make(1)
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 1)).astype(np.float32)
  out, variables = net.init_with_output(jax.random.key(0), images)
  assert out.tokens_BxNxD.shape == (2, 4, 16) and out.pooled_BxD.shape == (2, 16)
  np.testing.assert_allclose(out.pooled_BxD, out.tokens_BxNxD.mean(1), rtol=1e-6)
  images[:, :8, :8] += 1  # one patch changes, every token does
  changed = np.abs(net.apply(variables, images).tokens_BxNxD - out.tokens_BxNxD).max((0, 2))
  assert changed.shape == (4,) and changed.min() > 1e-6
  with pytest.raises(ValueError, match="a mixer reads one image size, 16 px"):
    net.apply(variables, images[:, :8, :8])
  with pytest.raises(ValueError, match="patch_size"):
    MixerConfig(image_size=16, patch_size=5)


def test_every_cell_of_the_architecture_study_builds_with_its_supervised_twin():
  base = {"name": "x", "total": "1steps", "batch_size": 16, "data": {"source": "digits", "canvas_px": 32}}
  base |= {"encoder": {"name": "convnet"}, "objective": TINY["objective"] | {"views": VIEWS}, "optim": {"lr": 1e-3}}
  base["data"] |= {"channels": 1, "mean": (0.5,), "std": (0.5,)}
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  for settings in architectures.ENCODERS.values():
    cfg = build_config(base, settings | {"encoder.image_size": "16"})
    assert make_experiment(cfg, mesh, 64, 10).abstract_state.params.keys() == {"encoder", "projector"}
    twin = {"objective.name": "supervised", "objective.projector.hidden": "()", "objective.projector.out": "10"}
    assert build_config(base, settings | {"encoder.image_size": "16"} | twin).objective.num_classes == 10


def test_a_forecast_times_a_step_of_every_network_and_takes_others_by_their_flops():
  flops = {"small": 100, "small, supervised": 50, "large": 200}
  cost = {"small": 0.5, "large": 7.0}  # as a narrow ResNet: far more than its FLOPs
  step = lambda name: types.SimpleNamespace(
    cfg=types.SimpleNamespace(encoder=name.split(",")[0]),
    total_steps=60,
    matrix_flops=lambda: flops[name],
    compile=lambda: None,
  )
  runs = {(Variant(name), seed): None for name in flops for seed in (0, 1)}
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(trials, "experiments", lambda runs, images: ((Variant(name), step(name)) for name in flops))
    patched.setattr(trials, "timed_step_s", lambda experiment, *_: (cost[experiment.cfg.encoder],))
    lines = trials.forecast(runs, None).splitlines()
  assert [line.split("about ")[1] for line in lines[:-1:2]] == ["0.5 min", "0.2 min", "7.0 min"]
  assert lines[-1].startswith("6 cells, about 0.3 h") and "each of 2 networks was timed" in lines[-1]


def test_gains_are_over_random_weights_and_of_those_of_labels():
  result = lambda name, seed, linear: Result(name, seed, 1, {"linear": linear}, 0.0)
  rows = [result("MLP", 0, 40.0), result("MLP", 1, 45.0)]
  rows += [result("MLP, supervised", seed, 50.0) for seed in (0, 1)]
  rows += [result("MLP, random weights", seed, 35.0) for seed in (0, 1)]
  assert "| MLP | 35.0 ± 0.0 | 42.5 ± 2.5 | 50.0 ± 0.0 | 50 |" in architectures.relative(rows)


def test_images_without_labels_are_refused_where_accuracy_is_the_measure():
  cfg = tiny_config()
  images = open_images(cfg.data, "train")
  assert trials.labelled(images) == images.num_classes
  with pytest.raises(ValueError, match="no labels, and accuracy is what this study measures"):
    trials.labelled(type("Unlabelled", (), {"num_classes": 0}))
