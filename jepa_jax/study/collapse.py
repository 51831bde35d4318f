"""Why do methods without negatives not collapse? I-JEPA's, BYOL's, MoCo v3's and DINO's parts, each switched off.

The question that readers of the paper (arXiv 2301.08243) ask, answered at small scale by RankMe, feature standard
deviation and probe accuracy over time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from jepa_jax.config import load_config
from jepa_jax.study import figures
from jepa_jax.study.tables import chosen, numbers, write_results
from jepa_jax.study.variants import Variant, configs, run_folder, run_variants
from jepa_jax.telemetry import read_metrics

DESCRIPTION = "Why I-JEPA, BYOL, MoCo v3 and DINO do not collapse: each part switched off, over time. Resumable."
ONLINE = {"objective.target": "online"}
FREE = ONLINE | {"objective.stop_gradient": "False"}
PANELS = {"rankme": "RankMe", "feature_std": "feature std", "probe_accuracy": "online probe, %"}
_MORE = {"dino": {"teacher_entropy": "entropy of the teacher, nats"}}
SIGREG = ONLINE | {"objective.lam": "0.05"}
_IJEPA: dict[str, dict[str, str]] = {
  "I-JEPA": {},
  "no EMA": ONLINE,
  "no EMA, no stop-gradient": FREE,
  "no target norm": {"objective.target_norm": "False"},
  "no EMA, no stop-gradient, no norm": FREE | {"objective.target_norm": "False"},
  "no predictor": {"objective.predictor.depth": "0"},
  "no predictor, no EMA": ONLINE | {"objective.predictor.depth": "0"},
  "random masks": {"objective.masks.kind": "random"},
  "quadrants": {"objective.masks.kind": "quadrants"},
  "one block": {
    "objective.masks.kind": "block",
    "objective.masks.num_targets": "1",
    "objective.masks.target_scale": "(0.6, 0.6)",
  },
  "matrices start from .02": {"encoder.init": "normal"},
  "SIGReg of pooled features for EMA": SIGREG,
  "SIGReg of tokens for EMA": SIGREG | {"objective.sigreg_on": "tokens"},
  "SIGReg of tokens for EMA and stop-gradient": FREE | SIGREG | {"objective.sigreg_on": "tokens"},
}

_BARE = {"objective.predictor.hidden": "()"}
_PREDICTED = {"no EMA": ONLINE, "no predictor": _BARE, "no predictor, no EMA": _BARE | ONLINE}
_STILL = {"objective.centre_momentum": "1.0"}  # it stays at zero
_FLAT = {"objective.teacher_temperature": "(0.1, 0.1)", "objective.student_temperature": "0.1"}  # no sharper
# What each method is switched by; `frozen_patches` is for ViTs alone.
SWITCHES: dict[str, dict[str, dict[str, str]]] = {
  "ijepa": _IJEPA,
  "byol": {
    "BYOL": {},
    **_PREDICTED,
    "no BatchNorm in the heads": {
      f"objective.{head}.{norm}": "none" for head in ("projector", "predictor") for norm in ("norm", "last_norm")
    },
  },
  "mocov3": {"MoCo v3": {}, **_PREDICTED, "frozen patch projection": {"objective.frozen_patches": "True"}},
  "dino": {"DINO": {}, "no centre": _STILL, "no sharpening": _FLAT, "neither": _STILL | _FLAT},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="of " + ", ".join(SWITCHES))
  parser.add_argument("--workdir", required=True, help="a folder per run, table and figure; finished runs are kept")
  names = "; ".join(f"{method}: {' | '.join(own)}" for method, own in SWITCHES.items())
  parser.add_argument("--only", help=f"names joined by '|' (default: all of the method): {names}")
  parser.add_argument("--seeds", type=numbers, default=[0, 1], metavar="S,..", help="one run per seed (default: 0,1)")


def run(
  config: str,
  workdir: str,
  only: str | None = None,
  seeds: Sequence[int] = (0, 1),
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns the table, for JSON; writes collapse.csv, collapse.md and collapse.png."""
  base = load_config(config, overrides)
  if base.objective.name not in SWITCHES:
    raise ValueError(f"--config={config}: {base.objective.name} has no switches here; {', '.join(SWITCHES)} have")
  switches = dict(SWITCHES[base.objective.name])
  if not hasattr(base.encoder, "drops_patches"):
    switches.pop("frozen patch projection", None)
  variants = [Variant(name, tuple(switches[name].items())) for name in chosen(only, list(switches))]
  folder = Path(workdir).expanduser()
  runs = configs(config, variants, seeds, dict(overrides or {}))
  results = run_variants(runs, folder)
  text = write_results(folder, "collapse", results)
  curves = {v.name: [read_metrics(run_folder(folder, v, s)) for s in seeds] for v in variants}
  figures.draw_runs(folder / "collapse.png", curves, PANELS | _MORE.get(base.objective.name, {}))
  return {"workdir": str(folder), "table": text}


def render(result: Mapping) -> str:
  """Returns the text that the command prints."""
  return f"{result['table']}\nRuns, table and figure: {result['workdir']}"
