"""Where do the methods stand? One encoder, the same images and views, equal encoder tokens, each with its own rate.

The question of IWM (arXiv 2403.00504, table 8): from contrastive learning to masked images, features become less
linear, and gain from attention. Every method chooses its learning rate on held-out training images.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa_jax.config import Config, load_config
from jepa_jax.data import open_images
from jepa_jax.evaluate import eval_config
from jepa_jax.objectives import Predicts
from jepa_jax.study import figures, trials
from jepa_jax.study.rates import best_rate, said
from jepa_jax.study.tables import Result, chosen, markdown, numbers, reals, with_spread, words, write_results
from jepa_jax.study.variants import Variant, configs, run_variants
from jepa_jax.views import mask_shape

DESCRIPTION = "LeJEPA, I-JEPA, IWM, MMCR and their neighbours on one encoder, equal tokens, rates chosen. Resumable."
EVALS = ("knn", "linear", "attentive")
FURTHER = ("fine_tuning", "predictor_tuning")  # on the same images
ON_MAPS = "segmentation"
RATES = (1e-3, 3e-3, 1e-2)
RANDOM = "random encoder"
SCORE = "linear_val"
_TEACHERS = {"byol": 2, "mocov3": 2}  # how often the teacher makes the views' tokens again
_VARIED = {"objective.name", "optim.lr", "total", "seed", "evals.names"}


class Cell(NamedTuple):
  """A row of the table: a method at the rate it has chosen, None for the random encoder."""

  method: str
  rate: float | None
  variant: Variant

  def of(self, results: Sequence[Result]) -> list[Result]:
    """Returns the runs of this cell."""
    return [r for r in results if r.variant == self.variant.name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a LeJEPA config with a ViT")
  parser.add_argument("--workdir", required=True, help="a folder per run, table and figure; finished runs are kept")
  parser.add_argument("--only", help="methods joined by '|' (default: all that --dry-run prints)")
  parser.add_argument("--rates", type=reals, default=RATES, metavar="R,..", help="learning rates to try")
  parser.add_argument("--seeds", type=numbers, default=[0, 1], metavar="S,..", help="the first one chooses the rate")
  parser.add_argument(
    "--further",
    type=words,
    action="extend",
    default=[],
    metavar="E,..",
    help=f"columns besides the three, of {', '.join(FURTHER)}; the table has those that are asked for",
  )
  parser.add_argument(
    "--maps",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="images with label maps, for the column of segmentation, such as data.label_maps.set=camvid; repeatable. What "
    "is not given is as in --config: data.max_train and canvas_px, too",
  )
  parser.add_argument("--dry-run", action="store_true", help="print the cells and what they will take; train nothing")


def run(
  config: str,
  workdir: str,
  only: str | None = None,
  rates: Sequence[float] = RATES,
  seeds: Sequence[int] = (0, 1),
  further: Sequence[str] = (),
  maps: Sequence[str] = (),
  dry_run: bool = False,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns {"workdir", "table", "results"}, or {"forecast"}; writes spectrum.csv, .md and .png, and rates.csv.

  Every further column is kept in a file of its own, so that one may be asked for when the rest is there.
  """
  base, given = _checked(config, further, overrides)
  images, on_maps = open_images(base.data, "train"), _label_maps(base, maps)
  settings = methods(base, trials.labelled(images))
  names = chosen(only, list(settings))
  given, own = trials.shared_by_supervised(given)
  settings["LeJEPA"] |= own  # --config.objective.lam and the like are its own
  epochs = {name: _epochs(base, load_config(config, {**given, **settings[name]})) for name in names}
  variant = lambda name, rate: _variant(name, settings[name], epochs[name], rate)
  tried = [variant(name, rate) for name in names for rate in rates]
  first = configs(config, tried, seeds[:1], given)
  if dry_run:
    more = f"and {len(names) * (len(seeds) - 1)} more, of further seeds at the rates that are chosen"
    return {"forecast": f"{trials.forecast(first, images)}\n{more}"}
  predicting = {v.name for v, e in trials.experiments(first, images) if isinstance(e.objective, Predicts)}
  folder, columns = Path(workdir).expanduser(), {name: {} for name in further} | ({ON_MAPS: on_maps} if on_maps else {})

  measured = lambda runs: _measured(runs, folder, columns, predicting)
  cells = [Cell(RANDOM, None, Variant(RANDOM, tuple(trials.UNTRAINED.items())))]
  measured(configs(config, [cells[0].variant], seeds[:1], given))  # what cannot be evaluated fails now, not at the end
  on_first = run_variants(first, folder, ("linear",), kept_in="rate.json")
  write_results(folder, "rates", on_first, {SCORE: "linear, validation"})
  for name in names:
    of = {rate: variant(name, rate) for rate in rates}
    best = best_rate(on_first, {rate: v.name for rate, v in of.items()}, SCORE, name)
    cells.append(Cell(name, best, of[best]))
  final = configs(config, [cell.variant for cell in cells], seeds, given)
  results = measured(final)
  write_results(folder, "spectrum", results)
  text = table(results, cells, {variant: cfg for (variant, _), cfg in final.items()}, rates)
  (folder / "spectrum.md").write_text(text + "\n")
  figures.draw_spectrum(folder / "spectrum.png", {cell.method: cell.of(results) for cell in cells})
  return {"workdir": str(folder), "table": text, "results": results}


