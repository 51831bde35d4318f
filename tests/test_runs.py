"""A run on disk, opened: what is read of it, and where a new one may start: own checkpoint, another run, scratch."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from jepa_jax import checkpoint
from jepa_jax.evals import PROTOCOLS
from jepa_jax.evaluate import evaluate
from jepa_jax.runs import load_encoder, open_run, read_config
from jepa_jax.train import Start, TrainingDiverged, train
from jepa_jax.workdir import read_json, write_json
from tests.test_ijepa import IJEPA
from tests.tiny import MLP, VIT, tiny_config

SMALL = {"encoder": MLP, "objective__views__local_crops__num": 0, "total": "2steps"}


def config(**changes):
  return tiny_config(**(SMALL | changes))


def networks(workdir, step=None):
  run = open_run(workdir, step)
  return run.networks(run.experiment())


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A run of two steps with a moving average of its encoder."""
  workdir = tmp_path_factory.mktemp("source")
  train(config(objective__weight_average=0.5), workdir)
  return workdir


@pytest.mark.slow
def test_what_a_checkpoint_says_of_itself(source):
  meta = open_run(source).meta
  assert (meta["format"], meta["step"], meta["num_classes"]) == (2, 2, 10)
  assert meta["jepa_jax"].keys() == {"version", "commit"} and meta["versions"].keys() >= {"jax", "flax"}
  assert {path.name for path in (source / "checkpoints" / "2").iterdir() if path.is_dir()} == {
    "meta",
    "networks",
    "training",
  }


@pytest.mark.slow
def test_the_encoder_alone_is_the_one_that_was_evaluated_and_all_else_is_new(source, tmp_path):
  train(config(), tmp_path / "new", Start(init_from=str(source)))
  train(config(), tmp_path / "scratch")
  before, new, scratch = networks(source), tmp_path / "new", tmp_path / "scratch"
  first = lambda workdir: [open_run(workdir, 2).meta.get("started_from")]
  assert first(scratch) == [None]
  assert first(new) == [{"workdir": str(source), "step": 2, "what": "encoder"}]
  assert not same(before["target"]["encoder"], before["params"]["encoder"])  # the average differs, and is taken


def started(source, tmp_path, what, **changes):
  """Returns the networks with which a run starts, before its first step."""
  from jepa_jax.experiment import make_experiment
  from jepa_jax.runs import one_device
  from jepa_jax.starts import start

  run = make_experiment(config(**changes), one_device(), 64, 10)
  state, step, spent, origin = start(run, tmp_path, {}, str(source), what)
  assert (int(state.step), step, spent, origin["what"]) == (0, 0, {}, what)
  return state, run.init()


@pytest.mark.slow
def test_start_takes_the_average_for_an_encoder_alone_and_both_for_everything(source, tmp_path):
  before = networks(source)
  state, fresh = started(source, tmp_path, "encoder")
  assert same(state.params["encoder"], before["target"]["encoder"])
  assert same(state.params["projector"], fresh.params["projector"]) and state.target is None
  assert same(state.opt_state, fresh.opt_state)
  state, fresh = started(source, tmp_path, "everything", objective__weight_average=0.9)
  assert same(state.params, before["params"]) and same(state.target, before["target"])
  assert same(state.model_state, before["state"]) and not same(state.model_state, fresh.model_state)
  state, fresh = started(source, tmp_path, "encoder", objective__weight_average=0.9)
  assert same(state.target["encoder"], state.params["encoder"])  # its own average begins where it begins
  state, fresh = started(source, tmp_path, "projector")
  assert same(state.params["projector"], before["params"]["projector"])
  assert same(state.params["encoder"], fresh.params["encoder"])


def test_an_own_checkpoint_comes_before_another_run(source, tmp_path):
  train(config(), tmp_path)
  whole = networks(tmp_path)
  again = train(config(), tmp_path, Start(init_from=str(source)))
  assert same(again.params, whole["params"])


