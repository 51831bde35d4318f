"""Evaluation from a checkpoint: every row by every protocol, written as it comes."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jepa_jax import distributed
from jepa_jax.config import Config, build_config, to_dict
from jepa_jax.data import ImageSet, open_images
from jepa_jax.evals import PROTOCOLS, Data, Protocol, Result, Subject, only_asked, print_table
from jepa_jax.evals.features import digest
from jepa_jax.runs import open_run
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.subjects import seen_of, subjects
from jepa_jax.workdir import EVALS, code_digest, read_json, write_json, written_by

log = logging.getLogger(__name__)
Rows = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What was found: {row: {column: percent or (mean, deviation)}}, what there is to say of it, where it was written."""

  rows: Rows
  details: Rows
  path: Path
  this: str  # the row of the checkpoint; the others are baselines

  @property
  def row(self) -> dict[str, Any]:
    """The row of the checkpoint."""
    return self.rows.get(self.this, {})


def evaluate(
  where: str | Path,
  step: int | None = None,
  overrides: Mapping[str, str] | None = None,
  names: tuple[str, ...] | None = None,
  baselines: bool = True,
  cache: bool = True,
  again: bool = False,
  show: bool = True,
  images: Callable[..., ImageSet] = open_images,
) -> Evaluation:
  """Returns the table of a checkpoint; it goes to the screen (with `show`) and to <workdir>/evals/<step>.json.

  Every finished protocol of a row is kept in <workdir>/evals/rows, so that an evaluation that was killed goes on and
  baselines, which no checkpoint changes, are computed once; `again` computes all anew, features too. These lie in
  <workdir>/features, those of the checkpoint after the end with `cache` only. With several processes all make
  features, process 0 does the rest.

  Args:
    where, step: a workdir (its newest checkpoint, or `step`) or one checkpoint folder.
    overrides: change `data` and `evals` of the checkpoint's config: other images, or the same ones in another place.
    names: the protocols to run; default: the config's.
    images: opens a split of the data (settings, split, and the run's tokenizer where there are captions).
  """
  began, run = time.monotonic(), open_run(where, step)
  cfg = eval_config(run.cfg, overrides, names)
  distributed.check_shared(run.workdir)
  mesh = make_mesh(MeshConfig(), jax.local_devices())
  tokenizer = run.tokenizer
  own = (tokenizer,) if cfg.data.captions.train else ()
  train, test = images(cfg.data, "train", *own), images(cfg.data, "test", *own)
  test.number_as(train.class_names)
  distributed.check_same("checkpoint, data or code", f"step {run.step}, {_state_of(train, test)}")
  experiment = run.experiment(mesh)
  data = seen_of(cfg, experiment.objective, train, test, tokenizer)
  _check_data(cfg, data)
  path = result_path(run.workdir, run.step, overrides, names, baselines)
  about = {"step": run.step, "settings": to_dict(cfg.evals), "data": to_dict(cfg.data), "jepa_jax": written_by()}
  about |= {"num_train": len(data.train), "num_test": len(data.test)}
  with subjects(run, cfg, experiment, data, mesh, baselines, cache, again) as rows:
    this, found = rows[-1].row, []
    cells = _cells(rows, cfg)
    _read_now(rows[-1], cfg)
    for i, (row, name, protocol) in enumerate(cells):
      found += _results(run.workdir / EVALS / "rows", row, name, protocol, again)
      table, details = _table(found, this, baselines)
      if distributed.is_primary():
        progress = {"complete": i + 1 == len(cells), "seconds": round(time.monotonic() - began, 1)}
        _write(path, {"rows": table, "details": details} | about | progress)
  if distributed.is_primary():
    if show:
      print_table(table, title=f"{cfg.name}: accuracy in percent, {len(data.test)} held-out images, step {run.step}")
    if path.exists():
      log.info("Written to %s", path)
  return Evaluation(table, details, path, this)


def _state_of(train: ImageSet, test: ImageSet) -> str:
  return f"train {train.fingerprint}, test {test.fingerprint}, code {code_digest()}"


def _cells(rows: list[Subject], cfg: Config) -> list[tuple[Subject, str, Protocol]]:
  """Returns what is to be computed; a ValueError, before anything is compiled, for what cannot be."""
  if not cfg.evals.asked:
    raise ValueError("evals.names is empty: there is nothing to evaluate; give names, or --evals=knn,linear")
  for name, protocol in cfg.evals.asked.items():
    if lacking := sorted(protocol.needs - {"labels"} - rows[-1].gives):
      raise ValueError(f"{name} needs {', '.join(lacking)}, and there is only: {', '.join(sorted(rows[-1].gives))}")
    there = rows[-1].objective.networks()
    if foreign := [network for network in protocol.reads if "features" in protocol.needs and network not in there]:
      raise ValueError(f"{name} reads the network {', '.join(foreign)}, and this method has: {', '.join(there)}")
  cells = [(row, name, p) for row in rows for name, p in cfg.evals.asked.items() if p.applies(row)]
  for row, _, protocol in cells:
    protocol.check(row)
  return cells


