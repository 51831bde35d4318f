"""The page: sections as HTML, pictures inside, no script and no network."""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jepa_jax import curves
from jepa_jax.config import flat, to_dict
from jepa_jax.figure import subplots
from jepa_jax.report.facts import Facts, Table
from jepa_jax.report.worries import worries

STYLE = """
:root { color-scheme: light; --line: #d0d7de; --soft: #f6f8fa; --text: #1f2328; --quiet: #59636e; --worry: #9a6700; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: #fff; margin: 0 auto; max-width: 1180px;
  padding: 16px; }
h1 { font-size: 1.5rem; margin: .2em 0; } h2 { font-size: 1.15rem; margin: 1.8em 0 .5em; padding-bottom: .2em;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.2em 0 .4em; }
p, li { max-width: 75ch; } .quiet { color: var(--quiet); font-size: .88rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
td, th { border: 1px solid var(--line); padding: 4px 9px; text-align: right; white-space: nowrap; }
th { background: var(--soft); } td:first-child, th:first-child { text-align: left; }
table.words td { text-align: left; white-space: normal; min-width: 8em; }
tr.this td { font-weight: 600; } img, svg { max-width: 100%; height: auto; display: block; }
img.shown { max-width: min(760px, 100%); max-height: 760px; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 12px; }
ul.worries { border-left: 4px solid var(--worry); background: #fff8c5; padding: .6em 1em .6em 2em; margin: .4em 0; }
p.fine { border-left: 4px solid #1a7f37; background: #dafbe1; padding: .5em 1em; margin: .4em 0; }
details { margin: .4em 0; } summary { cursor: pointer; color: var(--quiet); }
code { background: var(--soft); padding: 1px 4px; border-radius: 4px; font-size: .9em; overflow-wrap: anywhere; }
"""
_MOST_SETTINGS = 60


def page(runs: Sequence[Facts], sections: Iterable[str], made: str, refresh_s: int = 0) -> str:
  """Returns the whole document: what was run, worries, curves, tables, then `sections`; refresh_s: reload so often."""
  title = ", ".join(run.name for run in runs)
  reload = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
  parts = [summary(runs), concerns(runs), curves_of(runs), tables(runs), *sections, settings(runs)]
  body = "\n".join(part for part in parts if part)
  return (
    f'<!doctype html><html lang="en"><head><meta charset="utf-8">{reload}'
    f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_e(title)}</title>'
    f"<style>{STYLE}</style></head><body><h1>{_e(title)}</h1>"
    f'<p class="quiet">{_e(made)}</p>\n{body}\n</body></html>\n'
  )


def summary(runs: Sequence[Facts]) -> str:
  """Returns the section that says what was run, where, by which code, and what it took."""
  rows: dict[str, list[str]] = {}
  for run in runs:
    for name, value in _about(run).items():
      rows.setdefault(name, []).append(value)
  lines = [[name, *cells] for name, cells in rows.items()]
  return section("What was run", grid(["", *(run.name for run in runs)], lines, kind="words"))


def _about(run: Facts) -> dict[str, str]:
  cfg, seconds = run.cfg, run.seconds
  step = int(run.rows[-1]["step"]) if run.rows else run.steps[-1] if run.steps else 0
  step_s = seconds.get("step", 0.0) + seconds.get("data_wait", 0.0)
  rate = f"{step * cfg.batch_size / step_s:,.0f} images/s" if step_s > 0 and step else "-"
  whole = sum(seconds.values())
  shares = ", ".join(
    f"{name.replace('_', ' ')} {100 * s / whole:.0f} %" for name, s in seconds.items() if s > 0.005 * whole
  )
  versions = run.meta.get("versions", {})
  origin = run.meta.get("started_from") or {}
  data = run.meta.get("data") or {}
  return {
    "method": cfg.objective.name,
    "encoder": f"{cfg.encoder.name}, {cfg.encoder.image_size} px, {cfg.encoder.output_dim} features",
    "data": f"{cfg.data.source} {cfg.data.name or cfg.data.train}" + (f", {data['images']:,} images" if data else ""),
    "length": f"{cfg.total} in batches of {cfg.batch_size:,}; step {step:,}" + (" (ended)" if run.ended else " so far"),
    "started from": f"{origin['what']} of {origin['workdir']}, step {origin['step']}"
    if origin
    else "the seed " + str(cfg.seed),
    "time": f"{whole / 60:,.1f} min: {shares}" if whole else "-",
    "speed": rate,
    "machine": str(run.meta.get("machine") or "-"),
    "code": " ".join(filter(None, [run.written_by.get("version", "?"), run.written_by.get("commit", "")])),
    "libraries": ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax") if name in versions) or "-",
    "preset": f"{run.preset}, settings that differ: {len(run.changed)}" if run.preset else "none of this name",
  }


