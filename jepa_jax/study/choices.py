"""Which of LeJEPA's choices matter? Each changed alone, at equal images: which moves the probe by more than its
seeds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np

from jepa_jax.config import Config
from jepa_jax.study import trials
from jepa_jax.study.tables import Result
from jepa_jax.study.variants import Variant

DESCRIPTION = "LeJEPA's choices, each changed alone: projector, lam, batch, views, centre, averages. Resumable."
BASE = "as in the config"
_AS_LOCAL = ("num", "size_px", "scale")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  trials.add_arguments(parser, [BASE, "those that --dry-run prints"])


def run(
  config: str,
  workdir: str,
  only: str | None = None,
  seeds: Sequence[int] = (0, 1),
  dry_run: bool = False,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns the table and what it says, for JSON; writes choices.csv, choices.md and choices.png.

  The linear probe on the held-out fifth of the training images decides, never a test image.
  """
  base = trials.load_lejepa(config, overrides)
  if base.total.unit != "ep":
    said = "another batch would see other images; give epochs: --config.total=10ep"
    raise ValueError(f'config.total="{base.total}": {said}')
  changes = variants_of(base)
  names = [BASE, *(n for n in trials.chosen(only, list(changes)) if n != BASE)]
  variants = [Variant(name, tuple(changes[name].items())) for name in names]
  result = trials.run_trials("choices", config, workdir, variants, seeds, overrides, dry_run, {}, lambda _: {})
  return result if dry_run else result | {"table": f"{result['table']}\n\n{judge(result['results'])}"}


render = trials.render


def variants_of(cfg: Config) -> dict[str, dict[str, str]]:
  """Returns {name: settings}: every choice of this config, each changed alone.

  Another batch takes as many images: the schedule is in epochs or images. The batch goes through in microbatches, which
  give the same gradient, where the encoder has no BatchNorm.
  """
  objective, found = cfg.objective, {BASE: {}}
  hidden, out = objective.projector.hidden, objective.projector.out
  for width in (out // 4, out * 4):
    found[f"projector out {width}"] = {"objective.projector.out": str(width)}
  wide = hidden[-1] if hidden else 4 * out
  for depth in sorted({0, 1, 2, 3} - {len(hidden)}):
    found[f"projector of {depth} hidden layers"] = {"objective.projector.hidden": repr((wide,) * depth)}
  for times in (0.25, 0.5, 2, 4):
    found[f"lam {objective.lam * times:g}"] = {"objective.lam": repr(objective.lam * times)}
  for times in (0.5, 2, 4):
    size = round(cfg.batch_size * times)
    if size >= 2:
      found[f"batch {size}"] = {"batch_size": str(size)}
  crops, local = objective.views.global_crops, objective.views.local_crops
  for num in (2, 8):
    if num != crops.num and not (local and local.num):
      found[f"{num} views"] = {"objective.views.global_crops.num": str(num)}
  if not (local and local.num) and cfg.encoder.name not in ("mlp", "mixer"):  # these read one size
    small = {"num": 4, "size_px": max(8, crops.size_px // 2), "scale": (0.05, crops.scale[0])}
    views = {f"objective.views.local_crops.{key}": repr(small[key]) for key in _AS_LOCAL}
    found["2 global and 4 local views"] = {"objective.views.global_crops.num": "2"} | views
  if not cfg.encoder.uses_batch_statistics:
    found["weight average .99"] = {"objective.weight_average": "0.99"}
  found["stop-gradient on the centre"] = {"objective.stop_gradient": "True"}
  if hasattr(cfg.encoder, "drop_path"):
    found["drop path .1"] = {"encoder.drop_path": "0.1"}
  return found


def judge(results: Sequence[Result], score: str = "linear_val") -> str:
  """Returns one sentence per choice that moves the probe by more than two spreads of the seeds, the largest first.

  The spread is the larger of the two cells': half of the range over seeds.
  """
  of = {name: np.array([r.score(score) for r in results if r.variant == name]) for name in {r.variant for r in results}}
  base, said = of[BASE], []
  spread = lambda values: float(np.ptp(values)) / 2
  for name, values in of.items():
    gain, noise = float(values.mean() - base.mean()), max(spread(values), spread(base))
    if name != BASE and len(values) > 1 and abs(gain) > 2 * noise:
      said.append((abs(gain), f"{name}: {gain:+.1f} points (seeds: ± {noise:.1f})"))
  lines = [text for _, text in sorted(said, reverse=True)]
  head = "More than two spreads of the seeds, linear probe on held-out training images:"
  return "\n".join([head, *lines]) if lines else "No choice moves the probe by more than two spreads of the seeds."
