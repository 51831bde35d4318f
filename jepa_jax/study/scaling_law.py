"""Is the percent error of MMCR a power law of compute, and is it worse at P = D? Fits to the runs of a sweep.

The claims (arXiv 2406.09366): the pretraining percent error (PPE) falls as a power of compute for every P, D and K; at
P = D the curve lies higher and its slope is smaller. Compute is the matrix FLOPs of the train step, counted.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jepa_jax.study import figures
from jepa_jax.study.cells import TAIL, Row, read_rows
from jepa_jax.study.power_law import PowerLaw, Run, load_run
from jepa_jax.study.tables import write_table

DESCRIPTION = "Power laws of MMCR's percent error in compute, from the runs of study double_descent; trains nothing."
_NEIGHBOURS = {"smaller_P": -1, "larger_P": 1}  # places in the sorted batch sizes from that of P = D


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("--workdir", required=True, help="of study double_descent; its finished runs are read")
  parser.add_argument(
    "--longer", nargs="*", default=[], metavar="DIR", help="sweeps with a longer total, to be forecast"
  )
  parser.add_argument("--plot-only", action="store_true", help="the same: nothing is trained here")


def run(
  workdir: str, longer: Sequence[str] = (), plot_only: bool = False, overrides: Mapping[str, str] | None = None
) -> dict:
  """Returns exponents, forecasts and verdict, for JSON; writes scaling_law.csv and scaling_law.png into workdir.

  ValueError where workdir or `longer` holds no finished runs, or settings are given (they are those of the sweep).
  """
  del plot_only
  if overrides:
    raise ValueError(f"scaling_law trains nothing and takes no settings, got --config.{next(iter(overrides))}")
  folder = Path(workdir).expanduser()
  runs = [load_run(folder, row) for row in _rows(folder)]
  by_cell = {r.row.cell: r for r in runs}
  halves = [_forecast(r.row, r.half, r.half_end, r.row.train_ppe, r.end) for r in runs]
  later = [
    _forecast(row, by_cell[row.cell].law, by_cell[row.cell].row.train_ppe, row.train_ppe, row.flops * np.sqrt(1 - TAIL))
    for other in longer
    for row in _rows(Path(other).expanduser())
    if row.cell in by_cell and row.steps > by_cell[row.cell].row.steps
  ]
  table = [_line(r, forecast) for r, forecast in zip(runs, halves)]
  write_table(folder / "scaling_law.csv", table)
  figures.draw_scaling_law(folder / "scaling_law.png", runs)
  verdict = judge(runs, halves, later)
  return {"workdir": str(folder), "exponents": table, "longer": later, "verdict": verdict}


def render(result: Mapping) -> str:
  """Returns the text that the command prints."""
  return "\n".join(result["verdict"] + [f"Table and figure: {result['workdir']}/scaling_law.csv, scaling_law.png"])


def at_ridge(runs: Sequence[Run]) -> list[dict[str, float]]:
  """Returns, per K, D and seed, how P = D differs from the next smaller and the next larger P.

  `level` is PPE at P = D over the geometric mean of the neighbours' PPE, all at the most compute that each of them had,
  by their fits; `b`, `b_smaller_P`, `b_larger_P` are the exponents, `apart_*` says that the 95 % intervals do not meet.
  """
  cells, found = {r.row.cell: r for r in runs}, []
  for cell, ridge in cells.items():
    batches = sorted(c.batch for c in cells if dataclasses.replace(c, batch=cell.batch) == cell)
    i = batches.index(cell.batch)
    if cell.batch != cell.dim or not 0 < i < len(batches) - 1:
      continue
    near = {name: cells[dataclasses.replace(cell, batch=batches[i + k])] for name, k in _NEIGHBOURS.items()}
    compute = min(r.row.flops for r in (ridge, *near.values()))
    level = ridge.law(compute) / np.sqrt(np.prod([r.law(compute) for r in near.values()]))
    line = {"dim": cell.dim, "views": cell.views, "seed": cell.seed, "level": float(level), "b": ridge.law.exponent}
    for name, r in near.items():
      line |= {f"b_{name}": r.law.exponent, f"apart_{name}": bool(ridge.law.high < r.law.low)}
    found.append(line)
  return found


def judge(runs: Sequence[Run], halves: Sequence[Mapping], later: Sequence[Mapping]) -> list[str]:
  """Returns sentences: how straight the curves are, how well they forecast, and what is special at P = D."""
  r2 = np.array([r.law.r2 for r in runs])
  exponents = np.array([r.law.exponent for r in runs])
  falls = sum(r.law.low > 0 for r in runs)
  bent = sum(r.law.bend_p < 0.05 for r in runs)
  straight = falls == len(runs) and bent <= 0.1 * len(runs)
  lines = [
    f"PPE = a C^-b on {len(runs)} runs: R2 of the logarithms has median {np.median(r2):.3f} (least {r2.min():.3f}); "
    f"b from {exponents.min():.4f} to {exponents.max():.4f}; its 95 % interval is above 0 in {falls} of {len(runs)}. "
    f"A bend in the logarithms is significant (p < .05) in {bent}. Power law at every P, D, K: "
    f"{'yes' if straight else 'not everywhere'} (every b above 0, bends in at most a tenth)."
  ]
  lines.append(_judge_forecasts("Fitted on the first half of a run's compute, forecast of its end", halves))
  if later:
    lines.append(_judge_forecasts("Fitted on a run of the sweep, forecast of a longer one", later))
  ridges = at_ridge(runs)
  if not ridges:
    return lines + ["No P = D has a smaller and a larger P beside it: nothing to compare."]
  levels = [r["level"] for r in ridges]
  higher = sum(level > 1 for level in levels)
  lines.append(
    f"Level at P = D against the next smaller and larger P, at equal compute: PPE {min(levels):.2f} to "
    f"{max(levels):.2f} times theirs, higher in {higher} of {len(ridges)}. The claim of a higher curve "
    f"{_holds(higher, len(ridges))}."
  )
  parts, both = [], sum(all(r["b"] < r[f"b_{name}"] for name in _NEIGHBOURS) for r in ridges)
  for name in _NEIGHBOURS:
    ratios = [r["b"] / r[f"b_{name}"] for r in ridges]
    parts.append(
      f"{min(ratios):.2f} to {max(ratios):.2f} times that of the next {name.replace('_', ' ')} (smaller in "
      f"{sum(ratio < 1 for ratio in ratios)} of {len(ridges)}, beyond both intervals in "
      f"{sum(r[f'apart_{name}'] for r in ridges)})"
    )
  lines.append(
    f"Slope at P = D: b is {' and '.join(parts)}. The claim of a smaller slope {_holds(both, len(ridges))}"
    + (", but for single runs within the intervals." if both and not all(map(_all_apart, ridges)) else ".")
  )
  return lines


def _all_apart(ridge: Mapping) -> bool:
  return all(ridge[f"apart_{name}"] for name in _NEIGHBOURS)


def _holds(count: int, total: int) -> str:
  return "holds" if count == total else f"does not hold in {total - count} of {total}"


def _judge_forecasts(what: str, forecasts: Sequence[Mapping]) -> str:
  law = np.array([f["law_error"] for f in forecasts])
  same = np.array([f["no_change_error"] for f in forecasts])
  return (
    f"{what}: relative error {np.median(np.abs(law)):.1%} (median of {len(law)}, largest {np.abs(law).max():.1%}, mean "
    f"with sign {law.mean():+.1%}); to say that nothing changes any more errs by {np.median(np.abs(same)):.1%}."
  )


def _forecast(row: Row, law: PowerLaw, last: float, measured: float, compute: float) -> dict[str, float]:
  predicted = float(law(compute))
  return {
    **{"batch": row.batch, "dim": row.dim, "views": row.views, "seed": row.seed, "steps": row.steps},
    **{"predicted": predicted, "measured": measured},
    **{"law_error": predicted / measured - 1, "no_change_error": last / measured - 1},
  }


def _line(r: Run, forecast: Mapping) -> dict[str, float]:
  law = {"a": r.law.scale, "b": r.law.exponent, "b_low": r.law.low, "b_high": r.law.high}
  law |= {"r2": r.law.r2, "bend_p": r.law.bend_p}
  names = ("predicted", "measured", "law_error", "no_change_error")
  end = {f"half_{name}": forecast[name] for name in names}
  row = r.row
  settings = {"batch": row.batch, "dim": row.dim, "views": row.views, "seed": row.seed, "flops": row.flops}
  return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in (settings | law | end).items()}


def _rows(folder: Path) -> list[Row]:
  rows = [row for row in read_rows(folder) if np.isfinite(row.train_ppe)]
  if not rows:
    raise ValueError(
      f"{folder} has no finished runs; make them with: python -m jepa_jax study double_descent --workdir"
    )
  return sorted(rows, key=lambda row: row.cell)
