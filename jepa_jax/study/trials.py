"""What the studies of LeJEPA's claims share: variants of one config, forecast, trained, measured and drawn."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_jax import goodput
from jepa_jax.config import Config, load_config
from jepa_jax.data import ImageSet, open_images
from jepa_jax.experiment import Experiment, make_experiment, timed_step_s
from jepa_jax.sharding import make_mesh
from jepa_jax.study import figures
from jepa_jax.study.tables import COLUMNS, Result, numbers, write_results
from jepa_jax.study.variants import Variant, configs, run_folder, run_variants
from jepa_jax.workdir import read_json, write_json

Measure = Callable[[Path], Mapping[str, float]]
MEASURED = "held_out.json"
_TIMED_STEPS = 5
UNTRAINED = {"total": "1steps", "optim.lr": "1e-12"}  # of a run whose weights are those it begins with


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
  """Adds the arguments that these studies have in common."""
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a LeJEPA config")
  parser.add_argument("--workdir", required=True, help="a folder per run, table and figure; finished runs are kept")
  parser.add_argument("--only", help=f"names joined by '|' (default: all): {' | '.join(names)}".replace("%", "%%"))
  parser.add_argument("--seeds", type=numbers, default=[0, 1], metavar="S,..", help="one run per seed (default: 0,1)")
  parser.add_argument("--dry-run", action="store_true", help="print the cells and what they will take; train nothing")


def load_lejepa(config: str, overrides: Mapping[str, str] | None) -> Config:
  """Returns the config; a ValueError where it is not one of LeJEPA."""
  base = load_config(config, overrides)
  if base.objective.name != "lejepa":
    raise ValueError(f"--config={config}: the claims are LeJEPA's; give one of configs/lejepa_*.py")
  return base


def labelled(images: ImageSet) -> int:
  """Returns the number of classes; a ValueError where images have no labels: accuracy is what is measured."""
  if not images.num_classes:
    raise ValueError("the training images have no labels, and accuracy is what this study measures; give others")
  return images.num_classes


def run_trials(
  name: str,
  config: str,
  workdir: str,
  variants: Sequence[Variant],
  seeds: Sequence[int],
  overrides: Mapping[str, str] | None,
  dry_run: bool,
  columns: Mapping[str, str],
  measure: Measure | None = None,
) -> dict:
  """Returns {"workdir", "table", "results": Results}, or {"forecast"} for a dry run; writes <name>.csv, .md and .png.

  `measure` is asked of every finished run, once; `columns` {score: title} stand in the table beside the accuracies.
  """
  folder, runs = Path(workdir).expanduser(), configs(config, variants, seeds, dict(overrides or {}))
  images = open_images(next(iter(runs.values())).data, "train")
  labelled(images)
  if dry_run:
    return {"forecast": forecast(runs, images)}
  check_cells(runs, images)
  results = [
    dataclasses.replace(result, scores=result.scores | measured(run_folder(folder, variant, seed), result, measure))
    for (variant, seed), result in zip(runs, run_variants(runs, folder), strict=True)
  ]
  columns = COLUMNS | dict(columns) | {"step_ms": "ms per step"}
  text = write_results(folder, name, results, columns)
  figures.draw_trials(folder / f"{name}.png", results, {k: v for k, v in columns.items() if k not in _NOT_DRAWN})
  return {"workdir": str(folder), "table": text, "results": results}


def supervised(num_classes: int) -> dict[str, str]:
  """Returns the overrides that turn a LeJEPA config into supervised training of the same encoder on the same views."""
  return {
    "objective.name": "supervised",
    "objective.projector.hidden": "()",
    "objective.projector.out": str(num_classes),
  }


def shared_by_supervised(overrides: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, str]]:
  """Returns the overrides that a supervised twin takes too, and those that are LeJEPA's own."""
  is_shared = lambda key: not key.startswith("objective.") or key.startswith("objective.views.")
  overrides = dict(overrides or {})
  return {k: v for k, v in overrides.items() if is_shared(k)}, {k: v for k, v in overrides.items() if not is_shared(k)}


def check_cells(runs: Mapping[tuple[Variant, int], Config], images: ImageSet) -> None:
  """Raises the ValueError of `experiments`."""
  for _ in experiments(runs, images):
    pass


def experiments(runs: Mapping[tuple[Variant, int], Config], images: ImageSet) -> Iterator[tuple[Variant, Experiment]]:
  """Yields every variant once with its experiment on these images; a ValueError names one that cannot be built."""
  seen = set()
  for (variant, _), cfg in runs.items():
    if variant not in seen:
      seen.add(variant)
      num = min(cfg.data.max_train, len(images)) or len(images)
      try:
        yield variant, make_experiment(cfg, make_mesh(cfg.mesh), num, images.num_classes)
      except ValueError as error:
        raise ValueError(f"variant {variant.name!r}: {error}; leave it out with --only") from None


_NOT_DRAWN = ("feature_std", "rankme", "linear_val")


def render(result: Mapping) -> str:
  """Returns the text that the command prints."""
  if "forecast" in result:
    return result["forecast"]
  return f"{result['table']}\nRuns, table and figure: {result['workdir']}"


def forecast(runs: Mapping[tuple[Variant, int], Config], images: ImageSet) -> str:
  """Returns the cells and what training them will take here: a step of every network is timed, and other cells with it
  go by their FLOPs."""
  if not runs:
    return "0 cells: nothing is trained"
  cost: dict[Variant, tuple[int, float]] = {}  # steps, seconds of one
  timed: dict[Any, tuple[float, int]] = {}  # encoder -> seconds and FLOPs of a step
  for variant, experiment in experiments(runs, images):
    flops, encoder = max(experiment.matrix_flops(), 1), experiment.cfg.encoder
    if encoder not in timed:
      timed[encoder] = timed_step_s(experiment, experiment.compile(), _TIMED_STEPS)[0], flops
    step_s, first = timed[encoder]
    cost[variant] = experiment.total_steps, step_s * flops / first
  lines, total_s = [], 0.0
  for variant, seed in runs:
    steps, step_s = cost[variant]
    total_s += steps * step_s
    lines.append(f"{variant.name}, seed {seed}: {steps} steps, about {steps * step_s / 60:.1f} min")
  said = f"{len(runs)} cells, about {total_s / 3600:.1f} h of training on this machine"
  several = f"a step of each of {len(timed)} networks was timed" if len(timed) > 1 else "one step was timed"
  return "\n".join([*lines, f"{said} ({several}; compiling and evaluation come on top)"])


def measured(folder: Path, result: Result, measure: Measure | None) -> dict[str, float]:
  """Returns what `measure` says of a run, kept beside it, and its time per step; nothing of a run that diverged."""
  if "linear" not in result.scores:
    return {}
  step_ms = {"step_ms": round(1e3 * goodput.read(folder).get("step", 0.0) / max(result.steps, 1), 1)}
  if measure is None:
    return step_ms
  path = folder / MEASURED
  if not path.exists():
    write_json(path, dict(measure(folder)))
  return read_json(path) | step_ms
