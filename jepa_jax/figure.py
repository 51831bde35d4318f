"""Figures of matplotlib without pyplot: no backend is chosen, which a notebook has made its own choice of, and none is
kept open."""

from __future__ import annotations

from typing import Any


def subplots(
  rows: int = 1, columns: int = 1, figsize: tuple[float, float] = (6.4, 4.8), layout: Any = None, **grid: Any
) -> tuple[Any, Any]:
  """Returns a new figure and its frames, as `pyplot.subplots` does; `Figure.savefig` writes it."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=figsize, layout=layout)
  return figure, figure.subplots(rows, columns, **grid)