@pytest.mark.slow
def test_the_origin_stays_in_later_checkpoints_and_the_difference_is_shown(source, tmp_path, caplog):
  with caplog.at_level("INFO"):
    train(config(total="1steps"), tmp_path, Start(init_from=f"{source}:2"))
  assert "differs from where it starts: objective.weight_average: 0.5 -> 0.0" in caplog.text
  train(config(total="2steps"), tmp_path, Start(accept_change=True))
  assert open_run(tmp_path).meta["started_from"]["step"] == 2


@pytest.mark.parametrize(
  ("changes", "start", "message"),
  [
    (
      {"encoder": MLP | {"widths": (32, 24)}},
      {},
      r"(?s)of another architecture:.*encoder/\S*kernel: \(32, 16\) there, \(32, 24\) here",
    ),
    ({"encoder": VIT}, {}, r"(?s)of another architecture:.*missing there"),
    (
      {},
      {"init_what": "predictor"},
      "this method has no network predictor; choose 'everything', or of: encoder, projector",
    ),
    ({}, {"init_from": "{source}:7"}, r"no checkpoint of step 7 .* there are: \[2\]"),
    ({}, {"init_from": "/nowhere"}, "does not exist"),
  ],
)
def test_what_cannot_be_started_from_is_refused_before_anything_is_written(source, tmp_path, changes, start, message):
  options = {"init_from": str(source)} | {key: value.format(source=source) for key, value in start.items()}
  with pytest.raises(ValueError, match=message):
    train(config(**changes), tmp_path / "new", Start(**options))
  assert not (tmp_path / "new").exists()


def test_profile_is_a_trace_of_the_steps_asked_for(tmp_path):
  train(config(total="3steps"), tmp_path, Start(profile=(2, 3)))
  traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
  assert len(traces) == 1 and traces[0].stat().st_size > 0


def test_only_what_is_asked_for_is_read(source):
  run, read = open_run(source), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, "restore", lambda *_, networks, **__: read.append(networks) or {"networks": networks})
    run.variables(run.experiment(), "image")
  assert jax.tree.structure(read[0]) == jax.tree.structure(
    {"target": {"encoder": networks(source)["target"]["encoder"]}}
  )


@pytest.mark.slow
def test_a_method_without_state_starts_and_trains_from_another_run(tmp_path):
  """What the step was compiled for is what it gets: an empty state stays one."""
  changes = {"encoder": VIT, "objective": IJEPA, "total": "2steps"}
  train(tiny_config(**changes), tmp_path / "first")
  train(tiny_config(**changes | {"seed": 3}), tmp_path / "second", Start(init_from=str(tmp_path / "first")))
  assert open_run(tmp_path / "second").meta["started_from"]["workdir"] == str(tmp_path / "first")


def test_a_run_of_less_than_half_an_epoch_is_opened(tmp_path):
  train(config(total="0.25ep", batch_size=8), tmp_path)
  assert open_run(tmp_path).experiment().total_steps == 1


def test_a_config_of_a_newer_format_says_who_wrote_it(source, tmp_path):
  values = read_json(source / "config.json")
  assert values["jepa_jax"].keys() == {"version", "commit"}
  write_json(tmp_path / "config.json", values | {"format": 99, "jepa_jax": {"version": "9.1", "commit": "abc"}})
  with pytest.raises(ValueError, match=r"has format 99.*written by version 9\.1, commit abc"):
    read_config(tmp_path)


@pytest.mark.parametrize(
  ("overrides", "names", "message"),
  [
    ({"evals.names": "()"}, None, "there is nothing to evaluate"),
    ({"data.mean": "(.1,)"}, ("knn",), r"config.data.mean: the networks were trained with those of the checkpoint"),
    ({"data.channels": "3"}, ("knn",), "config.data.channels: "),
    ({"evals.names": "knn"}, ("linear",), "both say what to evaluate"),
  ],
)
def test_what_cannot_be_evaluated_is_refused(source, overrides, names, message):
  with pytest.raises(ValueError, match=message):
    evaluate(source, overrides=overrides, names=names)


