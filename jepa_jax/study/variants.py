"""A config with some settings changed, several ways, trained by the one loop and evaluated: the rows of an ablation.

Every variant and seed is an ordinary run in a folder of its own, so that a killed study goes on where it was, and every
run can be looked at (views.png, metrics.jsonl) and evaluated again.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_jax.config import RESUMABLE, Config, build_config, difference, flat, load_config, to_dict
from jepa_jax.evals import only_asked
from jepa_jax.evaluate import evaluate
from jepa_jax.runs import find_checkpoint
from jepa_jax.study.tables import COLUMNS, Result
from jepa_jax.telemetry import read_metrics
from jepa_jax.train import Start, TrainingDiverged, train
from jepa_jax.workdir import read_json, write_json

RESULT = "result.json"
# What may differ between a result that lies there and what is asked for: nothing of what is measured.
_FREE = tuple(name for name in RESUMABLE if name not in ("evals", "data.test", "data.captions.test", "data.label_maps"))


@dataclasses.dataclass(frozen=True)
class Variant:
  """Settings by their dotted names that differ from the config's, under a name for the table.

  init_from: the workdir of a run that it starts from; init_what: which of its networks, as for `train.Start`.
  """

  name: str
  overrides: tuple[tuple[str, str], ...] = ()
  init_from: str = ""
  init_what: str = "encoder"

  @property
  def folder(self) -> str:
    return re.sub(r"[^a-zA-Z0-9.]+", "_", self.name).strip("_")


def configs(path: str, variants: Sequence[Variant], seeds: Sequence[int], overrides: Mapping[str, str]) -> dict:
  """Returns {(variant, seed): Config}; a ValueError names the variant that cannot be built. Nothing is trained yet."""
  load_config(path, overrides)  # what is wrong with the config itself is no variant's fault
  names = [v.folder for v in variants]
  if len(set(names)) < len(names):
    raise ValueError(f"variants must differ in their names: {', '.join(v.name for v in variants)}")
  built = {}
  for variant in variants:
    for seed in seeds:
      try:
        built[variant, seed] = load_config(path, {**overrides, **dict(variant.overrides), "seed": str(seed)})
      except ValueError as error:
        raise ValueError(f"variant {variant.name!r}: {error}") from None
  return built


def run_folder(workdir: Path, variant: Variant, seed: int) -> Path:
  """Returns the folder of one run of a study."""
  return workdir / f"{variant.folder}-seed{seed}"


def run_variants(
  runs: Mapping[tuple[Variant, int], Config],
  workdir: Path,
  evals: Sequence[str] = ("knn", "linear"),
  on: Mapping[str, str] | None = None,
  kept_in: str = RESULT,
) -> list[Result]:
  """Trains and evaluates what workdir has no result of, and returns all results in the order of `runs`.

  A run that diverged is a result, too. ValueError for a folder that holds a run, or a result, of other settings. `on`:
  other data to evaluate with, such as {"data.test": ...}; the results of each have a file of their own, `kept_in`.
  """
  results = []
  for i, ((variant, seed), cfg) in enumerate(runs.items()):
    folder = run_folder(workdir, variant, seed)
    origin = _origin(variant, workdir) | ({"on": dict(on)} if on else {})
    result = _finished(folder / kept_in, cfg, evals, origin)
    if result is None:
      result = _run(variant, seed, cfg, folder, evals, on)
      write_json(folder / kept_in, {"result": dataclasses.asdict(result), "config": to_dict(cfg)} | origin)
      told = "linear_val" if "linear_val" in result.scores else next(iter(result.scores))
      print(
        f"[{i + 1}/{len(runs)}] {variant.name}, seed {seed}: {COLUMNS.get(told, told)} {result.score(told):.1f}, "
        f"RankMe {result.score('rankme'):.1f}, {result.seconds:.0f} s",
        file=sys.stderr,
        flush=True,
      )
    results.append(result)
  return results


def _origin(variant: Variant, study: Path) -> dict[str, str]:
  """Returns which checkpoint a run starts from, to be kept with its result; one of the study's own by its name."""
  if not variant.init_from:
    return {}
  workdir, step = find_checkpoint(variant.init_from)
  where, study = workdir.resolve(), study.resolve()
  what = {} if variant.init_what == "encoder" else {"init_what": variant.init_what}
  return {"init_from": f"{where.name if where.parent == study else where}, step {step}"} | what


def _asked(cfg: Config, evals: Sequence[str]) -> dict[str, Any]:
  """Returns what of the config's settings these protocols read."""
  return only_asked(to_dict(cfg.evals), tuple(evals))


def as_overrides(values: Mapping[str, Any]) -> dict[str, str]:
  """Returns nested plain settings as {dotted name: text}."""
  return {key: value if isinstance(value, str) else repr(value) for key, value in flat(values).items()}


def _finished(path: Path, cfg: Config, evals: Sequence[str], origin: Mapping[str, Any]) -> Result | None:
  if not path.exists():
    return None
  saved = read_json(path)
  told = lambda cfg, origin: to_dict(cfg) | {"evals": _asked(cfg, evals)} | {key: origin.get(key) for key in _ORIGIN}
  if lines := difference(told(build_config(saved["config"]), saved), told(cfg, origin), _FREE):
    shown = "\n  ".join(lines)
    raise ValueError(
      f"{path} is of other settings:\n  {shown}\nWhere these are evals or on, move the file away, and it is measured "
      "anew; else choose another --workdir"
    )
  return Result(**saved["result"])


_ORIGIN = ("init_from", "init_what", "on")


def _run(
  variant: Variant, seed: int, cfg: Config, folder: Path, evals: Sequence[str], on: Mapping[str, str] | None
) -> Result:
  start_s, scores = time.perf_counter(), {}
  try:
    train(cfg, folder, Start(init_from=variant.init_from, init_what=variant.init_what))
    # The config's own, too: the run may have been trained, and evaluated, with others.
    own = as_overrides({"evals": {k: v for k, v in _asked(cfg, evals).items() if k != "names"}})
    found = evaluate(folder, None, own | dict(on or {}), tuple(evals), baselines=False, cache=False, show=False)
    linear = found.details[found.this].get("linear")
    scores = found.row | ({"linear_val": linear["selected"]["accuracy"]} if linear else {})
  except TrainingDiverged as error:
    print(f"{variant.name}, seed {seed}: {error}", file=sys.stderr)
  metrics = read_metrics(folder)
  newest = lambda name: next((r[name] for r in reversed(metrics) if name in r), float("nan"))
  return Result(
    variant=variant.name,
    seed=seed,
    steps=metrics[-1]["step"] if metrics else 0,
    scores=scores | {name: newest(name) for name in ("rankme", "feature_std")},
    seconds=round(time.perf_counter() - start_s, 1),
  )
