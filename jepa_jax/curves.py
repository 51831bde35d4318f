"""Curves of metrics over steps: of one run while it goes on, of several over one another."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa_jax.figure import subplots
from jepa_jax.telemetry import read_metrics
from jepa_jax.workdir import CURVES, METRICS

log = logging.getLogger(__name__)
Rows = Sequence[Mapping[str, float]]
_SMOOTHED_FROM = 60  # points of a curve, from which on a smoothed line is drawn over it
_WINDOW = 0.03  # of the curve's length, that a smoothed point is the mean of
_MOST_POINTS = 600  # of a drawn line
_EVERY_S, _SHARE = 60.0, 0.02
_WIDTH_IN, _HEIGHT_IN, _DPI = 3.8, 2.9, 120
COLORS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#0550ae", "#953800", "#57606a")


class Panel(NamedTuple):
  """Metrics that are drawn in one frame: its title, with the unit, and their names."""

  title: str
  keys: tuple[str, ...]


# What every method logs, in the order in which it is looked at. A method's own terms stand behind the first `_FIRST`.
PANELS = (
  Panel("loss", ("loss",)),
  Panel("online probe, % right", ("probe_accuracy",)),
  Panel("RankMe (directions used)", ("rankme", "rankme_text")),
  Panel("standard deviation of features", ("feature_std", "token_std")),
  Panel("gradient norm", ("grad_norm",)),
  Panel("learning rate", ("learning_rate",)),
  Panel("waiting for data, ms per step", ("data_wait_ms",)),
  Panel("goodput, % of the time in steps", ("goodput",)),
)
# Counters and what has a place of its own in a report.
_NOT_DRAWN = {"step", "time", "bad_images", "enlarged_views", "recompiles", "probe_loss", "param_norm", "skipped"}
_NOT_DRAWN |= {"skipped_in_row", "bound", "zero_rows", "full_captions"}
_UNITS = {"r1_image_to_text": "%", "r1_text_to_image": "%", "scale": "inverse temperature"}
_FIRST = 4  # panels, which curves.png has, too: the loss, the probe, RankMe, the deviation


def panels_of(runs: Mapping[str, Rows]) -> list[Panel]:
  """Returns what there is to draw of runs: loss, probe and features, the method's own terms, the rest."""
  there = list(dict.fromkeys(key for rows in runs.values() for row in rows for key in row))
  known = {key for panel in PANELS for key in panel.keys} | _NOT_DRAWN
  titled = lambda key: f"{key.replace('_', ' ')}{f', {_UNITS[key]}' if key in _UNITS else ''}"
  own = [Panel(titled(key), (key,)) for key in there if key not in known]
  return [p for p in (*PANELS[:_FIRST], *own, *PANELS[_FIRST:]) if any(key in there for key in p.keys)]


