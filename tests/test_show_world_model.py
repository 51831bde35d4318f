"""`show world_model`: the bank and the questions, an oracle and blind predictors, the picture, the errors."""

import copy
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jepa_jax import losses
from jepa_jax.data import abstract_batch, image_columns
from jepa_jax.objectives import make_objective
from jepa_jax.objectives.iwm import IWM
from jepa_jax.show import predictions, world_model, world_model_picture
from jepa_jax.views import Pixels, color, no_color
from jepa_jax.views.paired import ACTION_SCALE
from tests.tiny import VIT, start_of, tiny_config, tiny_experiment

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8}
OBJECTIVE = {
  "name": "iwm",
  "views": {"global_crops": {"num": 1, "size_px": 16, "scale": (0.3, 1.0)}, "color": JITTER},
  "source": {"brightness": 0.4, "contrast": 0.4, "p": 0.8, "grayscale_p": 0.2},
  "masks": {"kind": "uniform"},
  "predictor": {"width": 8, "depth": 1, "conditioning": "feature"},
}
IJEPA = {name: OBJECTIVE[name] for name in ("views", "masks")} | {
  "name": "ijepa",
  "predictor": {"width": 8, "depth": 1},
}
SETTINGS = {
  "encoder": VIT | {"patch_size": 4, "pos_embed": "sincos"},
  "objective": OBJECTIVE,
  "data": {"source": "synthetic", "canvas_px": 16, "max_train": 64},  # ImageNet's mean and std
}
KEY = jax.random.key(3)
QUESTIONS = world_model.ask(5, channels=3)
NUM_BANK = 1 + 4 * 4 + 3 + 31 + 256


@pytest.fixture(scope="module")
def run():
  experiment = tiny_experiment(**SETTINGS)
  return experiment, start_of(experiment)


@pytest.fixture(scope="module")
def pixels():
  """A colourful image, (3, 16, 16), without values that brightness or contrast would clip."""
  return jnp.asarray(np.random.default_rng(0).uniform(0.3, 0.6, (3, 16, 16)).astype(np.float32))


def explore(run, pixels, imagine=None):
  """Returns the answers of an untrained run, with imagine(params, context, actions) in place of its predictor."""
  experiment, state = run
  objective = copy.copy(experiment.objective)
  objective.imagine = imagine or objective.imagine
  return jax.device_get(world_model.make_explore_fn(objective, QUESTIONS)(state.params, state.target, pixels, KEY))


def test_the_bank_has_what_is_asked_for_then_jitters(pixels):
  colors_K = world_model.bank_colors(KEY, QUESTIONS)
  pictures = np.asarray(world_model.recolor(pixels, colors_K))
  assert len(pictures) == QUESTIONS.num_bank == NUM_BANK
  np.testing.assert_allclose(pictures[0], pixels, atol=1e-6)
  adjust = {
    "brightness": (color.adjust_brightness, (0.6, 0.8, 1.0, 1.2, 1.4)),
    "contrast": (color.adjust_contrast, (0.6, 0.8, 1.0, 1.2, 1.4)),
    "saturation": (color.adjust_saturation, (0.8, 0.9, 1.0, 1.1, 1.2)),
    "hue": (color.adjust_hue, (-0.1, -0.05, 0.0, 0.05, 0.1)),
  }
  for name, (change, values) in adjust.items():
    which = QUESTIONS.of(name)
    assert (QUESTIONS.source_Q[which] == 0).all()
    for row, value in zip(QUESTIONS.truth_Q[which], values):
      np.testing.assert_allclose(pictures[row], change(pixels, value), atol=2e-6)
  sources = [QUESTIONS.source_Q[QUESTIONS.of(name)[0]] for name in ("grayscale", "blur", "solarize")]
  np.testing.assert_allclose(pictures[sources[0]], np.broadcast_to(color.gray(pixels), (3, 16, 16)), atol=1e-6)
  np.testing.assert_allclose(pictures[sources[1]], color.apply_blur(pixels, 2.0, 3), atol=1e-6)
  np.testing.assert_allclose(pictures[sources[2]], color.apply_solarize(pixels, True), atol=1e-6)
  assert len(np.unique(pictures.round(4), axis=0)) == NUM_BANK  # no picture has an equal, which would tie with it