def test_a_protocol_whose_needs_nothing_meets_is_refused(source, monkeypatch):
  monkeypatch.setattr(PROTOCOLS["knn"], "needs", frozenset({"features", "caption"}))
  with pytest.raises(ValueError, match="knn needs caption, and there is only: canvas, encoder, features"):
    evaluate(source, names=("knn",))


# ---------------------------------------------------------------------------------------------- data that changed
def folder_config(images, **changes):
  data = {"source": "folder", "root": str(images), "canvas_px": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3}
  return config(data=data, batch_size=8, total="2steps", **changes)


@pytest.fixture
def images(tmp_path):
  for split, count in (("train", 12), ("test", 4)):
    for i in range(count):
      path = tmp_path / "images" / split / f"class{i % 2}" / f"{i:02d}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
  return tmp_path / "images"


def add_class(images):
  (images / "train" / "cat").mkdir()
  shutil.copy(images / "train" / "class0" / "00.png", images / "train" / "cat")


@pytest.fixture
def trained(images, tmp_path):
  train(folder_config(images), tmp_path / "workdir")
  return tmp_path / "workdir"


def test_a_run_does_not_go_on_with_other_images_unless_told_to(images, trained):
  first = images / "train" / "class0" / "00.png"
  changes = [
    (lambda: first.rename(first.with_name("x.png")), "as many images and the same classes, but other names"),
    (lambda: first.with_name("x.png").unlink(), "12 images then, 11 now"),
    (lambda: (images / "train" / "class1").rename(images / "train" / "dog"), "are gone: class1\n.*are new: dog"),
  ]
  for change, message in changes:
    change()
    with pytest.raises(ValueError, match=message):
      train(folder_config(images), trained)
  train(folder_config(images), trained, Start(accept_change=True))


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
  """The loss and the gradient are of the parameters before the update: finite, where the update is not."""
  settings = {"optim__lr": 1e30, "optim__warmup": "0steps", "optim__clip_norm": 0.0, "checkpoint__every": "1steps"}
  with pytest.raises(TrainingDiverged, match="param_norm"):
    train(config(**settings), tmp_path)
  for step in checkpoint.steps(tmp_path):
    params = open_run(tmp_path, step).networks(open_run(tmp_path, step).experiment())["params"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


# ----------------------------------------------------------------------------------------------- load_encoder's input
@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((2, 16, 16, 1), np.int32), "int32 are neither uint8 nor normalised: give uint8"),
    (np.zeros((2, 16, 16, 1), np.uint16), "uint16 are neither"),
    (np.full((2, 16, 16, 1), 200.0, np.float32), "between 200 and 200, which no pixel does that is normalised"),
    (np.full((2, 16, 16, 1), np.nan, np.float32), "which no pixel does"),
    (np.zeros((2, 1, 16, 16), np.uint8), r"\(B, H, W, 1\), not \(2, 1, 16, 16\): transpose\(0, 2, 3, 1\)"),
    (np.zeros((16, 16, 1), np.uint8), r"images\[None\] is a batch of one"),
    (np.zeros((16, 16), np.uint8), r"not \(16, 16\)$"),
  ],
)
def test_images_that_the_encoder_was_not_trained_on_are_refused(source, images, message):
  apply_fn, params, _ = load_encoder(source)
  with pytest.raises(ValueError, match=message):
    apply_fn(params, images)


def test_normalised_images_may_be_given_inside_and_outside_of_jit(source):
  apply_fn, params, cfg = load_encoder(source)
  pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), np.uint8)
  normalised = ((pixels / 255 - cfg.data.mean) / cfg.data.std).astype(np.float32)
  outputs = [apply_fn(params, pixels), apply_fn(params, normalised), jax.jit(apply_fn)(params, normalised)]
  for out in outputs[1:]:
    np.testing.assert_allclose(out.pooled_BxD, outputs[0].pooled_BxD, rtol=1e-5, atol=1e-6)
