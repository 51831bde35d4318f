"""The loop as a user meets it: train, resume, refuse, diverge, evaluate."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

import jepa_jax.__main__ as cli
from jepa_jax import checkpoint, telemetry
from jepa_jax import train as train_module
from jepa_jax.config import to_dict
from jepa_jax.evaluate import evaluate
from jepa_jax.runs import load_encoder, read_config
from jepa_jax.train import Start, TrainingDiverged, train
from tests.tiny import MLP, TINY, VIT, tiny_config, tiny_values

ROOT = Path(__file__).parent.parent
SMALL = {"encoder": MLP, "objective__views__local_crops__num": 0, "evals__knn__k": 5}


PATCH_8 = {"encoder": VIT, "objective__views__local_crops__num": 0}


def small_config(**changes):
  return tiny_config(**(SMALL | changes))


def drawn_config():
  """That of `finished`: its first views are drawn."""
  return small_config(log__views=4)


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """One undisturbed run: (workdir, final state)."""
  workdir = tmp_path_factory.mktemp("finished")
  return workdir, jax.device_get(train(drawn_config(), workdir))


@pytest.mark.slow
def test_a_run_leaves_checkpoints_metrics_and_pictures(finished):
  workdir, state = finished
  assert int(state.step) == 6 and checkpoint.steps(workdir) == [4, 6]
  rows = telemetry.read_metrics(workdir)
  assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
  assert {"loss", "sigreg", "inv", "probe_accuracy", "data_wait_ms", "learning_rate"} <= rows[0].keys()
  for name in ("views.png", "curves.png", "config.json"):
    assert (workdir / name).stat().st_size > 0
  assert read_config(workdir) == drawn_config()
  assert json.loads((workdir / "config.json").read_text())["format"] == 2


def test_run_again_says_complete_and_changes_nothing(finished, caplog):
  workdir, state = finished
  before = (workdir / "metrics.jsonl").read_text()
  with caplog.at_level("INFO"):
    again = train(drawn_config(), workdir)
  assert "is complete (6 steps)" in caplog.text
  assert same(again, state) and (workdir / "metrics.jsonl").read_text() == before


def interrupt_at(step: int, monkeypatch):
  """Makes the loop fail as a crash would: after `step` steps, saved or not."""
  real = telemetry.Metrics.write

  def write(self, at, values):
    real(self, at, values)
    if at == step:
      raise KeyboardInterrupt

  monkeypatch.setattr(telemetry.Metrics, "write", write)


@pytest.mark.slow
def test_interrupted_run_resumes_bit_identically(finished, tmp_path, monkeypatch):
  workdir, state = finished
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    interrupt_at(5, patch)
    train(small_config(), tmp_path)
  assert checkpoint.latest_step(tmp_path) == 4
  resumed = train(small_config(), tmp_path)
  assert same(resumed, state)
  losses = [[r["loss"] for r in telemetry.read_metrics(w)] for w in (workdir, tmp_path)]
  assert losses[0] == losses[1]  # and each step stands once in metrics.jsonl


@pytest.mark.slow
def test_checkpoint_of_an_fsdp_mesh_resumes_on_another_with_the_same_loss_curve(finished, tmp_path, monkeypatch):
  workdir, _ = finished
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    interrupt_at(3, patch)
    train(small_config(mesh__data=1, mesh__fsdp=8), tmp_path)
  train(small_config(mesh__data=4, mesh__fsdp=2), tmp_path)
  losses = [[r["loss"] for r in telemetry.read_metrics(w)] for w in (workdir, tmp_path)]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(finished, tmp_path, caplog):
  _, state = finished
  train(small_config(), tmp_path)
  for path in (tmp_path / "checkpoints" / "6" / "networks").rglob("*"):
    if path.parent.name == "d":
      path.write_bytes(b"")
  resumed = train(small_config(), tmp_path)
  assert "is damaged or incomplete" in caplog.text and list((tmp_path / "checkpoints_damaged").iterdir())
  assert same(resumed, state)


def test_workdir_with_another_config_is_refused_with_the_difference(finished):
  workdir, _ = finished
  before = (workdir / "config.json").read_text()
  with pytest.raises(ValueError, match=r"(?s)another config.*optim.lr: 0.01 -> 0.5.*--accept-config-change"):
    train(small_config(optim__lr=0.5), workdir)
  assert (workdir / "config.json").read_text() == before and checkpoint.steps(workdir) == [4, 6]


@pytest.mark.slow
def test_what_a_diverged_run_is_told_to_change_can_be_changed(finished, tmp_path, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    interrupt_at(3, patch)
    train(small_config(), tmp_path)
  calmer = small_config(optim__lr=0.005, optim__clip_norm=1.0)
  state = train(calmer, tmp_path, Start(accept_change=True))
  assert int(state.step) == 6 and read_config(tmp_path) == calmer


def test_accepted_change_that_cannot_be_restored_loses_nothing(finished):
  workdir, _ = finished
  before = (workdir / "config.json").read_text()
  with pytest.raises(checkpoint.CheckpointError, match="of another architecture"):
    train(small_config(encoder=MLP | {"widths": (32, 24)}), workdir, Start(accept_change=True))
  assert (workdir / "config.json").read_text() == before and checkpoint.steps(workdir) == [4, 6]


@pytest.mark.parametrize("error", [PermissionError(13, "no"), RuntimeError("RESOURCE_EXHAUSTED: out of memory")])
def test_checkpoint_that_cannot_be_read_for_reasons_of_its_surroundings_stays(finished, monkeypatch, error):
  workdir, _ = finished

  def refuse(*args, **kwargs):
    raise error

  monkeypatch.setattr(ocp, "load_checkpointables", refuse)
  with pytest.raises(type(error)):
    train(small_config(), workdir)
  assert checkpoint.steps(workdir) == [4, 6] and not (workdir / "checkpoints_damaged").exists()


def test_another_batch_size_is_another_run(finished, tmp_path):
  """Its steps would count other numbers of images, and half of the epochs be called all."""
  workdir = shutil.copytree(finished[0], tmp_path / "workdir")
  with pytest.raises(ValueError, match=r"counted 6 steps of 16 images; with batch_size=8.*--init-from"):
    train(small_config(batch_size=8, total="12steps"), workdir, Start(accept_change=True))


def test_sigterm_before_training_listens_asks_for_another_start(tmp_path):
  """While JAX is imported, say: 75, as later, and not the signal's own status."""
  code = (
    "import os, signal, jepa_jax.__main__ as m\n"
    "m._parser = lambda _: os.kill(os.getpid(), signal.SIGTERM)\n"
    "m.main(['train'])"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 75 and "Stopped as asked" in done.stderr


def test_nan_stops_the_run_naming_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch):
  class Poisoned:
    """The compiled step, whose loss is NaN from its third call on."""

    def __init__(self, compiled):
      self.compiled, self.calls = compiled, 0

    def __call__(self, state, batch, key):
      self.calls += 1
      state, metrics = self.compiled(state, batch, key)
      return state, metrics | {"loss": metrics["loss"] * (float("nan") if self.calls > 2 else 1.0)}

  compile_ = train_module.Experiment.compile
  monkeypatch.setattr(train_module.Experiment, "compile", lambda self: Poisoned(compile_(self)))
  with pytest.raises(TrainingDiverged, match="loss not finite at step 3.*last good checkpoint is that of step 2"):
    train(small_config(), tmp_path)
  assert checkpoint.steps(tmp_path) == [2]


