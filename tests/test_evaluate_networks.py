"""Evaluation from a checkpoint of what needs networks (mrr, attentive, predictor_tuning); refusals come first."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jepa_jax.__main__ as cli
from jepa_jax import checkpoint
from jepa_jax.evals import predictor_tuning as protocol
from jepa_jax.evals.mrr import BLIND
from jepa_jax.evals.tuning import Task
from jepa_jax.evaluate import evaluate
from jepa_jax.losses import blind_mrr
from jepa_jax.runs import make_meta, open_run
from tests import test_tuning
from tests.test_tuning import ENCODER, IJEPA, PX
from tests.tiny import MLP, tiny_config, tiny_experiment

world = test_tuning.world  # the fixture


def save(folder, run, state):
  """Writes what training writes; returns the workdir."""
  saver = checkpoint.Saver(folder, keep_last=1)
  meta = make_meta(run.cfg, 0, 10, {"seconds": {}, "examples": 0})
  saver.save(0, state.networks, state.training, meta)
  saver.close()
  assert not saver.failures
  return folder


def blank(folder, **changes):
  """Writes a checkpoint of zeros: nothing is compiled for it."""
  run = tiny_experiment(**changes)
  return save(folder, run, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.abstract_state))


@pytest.fixture(scope="module")
def workdir(world, tmp_path_factory):
  return save(tmp_path_factory.mktemp("iwm"), world.run, world.state)


@pytest.fixture
def nothing_compiled():
  """Fails where anything was compiled during the test."""
  events, on = [], [True]
  watch = lambda event, *_, **__: events.append(event) if on[0] and "backend_compile" in event else None
  jax.monitoring.register_event_duration_secs_listener(watch)
  yield
  on[0] = False
  assert not events


MRR = {"evals.mrr.images": "4", "evals.mrr.bank": "8", "evals.mrr.chunk": "4", "evals.mrr.batch_size": "4"}
TUNING = {"evals.tuning.epochs": "1", "evals.tuning.batch_size": "16", "evals.tuning.learning_rates": "(1e-3,)"}
SMALL = MRR | TUNING
MRRS = [f"MRR{name}" for name in ("", " jitter", " blur", " grayscale", " solarize", " all")]


@pytest.mark.slow
def test_command_line_evaluates_a_world_model_beside_its_baselines(workdir, capsys, monkeypatch):
  monkeypatch.setattr("jepa_jax.evaluate.jax.local_devices", lambda: jax.devices()[:1])  # eight compile for longer
  flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
  flags += ["--config.evals.predictor_tuning.groups=(0,0,0,0,0,1,1,1,1,1)", "--config.data.max_train=32"]
  assert cli.main(["eval", f"--workdir={workdir}", "--evals=mrr,linear,attentive,predictor_tuning", *flags]) == 0
  (file,) = (workdir / "evals").glob("0-*.json")
  stored = json.loads(file.read_text())
  rows, details = stored["rows"], stored["details"]["iwm, step 0"]
  tuned = ["tuned encoder", "random predictor", "predictor", "end to end"]
  assert list(rows) == ["raw pixels", "random encoder", BLIND, "iwm, step 0"]
  assert set(rows["raw pixels"]) == {"linear"} and set(rows["random encoder"]) == {"linear", "attentive"}
  assert rows[BLIND] == dict.fromkeys(rows[BLIND], pytest.approx(100 * blind_mrr(8))) and set(rows[BLIND]) == set(MRRS)
  expected = {"linear", "attentive", *MRRS, *tuned, "predictor, groups", "multitask", "multitask, groups"}
  assert set(rows["iwm, step 0"]) == expected
  assert all(0 <= x <= 100 for x in rows["iwm, step 0"].values())
  assert set(details) == {"linear", "attentive", *tuned, "predictor, groups", "multitask", "multitask, groups"}
  assert details["predictor"]["learning_rate"] == 1e-3 and len(details["multitask"]["accuracy"]) == 2
  shown = capsys.readouterr().out
  assert BLIND in shown and "multitask, groups" in shown  # wide tables are printed in parts, not squeezed


@pytest.mark.slow
def test_mrr_needs_no_labels_and_all_else_does(workdir, tmp_path):
  (tmp_path / "images").mkdir()
  for i in range(4):
    Image.fromarray(np.full((PX, PX), 40 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
  data = {"data.source": "folder", "data.root": str(tmp_path), "data.train": "images", "data.test": "images"}
  for names in (("attentive",), ("mrr", "predictor_tuning"), ("mrr", "knn")):
    with pytest.raises(ValueError, match="no labels to evaluate with"):
      evaluate(workdir, overrides=data, names=names)
  rows = evaluate(workdir, overrides=data | MRR, names=("mrr",), show=False).rows
  assert list(rows) == [BLIND, "iwm, step 0"] and all(set(row) == set(MRRS) for row in rows.values())
  alone = evaluate(workdir, overrides=data | MRR, names=("mrr",), baselines=False, again=True, show=False).rows
  assert alone == {"iwm, step 0": rows["iwm, step 0"]}


LEJEPA = {"encoder": MLP, "objective__views__local_crops__num": 0}


@pytest.mark.parametrize(
  "changes, names, message",
  [
    (LEJEPA, ("predictor_tuning",), "attends to an encoder's tokens, and this one has none"),
    (LEJEPA, ("attentive",), "attends to an encoder's tokens, and this one has none"),
    (LEJEPA, ("mrr",), "'lejepa' has no predictor"),
    ({}, ("predictor_tuning",), "predictor_tuning needs a predictor, and objective 'lejepa' has none"),
    (
      {"encoder": ENCODER, "objective": IJEPA | {"predictor": {"depth": 0}}},
      ("predictor_tuning",),
      "predictor_tuning needs a predictor, and objective.predictor.depth=0",
    ),
    ({"encoder": ENCODER, "objective": IJEPA}, ("mrr",), "'ijepa' has no predictor that is told actions"),
  ],
)
def test_checkpoint_that_lacks_a_network_is_refused_before_anything_is_compiled(
  changes, names, message, tmp_path, request
):
  blank(tmp_path, **changes)
  request.getfixturevalue("nothing_compiled")
  with pytest.raises(ValueError, match=message):
    evaluate(tmp_path, names=names)


def test_wrong_settings_are_refused_before_anything_is_compiled(workdir, request):
  request.getfixturevalue("nothing_compiled")
  ask = lambda **more: evaluate(workdir, overrides=more, names=("predictor_tuning",))
  with pytest.raises(ValueError, match="groups has 2 entries for 10 classes"):
    ask(**{"evals.predictor_tuning.groups": "(0, 1)"})
  with pytest.raises(ValueError, match="set evals.view_px=16"):
    ask(**{"evals.view_px": "32"})
  with pytest.raises(ValueError, match="evals.mrr is set, but .* asks for nothing that reads it"):
    ask(**{"evals.mrr.bank": "8"})


def test_target_that_the_method_declares_must_be_there_and_an_online_one_needs_none(world):
  objective, params, target = world.networks
  for missing in (None, {"predictor": params["predictor"]}):
    with pytest.raises(ValueError, match="predictor_tuning takes the target encoder.*this checkpoint has none"):
      protocol.check_networks(objective, params, missing)
  with pytest.raises(ValueError, match="needs a predictor, and this checkpoint has none"):
    protocol.check_networks(objective, {"encoder": params["encoder"]}, target)
  online = tiny_experiment(encoder=ENCODER, objective=IJEPA | {"target": "online"}).objective
  protocol.check_networks(online, params, None)


def test_evaluation_reads_the_networks_and_only_what_it_needs_of_them(workdir, tmp_path):
  """The optimiser's state is never read: a checkpoint without it evaluates; and the encoder is read alone."""
  folder = tmp_path / "checkpoints" / "0"
  folder.parent.mkdir()
  shutil.copytree(workdir / "checkpoints" / "0", folder)
  shutil.rmtree(folder / "training")
  run = open_run(tmp_path)
  assert run.networks(run.experiment())["target"].keys() == {"encoder"}
  read = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, "restore", lambda *_, networks, **__: read.append(networks) or {"networks": networks})
    run.variables(run.experiment(), "image")
  assert read[0].keys() == {"target"} and read[0]["target"].keys() == {"encoder"}


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"predictor_tuning": {"groups": (0, 0, 0)}}, r"uses the groups \[0\].*at least 0 and 1"),
    ({"predictor_tuning": {"groups": (0, 2)}}, r"uses the groups \[0, 2\]: number them from 0 without gaps"),
    ({"tuning": {"learning_rates": ()}}, "config.evals.tuning: learning_rates=.*give at least one"),
    ({"tuning": {"learning_rates": (0.0,)}}, "all above 0"),
    ({"tuning": {"epochs": 0}}, "epochs=0"),
    ({"tuning": {"weight_decay": -1.0}}, "weight_decay=-1.0"),
    ({"mrr": {"chunk": 0}}, "config.evals.mrr: chunk=0 must be at least 1"),
    ({"mrr": {"batch_size": 0}}, "batch_size=0 must be at least 1"),
    ({"mrr": {"distance": "l1"}}, "config.evals.mrr.distance is 'l1', but must be one of l2, cosine"),
    ({"names": ("atentive",)}, "mrr, retrieval, zero_shot, predictor_tuning"),
  ],
)
def test_settings_check_themselves(settings, message):
  with pytest.raises(ValueError, match=message):
    tiny_config(evals={"names": ("predictor_tuning", "mrr")} | settings)


def test_labels_out_of_range_are_refused_with_where():
  with pytest.raises(ValueError, match=r"1 of 3 training labels are outside \[0, 2\), the first is -1 at index 1"):
    Task(np.array([0, -1, 1]), np.array([0]), 2)
