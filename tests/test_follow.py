"""Following a run: every checkpoint once, to the end, whatever vanishes, breaks or is killed; on any machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jepa_jax import checkpoint, subjects
from jepa_jax import evaluate as evaluate_module
from jepa_jax import follow as follow_module
from jepa_jax.evals.features import read_features
from jepa_jax.evals.linear import Linear
from jepa_jax.evaluate import evaluate
from jepa_jax.follow import Asked, follow, read_tables
from jepa_jax.subjects import PIXELS, RANDOM
from jepa_jax.train import train
from jepa_jax.workdir import write_end
from tests.tiny import MLP, tiny_config

ROOT = Path(__file__).parent.parent
OVERRIDES = {"evals.knn.k": "5", "data.max_train": "32"}
QUICK = Asked(OVERRIDES, ("knn",))
FOLLOW = """
import json, sys
from jepa_jax.follow import Asked, follow
print(follow(sys.argv[1], Asked(json.loads(sys.argv[2]), ("knn",)), poll_s=0.2))
"""


def run_config(**changes):
  return tiny_config(**{"encoder": MLP, "objective__views__local_crops__num": 0, "checkpoint__keep_last": 3} | changes)


def one_device() -> dict[str, str]:
  """The environment of a machine with one CPU device."""
  flags = " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f)
  return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of a mesh of eight devices that has ended, with the checkpoints 2, 4, 6."""
  workdir = tmp_path_factory.mktemp("trained")
  train(run_config(mesh__data=1, mesh__fsdp=8), workdir)
  write_end(workdir, 6)
  return workdir


@pytest.fixture
def workdir(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / "run")


def files(folder: Path) -> dict[Path, int]:
  return {p: p.stat().st_mtime_ns for p in folder.iterdir()}


@pytest.mark.slow
def test_each_checkpoint_once_oldest_first_and_nothing_anew_by_a_restart(workdir, capsys):
  assert follow(workdir, QUICK) == [2, 4, 6]
  tables = read_tables(workdir, QUICK)
  assert [list(rows) for rows in tables.values()] == [[PIXELS, RANDOM, f"lejepa, step {s}"] for s in (2, 4, 6)]
  assert len(files(workdir / "features")) == 4  # two baselines, two splits, made once: none of a checkpoint
  shown = capsys.readouterr().out
  assert all(name in shown for name in (PIXELS, RANDOM, "step 2", "step 4", "step 6"))

  before = files(workdir / "evals")
  assert follow(workdir, QUICK) == []
  assert files(workdir / "evals") == before
  assert "step 2" in capsys.readouterr().out  # the whole curve is shown again

  other = Asked(OVERRIDES | {"evals.knn.k": "3"}, ("knn",))
  assert follow(workdir, other) == [2, 4, 6]  # another evaluation has tables of its own


def test_a_table_of_follow_is_that_of_eval_and_features_are_made_on_all_devices(workdir, monkeypatch):
  follow(workdir, QUICK)
  rows = read_tables(workdir, QUICK)
  shutil.rmtree(workdir / "features")
  make, meshes = subjects.make_features, []
  monkeypatch.setattr(subjects, "make_features", lambda *args: meshes.append(args[5]) or make(*args))
  assert evaluate(workdir, 2, OVERRIDES, QUICK.names, again=True, show=False).rows == rows[2]
  assert {mesh.size for mesh in meshes} == {8}
  alone = evaluate(workdir, 6, OVERRIDES, QUICK.names, baselines=False, show=False)
  assert alone.rows == {"lejepa, step 6": rows[6]["lejepa, step 6"]}


def test_a_checkpoint_removed_before_it_is_read_is_passed_over(workdir, monkeypatch, caplog):
  restore = checkpoint.restore

  def restore_too_late(path, step, partial=False, **items):
    if step == 2:
      shutil.rmtree(workdir / "checkpoints" / "2", ignore_errors=True)
    return restore(path, step, partial, **items)

  monkeypatch.setattr(checkpoint, "restore", restore_too_late)
  with caplog.at_level("INFO"):
    assert follow(workdir, QUICK) == [4, 6]
  assert "Checkpoint 2 is gone" in caplog.text and "before they were evaluated: steps [2]" in caplog.text
  assert PIXELS in read_tables(workdir, QUICK)[4]  # the baselines come with the first that there is


