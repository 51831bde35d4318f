"""One setting at a time: every value of every setting, the rest as in the config, over seeds; a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from jepa_jax.study.tables import numbers, write_results
from jepa_jax.study.variants import Variant, configs, run_variants

DESCRIPTION = "One setting at a time changed in a config, trained and evaluated over seeds: a table. Resumable."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="what all cells have in common")
  parser.add_argument("--workdir", required=True, help="a folder per run, and the table; finished runs are kept")
  parser.add_argument(
    "--vary",
    action="append",
    default=[],
    metavar="KEY=V|V|..",
    help="a setting and its values, such as 'optim.lr=3e-4|3e-3'; several changes at once: '_=a=1&b=2|c=3'; repeatable",
  )
  parser.add_argument("--seeds", type=numbers, default=[0], metavar="S,..", help="one run per seed (default: 0)")


def parse_vary(text: str) -> list[Variant]:
  """Returns a Variant per value of "optim.lr=3e-4|3e-3"; "_=a=1&b=2|c=3" two, the first with two changes."""
  key, equals, values = text.partition("=")
  if not equals or not values:
    raise ValueError(f"--vary={text}: write a setting and its values, such as 'optim.lr=3e-4|3e-3'")
  variants = []
  for choice in values.split("|"):
    changes = choice if "=" in choice.split("&")[0] else f"{key}={choice}"
    pairs = [change.partition("=")[::2] for change in changes.split("&")]
    variants.append(Variant(", ".join("=".join(p) for p in pairs), tuple((k, v) for k, v in pairs)))
  return variants


def run(
  config: str,
  workdir: str,
  vary: Sequence[str] = (),
  seeds: Sequence[int] = (0,),
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns the table, for JSON; writes ablation.csv (a line per run) and ablation.md (means over seeds)."""
  variants = [Variant("as in the config"), *(v for text in vary for v in parse_vary(text))]
  folder = Path(workdir).expanduser()
  results = run_variants(configs(config, variants, seeds, dict(overrides or {})), folder)
  text = write_results(folder, "ablation", results)
  return {"workdir": str(folder), "table": text}


def render(result: Mapping) -> str:
  """Returns the text that the command prints."""
  return f"{result['table']}\nTables and runs: {result['workdir']}"