def test_the_null_action_asks_for_the_image_itself():
  middle = QUESTIONS.is_middle
  assert middle.sum() == 4 and (QUESTIONS.truth_Q[middle] == 0).all() and (QUESTIONS.source_Q[middle] == 0).all()
  changed = QUESTIONS.truth_Q[~middle & (QUESTIONS.source_Q == 0)]
  assert len(set(changed)) == len(changed) == 16 and 0 not in changed
  assert (QUESTIONS.truth_Q[QUESTIONS.source_Q > 0] == 0).all()


def test_an_oracle_finds_every_picture_and_is_lost_without_the_action(run, pixels):
  objective, state = run[0].objective, run[1]

  def oracle(params, context_NxD, actions_KxA):
    """Does to the image what the action says; an operation to undo leaves it as it is."""
    numbers = actions_KxA / ACTION_SCALE
    jitter = dict(brightness=jnp.exp(numbers[:, 0]), contrast=jnp.exp(numbers[:, 1]), saturation=jnp.exp(numbers[:, 2]))
    colors = dataclasses.replace(no_color((len(actions_KxA),)), **jitter, hue=numbers[:, 3])
    tokens = objective.encode_pixels(state.target["encoder"], world_model.recolor(pixels, colors))
    return objective.targets(tokens)

  found = explore(run, pixels, oracle)
  assert (found["inverse_rank_Q"] == 1).all()
  np.testing.assert_array_equal(found["nearest_QxM"][:, 0], QUESTIONS.truth_Q)
  table = world_model.rank_table([found, found], QUESTIONS)
  for numbers in (table["null"], *table["sweeps"].values(), *table["undo"].values()):
    assert numbers["mrr"] == 1 and numbers["top1"] == 100 and numbers["median_rank"] == 1
  assert max(numbers["mrr_null_action"] for numbers in table["sweeps"].values()) < 0.5


def test_predictors_that_are_blind_to_the_action(run, pixels):
  """One that imagines the same whatever is asked has its rank with the null action; a collapsed one ties with all."""
  objective, state = run[0].objective, run[1]
  imagined = jax.random.normal(KEY, (16, 16))
  found = explore(run, pixels, lambda params, context, actions: jnp.broadcast_to(imagined, (len(actions), 16, 16)))
  np.testing.assert_array_equal(found["inverse_rank_Q"], found["inverse_rank_null_Q"])
  assert len(np.unique(found["inverse_rank_Q"])) == 17  # one rank for each picture that is asked for

  flat = copy.copy(objective)
  flat.targets = jnp.ones_like
  found = world_model.make_explore_fn(flat, QUESTIONS)(state.params, state.target, pixels, KEY)
  numbers = world_model.rank_table([jax.device_get(found)], QUESTIONS)["sweeps"]["hue"]
  assert numbers["median_rank"] == numbers["median_rank_chance"] == (NUM_BANK + 1) / 2


def test_ranks_are_those_of_brute_force(run, pixels):
  experiment, state = run
  objective, found = experiment.objective, explore(run, pixels)
  colors_K = world_model.bank_colors(KEY, QUESTIONS)
  pictures = world_model.recolor(pixels, colors_K)
  encode, imagine = jax.jit(objective.encode_pixels), jax.jit(objective.imagine)
  bank = np.asarray(objective.targets(encode(state.target["encoder"], pictures)))
  for q in (0, 7, len(QUESTIONS.names) - 1):
    context = encode(state.params["encoder"], pictures[QUESTIONS.source_Q[q]][None])[0]
    for name, action_A in (("", found["action_QxA"][q]), ("null_", np.zeros(7, np.float32))):
      imagined = np.asarray(imagine(state.params, context, action_A[None]))[0]
      distance = ((bank - imagined) ** 2).sum((1, 2))
      rank = (distance < distance[QUESTIONS.truth_Q[q]]).sum() + 1
      assert abs(1 / found[f"inverse_rank_{name}Q"][q] - rank) <= 1  # two may be as near as float32 can tell


def test_one_channel_has_no_questions_about_colors():
  questions = world_model.ask(3, channels=1)
  assert dict.fromkeys(questions.names).keys() == {"brightness", "contrast", "blur", "solarize"}
  assert len(questions.colors) == 1 + 2 * 2 + 2
  assert world_model.has_colors(jnp.ones((2, 1, 4, 4))).all()
  assert not world_model.has_colors(jnp.ones((2, 3, 4, 4))).any()


