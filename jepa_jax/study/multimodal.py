"""Which loss for images and their captions, at which batch? CLIP, SigLIP and MMCR at equal images, each with its own
learning rate.

The paper (arXiv 2406.09366) ends with MMCR on pairs ahead of CLIP at batches below 512. Every loss chooses its rate
anew at every batch and width, on the development split; the test split is looked at once, with further seeds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jepa_jax.config import Config, build_config, load_config, to_dict
from jepa_jax.data import ImageSet, open_images
from jepa_jax.study import figures, trials
from jepa_jax.study.rates import best_rate, said
from jepa_jax.study.tables import Result, markdown, numbers, reals, with_spread, words, write_results
from jepa_jax.study.variants import Variant, configs, run_variants

DESCRIPTION = "CLIP, SigLIP and MMCR on pairs against the batch, each with its learning rate chosen on dev. Resumable."
LOSSES = ("clip", "siglip", "mmcr_pairs")
SCORE = "mean R"
_RECALLS = tuple(f"{way} R@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10))
_VARIED = {"objective.name", "objective.projector.out", "batch_size", "optim.lr", "seed"}
_DEV, _TEST = "dev.json", "test.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a config of images and captions")
  parser.add_argument("--workdir", required=True, help="a folder per run, table and figure; finished runs are kept")
  parser.add_argument("--dev", required=True, metavar="SPLIT", help="what data.test is while rates are chosen")
  parser.add_argument("--dev-captions", default="", metavar="FILE", help="its captions (default: those of training)")
  parser.add_argument("--losses", type=words, default=LOSSES, metavar="L,..", help=f"default: {','.join(LOSSES)}")
  parser.add_argument("--batches", type=numbers, default=[16, 32, 64, 128, 256, 512], metavar="B,..")
  parser.add_argument("--widths", type=numbers, default=[256], metavar="D,..", help="of the embeddings (default: 256)")
  parser.add_argument("--rates", type=reals, default=[3e-4, 1e-3, 3e-3], metavar="R,..", help="learning rates to try")
  parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="S,..", help="the first one chooses the rate")
  parser.add_argument("--dry-run", action="store_true", help="print the cells and what they will take; train nothing")


def run(
  config: str,
  workdir: str,
  dev: str,
  dev_captions: str = "",
  losses: Sequence[str] = LOSSES,
  batches: Sequence[int] = (16, 32, 64, 128, 256, 512),
  widths: Sequence[int] = (256,),
  rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
  seeds: Sequence[int] = (0, 1, 2),
  dry_run: bool = False,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns {"workdir", "table", "results"}, or {"forecast"}; writes multimodal.csv, .md and .png, and dev.csv."""
  base = load_config(config, overrides)
  if own := sorted(_VARIED & set(overrides or {})):
    raise ValueError(
      f"--config.{own[0]}: the study sets it itself; use --losses, --batches, --widths, --rates, --seeds"
    )
  if not (seeds and rates and losses and batches and widths):
    raise ValueError("--losses, --batches, --widths, --rates and --seeds each name one at least")
  on = {"data.test": dev, "data.captions.test": dev_captions}
  images = _checked(base, losses, dev, on)
  folder, given = Path(workdir).expanduser(), dict(overrides or {})
  cells = list(itertools.product(losses, batches, widths))
  tried = [variant(*cell, rate) for cell in cells for rate in rates]
  first, rest = configs(config, tried, seeds[:1], given), seeds[1:]
  if dry_run:
    more = f"and {len(cells) * len(rest)} more, {len(rest)} for each loss, batch and width at the rate that is chosen"
    return {"forecast": f"{trials.forecast(first, images)}\n{more}"}
  trials.check_cells(first, images)
  on_dev = run_variants(first, folder, ("retrieval",), on, _DEV)
  write_results(folder, "dev", on_dev, {SCORE: "mean recall on dev"})
  name_of = lambda cell: {rate: variant(*cell, rate).name for rate in rates}
  best = {cell: best_rate(on_dev, name_of(cell), SCORE, ", ".join(map(str, cell))) for cell in cells}
  final = configs(config, [variant(*cell, rate) for cell, rate in best.items()], seeds, given)
  results = run_variants(final, folder, ("retrieval",), kept_in=_TEST)
  write_results(folder, "multimodal", results, {SCORE: "mean recall", **{name: name for name in _RECALLS}})
  text = table(results, best, rates)
  (folder / "multimodal.md").write_text(text + "\n")
  lines = {(loss, width): _line(results, best, loss, width) for loss, width in itertools.product(losses, widths)}
  figures.draw_batches(folder / "multimodal.png", lines, "mean of the six recalls, test, %")
  return {"workdir": str(folder), "table": text, "results": results}


render = trials.render


def variant(loss: str, batch: int, width: int, rate: float) -> Variant:
  """Returns the cell: at this batch the epochs of the config are as many images."""
  changes = {"objective.name": loss, "objective.projector.out": str(width), "batch_size": str(batch)}
  return Variant(f"{loss}, batch {batch}, D {width}, lr {rate:g}", tuple((changes | {"optim.lr": repr(rate)}).items()))


def table(results: Sequence[Result], best: Mapping[tuple[str, int, int], float], rates: Sequence[float]) -> str:
  """Returns a Markdown table, a row for every loss, batch and width at the rate that was chosen for it."""
  rows = []
  for cell, rate in best.items():
    of = lambda name, cell=cell, rate=rate: with_spread(_scores(results, cell, rate, name))
    rows.append([cell[0], str(cell[1]), str(cell[2]), said(rate, rates), of(SCORE), of("t2i R@1"), of("i2t R@1")])
  return markdown(["loss", "batch", "D", "rate chosen", "mean recall", "t2i R@1", "i2t R@1"], rows)


def _scores(results: Sequence[Result], cell: tuple[str, int, int], rate: float, name: str = SCORE) -> np.ndarray:
  return np.array([r.score(name) for r in results if r.variant == variant(*cell, rate).name])


def _line(results: Sequence[Result], best: Mapping, loss: str, width: int) -> dict[int, np.ndarray]:
  """Returns {batch: the score of each seed} of one loss and width."""
  return {cell[1]: _scores(results, cell, rate) for cell, rate in best.items() if (cell[0], cell[2]) == (loss, width)}


def _checked(base: Config, losses: Sequence[str], dev: str, on: Mapping[str, str]) -> ImageSet:
  """Returns the training images; ValueError for what cannot be studied, before hours of training."""
  if not base.data.captions.train:
    raise ValueError("the study is of images and captions: give a config with data.captions, configs/clip_flickr8k.py")
  if base.total.unit != "ep":
    raise ValueError(f'config.total="{base.total}": another batch would see other images; give epochs, as "30ep"')
  if unknown := [loss for loss in losses if loss not in LOSSES]:
    raise ValueError(f"--losses: {', '.join(unknown)} is none of {', '.join(LOSSES)}")
  on_dev = open_images(build_config(to_dict(base), on).data, "test")
  splits = {kind: open_images(base.data, kind) for kind in ("test", "train")}
  for kind, images in splits.items():
    if dev == getattr(base.data, kind) or on_dev.fingerprint == images.fingerprint:
      raise ValueError(f"--dev={dev} is the {kind} split: rates are chosen on another one")
  return splits["train"]
