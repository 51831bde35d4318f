"""What a workdir says of its run, read from its files alone: nothing is compiled, no images are opened."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

from jepa_jax import checkpoint, goodput
from jepa_jax.config import Config, difference, load_config, to_dict
from jepa_jax.runs import read_config
from jepa_jax.shipped import shipped
from jepa_jax.telemetry import read_metrics
from jepa_jax.workdir import CONFIG, EVALS, METRICS, read_end, read_json


@dataclasses.dataclass(frozen=True)
class Table:
  """An evaluation: {row: {column: value, or (mean, deviation)}} of a step, with what was asked for."""

  step: int
  rows: dict[str, dict[str, Any]]
  num_test: int
  name: str
  seconds: float
  complete: bool

  @property
  def this(self) -> str:
    """The row of the checkpoint; "" where it is not there yet."""
    return next((name for name in self.rows if name.endswith(f", step {self.step}")), "")


@dataclasses.dataclass(frozen=True)
class Facts:
  """A run as its workdir tells it.

  Attributes:
    name: what the report calls it: the workdir's name, or more of its path where two have the same.
    rows: of metrics.jsonl.
    steps: of its checkpoints.
    ended: the step at which it ended, None while it has not.
    seconds: by activity.
    written_by: version and commit of jepa_jax that began it.
    preset: the config that it comes from, "" where none has its name, and the settings that differ from that.
  """

  name: str
  workdir: Path
  cfg: Config
  rows: list[dict[str, float]]
  steps: tuple[int, ...]
  ended: int | None
  seconds: dict[str, float]
  written_by: dict[str, str]
  meta: dict[str, Any]
  tables: tuple[Table, ...]
  preset: str
  changed: tuple[str, ...]

  def last(self, key: str) -> float | None:
    """Returns the newest value of a metric, None where it was never written."""
    return next((row[key] for row in reversed(self.rows) if math.isfinite(row.get(key, math.nan))), None)

  def newest_tables(self) -> list[Table]:
    """Returns the newest evaluation of each kind: of the same columns."""
    return list({tuple(list(table.rows.values())[-1]): table for table in self.tables}.values())


def read_facts(workdir: Path, name: str) -> Facts:
  """Returns what is known of the run in a workdir; ValueError where there is none."""
  if not workdir.is_dir():
    what = "is a file" if workdir.exists() else "does not exist"
    raise ValueError(f"{workdir} {what}; give the workdirs of runs")
  steps = tuple(checkpoint.steps(workdir))
  if not steps and not (workdir / CONFIG).exists():
    raise ValueError(f"{workdir} holds no run: no {CONFIG} and no checkpoints; give the workdirs of runs")
  cfg = read_config(workdir)
  rows = read_metrics(workdir) if (workdir / METRICS).exists() else []
  about: dict[str, Any] = {}
  with contextlib.suppress(FileNotFoundError, ValueError):
    about = read_json(workdir / CONFIG)
  meta: dict[str, Any] = {}
  if steps:
    with contextlib.suppress(Exception):  # a damaged one: `verify` says what is wrong with it
      meta = checkpoint.read_meta(workdir, steps[-1], verify=False)
  preset, changed = _against_preset(cfg)
  return Facts(
    name=name,
    workdir=workdir,
    cfg=cfg,
    rows=rows,
    steps=steps,
    ended=read_end(workdir),
    seconds=goodput.read(workdir),
    written_by=about.get("jepa_jax") or meta.get("jepa_jax") or {},
    meta=meta,
    tables=_tables(workdir),
    preset=preset,
    changed=changed,
  )


def names_of(workdirs: list[Path]) -> list[str]:
  """Returns a short name for each: the last part of its path, and as many before it as tell all of them apart."""
  depth, deepest = 1, max(len(path.parts) for path in workdirs)
  while True:
    names = ["/".join(path.parts[-depth:]) for path in workdirs]
    if len(set(names)) == len(names) or depth >= deepest:
      return names
    depth += 1


def _tables(workdir: Path) -> tuple[Table, ...]:
  found = []
  for path in sorted((workdir / EVALS).glob("*.json")):
    with contextlib.suppress(ValueError, KeyError, TypeError):
      value = read_json(path)
      number = int(value["num_test"])
      if not _is_table(value["rows"]):
        raise ValueError(path)
      found.append(
        Table(
          int(value["step"]), value["rows"], number, path.name, value.get("seconds", 0.0), value.get("complete", True)
        )
      )
  return tuple(sorted(found, key=lambda table: (table.step, table.name)))


def _is_table(rows: Any) -> bool:
  number = lambda x: isinstance(x, int | float) or (isinstance(x, list) and len(x) == 2 and all(map(number, x)))
  row = lambda x: isinstance(x, dict) and bool(x) and all(map(number, x.values()))
  return isinstance(rows, dict) and bool(rows) and all(map(row, rows.values()))


def _against_preset(cfg: Config) -> tuple[str, tuple[str, ...]]:
  """Returns the nearest config of this name among those that come with the project, and what differs from it."""
  found: list[tuple[int, str, tuple[str, ...]]] = []
  for config in shipped():
    if not cfg.name.startswith(config.name) and not config.name.startswith(cfg.name.split(":")[0]):
      continue
    for variant in config.variants or ("",):
      path = f"{config.name}{f':{variant}' if variant else ''}"
      with contextlib.suppress(ValueError):
        preset = load_config(path)
        if preset.name == cfg.name:
          lines = tuple(difference(to_dict(preset), to_dict(cfg), ignore=("data.root", "log", "checkpoint", "mesh")))
          found.append((len(lines), path, lines))
  return min(found, default=(0, "", ()))[1:]
