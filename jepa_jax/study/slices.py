"""Do a few fresh random directions beat thousands of fixed ones? LeJEPA (arXiv 2511.08544, fig. 7) says so."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from jepa_jax.study import held_out, trials
from jepa_jax.study.tables import chosen
from jepa_jax.study.trials import render as render
from jepa_jax.study.variants import Variant

DESCRIPTION = "SIGReg's directions: few or many, redrawn or fixed, random or Sobol. Resumable."
COUNTS = (16, 64, 256, 1024)


def _setting(count: int, redraw: bool, directions: str = "gaussian") -> dict[str, str]:
  name = {"num_slices": count, "redraw": redraw, "directions": directions}
  return {f"objective.{key}": str(value) for key, value in name.items()}


VARIANTS: dict[str, dict[str, str]] = {
  **{f"{count} redrawn": _setting(count, True) for count in COUNTS},
  **{f"{count} fixed": _setting(count, False) for count in (*COUNTS, 4096)},
  "256 Sobol, redrawn": _setting(256, True, "sobol"),
  "256 Sobol, fixed": _setting(256, False, "sobol"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  trials.add_arguments(parser, list(VARIANTS))


def run(
  config: str,
  workdir: str,
  only: str | None = None,
  seeds: Sequence[int] = (0, 1),
  dry_run: bool = False,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns the table and the results; writes slices.csv, slices.md and slices.png."""
  trials.load_lejepa(config, overrides)
  variants = [Variant(name, tuple(VARIANTS[name].items())) for name in chosen(only, list(VARIANTS))]
  return trials.run_trials("slices", config, workdir, variants, seeds, overrides, dry_run, *held_out.GAUSSIANITY)
