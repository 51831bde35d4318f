"""Where is the percent error of MMCR worst? Random rows against theory, then trained networks over P x D x K.

The claim (arXiv 2406.09366): the pretraining percent error (PPE) has its peak where the batch P equals the width D of
the embedding. For independent uniform rows that is the Marchenko-Pastur law; whether training follows is measured here.

All runs share the config's `total`. In steps ("300steps", as in configs/mmcr_study.py) every run makes the same number
of updates at the same rates, so none is less trained for want of updates, but larger P has seen more images. In epochs
("4ep") every run has seen the same images, and on a small budget large P makes too few updates to learn anything: a PPE
that rises with P then has nothing to do with P = D. `study scaling_law` compares at equal compute instead.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from jepa_jax.config import load_config
from jepa_jax.study import figures
from jepa_jax.study.cells import Row, grid, read_curve, read_rows
from jepa_jax.study.sweep import run_sweep
from jepa_jax.study.tables import numbers, write_table
from jepa_jax.theory import uniform_percent_error

DESCRIPTION = "Percent error of MMCR over batch P, width D and views K: random rows, and trained networks. Resumable."
MEASURES = {"train_ppe": "own batches", "held_ppe": "held-out batches"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings of the config follow as --config.key=value."""
  parser.add_argument("--workdir", required=True, help="tables and figures; finished runs in it are kept")
  parser.add_argument(
    "--config", metavar="FILE[:VARIANT]", help="an MMCR config; without one only random rows are measured, in seconds"
  )
  parser.add_argument("--batch", type=numbers, default=[8, 16, 32, 64, 128], metavar="P,..", help="global batch sizes")
  parser.add_argument("--dim", type=numbers, default=[16, 32, 64], metavar="D,..", help="widths of the embedding")
  parser.add_argument("--views", type=numbers, default=[2, 4], metavar="K,..", help="views of each image")
  parser.add_argument("--seeds", type=numbers, default=[0], metavar="S,..", help="one run per seed (default: 0)")
  uniform = [64, 128, 256, 512, 1024]
  parser.add_argument("--uniform", type=numbers, default=uniform, metavar="N,..", help="P and D of the random rows")
  parser.add_argument("--plot-only", action="store_true", help="figures and verdict of the runs that are there")


