"""Power laws of compute: a straight line in logarithms, its interval, what it predicts; and the runs with their fits.

Legend: N points of a curve.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
from scipy import stats

from jepa_jax.study.cells import TAIL, Row, read_curve

SKIP = 0.1  # of a run's steps: warm-up and the first fall from random weights follow no law


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """y = scale C^-exponent; `low` to `high` is the 95 % interval of the exponent; `r2` the share of log y explained.

  `bend_p` is the p-value of a quadratic term in log C: small where the curve is no straight line, however little it
  scatters; NaN for fewer than 5 points.
  """

  scale: float
  exponent: float
  low: float
  high: float
  r2: float
  bend_p: float

  def __call__(self, compute: float | np.ndarray) -> float | np.ndarray:
    return self.scale * np.asarray(compute, float) ** -self.exponent


def fit_power_law(compute_N: np.ndarray, y_N: np.ndarray) -> PowerLaw:
  """Returns the least squares line of log y on log C, with Student's interval for its slope.

  No constant is added to the law: over the factor of ten that a run spans it cannot be told from a smaller exponent.
  The interval takes the points' scatter around the line as independent; where a curve bends, it does not cover that.

  Raises:
    ValueError: fewer than 3 points, or a value that is not positive and finite.
  """
  compute_N, y_N = np.asarray(compute_N, float), np.asarray(y_N, float)
  if len(y_N) < 3 or not np.all(np.isfinite(compute_N) & np.isfinite(y_N) & (compute_N > 0) & (y_N > 0)):
    raise ValueError(f"a power law is fitted to at least 3 positive, finite points, got {y_N.tolist()}")
  x_N, log_y_N = np.log(compute_N / compute_N[0]), np.log(y_N)
  line = stats.linregress(x_N, log_y_N)
  half = stats.t.ppf(0.975, len(y_N) - 2) * line.stderr
  scale = math.exp(line.intercept - line.slope * math.log(compute_N[0]))
  return PowerLaw(scale, -line.slope, -line.slope - half, -line.slope + half, line.rvalue**2, _bend_p(x_N, log_y_N))


def _bend_p(x_N: np.ndarray, log_y_N: np.ndarray) -> float:
  if len(x_N) < 5:
    return math.nan
  coefficients, covariance = np.polyfit(x_N, log_y_N, 2, cov=True)
  return float(2 * stats.t.sf(abs(coefficients[0]) / math.sqrt(covariance[0, 0]), len(x_N) - 3))


def log_bins(
  y_by_step: np.ndarray, flops_per_step: float, last_step: int | None = None, num_bins: int = 12
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (FLOPs N, mean y N) in bins of equal width in log compute: late steps, though many, do not outvote early.

  The first 10 % of the whole run are left out; N is smaller than num_bins where bins are empty.

  Args:
    y_by_step: y of step 1, 2, ...
    last_step: bins end here; all steps by default.
  """
  last = last_step or len(y_by_step)
  steps = np.arange(max(1, round(SKIP * len(y_by_step))), last + 1)
  edges = np.geomspace(steps[0], last, num_bins + 1)
  bin_of = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, num_bins - 1)
  used = np.unique(bin_of)
  log_compute = [np.log(steps[bin_of == b] * float(flops_per_step)).mean() for b in used]
  return np.exp(log_compute), np.array([y_by_step[steps[bin_of == b] - 1].mean() for b in used])


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run with its PPE by compute (N bins) and two fits: to all of it and to the first half of its compute."""

  row: Row
  compute_N: np.ndarray
  ppe_N: np.ndarray
  law: PowerLaw
  half: PowerLaw
  half_end: float  # PPE at the end of that half: what a forecast of "no change" would say

  @property
  def end(self) -> float:
    """Compute at which the last measured PPE, a mean over a tail, belongs: the tail's geometric middle."""
    return self.row.flops * np.sqrt(1 - TAIL)


def load_run(folder: Path, row: Row) -> Run:
  """Returns a finished run of a sweep's folder with its fits."""
  curve, per_step = read_curve(folder, row.cell), row.flops / row.steps
  middle = row.steps // 2
  compute_N, ppe_N = log_bins(curve, per_step)
  half = fit_power_law(*log_bins(curve, per_step, last_step=middle))
  half_end = float(curve[middle - round(TAIL * middle) : middle].mean())
  return Run(row, compute_N, ppe_N, fit_power_law(compute_N, ppe_N), half, half_end)