def eval_config(cfg: Config, overrides: Mapping[str, str] | None, names: tuple[str, ...] | None) -> Config:
  """Returns the config with what an evaluation may change; a ValueError for what nobody would read."""
  check_overrides(overrides)
  if names is not None and "evals.names" in (overrides or {}):
    raise ValueError("--evals and --config.evals.names both say what to evaluate: leave one of them out")
  values = to_dict(cfg)
  if names is not None:
    values["evals"] = only_asked(values["evals"], names)
  return build_config(values, overrides)


def check_overrides(overrides: Mapping[str, str] | None) -> None:
  """Raises a ValueError where an override changes anything but the data and the protocols."""
  for key in overrides or {}:
    if key.split(".")[0] not in ("data", "evals"):
      raise ValueError(
        f"--config.{key}: evaluation takes its networks from the checkpoint; only data.* and evals.* change"
      )
    if key in ("data.mean", "data.std", "data.channels"):
      raise ValueError(f"--config.{key}: the networks were trained with those of the checkpoint; leave it out")


def result_path(
  workdir: Path, step: int, overrides: Mapping[str, str] | None = None, names: Any = None, baselines: bool = True
) -> Path:
  """Returns where the table goes: what was asked for otherwise in a file of its own, lest it replace the full one."""
  asked = {**(overrides or {}), **({"names": list(names)} if names is not None else {})}
  asked |= {} if baselines else {"baselines": False}
  return workdir / EVALS / f"{step}{f'-{digest(asked)}' if asked else ''}.json"


def _check_data(cfg: Config, data: Data) -> None:
  """Raises a ValueError where there are no labels to evaluate with; warns of what makes a table misleading."""
  if data.num_classes < 2 and any("labels" in protocol.needs for protocol in cfg.evals.asked.values()):
    free = [name for name, protocol in PROTOCOLS.items() if protocol.needs == {"features"}]
    raise ValueError(
      f"the images of data.source={cfg.data.source!r} have no labels to evaluate with: a folder needs one folder "
      "per class below data.train, TFDS data.label_key, a file the names of its classes. What needs none: "
      f"--evals={','.join(free)}"
    )
  if data.train.fingerprint == data.test.fingerprint:
    log.warning("The test images are the training images: accuracies will be of what was learned by heart")
  needed = min(data.view_hw) / data.crop_fraction
  if needed > cfg.data.canvas_px and not cfg.data.is_small:
    log.warning(
      "The evaluation view enlarges what it shows: %d px at crop_fraction %g need data.canvas_px=%d, not %d",
      min(data.view_hw),
      data.crop_fraction,
      math.ceil(needed),
      cfg.data.canvas_px,
    )


def _read_now(row: Subject, cfg: Config) -> None:
  """Reads the checkpoint before anything is computed: the run that writes it may remove it meanwhile."""
  row.about()
  if any("networks" in protocol.needs for protocol in cfg.evals.asked.values()):
    row.networks()


def _results(folder: Path, row: Subject, name: str, protocol: Protocol, again: bool) -> list[Result]:
  """Returns the cells of one row by one protocol: kept ones, unless asked for again, or new ones, which are kept.

  A process other than the first makes its part of the features and returns nothing.
  """
  shared = {group: to_dict(getattr(row.settings, group)) for group in protocol.shares}
  precision = row.settings.memory_gb if row.settings.precision == "auto" else row.settings.precision
  depends = [row.about(), name, to_dict(protocol), shared, row.settings.seed, precision, code_digest(type(protocol))]
  path = folder / f"{name}-{digest(depends)}.json"
  kept = None if again or not distributed.is_primary() else _kept(path)
  if distributed.from_primary("kept", lambda: "" if kept is None else "kept", timeout_s=24 * 3600):
    return kept or []
  if not distributed.is_primary():
    protocol.prepare(row)
    return []
  log.info("%s: %s", row.row, name)
  found = list(protocol.run(row))
  _write(path, [result._asdict() for result in found])
  return found


def _write(path: Path, value: Any) -> None:
  """Writes what was found; a disk that is full or may not be written to costs the file, not the evaluation."""
  try:
    write_json(path, value)
  except OSError as error:
    log.error("NOT WRITTEN: %s (%s). The evaluation goes on", path, error)


def _kept(path: Path) -> list[Result] | None:
  try:
    cells = read_json(path, list)
    return [Result(**cell)._replace(value=as_value(cell["value"])) for cell in cells]
  except FileNotFoundError:
    return None
  except (ValueError, TypeError, KeyError) as error:
    log.warning("%s cannot be read (%s); it is made again", path, error)
    return None


def as_value(value: Any) -> Any:
  """Returns a cell as it was before JSON: (mean, deviation) is a tuple."""
  return tuple(value) if isinstance(value, list) else value


def _table(results: list[Result], this: str, baselines: bool) -> tuple[Rows, Rows]:
  """Returns {row: {column: value}} and {row: {column: detail}}, the checkpoint's row last."""
  rows: Rows = {}
  details: Rows = {}
  for result in results:
    if baselines or result.row == this:
      rows.setdefault(result.row, {})[result.column] = result.value
      if result.detail is not None:
        details.setdefault(result.row, {})[result.column] = result.detail
  order = sorted(rows, key=lambda row: row == this)
  return {row: rows[row] for row in order}, {row: details.get(row, {}) for row in order}
