"""MMCR trained at every P x D x K: one process, one line of a table per finished run, resumed by running it again.

Legend: P global batch, D embedding width, K views; PPE is the pretraining percent error (arXiv 2406.09366).
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.config import RESUMABLE, Config, build_config, difference, to_dict
from jepa_jax.data import ImageSet, open_images, put_batch, train_batches
from jepa_jax.experiment import Experiment, make_experiment
from jepa_jax.files import write_whole
from jepa_jax.sharding import batch_sharding, make_mesh
from jepa_jax.step import TrainState

TAIL = 0.2  # the PPE of a run is the mean over this last share of its steps: one batch is noise of its own
HELD_OUT_IMAGES = 1024  # at least, and at least 4 batches
MEASURED = ("percent_error", "alignment", "flatness", "probe_accuracy")
RUNS, CURVES, SETTINGS = "runs.csv", "curves", "sweep.json"


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
  """A finished run. `train_*` are means over the last 20 % of its own batches, `held_*` over held-out batches of P."""

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


def run_sweep(base: Config, workdir: Path, cells: Sequence[Cell]) -> list[Row]:
  """Trains the cells that workdir has no row for and returns the rows of all, in the order of `cells`.

  What a kill interrupts is one run, which starts again. Written: sweep.json (the settings that all runs share),
  runs.csv (a line per finished run), curves/<run>.csv (the PPE of every step).

  Raises:
    ValueError: base is not MMCR, workdir holds a sweep with other settings (the message shows the difference), or a
      cell does not fit the images, the mesh or the networks; all before anything is trained.
  """
  if base.objective.name != "mmcr":
    raise ValueError(f'config.objective.name is "{base.objective.name}": a sweep over P, D and K needs "mmcr"')
  configs = {cell: _config(base, cell) for cell in cells}
  todo = [cell for cell in cells if cell not in (done := {row.cell for row in _mended_rows(workdir)})]
  images, held = open_images(base.data, "train"), open_images(base.data, "test")
  smallest = min(len(images), len(held))
  if todo and max(cell.batch for cell in todo) > smallest:
    raise ValueError(f"--batch: P can be at most {smallest} with {len(images)} training and {len(held)} test images")
  _check_settings(workdir, base)
  start_s, spent_views, initial = time.perf_counter(), 0, {}
  for i, cell in enumerate(todo):
    run = make_experiment(configs[cell], make_mesh(base.mesh), len(images), images.num_classes)
    weights = (cell.dim, cell.seed)
    initial = initial if weights in initial else {weights: run.init()}  # compiling init takes as long as a short run
    row, curve = train_cell(run, cell, initial[weights], images, held)
    _write_curve(workdir, cell, curve)
    _append(workdir, row)
    spent_views += _cost(configs[cell], len(images))
    left_s = (time.perf_counter() - start_s) / spent_views * sum(_cost(configs[c], len(images)) for c in todo[i + 1 :])
    print(
      f"[{len(done) + i + 1}/{len(done) + len(todo)}] {cell.name}: PPE {row.train_ppe:.4f}, "
      f"held out {row.held_ppe:.4f}; {row.seconds:.0f} s, about {left_s / 60:.0f} min left",
      file=sys.stderr,
      flush=True,
    )
  rows = {row.cell: row for row in read_rows(workdir)}
  return [rows[cell] for cell in cells]


def train_cell(
  run: Experiment, cell: Cell, initial: TrainState, images: ImageSet, held: ImageSet
) -> tuple[Row, np.ndarray]:
  """Returns the row of one run and its PPE at every step, float (steps,). No checkpoints, nothing is written.

  The held-out PPE is read from the compiled train step itself, given held-out batches and a copy of the final state:
  the same views, networks and batch statistics as in training, measured before the update, which is thrown away.
  """
  start_s = time.perf_counter()
  compiled, sharding = run.compile(), batch_sharding(run.mesh)
  batches = train_batches(images, cell.batch, cell.seed)
  state, values = jax.tree.map(jnp.copy, initial), []
  for _ in range(run.total_steps):
    state, metrics = compiled(state, put_batch(next(batches), sharding), run.key)
    values.append([float(metrics[name]) for name in MEASURED])
  batches.close()
  values, tail = np.array(values), math.ceil(TAIL * run.total_steps)
  train = dict(zip(MEASURED, values[-tail:].mean(0).tolist()))
  unseen, scores = train_batches(held, cell.batch, cell.seed), []
  for i in range(max(4, HELD_OUT_IMAGES // cell.batch)):
    key = jax.random.fold_in(run.key, run.total_steps + 1 + i)  # views that no other batch had
    _, metrics = compiled(jax.tree.map(jnp.copy, state), put_batch(next(unseen), sharding), key)
    scores.append([float(metrics[name]) for name in MEASURED])
  unseen.close()
  test = dict(zip(MEASURED, np.mean(scores, axis=0).tolist()))
  row = Row(
    batch=cell.batch,
    dim=cell.dim,
    views=cell.views,
    seed=cell.seed,
    steps=run.total_steps,
    images=run.total_steps * cell.batch,
    flops=run.total_steps * step_flops(run),
    train_ppe=train["percent_error"],
    train_alignment=train["alignment"],
    train_flatness=train["flatness"],
    held_ppe=test["percent_error"],
    held_alignment=test["alignment"],
    held_flatness=test["flatness"],
    probe_accuracy=train["probe_accuracy"],
    seconds=round(time.perf_counter() - start_s, 1),
  )
  return row, values[:, 0]


def step_flops(run: Experiment) -> int:
  """Returns the matrix FLOPs of one step: views, networks, optimiser.

  The nuclear norm is counted as its decomposition, which holds few products. The same on every platform: by products
  alone (12 polynomials) it would be as much as a network of this size, which is no part of what the laws are about.
  """
  cfg = dataclasses.replace(run.cfg, objective=dataclasses.replace(run.cfg.objective, nuclear="svd"))
  run = make_experiment(cfg, run.mesh, round(run.steps_per_epoch * cfg.batch_size), 2)
  return run.matrix_flops()


def read_rows(workdir: Path) -> list[Row]:
  """Returns the finished runs of a sweep's folder; a line that a kill cut short is left out."""
  path = workdir / RUNS
  if not path.exists():
    return []
  whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
  types = {f.name: int if f.type == "int" else float for f in dataclasses.fields(Row)}
  return [Row(**{k: types[k](v) for k, v in line.items()}) for line in csv.DictReader(whole)]


