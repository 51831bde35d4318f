"""Does the loss predict the probe? LeJEPA over lam and learning rate, and the rank correlation of what could tell.

The LeJEPA paper (arXiv 2511.08544) reports Spearman correlations of about .85 for the loss and .99 for loss / lam^0.4.
Beside the training loss and its terms stand the same of held-out images, and rivals: RankMe, LiDAR, the online probe.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from jepa_jax.config import load_config
from jepa_jax.study import figures
from jepa_jax.study.held_out import losses_and_ranks
from jepa_jax.study.tables import Result, markdown, reals, write_table
from jepa_jax.study.trials import measured
from jepa_jax.study.variants import Variant, configs, run_folder, run_variants
from jepa_jax.telemetry import read_metrics

DESCRIPTION = "Rank correlation of LeJEPA's training loss with probe accuracy, over lam and learning rate. Resumable."
TAIL = 0.1  # the loss of a run is the mean over this last share of its steps
LOSSES, PROBES = ("loss", "sigreg", "inv"), {"linear": "linear", "knn": "kNN"}
HELD = {"held_loss": "held-out loss", "held_inv": "held-out inv", "held_sigreg": "held-out sigreg"}
# Larger is better; the last one has seen labels.
RIVALS = {"rankme": "RankMe of the features", "lidar": "LiDAR of the embeddings"}
RIVALS |= {"online": "online probe, training images"}
ALPHAS = tuple(round(0.05 * i, 2) for i in range(41))


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a LeJEPA config")
  parser.add_argument("--workdir", required=True, help="a folder per run, table and figure; finished runs are kept")
  default = [0.005, 0.02, 0.08, 0.3]
  parser.add_argument("--lam", type=reals, default=default, metavar="L,..", help="values of objective.lam")
  default = [3e-4, 1e-3, 3e-3, 1e-2]
  parser.add_argument("--lr", type=reals, default=default, metavar="R,..", help="values of optim.lr")
  parser.add_argument("--alpha", type=float, default=0.4, help="exponent in loss / lam^alpha (default: 0.4)")


def run(
  config: str,
  workdir: str,
  lam: Sequence[float] = (0.005, 0.02, 0.08, 0.3),
  lr: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2),
  alpha: float = 0.4,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns rows, correlations and their table, for JSON; writes selection.csv, selection.md and selection.png."""
  base = load_config(config, overrides)
  if base.objective.name != "lejepa":
    raise ValueError(f"--config={config}: the loss and its lam are LeJEPA's; give one of configs/lejepa_*.py")
  if base.objective.regulariser != "epps_pulley":
    raise ValueError("the claim is about SIGReg: leave objective.regulariser at epps_pulley")
  cells = {variant(*cell): cell for cell in itertools.product(lam, lr)}
  folder = Path(workdir).expanduser()
  results = run_variants(configs(config, list(cells), [base.seed], dict(overrides or {})), folder, tuple(PROBES))
  rows = [_row(*cells[v], run_folder(folder, v, base.seed), result) for v, result in zip(cells, results, strict=True)]
  names = {name for row in rows for name in row}
  rows = [{name: row.get(name, math.nan) for name in sorted(names, key=list(max(rows, key=len)).index)} for row in rows]
  write_table(folder / "selection.csv", rows)
  whole = [row for row in rows if math.isfinite(row["linear"])]  # a grid may reach past what is stable
  rhos = correlations(whole, alpha)
  text = markdown(["Spearman of ... with", *PROBES.values()], [_line(name, of) for name, of in rhos.items()])
  (folder / "selection.md").write_text(text + "\n")
  figures.draw_selection(folder / "selection.png", whole, scores(whole, alpha), rhos)
  diverged = [(row["lam"], row["lr"]) for row in rows if row not in whole]
  fitted = judged_alpha(whole) if len(whole) >= 8 else {}
  return {"workdir": str(folder), "rows": rows, "diverged": diverged, "spearman": rhos, "alpha": fitted, "table": text}


def render(result: Mapping) -> str:
  """Returns the text that the command prints."""
  lost = ", ".join(f"lam {lam:g} lr {lr:g}" for lam, lr in result["diverged"])
  lines = [f"Diverged, and left out: {lost}"] if lost else []
  for said in result["alpha"].values():
    fit = f"loss / lam^{said['alpha']:g}, alpha fitted on the linear probe of half of the runs"
    lines.append(f"{fit}: Spearman {said['there']:.2f} there, {said['other_half']:.2f} on the other half")
  return "\n".join([result["table"], *lines, f"Runs, table and figure: {result['workdir']}"])


