"""The cells of an MMCR sweep over P x D x K, and its table: runs.csv, a line per finished run, and curves/.

Legend: P global batch, D embedding width, K views; PPE is the pretraining percent error (arXiv 2406.09366).
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jepa_jax.workdir import write_whole

TAIL = 0.2  # the PPE of a run is the mean over this last share of its steps: one batch is noise of its own
RUNS, CURVES = "runs.csv", "curves"


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
  """One run of a sweep."""

  views: int
  dim: int
  seed: int
  batch: int

  @property
  def name(self) -> str:
    return f"P{self.batch}_D{self.dim}_K{self.views}_seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Row:
  """A finished run. `train_*` are means over the last 20 % of its own batches, `held_*` over held-out batches of P.

  All of these are NaN where the run diverged; steps, images and flops are those that it was given.
  """

  batch: int
  dim: int
  views: int
  seed: int
  steps: int
  images: int
  flops: int
  train_ppe: float
  train_alignment: float
  train_flatness: float
  held_ppe: float
  held_alignment: float
  held_flatness: float
  probe_accuracy: float
  seconds: float

  @property
  def cell(self) -> Cell:
    return Cell(self.views, self.dim, self.seed, self.batch)


def grid(batches: Sequence[int], dims: Sequence[int], views: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
  """Returns every run once, P innermost: runs of one width and seed begin with the same weights."""
  for name, values, least in (("batch", batches, 2), ("dim", dims, 1), ("views", views, 2), ("seeds", seeds, 0)):
    if not values or min(values) < least:
      raise ValueError(f"--{name}={','.join(map(str, values))}: give numbers of at least {least}, such as 16,32,64")
  cells = itertools.product(sorted(set(views)), sorted(set(dims)), sorted(set(seeds)), sorted(set(batches)))
  return [Cell(*cell) for cell in cells]


def read_rows(workdir: Path) -> list[Row]:
  """Returns the finished runs of a sweep's folder; a line that a kill cut short is left out."""
  path = workdir / RUNS
  if not path.exists():
    return []
  whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
  types = {f.name: int if f.type == "int" else float for f in dataclasses.fields(Row)}
  return [Row(**{k: types[k](v) for k, v in line.items()}) for line in csv.DictReader(whole)]


def read_mended_rows(workdir: Path) -> list[Row]:
  """Returns the rows, and takes the line that a kill cut short out of runs.csv, so that the next begins anew."""
  path = workdir / RUNS
  if path.exists() and not (text := path.read_text()).endswith("\n"):
    write_whole(path, text[: text.rfind("\n") + 1])
  return read_rows(workdir)


def append_row(workdir: Path, row: Row) -> None:
  """Adds a finished run to runs.csv."""
  path, values = workdir / RUNS, dataclasses.asdict(row)
  lines = [] if path.exists() and path.stat().st_size else [",".join(values)]
  lines.append(",".join(repr(v) for v in values.values()))
  with path.open("a") as file:  # one write: whole lines, or a last one without its end
    file.write("\n".join(lines) + "\n")
    file.flush()
    os.fsync(file.fileno())


def read_curve(workdir: Path, cell: Cell) -> np.ndarray:
  """Returns the PPE of every step of a finished run, float (steps,)."""
  return np.loadtxt(workdir / CURVES / f"{cell.name}.csv", delimiter=",", skiprows=1, usecols=1, ndmin=1)


def write_curve(workdir: Path, cell: Cell, curve: np.ndarray) -> None:
  """Writes the PPE of every step of a run."""
  (workdir / CURVES).mkdir(exist_ok=True)
  lines = ["step,percent_error"] + [f"{step},{value!r}" for step, value in enumerate(curve.tolist(), 1)]
  write_whole(workdir / CURVES / f"{cell.name}.csv", "\n".join(lines) + "\n")