render = trials.render


def methods(base: Config, num_classes: int) -> dict[str, dict[str, str]]:
  """Returns {name: settings} of every method, with the projector, crops and colours of this LeJEPA config."""
  out, size_px = base.objective.projector.out, base.encoder.image_size
  plainly = lambda values: {f"objective.{name}": str(value) for name, value in values.items()}
  head = {"projector.hidden": base.objective.projector.hidden, "projector.out": out}
  key = lambda values: plainly(head | values)
  large = {"views.local_crops.num": 0} if base.objective.views.local_crops.num else {}
  two = {"views.global_crops.num": 2} | large
  predicted = {"predictor.hidden": (4 * out,), "predictor.out": out, "ema": (0.99, 1.0)}
  one = {"views.global_crops.num": 1, "views.global_crops.size_px": size_px} | large
  plain = {"views.color.p": 0.0, "views.color.grayscale_p": 0.0}
  plain |= {"views.color.blur_p": (0.0,), "views.color.solarize_p": (0.0,)}
  crops = {"views.global_crops.scale": (0.3, 1.0)}
  width = base.encoder.size.width
  predictor = {"predictor.depth": 2, "predictor.width": width, "predictor.num_heads": base.encoder.size.num_heads}
  masks = {"masks.num_targets": 4}
  patch = base.encoder.patch_size
  local = {"num": 4, "size_px": max(size_px // 2 // patch, 1) * patch, "scale": (0.05, 0.3)}
  iwm = one | crops | predictor | {"predictor.conditioning": "feature", "source_from": "image"}
  jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8, "order": "fixed"}
  strong = jitter | {"grayscale_p": 0.2, "blur_p": (0.2,), "solarize_p": (0.2,)}
  source = lambda values: {f"source.{name}": value for name, value in values.items()}
  color = {f"views.color.{name}": value for name, value in jitter.items()} | {
    k: v for k, v in plain.items() if k != "views.color.p"
  }
  return {
    "MoCo v3": key(
      {"name": "mocov3", "predictor.last_norm": "batch", "projector.last_norm": "batch"} | predicted | two
    ),
    "SimCLR": key({"name": "simclr"} | two),
    "BYOL": key({"name": "byol"} | predicted | two),
    "VICReg": key({"name": "vicreg"}),
    "Barlow Twins": key({"name": "barlow"} | two),
    "MCR2": key({"name": "mcr2"}),
    "MMCR": key({"name": "mmcr"}),
    "LeJEPA": {},
    "DINO": key(
      {"name": "dino", "prototypes": 1024, "still": 0.05, "projector.norm": "batch", "projector.activation": "gelu"}
      | {"ema": (0.99, 1.0), "views.global_crops.num": 2}
      | {f"views.local_crops.{name}": value for name, value in local.items()}
    ),
    "IWM, invariant": plainly(
      {"name": "iwm", "masks.num_context_patches": 0} | iwm | color | source(jitter) | {"predictor.depth": 1}
    ),
    "IWM, equivariant": plainly(
      {"name": "iwm", "predict": "all", "masks.num_targets": 2} | iwm | color | source(strong)
    ),
    "I-JEPA": plainly({"name": "ijepa"} | one | plain | crops | predictor | masks),
    "MAE": plainly({"name": "mae"} | one | plain | predictor),
    "supervised": trials.supervised(num_classes),
  }


def tokens(cfg: Config) -> int:
  """Returns how many tokens the encoder, and a teacher, make of one image in an epoch."""
  objective, patch = cfg.objective, cfg.encoder.patch_size
  of_views = [group.num * (group.size_px // patch) ** 2 for group in objective.views.groups]
  if hasattr(objective, "predictor") and hasattr(objective, "masks"):  # the context, and the targets of the whole
    grid = (objective.views.global_crops.size_px // patch,) * 2
    return of_views[0] + mask_shape(grid, objective.masks)[0]
  if objective.name == "mae":
    return int(of_views[0] * (1 - objective.mask_ratio))
  teacher = of_views[0] if objective.name == "dino" else 0
  return sum(of_views) * _TEACHERS.get(objective.name, 1) + teacher


def _checked(config: str, further: Sequence[str], overrides: Mapping[str, str] | None) -> tuple[Config, dict[str, str]]:
  """Returns the config and the overrides of all cells; ValueError for what cannot be studied."""
  if own := sorted(_VARIED & set(overrides or {}) - {"total"}):
    raise ValueError(f"--config.{own[0]}: the study sets it itself, by --only, --rates, --seeds or --further")
  given = dict(overrides or {}) | {"evals.names": ",".join(EVALS + FURTHER)}  # so that settings of each may be given
  base = trials.load_lejepa(config, given)
  if unknown := [name for name in further if name not in FURTHER]:
    raise ValueError(f"--further: {', '.join(unknown)} is none of {', '.join(FURTHER)}")
  if base.total.unit != "ep":
    raise ValueError(f'config.total="{base.total}": epochs are what is shared out; give --config.total=20ep')
  if not hasattr(base.encoder, "drops_patches"):
    raise ValueError(
      f"encoder name={base.encoder.name!r}: methods that mask patches need a ViT; set encoder.name='vit'"
    )
  return base, given


def _measured(
  runs: Mapping[tuple[Variant, int], Config], folder: Path, columns: Mapping[str, Mapping], predicting: set[str]
) -> list[Result]:
  """Returns the runs, trained where they are not, with all columns {protocol: other data}, each kept in its file."""
  results = run_variants(runs, folder, EVALS)
  whole = {(r.variant, r.seed) for r in results if "linear" in r.scores}  # the others diverged
  for name, on in columns.items():
    has = lambda variant, name=name: name != "predictor_tuning" or variant.name in predicting
    asked = {(v, s): cfg for (v, s), cfg in runs.items() if (v.name, s) in whole and has(v)}
    results = _with(results, run_variants(asked, folder, (name,), on, f"{name}.json"))
  return results


def _label_maps(base: Config, maps: Sequence[str]) -> dict[str, str]:
  """Returns --maps as {key: value}; a ValueError where it is not images with label maps."""
  pairs = [text.partition("=") for text in maps]
  if wrong := [key for key, equals, _ in pairs if not equals]:
    raise ValueError(f"--maps={wrong[0]}: write KEY=VALUE, such as --maps data.label_maps.set=camvid")
  on = {key: value for key, _, value in pairs}
  if not on:
    return on
  try:
    data = eval_config(base, on, (ON_MAPS,)).data
    train, test = (open_images(data, split).map_classes for split in ("train", "test"))
  except ValueError as error:
    raise ValueError(f"--maps: {error}") from error
  if not train or train != test:
    raise ValueError(
      "--maps: training and test images need label maps of the same classes; say which with data.label_maps.set, "
      "data.train and data.test"
    )
  return on


def _with(results: Sequence[Result], further: Sequence[Result]) -> list[Result]:
  """Returns the results with what else was found of the same runs."""
  more = {(r.variant, r.seed): r.scores for r in further}
  return [dataclasses.replace(r, scores=r.scores | more.get((r.variant, r.seed), {})) for r in results]


def _epochs(base: Config, cfg: Config) -> int:
  """Returns for how many epochs this config has the tokens of the first."""
  return max(1, round(base.total.value * tokens(base) / tokens(cfg)))


def _variant(name: str, changes: Mapping[str, str], epochs: int, rate: float) -> Variant:
  settings = dict(changes) | {"optim.lr": repr(rate), "total": f"{epochs}ep"}
  return Variant(f"{name}, lr {rate:g}", tuple(settings.items()))


def table(
  results: Sequence[Result], cells: Sequence[Cell], of: Mapping[Variant, Config], rates: Sequence[float]
) -> str:
  """Returns a Markdown table, a row per method: mean over seeds, and half the range.

  "-": there is no such number, or every seed diverged; of some that did the number is said.
  """
  scored = dict.fromkeys(score for r in results for score in r.scores)
  titles = {"knn": "kNN", "linear": "linear", "attentive": "attentive", "gain": "attentive - linear"}
  titles |= {"predictor": "predictor tuned", "random predictor": "random predictor", "fine-tuned": "fine-tuned"}
  titles |= {score: score for score in scored if score.startswith("mIoU")} | {"rankme": "RankMe"}
  titles = {score: title for score, title in titles.items() if score in scored or score == "gain"}
  rows = []
  for cell in cells:
    own, cfg = cell.of(results), of[cell.variant]
    scores = {score: np.array([r.score(score) for r in own]) for score in titles}
    scores["gain"] = scores["attentive"] - scores["linear"]
    trained = ["-"] * 3
    if cell.rate is not None:
      trained = [f"{cfg.total.value:g}", str(round(cfg.total.value * tokens(cfg))), said(cell.rate, rates)]
    rows.append([cell.method, *trained])
    rows[-1] += [_shown(values) for values in scores.values()]
  return markdown(["method", "epochs", "tokens per image", "rate chosen", *titles.values()], rows)


def _shown(values: np.ndarray) -> str:
  there = values[np.isfinite(values)]
  lost = f" ({len(values) - len(there)} diverged)" if 0 < len(there) < len(values) else ""
  return with_spread(there) + lost if len(there) else "-"
