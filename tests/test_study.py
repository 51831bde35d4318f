"""The studies: random rows against theory, sweeps that resume, fits that recover what was put in."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from jepa_jax.config import to_dict
from jepa_jax.study import cells, double_descent, scaling_law, sweep
from jepa_jax.study.cells import Cell, Row
from jepa_jax.study.power_law import fit_power_law, log_bins
from tests.test_train import write_config
from tests.tiny import MLP, TINY, tiny_config, tiny_values

VIEWS = {"global_crops": {"num": 2, "size_px": 16, "scale": (0.3, 1.0)}}
CHANGES = {
  "encoder": MLP,
  "objective": {"name": "mmcr", "projector": {"hidden": (16,), "out": 8}, "views": VIEWS},
  "total": "10steps",
  "optim": {"lr": 1e-3, "warmup": "1steps", "schedule": "constant"},
}
GRID = {"batch": [8, 16], "dim": [8], "views": [2], "seeds": [0]}


def config(tmp_path, **changes):
  path = tmp_path / "mmcr.py"
  write_config(path, tiny_values(**(CHANGES | changes)))
  return str(path)


def rows_without_time(folder):
  return [dataclasses.replace(row, seconds=0.0) for row in cells.read_rows(folder)]


def test_random_rows_are_as_marchenko_and_pastur_say():
  table = double_descent.uniform_table([64, 128], [64, 128])
  np.testing.assert_allclose([r["measured"] for r in table], [r["predicted"] for r in table], atol=0.01)
  ridge = [r["measured"] for r in table if r["batch"] == r["dim"]]
  np.testing.assert_allclose(ridge, 0.1512, atol=0.01)


def test_without_a_config_random_rows_alone_are_measured(tmp_path):
  result = double_descent.run(str(tmp_path), uniform=[32, 64])
  assert result["num_runs"] == 0 and len(result["uniform"]) == 4
  assert (tmp_path / "uniform.png").exists() and (tmp_path / "uniform.csv").exists()
  assert not (tmp_path / cells.RUNS).exists()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """A finished sweep of two cells: (its config file, its folder, what the study found)."""
  folder = tmp_path_factory.mktemp("swept")
  path = config(folder)
  return path, folder / "sweep", double_descent.run(str(folder / "sweep"), path, uniform=[16], **GRID)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_ends_as_an_undisturbed_one(swept, tmp_path):
  base, todo = tiny_config(**CHANGES), cells.grid([8, 16], [8], [2], [0])
  whole, stopped = swept[1], tmp_path / "stopped"
  rows = cells.read_rows(whole)
  assert [row.cell for row in rows] == todo and all(0 < row.train_ppe < 1 and 0 < row.held_ppe < 1 for row in rows)
  shutil.copytree(whole, stopped)
  table = (whole / cells.RUNS).read_text()
  (stopped / cells.RUNS).write_text(table[:-20])  # killed while the second row was written
  assert [row.cell for row in cells.read_rows(stopped)] == todo[:1]
  sweep.run_sweep(base, stopped, todo)
  assert rows_without_time(stopped) == rows_without_time(whole)
  for cell in todo:
    np.testing.assert_array_equal(cells.read_curve(stopped, cell), cells.read_curve(whole, cell))
    assert len(cells.read_curve(whole, cell)) == 10


@pytest.mark.slow
def test_a_finished_sweep_trains_nothing_and_a_changed_one_is_refused(swept, monkeypatch):
  path, folder, result = swept
  assert result["num_runs"] == 2 and (folder / "double_descent.png").exists()

  def untouched(*_):
    raise AssertionError("a finished run was trained again")

  monkeypatch.setattr(sweep, "train", untouched)
  again = double_descent.run(str(folder), path, uniform=[16], **GRID)
  assert again["verdict"] == result["verdict"]
  assert double_descent.run(str(folder), plot_only=True, uniform=[16])["num_runs"] == 2
  with pytest.raises(ValueError, match=r"other settings(.|\n)*optim\.lr: 0\.001 -> 0\.1"):
    double_descent.run(str(folder), path, uniform=[16], overrides={"optim.lr": "0.1"}, **GRID)
  with pytest.raises(ValueError, match="total: 10steps -> 2ep"):
    double_descent.run(str(folder), path, uniform=[16], overrides={"total": "2ep"}, **GRID)

  law = scaling_law.run(str(folder))
  assert len(law["exponents"]) == 2 and (folder / "scaling_law.png").exists() and (folder / "scaling_law.csv").exists()
  assert "trains nothing" in str(pytest.raises(ValueError, scaling_law.run, str(folder), overrides={"seed": "1"}).value)


def test_what_cannot_be_swept_is_refused_before_anything_is_trained(tmp_path):
  with pytest.raises(ValueError, match='needs "mmcr"'):
    sweep.run_sweep(tiny_config(), tmp_path, [])
  with pytest.raises(ValueError, match="at most"):
    sweep.run_sweep(tiny_config(**CHANGES), tmp_path / "big", [Cell(2, 8, 0, batch=100_000)])
  with pytest.raises(ValueError, match="--views=1"):
    cells.grid([8], [8], [1], [0])
  with pytest.raises(ValueError, match="no finished runs"):
    scaling_law.run(str(tmp_path))
  assert not (tmp_path / "big").exists()


def test_runs_share_everything_but_batch_width_views_and_seed():
  base = tiny_config(**CHANGES)
  changed = to_dict(sweep._config(base, Cell(views=3, dim=4, seed=7, batch=32)))
  assert (changed["batch_size"], changed["seed"]) == (32, 7)
  assert changed["objective"]["projector"]["out"] == 4 and changed["objective"]["views"]["global_crops"]["num"] == 3
  assert changed["optim"] == to_dict(base)["optim"] and TINY["batch_size"] == 16


def test_a_known_exponent_is_recovered_within_its_interval():
  """PPE = 3 C^-.12 with 2 % of noise: the interval holds the exponent about 19 times of 20."""
  compute = np.geomspace(1e9, 1e11, 12)
  exact = fit_power_law(compute, 3 * compute**-0.12)
  np.testing.assert_allclose([exact.scale, exact.exponent, exact.r2], [3, 0.12, 1], rtol=1e-9)
  np.testing.assert_allclose(exact(1e12), 3 * 1e12**-0.12, rtol=1e-9)
  rng, inside = np.random.default_rng(0), 0
  for _ in range(200):
    law = fit_power_law(compute, 3 * compute**-0.12 * np.exp(0.02 * rng.standard_normal(12)))
    inside += law.low <= 0.12 <= law.high
  assert 180 <= inside <= 199
  with pytest.raises(ValueError, match="at least 3 positive"):
    fit_power_law(compute[:2], compute[:2])


def test_a_curve_that_levels_off_is_said_to_bend():
  compute, rng = np.geomspace(1e9, 1e11, 12), np.random.default_rng(0)
  noise = np.exp(0.01 * rng.standard_normal(12))
  assert fit_power_law(compute, (0.1 + 1e3 * compute**-0.4) * noise).bend_p < 0.01
  assert fit_power_law(compute, 1e3 * compute**-0.4 * noise).bend_p > 0.05


def test_bins_leave_a_power_law_what_it_is():
  steps = np.arange(1, 1001)
  compute, y = log_bins(2.0 * steps**-0.3, flops_per_step=5e6)
  law = fit_power_law(compute, y)
  assert law.exponent == pytest.approx(0.3, abs=2e-3)
  assert law.r2 > 0.999
  assert compute[0] > 90 * 5e6 and compute[-1] < 1000 * 5e6  # the first 10 % are left out


def made_up(tmp_path, exponent, level):
  """A sweep without training: PPE = level(P, D) C^-exponent(P, D) at every step."""
  rows = []
  for batch in (8, 16, 32):
    cell = Cell(views=2, dim=16, seed=0, batch=batch)
    flops = 1_000_000 * batch
    noise = np.exp(0.01 * np.random.default_rng(batch).standard_normal(400))
    curve = level(batch) * (np.arange(1, 401) * float(flops)) ** -exponent(batch) * noise
    end = float(curve[-80:].mean())
    numbers = dict.fromkeys(("train_alignment", "train_flatness", "held_alignment", "held_flatness"), 0.9)
    sizes = {"steps": 400, "images": 400 * batch, "flops": 400 * flops}
    shape = {"batch": batch, "dim": 16, "views": 2, "seed": 0}
    row = Row(**shape, **sizes, **numbers, train_ppe=end, held_ppe=end, probe_accuracy=10.0, seconds=1.0)
    cells.write_curve(tmp_path, cell, curve)
    cells.append_row(tmp_path, row)
    rows.append(row)
  return rows


@pytest.mark.parametrize("claimed", [True, False])
def test_the_verdict_follows_the_numbers(tmp_path, claimed):
  rows = made_up(tmp_path, lambda p: 0.05 if (p == 16) == claimed else 0.1, lambda p: 9.0)
  text = "\n".join(double_descent.judge(rows))
  assert ("Peak at P = D: yes, everywhere" in text) == claimed and ("Peak at P = D: no" in text) != claimed
  assert f"above them for {int(claimed)} of 1" in double_descent.judge_start(tmp_path, rows)
  result = scaling_law.run(str(tmp_path))
  level, slope = result["verdict"][-2:]
  assert ("smaller slope holds" in slope) == claimed and ("higher curve holds" in level) == claimed
  assert "Power law at every P, D, K: yes" in result["verdict"][0]
  errors = [abs(row["half_law_error"]) for row in result["exponents"]]
  assert max(errors) < 0.02  # a true power law is forecast from the first half of its compute
  np.testing.assert_allclose(
    [row["b"] for row in result["exponents"]], [0.1, 0.05, 0.1] if claimed else [0.05, 0.1, 0.05], atol=8e-3
  )


def test_a_longer_run_is_forecast_from_a_shorter_one(tmp_path):
  short, long = tmp_path / "short", tmp_path / "long"
  short.mkdir()
  long.mkdir()
  made_up(short, lambda p: 0.1, lambda p: 5.0)
  row = cells.read_rows(short)[0]
  flops = 4 * row.flops
  tail = 5.0 * (np.arange(1281, 1601) * flops / 1600.0) ** -0.1
  cells.append_row(long, dataclasses.replace(row, steps=1600, flops=flops, train_ppe=float(tail.mean())))
  (forecast,) = scaling_law.run(str(short), longer=[str(long)])["longer"]
  assert abs(forecast["law_error"]) < 0.02 and forecast["no_change_error"] > 0.1