def concerns(runs: Sequence[Facts]) -> str:
  """Returns the section of worries, a list for each run."""
  parts = []
  for run in runs:
    head = f"<h3>{_e(run.name)}</h3>" if len(runs) > 1 else ""
    if found := worries(run):
      parts.append(head + '<ul class="worries">' + "".join(f"<li>{_e(line)}</li>" for line in found) + "</ul>")
    else:
      parts.append(head + '<p class="fine">Nothing stands out.</p>')
  return section("What to worry about", "".join(parts))


def curves_of(runs: Sequence[Facts]) -> str:
  """Returns the section of curves: a frame for each metric, the runs over one another."""
  rows = {run.name: run.rows for run in runs if run.rows}
  if not rows:
    return ""
  known = _references(runs)
  frames = [svg(curves.figure(rows, [panel], known, 1)) for panel in curves.panels_of(rows)]
  note = "Pale: as written; strong: the mean of the values around. Dashed: what the method's own theory says of it."
  return section("Curves", f'<p class="quiet">{note}</p><div class="curves">{"".join(frames)}</div>')


def _references(runs: Sequence[Facts]) -> dict[str, float]:
  """Returns what the methods say should be read against a value, where all runs that have it agree."""
  from jepa_jax.runs import open_run

  found: dict[str, set[float]] = {}
  for run in runs:
    if run.steps:
      try:
        references = open_run(run.workdir).experiment().references
      except Exception:  # a damaged checkpoint, or one of another version: the curves do without
        continue
      for key, value in references.items():
        found.setdefault(key, set()).add(float(value))
  return {key: values.pop() for key, values in found.items() if len(values) == 1}


def tables(runs: Sequence[Facts]) -> str:
  """Returns the section of evaluations: of each run the newest of every kind, older ones folded away."""
  parts = []
  for run in runs:
    if not run.tables:
      continue
    newest = run.newest_tables()
    older = [table for table in run.tables if not any(table is other for other in newest)]
    head = f"<h3>{_e(run.name)}</h3>" if len(runs) > 1 else ""
    parts.append(head + "".join(map(_table, newest)))
    if older:
      parts.append(f"<details><summary>{len(older)} earlier</summary>{''.join(map(_table, older))}</details>")
  return section("Evaluation", "".join(parts)) if parts else ""


def _table(table: Table) -> str:
  columns = list(dict.fromkeys(column for row in table.rows.values() for column in row))
  lines = [[name, *(number(row.get(column)) for column in columns)] for name, row in table.rows.items()]
  said = f"Step {table.step:,}, {table.num_test:,} held-out images, {table.seconds:.0f} s ({table.name})."
  return f'<p class="quiet">{_e(said)}</p>' + grid(["", *columns], lines, bold=[table.this] if len(lines) > 1 else ())


