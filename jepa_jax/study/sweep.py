"""MMCR trained at every P x D x K: each cell is a run of the one loop, a line of a table when finished. Resumable.

Legend: P global batch, D embedding width, K views; PPE is the pretraining percent error (arXiv 2406.09366).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.config import RESUMABLE, Config, build_config, difference, to_dict
from jepa_jax.data import ImageSet, open_images, put_batch, train_batches
from jepa_jax.experiment import make_experiment
from jepa_jax.sharding import batch_sharding, check_batch, make_mesh
from jepa_jax.step import TrainState, numbers
from jepa_jax.streams import stream
from jepa_jax.study.cells import TAIL, Cell, Row, append_row, read_mended_rows, read_rows, write_curve
from jepa_jax.telemetry import read_metrics
from jepa_jax.train import TrainingDiverged, train
from jepa_jax.workdir import read_json, write_json

HELD_OUT_IMAGES = 1024  # at least, and at least 4 batches
MEASURED = ("percent_error", "alignment", "flatness")
OF_TRAINING = (*MEASURED, "probe_accuracy")
SETTINGS, FOLDERS = "sweep.json", "runs"
# Every step's PPE is read; of a short run only the end is worth a checkpoint, and no other record is.
_LOG, _CHECKPOINT = {"every": "1steps", "tensorboard": False}, {"every": "100%"}


def run_sweep(base: Config, workdir: Path, cells: Sequence[Cell]) -> list[Row]:
  """Trains the cells that workdir has no row for and returns the rows of all, in the order of `cells`.

  What a kill interrupts is one run. Written: sweep.json (the settings that all runs share), runs/<run>/ (the workdir of
  each), runs.csv (a line per finished run), curves/<run>.csv (the PPE of every step).

  Raises:
    ValueError: base is not MMCR, workdir holds a sweep with other settings (the message shows the difference), or a
      cell does not fit the images, the mesh or the networks; all before anything is trained.
  """
  if base.objective.name != "mmcr":
    raise ValueError(f'config.objective.name is "{base.objective.name}": a sweep over P, D and K needs "mmcr"')
  configs = {cell: _config(base, cell) for cell in cells}
  todo = [cell for cell in cells if cell not in (done := {row.cell for row in read_mended_rows(workdir)})]
  images, held = open_images(base.data, "train"), open_images(base.data, "test")
  smallest = min(len(images), len(held))
  if todo and max(cell.batch for cell in todo) > smallest:
    raise ValueError(f"--batch: P can be at most {smallest} with {len(images)} training and {len(held)} test images")
  for cell in todo:
    check_batch(cell.batch, make_mesh(base.mesh), base.microbatch)
  _check_settings(workdir, base)
  start_s, spent_views = time.perf_counter(), 0
  for i, cell in enumerate(todo):
    row, curve = train_cell(configs[cell], cell, workdir / FOLDERS / cell.name, images, held)
    write_curve(workdir, cell, curve)
    append_row(workdir, row)
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


def train_cell(cfg: Config, cell: Cell, folder: Path, images: ImageSet, held: ImageSet) -> tuple[Row, np.ndarray]:
  """Trains one cell in a folder of its own; returns its row and its PPE at every step, float (steps,)."""
  start_s = time.perf_counter()
  steps = cfg.total.steps(len(images) / cfg.batch_size)
  unseen, end = dict.fromkeys(MEASURED, math.nan), dict.fromkeys(OF_TRAINING, math.nan)
  try:
    unseen = held_out(cfg, train(cfg, folder), images, held)
    own = _read_own(folder)
    end = {name: float(values[-math.ceil(TAIL * steps) :].mean()) for name, values in own.items()}
  except TrainingDiverged as error:
    print(f"{cell.name}: {error}", file=sys.stderr)
    own = _read_own(folder)
  row = Row(
    batch=cell.batch,
    dim=cell.dim,
    views=cell.views,
    seed=cell.seed,
    steps=steps,
    images=steps * cell.batch,
    flops=steps * step_flops(cfg, len(images)),
    train_ppe=end["percent_error"],
    train_alignment=end["alignment"],
    train_flatness=end["flatness"],
    held_ppe=unseen["percent_error"],
    held_alignment=unseen["alignment"],
    held_flatness=unseen["flatness"],
    probe_accuracy=end["probe_accuracy"],
    seconds=round(time.perf_counter() - start_s, 1),
  )
  return row, own["percent_error"]


def _read_own(folder: Path) -> dict[str, np.ndarray]:
  """Returns what the run's own batches gave, step by step; NaN where it was not measured."""
  lines = read_metrics(folder)
  return {name: np.array([line.get(name, math.nan) for line in lines]) for name in OF_TRAINING}


def held_out(cfg: Config, state: TrainState, images: ImageSet, held: ImageSet) -> dict[str, float]:
  """Returns the mean of each of MEASURED over held-out batches of P.

  They are read from the train step itself, given a copy of the final state: the same views, networks and statistics of
  the batch as in training, measured before the update, which is thrown away. The program is that of the run, so the
  compilation cache has it; a forward pass alone would be a program more to compile, 60 % as long as the step's.
  """
  run = make_experiment(cfg, make_mesh(cfg.mesh), len(images), images.num_classes)
  compiled, batches, scores = run.compile(), train_batches(held, cfg.batch_size, cfg.seed), []
  for i in range(max(4, HELD_OUT_IMAGES // cfg.batch_size)):
    key = jax.random.fold_in(stream(run.key, "held out"), i)  # views that no other batch had
    batch = put_batch(next(batches), batch_sharding(run.mesh))
    _, metrics = compiled(jax.tree.map(jnp.copy, state), batch, key)
    scores.append([numbers(metrics)[name] for name in MEASURED])
  batches.close()
  return dict(zip(MEASURED, np.mean(scores, axis=0).tolist()))


def step_flops(cfg: Config, num_train: int) -> int:
  """Returns the matrix FLOPs of one step: views, networks, optimiser.

  The nuclear norm is counted as its decomposition, which holds few products. The same on every platform: by products
  alone (12 polynomials) it would be as much as a network of this size, which is no part of what the laws are about.
  """
  cfg = dataclasses.replace(cfg, objective=dataclasses.replace(cfg.objective, nuclear="svd"))
  return make_experiment(cfg, make_mesh(cfg.mesh), num_train, 2).matrix_flops()


def _config(base: Config, cell: Cell) -> Config:
  values = to_dict(base)
  values |= {"batch_size": cell.batch, "seed": cell.seed}
  values |= {"log": values["log"] | _LOG, "checkpoint": values["checkpoint"] | _CHECKPOINT}
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
  if path.exists() and (lines := difference(read_json(path), values, free)):
    shown = "\n  ".join(lines)
    raise ValueError(
      f"{workdir} holds a sweep with other settings. Nothing was changed.\n  {shown}\nChoose another --workdir"
    )
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(path, values)
