"""The files of a run that are gone, empty, no JSON, or something else: named, or made again, never a traceback."""

import importlib.util
import json
import shutil
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest

from jepa_jax import goodput, telemetry
from jepa_jax.curves import draw_curves
from jepa_jax.follow import Asked, read_tables
from jepa_jax.runs import check_workdir, read_config
from jepa_jax.telemetry import LogConfig, Metrics, read_metrics, truncate_metrics
from jepa_jax.train import train
from jepa_jax.workdir import read_end, read_json
from tests.test_old_runs import ARCHIVE
from tests.tiny import tiny_config

NONE = ["", "{", "null", "3", '"text"', "[1, 2]", '{"other": 1}', "\ufeff{}", "<html>"]
BYTES = b"\xff\xfe\x00\x80"


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_file_of_ours_is_named_with_what_to_do(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config.json.*no checkpoint to take the config from") as caught:
    check_workdir(tmp_path, tiny_config(), False)
  assert "another --workdir" in str(caught.value)


@pytest.mark.parametrize("text", [*NONE, None])
def test_a_config_that_is_lost_is_that_of_the_newest_checkpoint(tmp_path, text, caplog):
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(tmp_path, filter="data")
  workdir = tmp_path / "lejepa"
  before = read_config(workdir)
  (workdir / "config.json").unlink() if text is None else (workdir / "config.json").write_text(text)
  assert read_config(workdir) == before and "taken from the checkpoint of step" in caplog.text
  with pytest.raises(ValueError, match="holds a run with another config"):
    check_workdir(workdir, tiny_config(), False)


@pytest.mark.parametrize("text", NONE)
def test_what_can_be_made_again_is_taken_for_missing(tmp_path, text):
  for name in ("complete.json", "goodput.json"):
    (tmp_path / name).write_text(text)
  assert read_end(tmp_path) is None
  assert goodput.read(tmp_path) in ({}, {"other": 1.0}) and "s went" in goodput.summary(tmp_path)
  goodput.Goodput(tmp_path).resume({})
  (tmp_path / "evals").mkdir()
  (tmp_path / "evals" / "3.json").write_text(text)
  assert read_tables(tmp_path, Asked()) == {}


def test_bytes_that_are_no_text_are_no_json(tmp_path):
  (tmp_path / "config.json").write_bytes(BYTES)
  with pytest.raises(ValueError, match="config.json is not whole JSON"):
    read_json(tmp_path / "config.json")
  (tmp_path / "metrics.jsonl").write_bytes(BYTES)
  assert telemetry.read_metrics(tmp_path) == []


def test_rows_that_are_none_are_left_out_of_the_metrics(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n3\nnull\n[1]\n{"loss": 1}\n{"step": "x"}\n{"st')
  assert telemetry.read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
  telemetry.truncate_metrics(tmp_path, 5)
  assert draw_curves(tmp_path).exists()


# ------------------------------------------------------------------------------------------ Weights & Biases
@pytest.fixture
def wandb(monkeypatch):
  """A stand-in that remembers how it was called."""
  calls: list[dict] = []
  run = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
  monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: calls.append(how) or run))
  return calls


def test_a_workdir_keeps_its_wandb_run_and_one_made_anew_is_another_run(tmp_path, wandb):
  start = lambda: Metrics(tmp_path / "a", LogConfig(wandb="p", tensorboard=False), {}).close()
  for _ in range(2):
    (tmp_path / "a").mkdir(exist_ok=True)
    start()
  shutil.rmtree(tmp_path / "a")
  (tmp_path / "a").mkdir()
  start()
  first, again, anew = (call["id"] for call in wandb)
  assert first == again != anew and all(call["resume"] == "allow" for call in wandb)
  assert json.loads((tmp_path / "a" / "wandb.json").read_text()) == {"id": anew, "workdir": str(tmp_path / "a")}


def test_pictures_go_to_wandb_and_tensorboard(tmp_path, monkeypatch):
  logged = []
  run = SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None)
  stand_in = SimpleNamespace(init=lambda **_: run, Image=lambda array: ("picture", array.shape))
  monkeypatch.setitem(sys.modules, "wandb", stand_in)
  metrics = Metrics(tmp_path, LogConfig(wandb="p"), {})
  metrics.picture("views", np.zeros((4, 6, 3), np.uint8), 0)
  metrics.close()
  assert logged == [({"views": ("picture", (4, 6, 3))}, 0)]
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"views" in events.read_bytes() and b"PNG" in events.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_run_with_wandb_offline_leaves_its_numbers_and_views(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  train(tiny_config(total="2steps", log__wandb="trial", log__views=2), tmp_path)
  assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
  assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/views_*.png"))


def test_lines_of_metrics_that_cannot_be_read_are_kept_beside(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  before = '{"step": 1, "loss": 2.0}\n{"step"? 2}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo'
  path.write_text(before)
  truncate_metrics(tmp_path, 3)
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3] and "1 of 4 lines" in caplog.text
  assert (tmp_path / "metrics.jsonl.damaged").read_text() == before
  caplog.clear()
  truncate_metrics(tmp_path, 3)
  assert not caplog.text
  path.unlink()
  truncate_metrics(tmp_path, 3)
  assert "is gone: the curves begin at step 3" in caplog.text


@pytest.mark.parametrize("text", [None, "", "nothing\n"])
def test_without_metrics_no_curves_are_drawn(tmp_path, caplog, text):
  if text is not None:
    (tmp_path / "metrics.jsonl").write_text(text)
  assert draw_curves(tmp_path) is None and "holds no metrics" in caplog.text


def test_a_folder_in_place_of_a_file_is_called_so(tmp_path):
  (tmp_path / "config.json").mkdir()
  with pytest.raises(ValueError, match="config.json is a folder, where a file should be"):
    read_json(tmp_path / "config.json")


def test_a_copy_of_a_workdir_is_another_wandb_run_and_one_that_was_moved_the_same(tmp_path, wandb):
  start = lambda name: Metrics(tmp_path / name, LogConfig(wandb="p", tensorboard=False), {}).close()
  (tmp_path / "a").mkdir()
  start("a")
  shutil.copytree(tmp_path / "a", tmp_path / "copy")
  start("copy")
  start("copy")
  (tmp_path / "a").rename(tmp_path / "moved")
  start("moved")
  first, copy, again, moved = (call["id"] for call in wandb)
  assert first == moved and copy == again != first


def test_a_missing_package_is_named_before_the_data_are_opened(tmp_path, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  monkeypatch.setattr("jepa_jax.train.open_images", lambda *_: pytest.fail("opened"))
  with pytest.raises(ValueError, match="pip install 'wandb"):
    train(tiny_config(log__wandb="project"), tmp_path / "workdir")
  assert not (tmp_path / "workdir").exists()