def read_curve(workdir: Path, cell: Cell) -> np.ndarray:
  """Returns the PPE of every step of a finished run, float (steps,)."""
  return np.loadtxt(workdir / CURVES / f"{cell.name}.csv", delimiter=",", skiprows=1, usecols=1, ndmin=1)


def write_table(path: Path, table: Sequence[Mapping]) -> None:
  """Writes rows of equal keys as CSV."""
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(table[0]))
    writer.writeheader()
    writer.writerows(table)


def _config(base: Config, cell: Cell) -> Config:
  values = to_dict(base)
  values |= {"batch_size": cell.batch, "seed": cell.seed}
  values["objective"]["projector"]["out"] = cell.dim
  values["objective"]["views"]["global_crops"]["num"] = cell.views
  return build_config(values)


def _cost(cfg: Config, num_images: int) -> int:
  """Views of a run, and as many again as compiling takes the time of, roughly: for the time that is left."""
  num_views = cfg.objective.views.num_views
  steps = cfg.total.steps(num_images / cfg.batch_size)
  return num_views * (cfg.batch_size * steps + max(4 * cfg.batch_size, HELD_OUT_IMAGES)) + 40_000


def _check_settings(workdir: Path, base: Config) -> None:
  """Writes what the runs share, less what the grid sets; refuses a workdir with something else."""
  path, values = workdir / SETTINGS, to_dict(_config(base, Cell(dim=1, views=2, seed=0, batch=2)))
  free = tuple(name for name in RESUMABLE if name != "data.test")  # the held-out images are part of what is measured
  if path.exists() and (lines := difference(json.loads(path.read_text()), values, free)):
    shown = "\n  ".join(lines)
    raise ValueError(
      f"{workdir} holds a sweep with other settings. Nothing was changed.\n  {shown}\nChoose another --workdir"
    )
  workdir.mkdir(parents=True, exist_ok=True)
  write_whole(path, json.dumps(values, indent=2) + "\n")


def _mended_rows(workdir: Path) -> list[Row]:
  """Returns the rows, and takes the line that a kill cut short out of runs.csv, so that the next begins anew."""
  path = workdir / RUNS
  if path.exists() and not (text := path.read_text()).endswith("\n"):
    write_whole(path, text[: text.rfind("\n") + 1])
  return read_rows(workdir)


def _append(workdir: Path, row: Row) -> None:
  path, values = workdir / RUNS, dataclasses.asdict(row)
  lines = [] if path.exists() and path.stat().st_size else [",".join(values)]
  lines.append(",".join(repr(v) for v in values.values()))
  with path.open("a") as file:  # one write: whole lines, or a last one without its end
    file.write("\n".join(lines) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _write_curve(workdir: Path, cell: Cell, curve: np.ndarray) -> None:
  (workdir / CURVES).mkdir(exist_ok=True)
  lines = ["step,percent_error"] + [f"{step},{value!r}" for step, value in enumerate(curve.tolist(), 1)]
  write_whole(workdir / CURVES / f"{cell.name}.csv", "\n".join(lines) + "\n")
