"""The figures of the studies, as PNG files. P batch, D width, K views."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatterSciNotation, NullFormatter, NullLocator, ScalarFormatter

from jepa_jax.figure import subplots
from jepa_jax.study.cells import Row
from jepa_jax.study.power_law import Run
from jepa_jax.study.tables import Result
from jepa_jax.theory import uniform_percent_error

_STYLES = [(color, line) for line in ("-", "--") for color in colormaps["tab10"].colors[:8]]


def draw_uniform(path: Path, table: Sequence[Mapping[str, float]]) -> None:
  """Draws the PPE of random rows (dots) and its prediction (lines) against P, a colour per D."""
  fig, ax = subplots(figsize=(5.6, 3.6), layout="constrained")
  dims = sorted({row["dim"] for row in table})
  for dim, color in zip(dims, _colors(len(dims))):
    rows = [row for row in table if row["dim"] == dim]
    fine = np.unique(np.geomspace(min(r["batch"] for r in rows), max(r["batch"] for r in rows), 97).astype(int))
    ax.plot(fine, uniform_percent_error(fine, np.full(len(fine), dim)), "--", color=color, lw=1)
    ax.plot([r["batch"] for r in rows], [r["measured"] for r in rows], "o", color=color, ms=5, label=f"D = {dim}")
  _log2_axis(ax, "x", sorted({row["batch"] for row in table}))
  ax.set(xlabel="batch P", ylabel="pretraining percent error", ylim=(0, None))
  ax.set_title("Random uniform rows; dashed: Marchenko-Pastur", fontsize=10)
  ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  _save(fig, path)


def draw_double_descent(path: Path, rows: Sequence[Row]) -> None:
  """Draws, per K: PPE against P for each D on own and on held-out batches, and the first as a map over P and D."""
  all_views = sorted({row.views for row in rows})
  fig, axes = subplots(
    len(all_views), 3, figsize=(12.5, 3.5 * len(all_views) + 0.3), layout="constrained", squeeze=False
  )
  for axes_row, views in zip(axes, all_views):
    here = [row for row in rows if row.views == views]
    for ax, measure, title in zip(axes_row, ("train_ppe", "held_ppe"), ("own batches, last 20 %", "held-out batches")):
      _draw_curves(ax, here, measure)
      ax.set_title(f"K = {views}, {title}", fontsize=10)
    axes_row[1].sharey(axes_row[0])
    axes_row[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _draw_map(fig, axes_row[2], here)
    axes_row[2].set_title(f"K = {views}, own batches (framed: P = D)", fontsize=10)
  _save(fig, path)


def draw_scaling_law(path: Path, runs: Sequence[Run]) -> None:
  """Draws, per K and D, PPE against compute with fits for every P, and the exponents with their intervals."""
  all_views = sorted({r.row.views for r in runs})
  dims = sorted({r.row.dim for r in runs})
  batches = sorted({r.row.batch for r in runs})
  colors = dict(zip(batches, _colors(len(batches))))
  shape = len(all_views), len(dims) + 1
  fig, axes = subplots(
    *shape, figsize=(3.4 * shape[1] + 0.8, 3.2 * shape[0] + 0.6), layout="constrained", squeeze=False
  )
  for axes_row, views in zip(axes, all_views):
    for ax, dim in zip(axes_row, dims):
      ax.sharey(axes_row[0])
      here = [r for r in runs if (r.row.views, r.row.dim) == (views, dim)]
      for r in here:
        ridge = r.row.batch == dim
        ax.plot(r.compute_N, r.ppe_N, "o", color=colors[r.row.batch], ms=5 if ridge else 3)
        ax.plot(r.compute_N, r.law(r.compute_N), color=colors[r.row.batch], lw=2.6 if ridge else 1)
      ax.set_title(f"K = {views}, D = {dim}", fontsize=10)
      ax.set(xlabel="matrix FLOPs", xscale="log", yscale="log")
    for ax in axes_row[:-1]:
      _plain_log_axis(ax)  # once all curves are in: the panels share their range
    axes_row[0].set_ylabel("pretraining percent error")
    _draw_exponents(axes_row[-1], [r for r in runs if r.row.views == views], dims, views)
  handles = [Line2D([], [], color=colors[b], marker="o", ms=4, label=f"P = {b}") for b in batches]
  fig.legend(handles=handles, loc="outside lower center", ncols=len(batches), fontsize=9, title="thick: P = D")
  _save(fig, path)


_LINEAR = ("probe_accuracy", "teacher_entropy")


def draw_runs(
  path: Path, curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], panels: Mapping[str, str]
) -> None:
  """Draws metrics against the step, a panel for each of {metric: title}: {variant: metrics of each seed}, a line per
  run.

  Accuracies and entropies have a linear axis, all else a logarithmic one.
  """
  fig, axes = subplots(1, len(panels), figsize=(14, 4.6), layout="constrained")
  for (name, runs), (color, line) in zip(curves.items(), itertools.cycle(_STYLES)):
    for i, rows in enumerate(runs):
      for ax, key in zip(axes, panels):
        points = [(r["step"], r[key]) for r in rows if key in r]
        label = name if i == 0 else None
        if points:
          ax.plot(*zip(*points, strict=True), line, color=color, lw=1.3, label=label)
  for ax, (key, title) in zip(axes, panels.items()):
    ax.set(xlabel="step", title=title)
    if key not in _LINEAR:
      ax.set_yscale("log")
    ax.grid(alpha=0.3)
  fig.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
  _save(fig, path)


def draw_trials(path: Path, results: Sequence[Result], columns: Mapping[str, str]) -> None:
  """Draws every run as a dot, a row per variant, and a panel for each of {score: title} that some run has."""
  columns = {key: title for key, title in columns.items() if any(np.isfinite(r.score(key)) for r in results)}
  names = list(dict.fromkeys(r.variant for r in results))
  size = 3 + 2.2 * len(columns), 1 + 0.3 * len(names)
  fig, axes = subplots(1, max(1, len(columns)), figsize=size, layout="constrained", sharey=True, squeeze=False)
  for ax, (key, title) in zip(axes[0], columns.items()):
    values = [r.score(key) for r in results]
    ax.plot(values, [names.index(r.variant) for r in results], "o", ms=5, alpha=0.7)
    finite = [v for v in values if np.isfinite(v) and v > 0]
    if len(finite) == len(values) and max(finite) > 20 * min(finite):
      ax.set_xscale("log")
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3)
  axes[0][0].set_yticks(range(len(names)), names, fontsize=9)
  axes[0][0].invert_yaxis()
  _save(fig, path)


def draw_pushes(path: Path, table: Sequence[Mapping[str, Any]], of: str = "of the embeddings") -> None:
  """Draws the gradient of each regulariser against the scale of what is said, over its own at half the width."""
  fig, ax = subplots(figsize=(7.6, 4.4), layout="constrained")
  for name, (color, line) in zip(dict.fromkeys(row["regulariser"] for row in table), itertools.cycle(_STYLES)):
    rows = [row for row in table if row["regulariser"] == name]
    middle = min(rows, key=lambda row: abs(np.log(row["scale"] / 0.5)))["push"] or 1
    ax.plot(
      [row["scale"] for row in rows], [row["push"] / middle for row in rows], line, color=color, lw=1.3, label=name
    )
  ax.axvline(1, color="grey", lw=0.8)
  ax.set(xscale="log", yscale="log", xlabel=f"standard deviation {of}", ylabel="gradient / gradient near .5")
  ax.grid(alpha=0.3)
  fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
  _save(fig, path)


def draw_spectrum(path: Path, runs: Mapping[str, Sequence[Result]]) -> None:
  """Draws the abstraction axis: an attentive probe's lead over a linear one, against the linear one; a dot per run."""
  fig, ax = subplots(figsize=(7.2, 4.6), layout="constrained")
  for (name, own), (color, line) in zip(runs.items(), itertools.cycle(_STYLES)):
    linear = np.array([r.score("linear") for r in own])
    gain = np.array([r.score("attentive") for r in own]) - linear
    ax.plot(gain, linear, "o" if line == "-" else "s", color=color, ms=6, label=name)
  ax.set(xlabel="attentive probe minus linear probe, points", ylabel="linear probe, %")
  ax.grid(alpha=0.3)
  fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
  _save(fig, path)


