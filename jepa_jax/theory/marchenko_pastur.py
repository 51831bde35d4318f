"""What random rows would give: the Marchenko-Pastur law, and MMCR's double descent in closed form."""

from __future__ import annotations

import math

import numpy as np


def mean_root_eigenvalue(ratio: float) -> float:
  """Returns E sqrt(lambda) under the Marchenko-Pastur law of aspect ratio r in (0, 1] and variance 1.

  With lambda = 1 + r + 2 sqrt(r) cos t the law's integral is 2/pi int_0^pi sin^2 t / sqrt(lambda(t)) dt, which has no
  singular end; 8 / (3 pi) at r = 1.

  Raises:
    ValueError: r is not in (0, 1].
  """
  if not 0 < ratio <= 1:
    raise ValueError(f"ratio must be in (0, 1], got {ratio}; it is min(P, D) / max(P, D)")
  from scipy import integrate  # a quarter of a second at the start of every command

  return 2 / math.pi * integrate.quad(lambda t: _integrand(t, ratio), 0, math.pi)[0]


def _integrand(t: float, ratio: float) -> float:
  # (1 - sqrt r)^2 + 4 sqrt(r) cos^2(t/2): 1 + r + 2 sqrt(r) cos t cancels at r = 1, t = pi, where both go to 0.
  square = (1 - math.sqrt(ratio)) ** 2 + 4 * math.sqrt(ratio) * math.cos(t / 2) ** 2
  return math.sin(t) ** 2 / math.sqrt(square)


def uniform_percent_error(num_rows: int | np.ndarray, dim: int | np.ndarray) -> float | np.ndarray:
  """Returns the pretraining percent error of P independent rows, uniform on the unit sphere in D dimensions.

  The limit of large P and D at r = min(P, D) / max(P, D), on which alone it depends: 1 - E sqrt(lambda), with its peak
  at P = D: .1512 for r = 1; .0672, .0323, .0159, .0079 for r = 1/2, 1/4, 1/8, 1/16. The rows are MMCR's perfect
  reconstruction and uniformity (arXiv 2406.09366); a trained network can be below it on its own batch.

  Args:
    num_rows: P, at least 1; a number or an array.
    dim: D, at least 1; a number or an array that broadcasts against P.

  Raises:
    ValueError: a P or D below 1.
  """
  if np.min(num_rows) < 1 or np.min(dim) < 1:
    raise ValueError(f"num_rows and dim must be at least 1, got {num_rows} and {dim}")
  ratios = np.minimum(num_rows, dim) / np.maximum(num_rows, dim)
  errors = np.vectorize(lambda ratio: 1 - mean_root_eigenvalue(ratio), otypes=[float])(ratios)
  return errors if errors.ndim else float(errors)