@pytest.mark.slow
def test_learning_rate_that_explodes_is_caught_for_real(tmp_path):
  with pytest.raises(TrainingDiverged, match="not finite at step"):
    train(small_config(optim__name="sgd", optim__lr=1e30, optim__warmup="0steps", total="20steps"), tmp_path)


def test_full_disk_does_not_stop_training(tmp_path, monkeypatch, caplog):
  def no_space(self, step, response=None):
    raise OSError(28, "No space left on device")

  real = ocp.training.Checkpointer.save_checkpointables_async
  fail = lambda self, step, *a, **k: no_space(self, step) if step == 4 else real(self, step, *a, **k)
  monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", fail)
  state = train(small_config(), tmp_path)
  assert int(state.step) == 6 and checkpoint.steps(tmp_path) == [2, 6]
  assert "CHECKPOINT NOT SAVED at step 4" in caplog.text


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch_size": 128}, "64 training images are fewer than one batch of 128"),
    ({"batch_size": 12}, "the nearest: 8 or 16"),
    ({"data__channels": 3}, "data.channels is 3; give one number per channel"),
    ({"data__source": "folder", "data__root": "/nowhere/at/all"}, "nowhere"),
    ({"total": "0.01ep"}, "less than one step"),
    ({"mesh__data": 3}, "does not multiply out"),
    (PATCH_8 | {"objective__views__local_crops": {"num": 1, "size_px": 4, "scale": (0.1, 0.2)}}, "patch_size=8"),
    (PATCH_8 | {"objective__views__global_crops__size_px": 20}, "nearest that are: 16 or 24"),
  ],
)
def test_bad_input_is_said_before_anything_is_written(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    train(small_config(**changes), tmp_path / "new")
  assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_evaluation_from_the_checkpoint(finished):
  workdir, _ = finished
  rows = evaluate(workdir).rows
  assert list(rows) == ["raw pixels", "random encoder", "lejepa, step 6"]
  for row in rows.values():
    assert {"knn", "linear"} <= row.keys()
  stored = json.loads((workdir / "evals" / "6.json").read_text())
  assert stored["rows"].keys() == rows.keys() and stored["step"] == 6
  assert stored["complete"] and stored["jepa_jax"]["version"]
  times = lambda: {path: path.stat().st_mtime_ns for path in (workdir / "features").rglob("*.npy")}
  before = times()
  shutil.rmtree(workdir / "evals" / "rows")
  assert evaluate(workdir).rows == rows and times() == before  # from the features that are there
  again = evaluate(workdir, names=("knn",), again=True).rows
  assert again == {row: {"knn": columns["knn"]} for row, columns in rows.items()}
  assert times().keys() == before.keys() and not set(times().values()) & set(before.values())  # all anew


def test_load_encoder_gives_what_training_had(finished):
  workdir, state = finished
  apply_fn, params, cfg = load_encoder(workdir)
  assert cfg == drawn_config()
  assert same(params["params"], state.params["encoder"])
  images = np.zeros((2, 16, 16, 1), np.uint8)
  out = apply_fn(params, images)
  normalised = (images / 255 - 0.5) / 0.5
  np.testing.assert_allclose(out.pooled_BxD, apply_fn(params, normalised.astype(np.float32)).pooled_BxD, rtol=1e-6)
  at_4 = load_encoder(workdir / "checkpoints" / "4")[1]
  assert not same(at_4, params)


def test_load_encoder_says_what_is_missing(finished, tmp_path):
  with pytest.raises(checkpoint.CheckpointError, match="holds no finished checkpoint"):
    load_encoder(tmp_path)
  with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
    load_encoder(tmp_path / "gone")
  with pytest.raises(checkpoint.CheckpointError, match=r"there are: \[4, 6\]"):
    load_encoder(finished[0], step=5)


def write_config(path: Path, values: dict) -> Path:
  path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict({values!r})\n")
  return path


@pytest.mark.slow
def test_command_line_trains_and_evaluates(tmp_path, capsys):
  config = write_config(tmp_path / "tiny.py", tiny_values(**SMALL))
  workdir = tmp_path / "run"
  assert cli.main(["train", f"--config={config}", f"--workdir={workdir}", "--config.total=2steps"]) == 0
  assert checkpoint.steps(workdir) == [2]
  assert cli.main(["eval", f"--workdir={workdir}", "--evals=knn"]) == 0
  assert "raw pixels" in capsys.readouterr().out
  (file,) = (workdir / "evals").glob("2-*.json")  # a partial table does not overwrite the full one
  stored = json.loads(file.read_text())
  assert all(row.keys() == {"knn"} for row in stored["rows"].values())


def test_command_line_errors_are_short_and_name_the_fix(tmp_path, capsys):
  config = write_config(tmp_path / "tiny.py", TINY)
  assert cli.main(["train", f"--config={config}", f"--workdir={tmp_path}", "--config.optim.leraning=1"]) == 2
  error = capsys.readouterr().err
  assert "config.optim.leraning is not a setting" in error and "Traceback" not in error
  assert cli.main(["eval", f"--workdir={tmp_path}", "--evals=knn,lineer"]) == 2
  assert "choose from" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    cli.main(["train", f"--config={config}", f"--workdir={tmp_path}", "--lr=3"])
  assert "settings are changed by --config.some.key=value" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("text", "hint"),
  [
    ("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nlong story", "Raise config.microbatch"),
    ("INTERNAL: YNNPACK operation failed: error", "Raise config.microbatch"),
    ("INTERNAL: something else", None),
  ],
)
def test_a_device_without_memory_is_told_what_takes_less(text, hint, tmp_path, monkeypatch, capsys):
  def train(*_):
    raise jax.errors.JaxRuntimeError(text)

  monkeypatch.setattr("jepa_jax.train.train", train)
  command = ["train", "--config=lejepa_digits", f"--workdir={tmp_path}"]
  if hint is None:
    with pytest.raises(jax.errors.JaxRuntimeError):
      cli.main(command)
    return
  assert cli.main(command) == cli.INPUT_ERROR
  said = capsys.readouterr().err
  assert hint in said and "long story" not in said