def test_actions_that_training_never_had_are_known():
  source = color.ColorSettings(brightness=0.4, p=0.8, grayscale_p=0.2)
  views = types.SimpleNamespace(color=color.ColorSettings(hue=0.1, p=0.8))
  settings = types.SimpleNamespace(views=views, source=source, source_from="target")
  assert world_model.unseen_actions(settings) == {"contrast", "saturation", "hue", "blur", "solarize"}
  settings.source_from = "image"  # then the target's jitter is part of the action
  assert world_model.unseen_actions(settings) == {"contrast", "saturation", "blur", "solarize"}


@pytest.fixture
def checkpoint(run, tmp_path, monkeypatch):
  """Puts an untrained run, or what it is set to, in place of a checkpoint."""
  held = types.SimpleNamespace(held=run[0], state=run[1], workdir=tmp_path, step=7)
  held.experiment, held.networks = lambda: held.held, lambda experiment: held.state.networks
  monkeypatch.setattr(world_model, "open_run", lambda where, step: held)
  return held


def test_a_run_is_drawn_and_measured(checkpoint, tmp_path, monkeypatch):
  monkeypatch.setattr(world_model, "MEASURED", 3)
  out = tmp_path / "new" / "picture.png"
  result = world_model.run(tmp_path, images=2, steps_per_dimension=3, out=out)
  assert result["step"] == 7 and result["images"] == 3 and result["bank"] == NUM_BANK - 8
  assert set(result["sweeps"]) == {"brightness", "contrast", "saturation", "hue"}
  assert set(result["undo"]) == {"grayscale", "blur", "solarize"}
  numbers = result["sweeps"]["hue"]
  assert numbers["mrr_chance"] == pytest.approx(losses.blind_mrr(NUM_BANK - 8), rel=1e-3)
  json.dumps(result)
  sides = world_model_picture
  height = sides.TITLE_IN + 2 * 4 * (sides.HEAD_IN + 2 * sides.PITCH_IN) + sides.BETWEEN_IN + sides.MARGIN_IN
  with Image.open(result["picture"]) as picture:
    assert picture.size[1] == pytest.approx(sides.DPI * height, abs=1)
    drawn = np.asarray(picture.convert("RGB"))
  assert (drawn[-1] == 255).all() and (drawn[:, -1] == 255).all() and (drawn != 255).any(-1).mean() > 0.4


def test_what_cannot_be_drawn_is_said(checkpoint, tmp_path, monkeypatch):
  for options, message in (
    ({"images": 0}, "images=0"),
    ({"images": 10**6}, "number of test images"),
    ({"steps_per_dimension": 4}, "must be odd"),
    ({"overrides": {"optim.lr": "1"}}, r"only data\.\* and evals\.\*"),
  ):
    with pytest.raises(ValueError, match=message):
      world_model.run(tmp_path, **options)
  monkeypatch.setattr(world_model, "has_colors", lambda pixels: np.zeros(len(pixels), bool))
  with pytest.raises(ValueError, match="only 0 of .* have colours"):
    world_model.run(tmp_path)
  for changes, message in (
    ({"objective__predictor__conditioning": "none"}, "imagines the same whatever the action"),
    ({"objective": IJEPA}, "'ijepa', which is told no actions: train one of configs/iwm_"),
  ):
    cfg = tiny_config(**SETTINGS | changes)
    objective = make_objective(cfg.objective, cfg.encoder, Pixels(cfg.data.mean, cfg.data.std))
    checkpoint.held = types.SimpleNamespace(objective=objective, cfg=cfg)
    with pytest.raises(ValueError, match=message):
      world_model.run(tmp_path)


def test_predictions_of_a_world_model_are_those_after_the_null_action(run):
  """Shapes only: `show predictions` takes an IWM, too."""
  experiment = run[0]
  assert isinstance(experiment.objective, IWM)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
  describe_fn = predictions.make_describe_fn(experiment.objective, experiment.cfg)
  batch = abstract_batch(image_columns(experiment.cfg.data), 8)
  described = jax.eval_shape(describe_fn, experiment.abstract_state.networks, batch, keys)
  assert described["prediction_BxMxTxD"].shape[-1] == 16
