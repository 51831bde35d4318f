"""From invariant to equivariant: what conditioning, depth and augmentation make of IWM's predictor (arXiv 2403.00504).

Every cell is a run of the one loop; its MRR says how much of a world model it has, beside it stands what is gained
downstream from its encoder (linear, attentive) and from its predictor.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from jepa_jax.config import load_config
from jepa_jax.losses import blind_mrr
from jepa_jax.models import CONDITIONINGS
from jepa_jax.study import figures
from jepa_jax.study.tables import numbers, words, write_results
from jepa_jax.study.variants import Variant, configs, run_variants
from jepa_jax.views import PAPER_JITTER

DESCRIPTION = "IWM from invariant to equivariant: conditioning x depth x augmentation, MRR against accuracy. Resumable."
EVALS = ("mrr", "linear", "attentive", "predictor_tuning")
_DESTRUCTIVE = ("grayscale_p", "blur_p", "solarize_p")
_STRENGTHS = {name: getattr(PAPER_JITTER, name) for name in ("brightness", "contrast", "saturation", "hue")}


def _jitter(times: float) -> dict[str, str]:
  """Returns the settings of both views' jitter at a multiple of the paper's strengths."""
  places = ("objective.views.color", "objective.source")
  return {f"{place}.{name}": str(times * value) for place in places for name, value in _STRENGTHS.items()}


# The paper's three difficulties; what destroys is on the source only, as likely as in the config.
STRENGTHS: dict[str, dict[str, str]] = {
  "jitter": _jitter(1) | {f"objective.source.{n}": "(0.0,)" if n != "grayscale_p" else "0.0" for n in _DESTRUCTIVE},
  "destructive": _jitter(1),
  "strong": _jitter(2),
}
COLUMNS = {"MRR": "MRR, all sources", "MRR jitter": "MRR, clean source", "linear": "linear", "attentive": "attentive"}
COLUMNS |= {"tuned encoder": "encoder tuned", "random predictor": "frozen, random predictor"}
COLUMNS |= {"predictor": "frozen, its predictor", "end to end": "end to end", "rankme": "RankMe"}

MRR = "MRR jitter"  # the paper's, from a clean source, is what accuracies are laid beside
ACCURACIES = {name: COLUMNS[name] for name in ("linear", "attentive", "predictor", "end to end")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="an IWM config")
  parser.add_argument("--workdir", required=True, help="a folder per run, table and figure; finished runs are kept")
  parser.add_argument("--conditioning", type=words, default=CONDITIONINGS, help="default: none,feature,sequence")
  parser.add_argument("--depths", type=numbers, default=[2, 6], help="blocks of the predictor (default: 2,6)")
  parser.add_argument("--strengths", type=words, default=tuple(STRENGTHS), help="default: jitter,destructive,strong")
  parser.add_argument("--seeds", type=numbers, default=[0, 1], metavar="S,..", help="one run per seed (default: 0,1)")
  parser.add_argument("--evals", type=words, default=EVALS, help=f"default: {','.join(EVALS)}")


def run(
  config: str,
  workdir: str,
  conditioning: Sequence[str] = CONDITIONINGS,
  depths: Sequence[int] = (2, 6),
  strengths: Sequence[str] = tuple(STRENGTHS),
  seeds: Sequence[int] = (0, 1),
  evals: Sequence[str] = EVALS,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns the table, for JSON; writes equivariance.csv, equivariance.md and equivariance.png."""
  overrides = {**(overrides or {}), "evals.names": repr(tuple(evals))}
  if load_config(config, overrides).objective.name != "iwm":
    raise ValueError(f"--config={config}: only IWM's predictor can be told actions; give one of configs/iwm_*.py")
  for option, given, known in (("conditioning", conditioning, CONDITIONINGS), ("strengths", strengths, STRENGTHS)):
    if unknown := [name for name in given if name not in known]:
      raise ValueError(f"--{option}: {', '.join(unknown)} is none of {', '.join(known)}")
  if "mrr" not in evals:
    raise ValueError("--evals must hold mrr: it is what the study is about")
  cells = {variant(*cell): cell for cell in itertools.product(conditioning, depths, strengths)}
  folder = Path(workdir).expanduser()
  runs = configs(config, list(cells), seeds, overrides)
  results = run_variants(runs, folder, evals)
  chance = 100 * blind_mrr(next(iter(runs.values())).evals.mrr.bank)
  text = write_results(folder, "equivariance", results, COLUMNS)
  scores = {cell: [r.scores for r in results if r.variant == v.name] for v, cell in cells.items()}
  rhos = rank_correlations([mean_scores(seeds) for seeds in scores.values()])
  figures.draw_equivariance(folder / "equivariance.png", scores, rhos, MRR, chance)
  return {"workdir": str(folder), "blind_mrr": round(chance, 2), "rank_correlation_with_mrr": rhos, "table": text}


def mean_scores(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Returns the mean over seeds of every score that all of them have."""
  names = set.intersection(*map(set, seeds))
  return {name: float(np.mean([scores[name] for scores in seeds])) for name in names}


def rank_correlations(means: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Returns {accuracy: Spearman's rho with MRR} over cells; the paper has .93 for predictor tuning, -.85 linear."""
  rhos = {}
  for name in ACCURACIES:
    pairs = np.array([(m[MRR], m[name]) for m in means if name in m and np.isfinite([m[MRR], m[name]]).all()])
    if len(pairs) > 2 and np.ptp(pairs, axis=0).min() > 0:  # of what is constant there is no rank
      rhos[name] = round(float(spearmanr(*pairs.T).statistic), 2)
  return rhos


def variant(conditioning: str, depth: int, strength: str) -> Variant:
  """Returns one cell: its name, "feature, 6 deep, strong", is what figure and table tell it by."""
  changes = {"objective.predictor.conditioning": conditioning, "objective.predictor.depth": str(depth)}
  return Variant(f"{conditioning}, {depth} deep, {strength}", tuple((changes | STRENGTHS[strength]).items()))


def render(result: Mapping) -> str:
  """Returns the text that the command prints."""
  rhos = ", ".join(f"{name} {rho:+.2f}" for name, rho in result["rank_correlation_with_mrr"].items())
  lines = [result["table"], f"MRR of a blind predictor: {result['blind_mrr']}", f"rank correlation with MRR: {rhos}"]
  return "\n".join([*lines, f"Runs, table, figure: {result['workdir']}"])