def draw_few_images(path: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
  """Draws each of {score: title} against the number of images, a line per way of learning, a dot per seed."""
  fig, axes = subplots(1, len(columns), figsize=(4.6 * len(columns) + 1.6, 3.8), layout="constrained")
  arms = list(dict.fromkeys(row["arm"] for row in rows))
  for ax, (key, title) in zip(np.atleast_1d(axes), columns.items()):
    for arm, color in zip(arms, colormaps["tab10"].colors):
      own = [row for row in rows if row["arm"] == arm]
      sizes = sorted({row["images"] for row in own})
      means = [np.mean([row[key] for row in own if row["images"] == num]) for num in sizes]
      ax.plot(sizes, means, "-", color=color, lw=1.3, label=arm)
      ax.plot([row["images"] for row in own], [row[key] for row in own], "o", color=color, ms=4, alpha=0.7)
    _log2_axis(ax, "x", sorted({row["images"] for row in rows}))
    ax.set(xlabel="images", ylabel=f"{title}, %")
  fig.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
  _save(fig, path)


def draw_batches(path: Path, lines: Mapping[tuple[str, int], Mapping[int, np.ndarray]], title: str) -> None:
  """Draws {(loss, D): {batch: score of each seed}}: a panel per D, a line per loss, a dot per seed."""
  widths = list(dict.fromkeys(width for _, width in lines))
  fig, axes = subplots(1, len(widths), figsize=(1 + 4 * len(widths), 3.6), layout="constrained", squeeze=False)
  for ax, width in zip(axes[0], widths):
    for (loss, _), (color, _) in zip([key for key in lines if key[1] == width], _STYLES):
      by_batch = lines[loss, width]
      ax.plot(list(by_batch), [values.mean() for values in by_batch.values()], "-", color=color, label=loss)
      for batch, values in by_batch.items():
        ax.plot([batch] * len(values), values, "o", color=color, ms=4, alpha=0.6)
    _log2_axis(ax, "x", sorted({batch for (_, w), line in lines.items() if w == width for batch in line}))
    ax.set(xlabel="batch", ylabel=title, ylim=(0, None))
    ax.set_title(f"D = {width}", fontsize=10)
  axes[0][-1].legend(fontsize=8)
  _save(fig, path)


def draw_equivariance(
  path: Path,
  scores: Mapping[tuple[str, int, str], Sequence[Mapping[str, float]]],
  rhos: Mapping[str, float],
  mrr: str,
  blind_mrr: float,
) -> None:
  """Draws the score `mrr` by augmentation, a line per conditioning and depth, and each accuracy of `rhos` against it.

  scores: {(conditioning, depth, strength): scores of each seed, in %}; their mean is drawn, with a bar from least to
  most; where a seed has none, nothing. Colours are conditionings, marks depths, sizes strengths.
  """
  conditionings, depths, strengths = (list(dict.fromkeys(cell[i] for cell in scores)) for i in range(3))
  color = dict(zip(conditionings, _colors(len(conditionings))))
  mark, size = dict(zip(depths, itertools.cycle("os^D"))), dict(zip(strengths, (5, 8, 11)))

  def mean_and_range(name, *cells):
    values_KxS = np.array([[seed.get(name, np.nan) for seed in scores[cell]] for cell in cells])
    mean_K = values_KxS.mean(1)
    return mean_K, np.stack([mean_K - values_KxS.min(1), values_KxS.max(1) - mean_K])

  fig, axes = subplots(1, 1 + len(rhos), figsize=(3.5 * (1 + len(rhos)) + 1.7, 3.4), layout="constrained")
  axes = np.atleast_1d(axes)
  for c, d in itertools.product(conditionings, depths):
    y, yerr = mean_and_range(mrr, *((c, d, s) for s in strengths))
    style = dict(fmt=f"{mark[d]}-", color=color[c], ms=6, elinewidth=1)
    axes[0].errorbar(range(len(strengths)), y, yerr, label=f"{c}, {d} deep", **style)
  axes[0].axhline(blind_mrr, color="gray", ls="--", lw=1, label="blind")
  axes[0].set_xticks(range(len(strengths)), strengths)
  axes[0].margins(x=0.15)
  axes[0].set(title="MRR, clean source, %", xlabel="augmentation in training", ylim=(0, None))
  for ax, (name, rho) in zip(axes[1:], rhos.items()):
    for c, d, s in scores:
      (x, xerr), (y, yerr) = (mean_and_range(score, (c, d, s)) for score in (mrr, name))
      ax.errorbar(x, y, yerr, xerr, fmt=mark[d], ms=size[s], color=color[c], alpha=0.75, elinewidth=1)
    ax.set(title=f"{name}, %: rank correlation {rho:+.2f}", xlabel="MRR, clean source, %")
  for s in strengths:
    axes[0].plot([], [], "o", ms=size[s], color="gray", label=s)
  for ax in axes:
    ax.grid(alpha=0.3)
  fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
  _save(fig, path)


def draw_selection(
  path: Path,
  rows: Sequence[Mapping[str, float]],
  scores: Mapping[str, np.ndarray],
  rhos: Mapping[str, Mapping[str, float]],
) -> None:
  """Draws the linear probe of every row against the first two of its scores, a colour per lam."""
  fig, axes = subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
  linear, lams = np.array([row["linear"] for row in rows]), np.array([row["lam"] for row in rows])
  for ax, name in zip(axes, scores):
    for lam in np.unique(lams):
      at = lams == lam
      ax.scatter(scores[name][at], linear[at], label=f"lam {lam:g}", s=20 + 15 * np.arange(at.sum()))
    ax.set(xlabel=name, title=f"Spearman {rhos[name]['linear']:.2f}")
    ax.grid(alpha=0.3)
  axes[0].set_ylabel("linear probe, percent")
  axes[1].legend(fontsize=8, title="larger dot: larger lr", title_fontsize=8)
  _save(fig, path)


def _draw_curves(ax: Any, rows: Sequence[Row], measure: str) -> None:
  dims, batches = sorted({row.dim for row in rows}), sorted({row.batch for row in rows})
  for dim, color in zip(dims, _colors(len(dims))):
    here = sorted({row.batch for row in rows if row.dim == dim})
    values = [np.mean([getattr(r, measure) for r in rows if (r.dim, r.batch) == (dim, p)]) for p in here]
    ax.plot(here, values, "o-", color=color, ms=4, label=f"D = {dim}")
    ax.plot(here, uniform_percent_error(np.array(here), np.full(len(here), dim)), "--", color=color, lw=1)
    for p, value in zip(here, values):
      if p == dim:
        ax.plot(p, value, "o", ms=11, mfc="none", color=color)
  ax.plot([], [], "o", ms=9, mfc="none", color="gray", label="P = D")
  ax.plot([], [], "--", color="gray", lw=1, label="uniform rows")
  _log2_axis(ax, "x", batches)
  ax.set(xlabel="batch P", ylabel="pretraining percent error", ylim=(0, None))


def _draw_map(fig: Any, ax: Any, rows: Sequence[Row]) -> None:
  dims, batches = sorted({row.dim for row in rows}), sorted({row.batch for row in rows})
  values = np.full((len(dims), len(batches)), np.nan)
  for i, dim in enumerate(dims):
    for j, batch in enumerate(batches):
      cell = [r.train_ppe for r in rows if (r.dim, r.batch) == (dim, batch)]
      if cell:
        values[i, j] = np.mean(cell)
  image = ax.imshow(values, origin="lower", cmap="viridis", aspect="auto")
  middle = (np.nanmin(values) + np.nanmax(values)) / 2
  for (i, j), value in np.ndenumerate(values):
    if np.isfinite(value):
      color = "white" if value < middle else "black"
      ax.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=8, color=color)
    if dims[i] == batches[j]:
      ax.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, fill=False, ec="red", lw=2))
  ax.set_xticks(range(len(batches)), batches)
  ax.set_yticks(range(len(dims)), dims)
  ax.set(xlabel="batch P", ylabel="width D")
  fig.colorbar(image, ax=ax)