def smoothed(values: np.ndarray) -> np.ndarray:
  """Returns the mean of each value and those around it, 3 % of them, fewer at both ends: a straight line stays one."""
  half = max(1, int(_WINDOW * len(values) / 2))
  places = np.arange(len(values))
  reach = np.minimum(half, np.minimum(places, places[::-1]))
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def thinned(steps: np.ndarray, values: np.ndarray, most: int = _MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
  """Returns a line of at most `most` points, in which the largest and smallest value of every stretch are kept."""
  if len(steps) <= most:
    return steps, values
  edges = np.linspace(0, len(steps), most // 2 + 1).astype(int)
  kept = [{lo + int(np.argmin(values[lo:hi])), lo + int(np.argmax(values[lo:hi]))} for lo, hi in zip(edges, edges[1:])]
  places = np.array(sorted(set().union(*kept)))
  return steps[places], values[places]


def draw_panel(ax: Any, panel: Panel, runs: Mapping[str, Rows], references: Mapping[str, float]) -> None:
  """Draws one frame: a line for every run (and metric of the panel), its values pale behind where it is smoothed."""
  lowest, highest, several = math.inf, -math.inf, len(runs) > 1
  for i, (name, rows) in enumerate(runs.items()):
    for j, key in enumerate(panel.keys):
      points = [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
      if not points:
        continue
      steps, values = (np.array(column, float) for column in zip(*points))
      color = COLORS[(i + (0 if several else j)) % len(COLORS)]
      if several:
        label = None if j else name.lstrip("_") or "run"  # matplotlib leaves out what begins with _
      else:
        label = key if len(panel.keys) > 1 else None
      style = "-" if j == 0 or not several else "--"
      if len(values) >= _SMOOTHED_FROM:
        ax.plot(*thinned(steps, values), color=color, alpha=0.25, linewidth=0.7)
        values = smoothed(values)
      ax.plot(*thinned(steps, values), style, color=color, label=label, linewidth=1.5, marker="o" * (len(steps) == 1))
      lowest, highest = min(lowest, values.min()), max(highest, values.max())
  for key in panel.keys:
    if key in references:
      value = references[key]
      ax.axhline(value, color="black", linestyle="--", linewidth=0.8, label=f"{key}, reference: {value:.2f}")
  spreads = lowest > 0 and highest > 10 * lowest and "%" not in panel.title
  ax.set_yscale("log" if spreads else "linear")
  ax.set_title(panel.title, fontsize=9, loc="left")
  ax.set_xlabel("step", fontsize=8)
  ax.tick_params(labelsize=8)
  ax.grid(alpha=0.3)
  if ax.get_legend_handles_labels()[1]:
    ax.legend(fontsize=7)


def figure(runs: Mapping[str, Rows], panels: Sequence[Panel], references: Mapping[str, float], columns: int) -> Any:
  """Returns a matplotlib figure of these panels."""
  columns = min(columns, len(panels))
  lines = -(-len(panels) // columns)
  size = (_WIDTH_IN * columns, _HEIGHT_IN * lines)
  fig, axes = subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
  for ax, panel in zip(axes.flat, panels):
    draw_panel(ax, panel, runs, references)
  for ax in axes.flat[len(panels) :]:
    ax.remove()
  return fig


def draw_curves(workdir: Path, references: Mapping[str, float] | None = None) -> Path | None:
  """Writes curves.png: the loss, what the method says should be read against a value, beside that value, the online
  probe, RankMe and the deviation of features. None, and a warning, where no metrics are there to draw."""
  rows = read_metrics(workdir) if (workdir / METRICS).exists() else []
  read_against = set(references or {}) | {"inv"}
  panels = [p for p in panels_of({"": rows}) if p in PANELS[:_FIRST] or read_against & set(p.keys)]
  if not panels:
    log.warning("%s holds no metrics: no %s is drawn", workdir / METRICS, CURVES)
    return None
  fig = figure({"": rows}, panels, references or {}, columns=len(panels))
  path = workdir / CURVES
  fig.savefig(path, dpi=_DPI)
  return path


class LiveCurves:
  """Draws curves.png while a run goes on: at most once a minute, and for at most 2 % of its time."""

  def __init__(self, workdir: Path, references: Mapping[str, float], enabled: bool = True):
    self._workdir, self._references, self._enabled = workdir, references, enabled
    self._next_s = time.monotonic() + _EVERY_S

  def update(self) -> None:
    """Draws where it is time to."""
    began_s = time.monotonic()
    if self._enabled and began_s >= self._next_s:
      self.draw()
      now_s = time.monotonic()
      self._next_s = now_s + max(_EVERY_S, (now_s - began_s) / _SHARE)

  def draw(self) -> None:
    """Draws; a failure is told and costs the picture, not the run."""
    if not (self._enabled and (self._workdir / METRICS).exists()):
      return
    try:
      draw_curves(self._workdir, self._references)
    except Exception as error:
      log.warning("%s is not drawn: %s", CURVES, error)
