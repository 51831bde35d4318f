"""A config with some settings changed, several ways, trained by the one loop and evaluated: the rows of an ablation.

Every variant and seed is an ordinary run in a folder of its own, so that a killed study goes on where it was, and every
run can be looked at (views.png, metrics.jsonl) and evaluated again.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jepa_jax.config import Config, build_config, load_config, to_dict
from jepa_jax.evaluate import evaluate
from jepa_jax.files import write_whole
from jepa_jax.study.sweep import write_table
from jepa_jax.telemetry import read_metrics
from jepa_jax.train import TrainingDiverged, train

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Variant:
  """Settings by their dotted names that differ from the config's, under a name for the table."""

  name: str
  overrides: tuple[tuple[str, str], ...] = ()

  @property
  def folder(self) -> str:
    return re.sub(r"[^a-zA-Z0-9.]+", "_", self.name).strip("_")


@dataclasses.dataclass(frozen=True)
class Result:
  """One run; accuracies in %, NaN where training diverged.

  `linear_val` is that of the linear probe on the held-out fifth of the training images: what settings are chosen by.
  """

  variant: str
  seed: int
  steps: int
  linear_val: float
  linear_test: float
  knn_test: float
  rankme: float
  feature_std: float
  seconds: float


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


def run_variants(runs: Mapping[tuple[Variant, int], Config], workdir: Path) -> list[Result]:
  """Trains and evaluates what workdir has no result of, and returns all results in the order of `runs`.

  A run that diverged is a result, too. A folder that holds a run with other settings is refused by `train`.
  """
  results = []
  for i, ((variant, seed), cfg) in enumerate(runs.items()):
    folder = workdir / f"{variant.folder}-seed{seed}"
    result = _finished(folder, cfg)
    if result is None:
      result = _run(variant, seed, cfg, folder)
      write_whole(folder / RESULT, json.dumps({"result": dataclasses.asdict(result), "config": to_dict(cfg)}, indent=2))
      print(
        f"[{i + 1}/{len(runs)}] {variant.name}, seed {seed}: linear (validation) {result.linear_val:.1f}, "
        f"RankMe {result.rankme:.1f}, {result.seconds:.0f} s",
        file=sys.stderr,
        flush=True,
      )
    results.append(result)
  return results


def _finished(folder: Path, cfg: Config) -> Result | None:
  if not (folder / RESULT).exists():
    return None
  saved = json.loads((folder / RESULT).read_text())
  if build_config(saved["config"]) != cfg:
    raise ValueError(f"{folder} holds the result of other settings; choose another --workdir")
  return Result(**saved["result"])


def _run(variant: Variant, seed: int, cfg: Config, folder: Path) -> Result:
  start_s, scores = time.perf_counter(), {}
  try:
    train(cfg, folder)
    rows = evaluate(folder, overrides={"evals.evals": "('knn', 'linear')"}, baselines=False, cache=False, show=False)
    details = json.loads(max((folder / "evals").glob("*.json")).read_text())["details"]
    scores = next(iter(rows.values())) | {"validation": next(iter(details.values()))["linear"]["selected"]["accuracy"]}
  except TrainingDiverged as error:
    print(f"{variant.name}, seed {seed}: {error}", file=sys.stderr)
  metrics = read_metrics(folder)
  newest = lambda name: next((r[name] for r in reversed(metrics) if name in r), float("nan"))
  return Result(
    variant=variant.name,
    seed=seed,
    steps=metrics[-1]["step"] if metrics else 0,
    linear_val=scores.get("validation", float("nan")),
    linear_test=scores.get("linear", float("nan")),
    knn_test=scores.get("knn", float("nan")),
    rankme=newest("rankme"),
    feature_std=newest("feature_std"),
    seconds=round(time.perf_counter() - start_s, 1),
  )


def write_results(folder: Path, name: str, results: Sequence[Result]) -> str:
  """Writes <name>.csv, a line per run, and <name>.md, the `table`, which it returns."""
  write_table(folder / f"{name}.csv", [dataclasses.asdict(r) for r in results])
  text = table(results)
  (folder / f"{name}.md").write_text(text + "\n")
  return text


def table(results: Sequence[Result]) -> str:
  """Returns a Markdown table, a row per variant: mean over seeds, and half the range where there are several."""
  names = list(dict.fromkeys(r.variant for r in results))
  columns = {"linear_val": "linear, validation", "linear_test": "linear", "knn_test": "kNN", "rankme": "RankMe"}
  columns |= {"feature_std": "feature std"}
  lines = [f"| variant | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
  for name in names:
    cells = [name]
    for column in columns:
      values = np.array([getattr(r, column) for r in results if r.variant == name])
      digits = 3 if column == "feature_std" else 1
      spread = f" ± {np.ptp(values) / 2:.{digits}f}" if len(values) > 1 else ""
      cells.append(f"{values.mean():.{digits}f}{spread}")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)