def _draw_exponents(ax: Any, runs: Sequence[Run], dims: Sequence[int], views: int) -> None:
  for k, (dim, color) in enumerate(zip(dims, _colors(len(dims)))):
    here = sorted((r for r in runs if r.row.dim == dim), key=lambda r: r.row.batch)
    if not here:
      continue
    x = np.array([r.row.batch / dim for r in here]) * 2 ** (0.12 * (k - (len(dims) - 1) / 2))  # beside, not over
    b = np.array([r.law.exponent for r in here])
    spread = [b - [r.law.low for r in here], [r.law.high for r in here] - b]
    ax.errorbar(x, b, spread, fmt="o-", color=color, ms=4, lw=1, capsize=2, label=f"D = {dim}")
  ax.axvline(1, color="gray", lw=1, ls=":")
  _log2_axis(ax, "x", sorted({r.row.batch / r.row.dim for r in runs}))
  ax.set(xlabel="P / D", ylabel="exponent b, 95 % interval")
  ax.set_title(f"K = {views}, PPE = a C^-b", fontsize=10)
  ax.legend(fontsize=8)


def _colors(count: int) -> list:
  return [colormaps["viridis"](x) for x in np.linspace(0, 0.88, count)]


def _log2_axis(ax: Any, axis: str, values: Sequence[float]) -> None:
  getattr(ax, f"set_{axis}scale")("log", base=2)
  ticks = getattr(ax, f"{axis}axis")
  labels = [f"{v:g}" if v >= 1 else f"1/{1 / v:g}" for v in values]
  ticks.set_ticks(values, labels)
  ticks.set_minor_locator(NullLocator())
  ax.grid(alpha=0.3)


def _plain_log_axis(ax: Any) -> None:
  """Few decades: powers of ten below, plain numbers at the side, where there may be no power of ten at all."""
  ax.xaxis.set_major_formatter(LogFormatterSciNotation())
  ax.xaxis.set_minor_formatter(NullFormatter())
  low, high = ax.get_ylim()
  ax.yaxis.set_minor_locator(NullLocator())
  ax.yaxis.set_major_formatter(ScalarFormatter())
  ticks = np.round(np.geomspace(low, high, 6)[1:-1], 3)
  ax.yaxis.set_ticks(ticks, [f"{t:.3f}" for t in ticks])
  ax.grid(alpha=0.3)


def _save(fig: Any, path: Path) -> None:
  fig.savefig(path, dpi=120)