def run(
  workdir: str,
  config: str | None = None,
  batch: Sequence[int] = (8, 16, 32, 64, 128),
  dim: Sequence[int] = (16, 32, 64),
  views: Sequence[int] = (2, 4),
  seeds: Sequence[int] = (0,),
  uniform: Sequence[int] = (64, 128, 256, 512, 1024),
  plot_only: bool = False,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns tables and verdict, for JSON; writes runs/, runs.csv, curves/, uniform.csv and two figures.

  ValueError where the config, the grid and what workdir holds do not fit together.
  """
  folder = Path(workdir).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  random_rows = uniform_table(uniform, uniform)
  write_table(folder / "uniform.csv", random_rows)
  figures.draw_uniform(folder / "uniform.png", random_rows)
  worst = max(abs(row["measured"] - row["predicted"]) for row in random_rows)
  shown = ", ".join(map(str, uniform))
  verdict = [f"Random uniform rows, P and D in {shown}: the measured PPE is within {worst:.4f} of the prediction."]
  if plot_only:
    rows = read_rows(folder)
    if not rows:
      raise ValueError(f"{folder} has no finished runs; leave out --plot-only and give --config")
  elif config:
    rows = run_sweep(load_config(config, overrides), folder, grid(batch, dim, views, seeds))
  else:
    rows = []
  if rows:
    figures.draw_double_descent(folder / "double_descent.png", rows)
    verdict += judge(rows) + [judge_start(folder, rows)]
  return {"workdir": str(folder), "uniform": random_rows, "num_runs": len(rows), "verdict": verdict}


def render(result: Mapping) -> str:
  """Returns the text that the command prints."""
  return "\n".join(result["verdict"] + [f"Tables and figures: {result['workdir']}"])


def uniform_table(batches: Sequence[int], dims: Sequence[int], repeats: int = 2) -> list[dict[str, float]]:
  """Returns P, D, the PPE of P random unit rows (mean of `repeats` draws) and the Marchenko-Pastur prediction."""
  rng, table = np.random.default_rng(0), []
  for num_rows, width in itertools.product(batches, dims):
    errors = []
    for _ in range(repeats):
      m_PxD = rng.standard_normal((num_rows, width), np.float32)
      m_PxD /= np.linalg.norm(m_PxD, axis=1, keepdims=True)
      norm = np.linalg.svd(m_PxD, compute_uv=False).sum()
      errors.append(1 - norm / np.sqrt(num_rows * min(num_rows, width)))
    predicted = uniform_percent_error(num_rows, width)
    table.append({"batch": num_rows, "dim": width, "measured": float(np.mean(errors)), "predicted": predicted})
  return table


def mean_over_seeds(rows: Sequence[Row], measure: str) -> dict[tuple[int, int, int], float]:
  """Returns {(K, D, P): mean of the measure over seeds}, without the runs that diverged."""
  values: dict[tuple[int, int, int], list[float]] = {}
  for row in rows:
    if math.isfinite(value := getattr(row, measure)):
      values.setdefault((row.views, row.dim, row.batch), []).append(value)
  return {key: float(np.mean(v)) for key, v in sorted(values.items())}


def judge(rows: Sequence[Row]) -> list[str]:
  """Returns sentences: where the peaks are, how high P = D is over its neighbours, and whether the claim holds."""
  diverged = [row.cell.name for row in rows if not math.isfinite(row.train_ppe)]
  lines = [f"Not finite, and left out: {', '.join(diverged)}."] if diverged else []
  for measure, label in MEASURES.items():
    table = mean_over_seeds(rows, measure)
    for views in sorted({k for k, _, _ in table}):
      cells = {(d, p): v for (k, d, p), v in table.items() if k == views}
      over_p = _peaks(cells)
      over_d = _peaks({(p, d): v for (d, p), v in cells.items()})
      expected = [uniform_percent_error(p, d) for d, p in cells]
      rank = spearmanr(list(cells.values()), expected).statistic if len(cells) > 2 else float("nan")
      below = sum(v < e for v, e in zip(cells.values(), expected))
      lines.append(
        f"K = {views}, {label}: {_say(over_p, 'D', 'P')} {_say(over_d, 'P', 'D')} Spearman correlation with the "
        f"prediction for uniform rows {rank:.2f} over {len(cells)} cells; {below} of them lie below it. "
        f"Peak at P = D: {_agreement(over_p + over_d)}. {_say_flatness(rows, views, measure)}"
      )
  return lines


def judge_start(folder: Path, rows: Sequence[Row], num_steps: int = 3) -> str:
  """Returns a sentence on the peak in the first steps, during warm-up: random weights may have one, too."""
  ratios = []
  for views in sorted({row.views for row in rows}):
    cells: dict[tuple[int, int], list[float]] = {}
    for row in rows:
      if row.views == views:
        cells.setdefault((row.dim, row.batch), []).append(float(read_curve(folder, row.cell)[:num_steps].mean()))
    ratios += [ratio for *_, ratio in _peaks({at: float(np.mean(values)) for at, values in cells.items()})]
  if not ratios:
    return "No D has a smaller and a larger P beside P = D: no peak to look for before training."
  return (
    f"Before training (first {num_steps} steps, own batches): PPE at P = D is {min(ratios):.2f} to {max(ratios):.2f} "
    f"times its neighbours, above them for {sum(ratio > 1 for ratio in ratios)} of {len(ratios)} pairs of D and K."
  )


def _say_flatness(rows: Sequence[Row], views: int, measure: str) -> str:
  """1 - PPE = alignment flatness: uniform rows have alignment 1, so their prediction speaks of the flatness alone."""
  flat = mean_over_seeds([row for row in rows if row.views == views], measure.replace("ppe", "flatness"))
  gaps = [value - (1 - uniform_percent_error(p, d)) for (_, d, p), value in flat.items()]
  aligned = mean_over_seeds([row for row in rows if row.views == views], measure.replace("ppe", "alignment")).values()
  return (
    f"1 - PPE = alignment x flatness: flatness is {min(gaps):+.3f} to {max(gaps):+.3f} from that of uniform rows, "
    f"alignment is {min(aligned):.3f} to {max(aligned):.3f} (uniform rows: 1)."
  )


def _peaks(cells: Mapping[tuple[int, int], float]) -> list[tuple[int, int, float]]:
  """Returns (x, y of the peak, PPE at y = x over the geometric mean of its neighbours) per x that has both of them."""
  peaks = []
  for x in sorted({x for x, _ in cells}):
    curve = {y: v for (at, y), v in sorted(cells.items()) if at == x}
    ys = list(curve)
    if x not in ys[1:-1]:
      continue  # at the edge of the grid a peak cannot be told from a rise
    i = ys.index(x)
    ratio = curve[x] / np.sqrt(curve[ys[i - 1]] * curve[ys[i + 1]])
    peaks.append((x, max(curve, key=lambda y: curve[y]), float(ratio)))
  return peaks


def _say(peaks: list[tuple[int, int, float]], fixed: str, free: str) -> str:
  if not peaks:
    return f"over {free} no {fixed} has neighbours on both sides of P = D."
  at = sum(x == y for x, y, _ in peaks)
  where = ", ".join(f"{fixed} = {x}: {free} = {y}" for x, y, _ in peaks)
  ratios = [ratio for *_, ratio in peaks]
  return (
    f"over {free} the largest PPE is at P = D for {at} of {len(peaks)} ({where}); at P = D it is "
    f"{min(ratios):.2f} to {max(ratios):.2f} times its neighbours."
  )


def _agreement(peaks: list[tuple[int, int, float]]) -> str:
  if not peaks:
    return "not measured by this grid"
  share = np.mean([x == y for x, y, _ in peaks])
  higher = np.mean([ratio > 1 for *_, ratio in peaks])
  if share == 1:
    return "yes, everywhere"
  if higher == 1:
    return "in part: higher than both neighbours' mean everywhere, but not always the largest of all"
  return f"no: the largest in {share:.0%} of the rows and columns, above its neighbours' mean in {higher:.0%}"