def test_a_checkpoint_removed_while_it_is_read_is_no_damaged_one(workdir, monkeypatch, caplog):
  folder = workdir / "checkpoints" / "4"
  shutil.rmtree(folder / "networks")  # the half that is left of it ...
  monkeypatch.setattr(follow_module.time, "sleep", lambda _: shutil.rmtree(folder))  # ... and then nothing
  with caplog.at_level("INFO"):
    assert follow(workdir, QUICK) == [2, 6]
  assert "Checkpoint 4 is gone" in caplog.text and "damaged" not in caplog.text.lower()


def test_a_damaged_checkpoint_is_reported_once_and_left_where_it_is(workdir, caplog):
  os.truncate(workdir / "checkpoints" / "4" / "networks" / "_METADATA", 10)
  assert follow(workdir, QUICK, poll_s=0.01) == [2, 6]
  assert caplog.text.count("checkpoints/4 is damaged") == 1 and "not evaluated: steps [4]" in caplog.text
  assert checkpoint.steps(workdir) == [2, 4, 6]


def test_a_table_that_cannot_be_written_is_made_once(workdir, monkeypatch, caplog):
  monkeypatch.setattr(evaluate_module, "write_json", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
  assert follow(workdir, QUICK, poll_s=0.1) == [2, 4, 6]
  assert "NOT WRITTEN" in caplog.text


def test_a_table_without_baselines_is_not_taken_for_a_full_one(workdir):
  few = Asked(OVERRIDES, ("knn",), baselines=False)
  assert list(evaluate(workdir, 6, OVERRIDES, ("knn",), baselines=False).rows) == ["lejepa, step 6"]
  assert read_tables(workdir, few).keys() == {6} and not read_tables(workdir, QUICK)
  evaluate(workdir, 6, OVERRIDES, ("knn",))
  assert [len(read_tables(workdir, asked)[6]) for asked in (few, QUICK)] == [1, 3]


def test_any_other_error_is_raised(workdir):
  with pytest.raises(ValueError, match="nonexistent"):
    follow(workdir, Asked({"data.source": "nonexistent"}))


def test_without_an_end_it_waits_and_with_a_time_limit_not_for_ever(workdir, tmp_path, caplog):
  (workdir / "complete.json").unlink()
  assert follow(workdir, QUICK, poll_s=0.01, timeout_s=0.1) == [2, 4, 6]
  assert "no mark that the run has ended" in caplog.text
  with pytest.raises(checkpoint.CheckpointError, match="no checkpoint came to"):
    follow(tmp_path / "nowhere", poll_s=0.01, timeout_s=0.1)
  assert not (tmp_path / "nowhere").exists()


def test_what_would_be_waited_for_in_vain_is_refused(tmp_path):
  (tmp_path / "file").touch()
  for where, options, message in (
    ("gs://bucket/run", {}, "mount the bucket"),
    (tmp_path / "checkpoints" / "4", {}, "watches a whole run"),
    (tmp_path / "file", {}, "is a file"),
    (tmp_path, {"poll_s": 0}, "must be positive"),
    (tmp_path, {"timeout_s": -1}, "must be positive"),
    (tmp_path, {"asked": Asked({"encoder.depth": "3"})}, "only data.* and evals.* change"),
  ):
    with pytest.raises(ValueError, match=message):
      follow(where, **options)


def test_sigterm_ends_it_and_the_next_call_goes_on(workdir, monkeypatch):
  def evaluate_until_4(where, step, *args, **options):
    if step == 4:
      signal.raise_signal(signal.SIGTERM)
    return evaluate(where, step, *args, **options)

  handler = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    patch.setattr(follow_module, "evaluate", evaluate_until_4)
    assert follow(workdir, QUICK) == [2]
  assert signal.getsignal(signal.SIGTERM) == handler
  assert follow(workdir, QUICK) == [4, 6]


def test_what_a_killed_evaluation_left_is_replaced(workdir):
  """Half-written temporary files, and files that another program or a power cut left truncated."""
  follow(workdir, QUICK)
  want, kept = read_tables(workdir, QUICK), sorted((workdir / "evals" / "rows").glob("*.json"))
  assert len(kept) == 5  # kNN of two baselines and three checkpoints
  table = QUICK.path(workdir, 2)
  os.truncate(table, 20)
  os.truncate(kept[0], 5)
  cached = sorted((workdir / "features").rglob("*"))
  for file, size in zip((f for f in cached if f.is_file()), (0, 10, 1000, 2000)):
    os.truncate(file, size)
  part = cached[0].with_name(f".{cached[0].name}.part0")
  part.mkdir()
  (part / "pooled.npy").write_bytes(b"half")
  table.with_name(f".{table.name}.0123abcd.tmp").write_bytes(b"{")
  assert follow(workdir, QUICK) == [2]
  assert read_tables(workdir, QUICK) == want
  assert evaluate(workdir, 2, OVERRIDES, QUICK.names, again=True, show=False, cache=False).rows == want[2]


def test_an_evaluation_that_is_not_finished_is_no_table_and_goes_on(workdir):
  """What one protocol has found is there at once; the next start takes it over."""
  asked = Asked(OVERRIDES, ("knn", "linear"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Linear, "run", lambda self, row: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      evaluate(workdir, 2, OVERRIDES, asked.names, show=False)
  stored = json.loads(asked.path(workdir, 2).read_text())
  assert not stored["complete"] and stored["rows"] == {PIXELS: {"knn": stored["rows"][PIXELS]["knn"]}}
  assert read_tables(workdir, asked) == {}
  before = files(workdir / "evals" / "rows")
  assert evaluate(workdir, 2, OVERRIDES, asked.names, show=False).rows[PIXELS].keys() == {"knn", "linear"}
  assert before.items() <= files(workdir / "evals" / "rows").items()


@pytest.mark.parametrize("gone", ["room", "writing"])
def test_a_full_disk_costs_the_cache_but_not_the_evaluation(workdir, monkeypatch, caplog, gone):
  def full(*_, **__):
    raise OSError(28, "No space left on device")

  if gone == "room":
    monkeypatch.setattr(os, "posix_fallocate", full)
  else:
    monkeypatch.setattr(evaluate_module, "write_json", full)
  found = evaluate(workdir, 2, OVERRIDES, QUICK.names)
  assert PIXELS in found.rows
  assert ("Features not kept on disk" if gone == "room" else "NOT WRITTEN") in caplog.text
  if gone == "room":
    assert not list((workdir / "features").iterdir())
    with pytest.raises(ValueError, match="raise evals.memory_gb to keep them in memory.*evals.precision='float16'"):
      evaluate(workdir, 2, OVERRIDES | {"evals.memory_gb": "1e-6"}, QUICK.names, again=True)


@pytest.mark.slow
def test_checkpoint_of_eight_devices_evaluated_on_one(workdir):
  """Features and table are those of the machine that trained."""
  overrides = [f"--config.{k}={v}" for k, v in OVERRIDES.items()]
  command = [sys.executable, "-m", "jepa_jax", "eval", f"--workdir={workdir}", "--evals=knn", *overrides]
  done = subprocess.run(command, env=one_device(), cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-4000:]
  (there,) = read_tables(workdir, QUICK).values()
  (workdir / "features").rename(workdir / "there")
  here = evaluate(workdir, 6, OVERRIDES, QUICK.names, again=True).rows
  assert here.keys() == there.keys() and all(here[name] == pytest.approx(there[name], abs=1) for name in here)
  names = [p.name for p in (workdir / "features").iterdir()]
  assert len(names) == 6
  for name in names:
    ours, theirs = (read_features(workdir / folder / name) for folder in ("features", "there"))
    for x, y in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_live_from_before_the_run_to_its_end(tmp_path, monkeypatch):
  """Only one checkpoint is kept, and the run waits at each save for the table before: each is met while training."""
  workdir = tmp_path / "new" / "run"
  save, saved = checkpoint.Saver.save, []

  def save_when_followed(saver, step, *items, **how):
    if saved:
      saver.wait()
      deadline = time.monotonic() + 120
      while not QUICK.path(workdir, saved[-1]).exists():
        assert follower.poll() is None and time.monotonic() < deadline, f"step {saved[-1]} was not evaluated"
        time.sleep(0.05)
    saved.append(step)
    return save(saver, step, *items, **how)

  monkeypatch.setattr(checkpoint.Saver, "save", save_when_followed)
  command = [sys.executable, "-c", FOLLOW, str(workdir), json.dumps(OVERRIDES)]
  with subprocess.Popen(command, env=one_device(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as follower:
    try:
      train(run_config(checkpoint__keep_last=1), workdir)
      write_end(workdir, 6)
      output, _ = follower.communicate(timeout=120)
    finally:
      follower.kill()
  assert follower.returncode == 0 and output.strip().endswith("[2, 4, 6]"), output
  assert list(read_tables(workdir, QUICK)) == [2, 4, 6]
