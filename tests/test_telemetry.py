"""metrics.jsonl holds every logged step once, whatever happened to the process; the terminal stays readable."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from jepa_jax import telemetry
from jepa_jax.curves import draw_curves
from jepa_jax.telemetry import LogConfig, Metrics, ProgressBar, read_metrics, write_png

ROOT = Path(__file__).resolve().parent.parent
QUIET = LogConfig(tensorboard=False)


def test_values_that_were_not_measured_are_left_out_but_the_loss_never(tmp_path):
  metrics = Metrics(tmp_path, QUIET, {})
  metrics.write(1, {"loss": 2.0, "rankme": math.nan})
  metrics.write(2, {"loss": math.nan, "rankme": 3.0})
  metrics.close()
  first, second = read_metrics(tmp_path)
  assert first["loss"] == 2.0 and "rankme" not in first
  assert math.isnan(second["loss"]) and second["rankme"] == 3.0


def test_resuming_drops_what_will_be_written_again_and_a_line_cut_by_a_crash(tmp_path):
  metrics = Metrics(tmp_path, QUIET, {})
  for step in range(1, 6):
    metrics.write(step, {"loss": step})
  metrics.close()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 6, "lo')
  resumed = Metrics(tmp_path, QUIET, {}, start_step=3)
  resumed.write(4, {"loss": 40})
  resumed.close()
  assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_disk_that_is_full_costs_lines_of_the_log_but_not_the_run(tmp_path, caplog):
  metrics = Metrics(tmp_path, QUIET, {})
  (tmp_path / "metrics.jsonl").mkdir()  # every write now fails with an OSError
  metrics.write(1, {"loss": 1.0})
  metrics.write(2, {"loss": 1.0})
  metrics.close()
  assert caplog.text.count("METRICS NOT WRITTEN") == 1


def test_only_the_first_process_writes(tmp_path):
  metrics = Metrics(tmp_path, QUIET, {}, primary=False)
  metrics.write(1, {"loss": 1.0})
  metrics.close()
  assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same_scalars(tmp_path):
  metrics = Metrics(tmp_path, LogConfig(), {})
  metrics.write(7, {"loss": 1.5})
  metrics.close()
  (event_file,) = (tmp_path / "tensorboard").iterdir()
  assert b"loss" in event_file.read_bytes()


def test_progress_without_a_terminal_is_plain_lines(monkeypatch):
  text = io.StringIO()
  monkeypatch.setattr(telemetry, "console", Console(file=text, width=100))
  bar = ProgressBar(total_steps=10, start_step=0, batch_size=32)
  for step in range(1, 11):
    bar.update(step, {"loss": 0.5, "probe_accuracy": 91.0} if step % 5 == 0 else None)
  bar.close()
  lines = text.getvalue().splitlines()
  assert len(lines) == 2 and lines[-1].startswith("step 10/10") and "img/s  loss 0.5000  probe 91.0 %" in lines[-1]


def test_progress_on_a_terminal_shows_rate_loss_probe_and_time_left(monkeypatch):
  text = io.StringIO()
  monkeypatch.setattr(telemetry, "console", Console(file=text, width=100, force_terminal=True))
  bar = ProgressBar(total_steps=10, start_step=0, batch_size=32)
  bar.update(5, {"loss": 0.5, "probe_accuracy": 91.0})
  bar.close()
  shown = text.getvalue()
  assert "5/10" in shown and "img/s" in shown and "loss 0.5000" in shown and ":" in shown


def test_curves_and_pictures_are_written(tmp_path):
  rows = [{"step": s, "loss": 1 / s, "sigreg": 2.0, "inv": 0.1, "probe_accuracy": 50.0} for s in (1, 2, 3)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  assert Image.open(draw_curves(tmp_path, {"sigreg": 1.05})).width > 600
  write_png(tmp_path / "small.png", np.zeros((10, 20, 3), np.uint8))
  assert Image.open(tmp_path / "small.png").size == (1600, 800)


def test_a_writer_of_scalars_does_not_take_in_torch_and_others_may(tmp_path):
  (tmp_path / "torch.py").write_text("")
  script = """
import sys
from pathlib import Path
from jepa_jax.telemetry import LogConfig, Metrics
Metrics(Path(sys.argv[1]), LogConfig(), {}).close()
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
import torch
"""
  environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
  command = [sys.executable, "-c", script, str(tmp_path / "run")]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
