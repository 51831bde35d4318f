"""Which of LeJEPA's choices matter? Each changed alone, at equal images: which moves the probe beyond chance?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
import scipy  # its parts are loaded when they are used

from jepa_jax.config import Config, build_config, to_dict
from jepa_jax.study import trials
from jepa_jax.study.tables import Result, chosen
from jepa_jax.study.variants import Variant

DESCRIPTION = "LeJEPA's choices, each changed alone: projector, lam, batch, views, centre, averages. Resumable."
BASE = "as in the config"
_STOPPED = {"objective.stop_gradient": "True"}


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
  """Returns the table with what it says, and the results; writes choices.csv, choices.md and choices.png.

  The linear probe on the held-out fifth of the training images decides, never a test image.
  """
  base = trials.load_lejepa(config, overrides)
  if base.total.unit != "ep":
    said = "another batch would see other images; give epochs: --config.total=10ep"
    raise ValueError(f'config.total="{base.total}": {said}')
  changes = variants_of(base)
  names = [BASE, *(n for n in chosen(only, list(changes)) if n != BASE)]
  variants = [Variant(name, tuple(changes[name].items())) for name in names]
  result = trials.run_trials("choices", config, workdir, variants, seeds, overrides, dry_run, {})
  return result if dry_run else result | {"table": f"{result['table']}\n\n{judge(result['results'])}"}


render = trials.render


def variants_of(cfg: Config) -> dict[str, dict[str, str]]:
  """Returns {name: settings}: every choice of this config, each changed alone; none that it has already.

  Another batch takes as many images, since the schedule is in epochs; the learning rate stays.
  """
  objective, found = cfg.objective, {}
  hidden, out, encoder = objective.projector.hidden, objective.projector.out, cfg.encoder
  for width in (out // 4, out * 4):
    found[f"projector out {width}"] = {"objective.projector.out": str(width)}
  wide = hidden[-1] if hidden else 4 * out
  for depth in range(4):
    found[f"projector of {depth} hidden layers"] = {"objective.projector.hidden": repr((wide,) * depth)}
  for times in (0.25, 0.5, 2, 4):
    found[f"lam {objective.lam * times:g}"] = {"objective.lam": repr(objective.lam * times)}
  for times in (0.5, 2, 4):
    found[f"batch {round(cfg.batch_size * times)}"] = {"batch_size": str(round(cfg.batch_size * times))}
  crops, local = objective.views.global_crops, objective.views.local_crops
  num_local = local.num if local else 0
  if not num_local:
    for num in (2, 8):
      found[f"{num} views"] = {"objective.views.global_crops.num": str(num)}
    patch = getattr(encoder, "patch_size", 1)
    small = max(8, crops.size_px // 2) // patch * patch
    if encoder.name not in ("mlp", "mixer") and small:  # these read one size
      views = {"num": 4, "size_px": small, "scale": (min(0.05, crops.scale[0]), crops.scale[0])}
      both = {f"objective.views.local_crops.{key}": repr(value) for key, value in views.items()}
      found["2 global and 4 local views"] = {"objective.views.global_crops.num": "2"} | both
      found["the same, stop-gradient on the centre"] = found["2 global and 4 local views"] | _STOPPED
  else:  # without local views the gradient through the centre is zero anyway
    found["stop-gradient on the centre"] = _STOPPED
  if not encoder.uses_batch_statistics:
    found["weight average .99"] = {"objective.weight_average": "0.99"}
  if hasattr(encoder, "drop_path"):
    found["drop path .1"] = {"encoder.drop_path": "0.1"}
  return {BASE: {}} | {name: changes for name, changes in found.items() if _is_another(cfg, changes)}


def judge(results: Sequence[Result], score: str = "linear_val") -> str:
  """Returns a sentence per choice that moves the probe beyond chance, the largest first, and what cannot be judged.

  A difference counts where a t test finds it at 5 % over all choices (Bonferroni), with the deviation of the seeds
  pooled over all cells: two seeds of one cell alone say too little of it.
  """
  names = list(dict.fromkeys(r.variant for r in results))
  of = {name: np.array([r.score(score) for r in results if r.variant == name]) for name in names}
  lost = [name for name, values in of.items() if not np.isfinite(values).all()]
  lines = [f"{name}: diverged in {(~np.isfinite(of[name])).sum()} of {len(of[name])} runs" for name in lost]
  kept = {name: values for name, values in of.items() if name not in lost}
  freedom = sum(len(values) - 1 for values in kept.values())
  if BASE not in kept or len(kept) < 2 or freedom < 1:
    lines.append("Nothing more can be said: it takes the config itself, a choice and two seeds, not diverged.")
    return "\n".join(lines)
  pooled = np.sqrt(sum(((values - values.mean()) ** 2).sum() for values in kept.values()) / freedom)
  threshold = scipy.stats.t.ppf(1 - 0.05 / (2 * (len(kept) - 1)), freedom)
  base, said = kept.pop(BASE), []
  for name, values in kept.items():
    gain, least = values.mean() - base.mean(), threshold * pooled * np.sqrt(1 / len(values) + 1 / len(base))
    if abs(gain) > least:
      said.append((abs(gain), f"{name}: {gain:+.1f} points (beyond chance from {least:.1f})"))
  lines += [text for _, text in sorted(said, reverse=True)]
  head = f"Linear probe on held-out training images, deviation of a seed {pooled:.1f}:"
  return "\n".join([head, *(lines or ["no choice moves it beyond chance"])])


def _is_another(cfg: Config, changes: Mapping[str, str]) -> bool:
  """Returns whether these settings make another experiment that can be built at all."""
  try:
    return build_config(to_dict(cfg), changes) != cfg
  except ValueError:
    return False