def test_print_config_shows_every_default(tmp_path, capsys):
  config = write_config(tmp_path / "tiny.py", TINY)
  assert cli.main(["train", f"--config={config}", f"--workdir={tmp_path}", "--print-config"]) == 0
  assert json.loads(capsys.readouterr().out) == to_dict(tiny_config())


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["bench"]])
def test_help_helps(command):
  result = subprocess.run(
    [sys.executable, "-m", "jepa_jax", *command, "--help"], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0
  assert ("--config.optim.lr" in result.stdout) == (command == ["train"])


def test_evaluation_elsewhere_changes_data_and_protocol_but_not_the_networks(finished):
  workdir, _ = finished
  found = evaluate(workdir, 4, {"data.max_train": "32"}, names=("knn",), baselines=False)
  assert list(found.rows) == ["lejepa, step 4"] and found.row.keys() == {"knn"}
  with pytest.raises(ValueError, match="only data.* and evals.* change"):
    evaluate(workdir, overrides={"encoder.depth": "3"})


@pytest.mark.slow
def test_features_are_cached_by_the_weights_they_come_from(finished, tmp_path):
  train(small_config(), tmp_path)
  evaluate(tmp_path, names=("knn",), baselines=False)
  before = {p.name for p in (tmp_path / "features").iterdir()}
  (tmp_path / "checkpoints").rename(tmp_path / "old")
  train(small_config(optim__lr=0.5), tmp_path, Start(accept_change=True))
  evaluate(tmp_path, names=("knn",), baselines=False)
  assert len({p.name for p in (tmp_path / "features").iterdir()} - before) == 2  # train and test, anew


def test_images_without_labels_are_trained_on_but_not_evaluated(tmp_path):
  folder = tmp_path / "images"
  folder.mkdir()
  for i in range(16):
    Image.fromarray(np.full((16, 16), 16 * i, np.uint8)).save(folder / f"{i}.png")
  data = {
    "source": "folder",
    "root": str(tmp_path),
    "train": "images",
    "test": "images",
    "canvas_px": 16,
    "channels": 1,
    "mean": (0.5,),
    "std": (0.5,),
  }
  state = train(small_config(data=data, total="1steps"), tmp_path / "run")
  assert int(state.step) == 1
  with pytest.raises(ValueError, match="no labels to evaluate with"):
    evaluate(tmp_path / "run")


def test_object_store_is_refused_rather_than_written_to_a_local_folder_of_that_name():
  with pytest.raises(ValueError, match="mount the bucket"):
    train(small_config(), "gs://bucket/run")