def variant(lam: float, lr: float) -> Variant:
  """Returns one cell of the grid."""
  return Variant(f"lam {lam:g}, lr {lr:g}", (("objective.lam", str(lam)), ("optim.lr", str(lr))))


def scores(rows: Sequence[Mapping[str, float]], alpha: float) -> dict[str, np.ndarray]:
  """Returns {score: its value of every row}, which should be low where the probe is good."""
  lam, loss, sigreg, inv = (np.array([row[name] for row in rows]) for name in ("lam", *LOSSES))
  found = {"loss": loss, f"loss / lam^{alpha:g}": loss / lam**alpha, "inv": inv, "sigreg": sigreg}
  if "held_loss" in rows[0]:
    held = np.array([row["held_loss"] for row in rows])
    found |= {title: np.array([row[name] for row in rows]) for name, title in HELD.items()}
    found[f"held-out loss / lam^{alpha:g}"] = held / lam**alpha
    rivals = {title: -np.array([row[name] for row in rows]) for name, title in RIVALS.items()}
    found |= {title: values for title, values in rivals.items() if np.isfinite(values).all()}
  return found


def judged_alpha(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
  """Returns, for each half of the runs, the alpha that fits it best and the correlation there and on the other half.

  The halves are every second run of the grid. What is fitted is judged where it was not: a grid of alphas finds a good
  one for any few runs.
  """
  halves, found = (list(rows[::2]), list(rows[1::2])), {}
  rho = lambda alpha, half: _rho(np.array([row["loss"] / row["lam"] ** alpha for row in half]), half, "linear")
  for name, own, other in (("first", *halves), ("second", *halves[::-1])):
    alpha = max(ALPHAS, key=lambda a: (rho(a, own), -a))
    found[name] = {"alpha": alpha, "there": rho(alpha, own), "other_half": rho(alpha, other)}
  return found


def correlations(rows: Sequence[Mapping[str, float]], alpha: float) -> dict[str, dict[str, float]]:
  """Returns {score: {probe: Spearman correlation}}, its sign turned so that 1 is a perfect prediction.

  "loss, within one lam" is the mean over the values of lam that have at least three rows.
  """
  rhos = {name: {probe: _rho(values, rows, probe) for probe in PROBES} for name, values in scores(rows, alpha).items()}
  groups = [[row for row in rows if row["lam"] == lam] for lam in sorted({row["lam"] for row in rows})]
  if groups := [group for group in groups if len(group) > 2]:
    within = lambda probe: [_rho([row["loss"] for row in group], group, probe) for group in groups]
    rhos["loss, within one lam"] = {probe: round(float(np.mean(within(probe))), 3) for probe in PROBES}
  return rhos


def _rho(values: Sequence[float] | np.ndarray, rows: Sequence[Mapping[str, float]], probe: str) -> float:
  if len(rows) < 2:
    raise ValueError(f"{len(rows)} run(s) ended without diverging: a rank correlation takes more; widen --lam or --lr")
  return round(-float(spearmanr(values, [row[probe] for row in rows]).statistic), 3)


def _row(lam: float, lr: float, folder: Path, result: Result) -> dict[str, float]:
  lines = read_metrics(folder)
  tail = [line for line in lines if line["step"] > (1 - TAIL) * lines[-1]["step"]]
  losses = {name: float(np.mean([line.get(name, math.nan) for line in tail])) for name in LOSSES}
  row = {"lam": lam, "lr": lr, **losses, **{probe: result.score(probe) for probe in PROBES}}
  if not math.isfinite(row["linear"]):
    return row
  online = float(np.mean([line.get("probe_accuracy", math.nan) for line in tail]))
  held = measured(folder, result, losses_and_ranks)
  return row | {name: held[name] for name in (*HELD, "lidar")} | {"rankme": result.score("rankme"), "online": online}


def _line(name: str, rhos: Mapping[str, float]) -> list[str]:
  return [name, *(f"{rhos[probe]:.2f}" for probe in PROBES)]
