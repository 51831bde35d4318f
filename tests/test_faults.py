"""A run is safe to kill: the quick version of `python -m jepa_jax bench faults`, and that it finds what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from jepa_jax import telemetry
from jepa_jax.bench import faults
from jepa_jax.bench.disturbed import ROOT, STEPS, Disturbed, NotSafeToKill, Undisturbed
from jepa_jax.workdir import read_end, remove_end
from tests.test_checkpoint import full_disk
from tests.test_train import small_config

QUICK = ("kill in a save", "SIGTERM", "truncated checkpoint file")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  return Undisturbed(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def copy(undisturbed, request):
  """The undisturbed run once more, to be tampered with."""
  shutil.copytree(undisturbed.workdir, undisturbed.folder / request.node.name)
  trial = Disturbed(undisturbed, request.node.name, np.random.default_rng(0))
  trial.check()
  return trial


@pytest.mark.slow
def test_a_killed_stopped_and_damaged_run_ends_like_the_undisturbed_one(undisturbed):
  result = faults.disturb(undisturbed, len(QUICK), np.random.default_rng(0), QUICK)
  assert result["faults"] == dict.fromkeys(QUICK, 1) | {"all": 3}
  assert result["all_runs_ended_with_it"] and result["starts"] >= len(QUICK)
  assert result["damaged_checkpoints_set_aside"] + result["damaged_where_training_needs_nothing"] == 1


@pytest.mark.slow
def test_a_run_killed_after_its_last_save_is_marked_as_ended_by_the_next_start(copy):
  remove_end(copy.workdir)
  copy.finish()
  assert read_end(copy.workdir) == STEPS and copy.starts == 1


@pytest.mark.slow
def test_another_final_state_is_found(copy):
  folder = copy.workdir / "checkpoints"
  shutil.rmtree(folder / str(STEPS))
  shutil.copytree(folder / str(STEPS - 5), folder / str(STEPS))
  with pytest.raises(NotSafeToKill, match="final state of .* has the hash"):
    copy.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
  "tamper, message",
  [
    (lambda rows: [row | {"loss": row["loss"] + 1e-7 * (row["step"] == 7)} for row in rows], r"steps \[7\] differ"),
    (lambda rows: [row for row in rows if row["step"] != 7], "does not hold each step once"),
    (lambda rows: rows[:7] + rows[6:], "does not hold each step once"),
  ],
  ids=["another", "missing", "twice"],
)
def test_another_metric_and_one_missing_or_twice_are_found(copy, tamper, message):
  rows = tamper(telemetry.read_metrics(copy.workdir))
  (copy.workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(NotSafeToKill, match=message):
    copy.check()


@pytest.mark.slow
def test_a_checkpoint_that_vanishes_or_changes_is_found(copy):
  folder = copy.workdir / "checkpoints"
  shutil.rmtree(folder / str(STEPS))
  with pytest.raises(NotSafeToKill, match=f"checkpoint of step {STEPS} is gone"):
    copy.check()
  shutil.copytree(folder / str(STEPS - 5), folder / str(STEPS))
  with pytest.raises(NotSafeToKill, match=f"checkpoint of step {STEPS} has changed"):
    copy.check()


@pytest.mark.slow
def test_sigterm_while_compiling_ends_with_its_own_status_and_loses_nothing(undisturbed):
  trial = Disturbed(undisturbed, "compiling", np.random.default_rng(0))
  child = trial.train()
  assert child.until(lambda: "parameters, " in child.text)  # said before the first step is compiled
  assert trial.stop(child, signal.SIGTERM) == 75
  assert "no step was finished yet" in child.text and trial.newest == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a file that is always full")
def test_output_into_a_file_on_a_full_disk_does_not_stop_a_run():
  code = (
    "import logging\nfrom jepa_jax import telemetry\ntelemetry.setup_logging()\nbar = telemetry.ProgressBar(2, 0, 1)\n"
  )
  code += "logging.getLogger('jepa_jax').error('x' * 100_000)\nbar.update(1, {'loss': 1.0})\nbar.close()\n"
  code += "open('/dev/stdout', 'w').write('went on')"
  with open("/dev/full", "w") as full:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=full, text=True)
  assert done.stdout == "went on"


def test_tensorboard_on_a_full_disk_does_not_hang(tmp_path):
  """Its thread would end at the first error, and the queue that nobody empties any more take ten values."""
  metrics = telemetry.Metrics(tmp_path, small_config(log={"every": "1steps"}).log, {})
  writes = lambda: [metrics.write(i, {f"{j}": 1.0 for j in range(20)}) for i in range(100)]
  with full_disk(40_000):  # metrics.jsonl fits, the events do not
    thread = threading.Thread(target=writes, daemon=True)
    thread.start()
    thread.join(30)
  assert not thread.is_alive()
  metrics.close()
  assert len(telemetry.read_metrics(tmp_path)) == 100
