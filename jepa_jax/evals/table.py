"""The table of an evaluation: one row per feature set, one column per protocol, the best of each column in bold."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

Value = float | tuple[float, float] | None  # percent, or (mean, standard deviation)
Rows = Mapping[str, Mapping[str, Value]]

TITLES = {"knn": "kNN", "linear": "linear", "attentive": "attentive"}
_SHOTS = "shots_"


def shots_columns(results: Mapping[int, tuple[float, float]]) -> dict[str, tuple[float, float]]:
  """Returns the columns {"shots_<n>": (mean, deviation)} of what few_shot gave, to merge into a row."""
  return {f"{_SHOTS}{n}": value for n, value in results.items()}


def format_table(rows: Rows, title: str = "") -> str:
  """Returns the table as text for a terminal (box, ANSI bold), accuracies in percent.

  rows is {name: {"knn": 86.1, "linear": 88.0, "shots_5": (80.2, 1.3), ...}}. kNN, linear, attentive and the
  shots come first, in this order, then other keys under their own name; higher is better in all. What is missing, None
  or NaN is a "-".
  """
  text = io.StringIO()
  print_table(rows, title, Console(file=text, force_terminal=True, color_system="standard", width=1000))
  return text.getvalue()


def markdown_table(rows: Rows, title: str = "") -> str:
  """Returns the table of format_table in Markdown."""
  columns = _columns(rows)
  line = lambda cells: "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
  lines = [f"{title}\n"] if title else []
  lines += [line(["features", *map(_column_title, columns)]), "|---|" + "---:|" * len(columns)]
  for name, cells in _cells(rows, columns).items():
    lines.append(line([name, *(f"**{text}**" if best else text for text, best in cells)]))
  return "\n".join(lines) + "\n"


def print_table(rows: Rows, title: str = "", console: Console | None = None) -> None:
  """Prints the table to the console, standard output by default; bold only where that is a terminal.

  Columns for which the console is too narrow come in tables of their own, below.
  """
  console = console or Console()
  unbounded = console.options.update(width=10_000)  # a measure is cut at the width
  groups: list[list[str]] = [[]]
  for column in _columns(rows):
    table = _rich_table(rows, "", [*groups[-1], column])
    if groups[-1] and console.measure(table, options=unbounded).maximum > console.width:
      groups.append([])
    groups[-1].append(column)
  for columns in groups:
    filled = {name: row for name, row in rows.items() if not columns or set(columns) & row.keys()}
    console.print(_rich_table(filled if len(groups) > 1 else rows, title, columns))
    title = ""


def _rich_table(rows: Rows, title: str, columns: list[str]) -> Table:
  table = Table(title=Text(title) if title else None, title_justify="left")
  table.add_column("features", no_wrap=True)
  for column in columns:
    table.add_column(_column_title(column), justify="right")
  for name, cells in _cells(rows, columns).items():
    table.add_row(Text(name), *(Text(text, style="bold" if best else "") for text, best in cells))
  return table


def _columns(rows: Rows) -> list[str]:
  """Returns the keys of all rows: kNN, linear, attentive, shots by their number, then the rest as they come."""
  keys = list(dict.fromkeys(key for row in rows.values() for key in row))
  known = [key for key in TITLES if key in keys]
  shots = sorted((key for key in keys if _num_shots(key)), key=_num_shots)
  return [*known, *shots, *(key for key in keys if key not in known and key not in shots)]


def _num_shots(column: str) -> int:
  number = column.removeprefix(_SHOTS)
  return int(number) if column.startswith(_SHOTS) and number.isdigit() else 0


def _column_title(column: str) -> str:
  n = _num_shots(column)
  return f"{n} label{'s' if n > 1 else ''}" if n else TITLES.get(column, column)


def _cells(rows: Rows, columns: list[str]) -> dict[str, list[tuple[str, bool]]]:
  """Returns {row name: [(text, whether it is the best of its column)]}; equal as printed is equally best."""
  shown = {name: [_mean(row.get(column)) for column in columns] for name, row in rows.items()}
  best = [
    max((means[i] for means in shown.values() if means[i] is not None), default=None) for i in range(len(columns))
  ]
  return {
    name: [
      (cell_text(rows[name].get(c)), mean is not None and mean == top) for c, mean, top in zip(columns, means, best)
    ]
    for name, means in shown.items()
  }


def _mean(value: Value) -> float | None:
  mean = value[0] if isinstance(value, tuple) else value
  return None if mean is None or math.isnan(mean) else round(float(mean), 1)


def cell_text(value: Value) -> str:
  """Returns a value as the table shows it: "97.8", "64.4 ± 7.0", or "-" where there is none."""
  mean = _mean(value)
  if mean is None:
    return "-"
  return f"{mean:.1f} ± {value[1]:.1f}" if isinstance(value, tuple) else f"{mean:.1f}"