def settings(runs: Sequence[Facts]) -> str:
  """Returns the section of settings: what differs between the runs, what from the preset, and the whole config."""
  parts = []
  if len(runs) > 1:
    trees = [flat(to_dict(run.cfg)) for run in runs]
    keys = [key for key in sorted(set().union(*trees)) if len({str(tree.get(key, "-")) for tree in trees}) > 1]
    lines = [[key, *(_short(tree.get(key, "-")) for tree in trees)] for key in keys[:_MOST_SETTINGS]]
    parts.append("<h3>Between these runs</h3>" + grid(["", *(run.name for run in runs)], lines))
  for run in runs:
    changed = "".join(f"<li><code>{_e(line)}</code></li>" for line in run.changed[:_MOST_SETTINGS])
    if run.preset:
      what = f"<ul>{changed}</ul>" if changed else "<p>Nothing.</p>"
      parts.append(f"<h3>{_e(run.name)}: what differs from {_e(run.preset)}</h3>{what}")
    whole = "\n".join(f"{key} = {value}" for key, value in sorted(flat(to_dict(run.cfg)).items()))
    parts.append(f"<details><summary>All settings of {_e(run.name)}</summary><pre>{_e(whole)}</pre></details>")
  return section("Settings", "".join(parts))


def section(title: str, inner: str) -> str:
  """Returns a section of the page."""
  return f"<section><h2>{_e(title)}</h2>{inner}</section>"


def picture(title: str, about: str, uri: str) -> str:
  """Returns a section with one picture and what there is to see in it."""
  return section(title, f'<p class="quiet">{_e(about)}</p><img class="shown" alt="{_e(title)}" src="{uri}">')


def grid(head: Sequence[str], lines: Sequence[Sequence[str]], bold: Sequence[str] = (), kind: str = "") -> str:
  """Returns a table that scrolls by itself where it is wider than the page."""
  first = "".join(f"<th>{_e(cell)}</th>" for cell in head)
  style = lambda line: ' class="this"' if line[0] in bold else ""
  rows = "".join(f"<tr{style(line)}>{''.join(f'<td>{_e(cell)}</td>' for cell in line)}</tr>" for line in lines)
  return f'<div class="scroll"><table class="{kind}"><tr>{first}</tr>{rows}</table></div>'


def number(value: Any) -> str:
  """Returns a cell: "58.1", "58.1 ± .9", or a dash."""
  if value is None:
    return "-"
  if isinstance(value, list | tuple):
    return f"{float(value[0]):.1f} ± {float(value[1]):.1f}"
  return f"{float(value):.1f}" if math.isfinite(float(value)) else "-"


def svg(figure: Any) -> str:
  """Returns a matplotlib figure as SVG to stand inside a page, its words as text."""
  import matplotlib

  buffer = io.StringIO()
  with (
    warnings.catch_warnings(),
    matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "report"}),
  ):
    warnings.filterwarnings("ignore", message="Glyph .* missing")  # words stay text: the browser has the letters
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
  text = buffer.getvalue()
  return text[text.index("<svg") :]


def spectra(found: Mapping[str, tuple[np.ndarray, float]]) -> str:
  """Returns the section of the features' spectra: {run: (singular values over the largest, RankMe)}."""
  fig, ax = subplots(figsize=(5.2, 3.2), layout="constrained")
  for i, (name, (values, rank)) in enumerate(found.items()):
    places = np.arange(1, len(values) + 1)
    ax.loglog(
      places, np.maximum(values, 1e-7), color=curves.COLORS[i % len(curves.COLORS)], label=f"{name}: RankMe {rank:.1f}"
    )
  ax.set_xlabel("direction", fontsize=8)
  ax.set_ylabel("singular value over the largest", fontsize=8)
  ax.tick_params(labelsize=8)
  ax.grid(alpha=0.3)
  ax.legend(fontsize=8)
  note = "Singular values of the features of held-out images. A line that falls off at once is a collapse."
  return section(
    "Spectrum of the features", f'<p class="quiet">{note}</p><div style="max-width:640px">{svg(fig)}</div>'
  )


def _short(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 60 else text[:57] + "..."


def _e(text: Any) -> str:
  return html.escape(str(text))
