"""Is the characteristic function the right test? SIGReg with other tests in its place, and its rivals, side by side.

The LeJEPA paper (arXiv 2511.08544) rejects moments, whose gradients explode, and tests by the distribution function,
which do not distribute. Scales differ, so each is given the lam with which its gradient is as long as Epps-Pulley's
where embeddings are Gaussian at half the width; `--factors` tries multiples of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.config import Config
from jepa_jax.losses import REGULARISERS, slice_directions
from jepa_jax.study import figures, held_out, trials
from jepa_jax.study.tables import chosen, reals, write_table
from jepa_jax.study.variants import Variant, run_folder
from jepa_jax.telemetry import read_metrics

DESCRIPTION = "SIGReg's test and its rivals: gradients, accuracy, distance from a Gaussian. Resumable."
SCALES = tuple(float(s) for s in np.geomspace(1e-3, 10, 17))
PANELS = {"grad_norm": "norm of the gradient / (1 - lam)", "inv": "invariance", "probe_accuracy": "online probe, %"}
COLLAPSE = "invariance alone"
_EQUAL_AT = 0.5  # the width of embeddings at which all push alike


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  trials.add_arguments(parser, list(REGULARISERS))
  parser.add_argument(
    "--collapsed", action="store_true", help="start from a network that invariance alone (lam=0) has made collapse"
  )
  help_ = "multiples of the weight at which all push alike (default: 1); a cell each"
  parser.add_argument("--factors", type=reals, default=[1.0], metavar="F,..", help=help_)


def run(
  config: str,
  workdir: str,
  only: str | None = None,
  seeds: Sequence[int] = (0, 1),
  factors: Sequence[float] = (1.0,),
  collapsed: bool = False,
  dry_run: bool = False,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns the table and the results; writes statistic.csv, statistic.md, statistic.png, and the push at every scale.

  pushes.csv and pushes.png: the root mean square of the gradient with respect to N(0, s^2) embeddings, against s;
  nothing is trained for it. gradients.png: the norm of the network's gradient over training.

  collapsed: every cell starts from all networks of one run of the first seed with lam=0, itself a row, `COLLAPSE`.
  """
  base, names = trials.load_lejepa(config, overrides), chosen(only, list(REGULARISERS))
  if min(factors, default=0) <= 0:
    raise ValueError(f"--factors={','.join(map(str, factors))}: give numbers above 0, such as 0.3,1,3")
  variants, folder = [variant(base, name, factor) for name in names for factor in factors], Path(workdir).expanduser()
  if collapsed:
    variants = _from_collapse(folder, variants, seeds[0])
  result = trials.run_trials("statistic", config, workdir, variants, seeds, overrides, dry_run, *held_out.GAUSSIANITY)
  if dry_run:
    return result
  table = [{"regulariser": name, "scale": s, "push": push(base, name, s)} for name in names for s in SCALES]
  write_table(folder / "pushes.csv", table)
  figures.draw_pushes(folder / "pushes.png", table)
  curves = {v.name: [_in_units_of_invariance(run_folder(folder, v, seed), v) for seed in seeds] for v in variants}
  figures.draw_runs(folder / "gradients.png", curves, PANELS)
  return result


render = trials.render


def _from_collapse(folder: Path, variants: Sequence[Variant], seed: int) -> list[Variant]:
  """Returns the collapse, which is trained first, and the variants, each from that run of this seed."""
  collapse = Variant(COLLAPSE, (("objective.lam", "0.0"),))
  start = {"init_from": str(run_folder(folder, collapse, seed)), "init_what": "everything"}
  return [collapse, *(dataclasses.replace(v, name=f"{v.name}, from it", **start) for v in variants)]


def _in_units_of_invariance(folder: Path, variant: Variant) -> list[dict[str, float]]:
  """Returns the metrics with the gradient of invariance + weight regulariser, which is that of the loss over 1 -
  lam."""
  lam = float(dict(variant.overrides)["objective.lam"])
  scaled = lambda row: {"grad_norm": row["grad_norm"] / (1 - lam)} if "grad_norm" in row else {}
  return [row | scaled(row) for row in read_metrics(folder)]


@functools.cache
def _gradient(name: str) -> Callable:
  return jax.jit(jax.grad(REGULARISERS[name]))


def variant(base: Config, name: str, factor: float) -> Variant:
  """Returns one cell: the regulariser, with the lam at which it pushes `factor` times as hard as Epps-Pulley at half
  width."""
  lam = min(base.objective.lam, 1 - 1e-6)
  weight = lam / (1 - lam) * factor * push(base, "epps_pulley", _EQUAL_AT) / push(base, name, _EQUAL_AT)
  changes = {"objective.regulariser": name, "objective.lam": repr(float(f"{weight / (1 + weight):.6g}"))}
  return Variant(name if factor == 1 else f"{name} x {factor:g}", tuple(changes.items()))


def push(base: Config, name: str, scale: float) -> float:
  """Returns the root mean square over samples and dimensions of N times the gradient where z ~ N(0, scale^2 I).

  N, D and the number of directions are the config's. Of an empty gradient (a saturated test) the result is 0.
  """
  num, width = base.batch_size, base.objective.projector.out
  z_1xNxD = scale * jax.random.normal(jax.random.key(0), (1, num, width))
  directions_DxM = slice_directions(jax.random.key(1), width, base.objective.num_slices)
  gradient = _gradient(name)(z_1xNxD, directions_DxM)
  return float(num * jnp.sqrt(jnp.mean(gradient**2)))
