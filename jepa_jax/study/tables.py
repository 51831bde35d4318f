"""What a study's command line lists, and the tables of its results: CSV for programs, Markdown for people."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

COLUMNS = {"linear_val": "linear, validation", "linear": "linear", "knn": "kNN", "rankme": "RankMe"}
COLUMNS |= {"feature_std": "feature std"}


@dataclasses.dataclass(frozen=True)
class Result:
  """One run. `scores`: what `evaluate` says of it, in %, and its last RankMe and feature std; NaN where it diverged.

  `linear_val` is the linear probe's accuracy on the held-out fifth of the training images: settings are chosen by it.
  """

  variant: str
  seed: int
  steps: int
  scores: dict[str, float]
  seconds: float

  def score(self, name: str) -> float:
    return self.scores.get(name, float("nan"))


def numbers(text: str) -> list[int]:
  """Returns the whole numbers of "16,32,64"."""
  return [int(part) for part in text.split(",")]


def reals(text: str) -> list[float]:
  """Returns the numbers of "0.02,3e-4"."""
  return [float(part) for part in text.split(",")]


def words(text: str) -> tuple[str, ...]:
  """Returns the words of "none, feature"."""
  return tuple(word.strip() for word in text.split(","))


def chosen(only: str | None, names: Sequence[str]) -> list[str]:
  """Returns the names that `--only` asks for, all without it; a ValueError for one that is not there."""
  asked = [n.strip() for n in only.split("|")] if only else list(names)
  if unknown := [n for n in asked if n not in names]:
    raise ValueError(f"--only: {', '.join(unknown)} is none of: {' | '.join(names)}")
  return asked


def write_table(path: Path, table: Sequence[Mapping]) -> None:
  """Writes rows of equal keys as CSV."""
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(table[0]))
    writer.writeheader()
    writer.writerows(table)


def write_results(folder: Path, name: str, results: Sequence[Result], columns: Mapping[str, str] | None = None) -> str:
  """Writes <name>.csv, a line per run with all scores, and <name>.md, the `table`, which it returns."""
  names = list(dict.fromkeys(score for r in results for score in r.scores))
  rows = [{**dataclasses.asdict(r), **{n: r.score(n) for n in names}} for r in results]
  write_table(folder / f"{name}.csv", [{k: v for k, v in row.items() if k != "scores"} for row in rows])
  text = table(results, columns or COLUMNS)
  (folder / f"{name}.md").write_text(text + "\n")
  return text


def table(results: Sequence[Result], columns: Mapping[str, str]) -> str:
  """Returns a Markdown table, a row per variant: mean over seeds, and half the range where there are several.

  columns: {score: title}; a score that no run has is left out.
  """
  columns = {score: title for score, title in columns.items() if any(score in r.scores for r in results)}
  rows = []
  for name in dict.fromkeys(r.variant for r in results):
    cells = [name]
    for column in columns:
      values = np.array([r.score(column) for r in results if r.variant == name])
      digits = 3 if column in ("feature_std", "energy") else 1
      cells.append(with_spread(values, digits))
    rows.append(cells)
  return markdown(["variant", *columns.values()], rows)


def with_spread(values: np.ndarray, digits: int = 1) -> str:
  """Returns the mean of the seeds, and half their range where there are several: "48.8 ± 1.5"."""
  spread = f" ± {np.ptp(values) / 2:.{digits}f}" if len(values) > 1 else ""
  return f"{values.mean():.{digits}f}{spread}"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table, without a line end behind its last row."""
  lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
  return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
