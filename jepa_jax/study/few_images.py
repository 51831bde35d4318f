"""How few images of one's own beat a general frozen encoder? LeJEPA from scratch on them, beside other ways.

The paper (arXiv 2511.08544) claims that pre-training on a thousand images of one's own domain beats probing a general
encoder. Four ways, the same images, steps and probes: from scratch, the general encoder frozen, LeJEPA going on from
it, and labels from scratch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jepa_jax.config import Config, load_config, to_dict
from jepa_jax.data import open_images
from jepa_jax.evaluate import evaluate
from jepa_jax.runs import open_run
from jepa_jax.study import figures, trials
from jepa_jax.study.tables import Result, markdown, numbers, with_spread, words, write_table
from jepa_jax.study.variants import Variant, as_overrides, configs, run_variants
from jepa_jax.workdir import read_json, write_json

DESCRIPTION = "LeJEPA from scratch on few images, beside a general encoder: frozen, continued; and labels. Resumable."
SCRATCH, FROZEN, CONTINUED, LABELS = ARMS = ("scratch", "frozen", "continued", "supervised")
SIZES = (250, 500, 1000, 2000, 5000)
_OF_NETWORKS = ("mean", "std", "channels")  # of the data's settings: what a network has seen
SCORES = {"linear": "linear", "knn": "kNN"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a LeJEPA config of the own images")
  parser.add_argument("--workdir", required=True, help="a folder per run, table and figure; finished runs are kept")
  parser.add_argument("--general", default="", metavar="WORKDIR", help="the run of the general encoder")
  parser.add_argument("--images", type=numbers, default=list(SIZES), metavar="N,..", help="default: 250 to 5000")
  parser.add_argument("--arms", type=words, default=ARMS, help=f"default: {','.join(ARMS)}")
  parser.add_argument("--seeds", type=numbers, default=[0, 1], metavar="S,..", help="one run per seed (default: 0,1)")
  parser.add_argument("--dry-run", action="store_true", help="print the cells and what they will take; train nothing")


def run(
  config: str,
  workdir: str,
  general: str = "",
  images: Sequence[int] = SIZES,
  arms: Sequence[str] = ARMS,
  seeds: Sequence[int] = (0, 1),
  dry_run: bool = False,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns the table, for JSON; writes few_images.csv, few_images.md and few_images.png.

  A seed draws the images, too: with one seed, fewer are contained in more.
  """
  overrides, base = dict(overrides or {}), trials.load_lejepa(config, overrides)
  if unknown := [arm for arm in arms if arm not in ARMS]:
    raise ValueError(f"--arms: {', '.join(unknown)} is none of {', '.join(ARMS)}")
  if need := [arm for arm in (FROZEN, CONTINUED) if arm in arms and not general]:
    raise ValueError(f"--general is empty, and {', '.join(need)} starts from it: give a workdir, or other --arms")
  if min(images, default=0) < base.batch_size:
    raise ValueError(f"--images={','.join(map(str, images))}: give at least one batch, {base.batch_size} images")
  if base.total.unit == "ep":
    raise ValueError(f'config.total="{base.total}" gives few images few steps; give steps: --config.total=1000steps')
  train = open_images(base.data, "train")
  num_classes = trials.labelled(train)
  if general:
    _check_general(open_run(general).cfg, base)
  available = len(open_images(load_config(config, overrides | {"data.max_train": "0"}).data, "train"))
  if max(images) > available:
    raise ValueError(f"--images={','.join(map(str, images))}: there are {available:,} training images")
  runs, folder = {}, Path(workdir).expanduser()
  common, lejepa_own = trials.shared_by_supervised(overrides)
  for num in images:
    for seed in seeds:
      own = common | {"data.max_train": str(num), "data.subset_seed": str(seed)}
      made = [_variant(arm, num, num_classes, general, lejepa_own) for arm in arms if arm != FROZEN]
      runs |= configs(config, made, [seed], own)
  if dry_run:
    return {"forecast": trials.forecast(runs, train)}
  results = []
  if FROZEN in arms:  # first: what does not fit is said before anything is trained
    results += [_frozen(general, config, overrides, num, seed, folder) for num in images for seed in seeds]
  if runs:
    trials.check_cells(runs, train)
  results += run_variants(runs, folder)
  rows = [_row(result) for result in results]
  write_table(folder / "few_images.csv", rows)
  text = _table(rows, images, arms)
  (folder / "few_images.md").write_text(text + "\n")
  figures.draw_few_images(folder / "few_images.png", rows, SCORES)
  return {"workdir": str(folder), "table": text}


render = trials.render


def _variant(arm: str, num: int, num_classes: int, general: str, own: Mapping[str, str]) -> Variant:
  changes = trials.supervised(num_classes) if arm == LABELS else own
  return Variant(f"{arm} {num}", tuple(changes.items()), init_from=general if arm == CONTINUED else "")


def _frozen(general: str, config: str, overrides: Mapping[str, str], num: int, seed: int, folder: Path) -> Result:
  """Returns the probes on features of the general encoder, trained on these images; kept in the study's folder."""
  path, run = folder / f"frozen_{num}-seed{seed}" / "result.json", open_run(general)
  base = to_dict(load_config(config, overrides))
  data = base["data"] | {"max_train": num, "subset_seed": seed}
  probes = {name: base["evals"][name] for name in SCORES}
  wanted = {"general": str(run.workdir.resolve()), "step": run.step, "data": data, "probes": probes}
  if not path.exists():
    values = {"data": {key: value for key, value in data.items() if key not in _OF_NETWORKS}, "evals": probes}
    found = evaluate(
      general, overrides=as_overrides(values), names=tuple(SCORES), baselines=False, cache=False, show=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted | {"scores": found.row})
  saved = read_json(path)
  if {key: saved[key] for key in wanted} != wanted:
    raise ValueError(f"{path.parent} holds the result of another encoder or other images; choose another --workdir")
  return Result(f"{FROZEN} {num}", seed, 0, saved["scores"], 0.0)


def _check_general(general: Config, base: Config) -> None:
  if general.encoder != base.encoder:
    raise ValueError(
      f"the general encoder is {general.encoder}, and --config has {base.encoder}: give the same, so that only where "
      "it was trained differs"
    )
  for name in _OF_NETWORKS:
    if (theirs := getattr(general.data, name)) != (own := getattr(base.data, name)):
      raise ValueError(f"data.{name} of the general encoder is {theirs}, here {own}: set --config.data.{name} to it")


def _row(result: Result) -> dict[str, float | str]:
  arm, num = result.variant.split()
  return {"arm": arm, "images": int(num), "seed": result.seed} | {name: result.score(name) for name in SCORES}


def _table(rows: Sequence[Mapping], images: Sequence[int], arms: Sequence[str]) -> str:
  """Returns a Markdown table: linear / kNN of every way and number of images, the mean over seeds and half the
  range."""
  own = lambda arm, num: [r for r in rows if (r["arm"], r["images"]) == (arm, num)]
  lines = [[f"{num:,}", *(_cell(own(arm, num)) for arm in arms)] for num in images]
  return markdown(["images", *(f"{arm}, linear / kNN" for arm in arms)], lines)


def _cell(rows: Sequence[Mapping]) -> str:
  return " / ".join(with_spread(np.array([row[name] for row in rows])) for name in SCORES)
