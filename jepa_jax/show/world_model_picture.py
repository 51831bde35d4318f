"""The figure of `show world_model`: for each image a block of sweeps and, right of it, one of single questions.

Everything is placed on one canvas in inches from the top left. H W picture, S values of a sweep, M nearest pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

CELL_IN, PITCH_IN, LARGE_IN, DPI = 0.62, 0.67, 1.29, 130  # a large picture is as high as two cells and their gap
MARGIN_IN, TITLE_IN, LABEL_IN, HEAD_IN, BETWEEN_IN = 0.15, 1.05, 0.85, 0.26, 0.35
HIT, MISS, QUIET = "#1a9641", "#d7191c", "0.35"
LEGEND = (
  "In brackets: told the null action instead; a guess has {chance:.2f}. "
  "Ranks are among {num_bank} pictures of the image: sweeps, sources, jitters, other colours.\n"
  "Green frame: the picture asked for is the nearest to what is imagined. "
  "Red: another is; the number is the rank of the one asked for."
)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """One dimension: for each of its S values the picture asked for, the nearest one, and the rank of that asked for."""

  name: str
  labels: list[str]
  asked_SxHxWx3: np.ndarray
  nearest_SxHxWx3: np.ndarray
  rank_S: np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
  """One question: what it is about, the action in words, the pictures, which of the nearest is asked for, its rank."""

  name: str
  action: str
  source_HxWx3: np.ndarray
  asked_HxWx3: np.ndarray
  nearest_MxHxWx3: np.ndarray
  is_asked_M: np.ndarray
  rank: float


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What is drawn of one image."""

  sweeps: list[Sweep]
  cases: list[Case]


def size_in(drawn: list[Drawn]) -> tuple[float, float]:
  """Returns the figure's width and height in inches."""
  num_values, num_nearest = len(drawn[0].sweeps[0].labels), len(drawn[0].cases[0].nearest_MxHxWx3)
  width = _cases_left_in(num_values) + 4 * PITCH_IN + -(-num_nearest // 2) * PITCH_IN + 0.1 + MARGIN_IN
  return width, TITLE_IN + sum(map(_height_in, drawn)) + BETWEEN_IN * (len(drawn) - 1) + MARGIN_IN


def _cases_left_in(num_values: int) -> float:
  return MARGIN_IN + LABEL_IN + num_values * PITCH_IN + BETWEEN_IN


def _height_in(image: Drawn) -> float:
  return max(len(image.sweeps), len(image.cases)) * (HEAD_IN + 2 * PITCH_IN)


def draw(path: Path, drawn: list[Drawn], title: str, mrr: dict[str, Any], num_bank: int, unseen: Set[str]) -> None:
  """Writes the picture. mrr: by name {"mrr", "mrr_null_action", "mrr_chance"}; unseen: actions training never had."""
  width, height = size_in(drawn)
  fig = Figure(figsize=(width, height))
  ax = fig.add_axes((0, 0, 1, 1))
  text = [f"{n} {x['mrr']:.2f} ({x['mrr_null_action']:.2f})" for n, x in mrr.items()]
  legend = LEGEND.format(chance=next(iter(mrr.values()))["mrr_chance"], num_bank=num_bank)
  ax.text(MARGIN_IN, 0.22, title, fontsize=11, weight="bold", va="center")
  ax.text(MARGIN_IN, 0.48, "   ".join(text), fontsize=7.5, va="center")
  ax.text(MARGIN_IN, 0.78, legend, fontsize=7, va="center", color=QUIET, linespacing=1.5)
  top = TITLE_IN
  for image in drawn:
    for place, sweep in enumerate(image.sweeps):
      _draw_sweep(ax, top + place * (HEAD_IN + 2 * PITCH_IN), sweep, sweep.name in unseen)
    left = _cases_left_in(len(image.sweeps[0].labels))
    for place, case in enumerate(image.cases):
      _draw_case(ax, left, top + place * (HEAD_IN + 2 * PITCH_IN), case, case.name in unseen)
    top += _height_in(image) + BETWEEN_IN
  ax.set(xlim=(0, width), ylim=(height, 0), aspect="auto")  # after imshow, which sets them, too
  ax.axis("off")
  fig.savefig(path, dpi=DPI)


def _draw_sweep(ax, top: float, sweep: Sweep, is_unseen: bool) -> None:
  """Draws the dimension's name and values, the pictures asked for and, below, the nearest ones."""
  left, first = MARGIN_IN + LABEL_IN, top + HEAD_IN
  ax.text(MARGIN_IN, first - 0.08, sweep.name, fontsize=8, weight="bold")
  if is_unseen:
    ax.text(MARGIN_IN, first + 0.1, "untrained", fontsize=6.5, color=QUIET, va="center")
  for row, label in enumerate(("asked for", "nearest")):
    middle = first + row * PITCH_IN + CELL_IN / 2
    ax.text(left - 0.08, middle, label, fontsize=7, color=QUIET, ha="right", va="center")
  for s, (label, rank) in enumerate(zip(sweep.labels, sweep.rank_S)):
    x = left + s * PITCH_IN
    ax.text(x + CELL_IN / 2, first - 0.08, label, fontsize=7, ha="center")
    _show(ax, x, first, CELL_IN, sweep.asked_SxHxWx3[s])
    _show(ax, x, first + PITCH_IN, CELL_IN, sweep.nearest_SxHxWx3[s], HIT if rank == 1 else MISS)
    if rank != 1:
      _mark(ax, x, first + PITCH_IN, f"{rank:g}")


def _draw_case(ax, left: float, top: float, case: Case, is_unseen: bool) -> None:
  """Draws the source and the picture asked for, large, and the nearest ones in two rows, the nearest first."""
  first = top + HEAD_IN
  columns = [left, left + 2 * PITCH_IN, left + 4 * PITCH_IN + 0.1]
  color = HIT if case.rank == 1 else MISS
  rank = f"nearest; the one asked for has rank {case.rank:g}{' (untrained)' if is_unseen else ''}"
  ax.text(columns[0], first - 0.08, "source", fontsize=7)
  ax.text(columns[1], first - 0.08, case.action, fontsize=7, weight="bold")
  ax.text(columns[2], first - 0.08, rank, fontsize=7, color=color)
  _show(ax, columns[0], first, LARGE_IN, case.source_HxWx3)
  _show(ax, columns[1], first, LARGE_IN, case.asked_HxWx3)
  per_row = -(-len(case.nearest_MxHxWx3) // 2)
  for m, picture in enumerate(case.nearest_MxHxWx3):
    x, y = columns[2] + m % per_row * PITCH_IN, first + m // per_row * PITCH_IN
    _show(ax, x, y, CELL_IN, picture, HIT if case.is_asked_M[m] else MISS if m == 0 else None)


def _show(ax, left: float, top: float, side: float, picture: np.ndarray, frame: str | None = None) -> None:
  ax.imshow(picture, extent=(left, left + side, top + side, top))
  if frame:
    ax.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=frame, linewidth=2.2))


def _mark(ax, left: float, top: float, text: str) -> None:
  box = dict(boxstyle="square,pad=0.15", facecolor="white", edgecolor=MISS, linewidth=0.8)
  ax.text(left + CELL_IN - 0.06, top + CELL_IN - 0.07, text, fontsize=6.5, ha="right", va="bottom", bbox=box)
