"""The learning rate that each cell of a study chooses for itself, on images that the final numbers are not of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jepa_jax.study.tables import Result


def best_rate(results: Sequence[Result], name_of: Mapping[float, str], score: str, cell: str) -> float:
  """Returns the rate whose runs, under its name, have the highest mean score; one that diverged is none.

  ValueError where all did, for the cell that a message names.
  """
  scores = {rate: [r.score(score) for r in results if r.variant == name] for rate, name in name_of.items()}
  means = {rate: float(np.mean(values)) for rate, values in scores.items() if values and np.isfinite(values).all()}
  if not means:
    raise ValueError(f"{cell}: every rate diverged; give lower --rates")
  return max(means, key=lambda rate: means[rate])


def said(rate: float, rates: Sequence[float]) -> str:
  """Returns a rate for the table; one at the edge of those that were tried is marked: a better may lie beyond."""
  return f"{rate:g} (the edge)" if len(rates) > 1 and rate in (min(rates), max(rates)) else f"{rate:g}"
