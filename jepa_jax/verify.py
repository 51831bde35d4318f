"""`verify`: are the files of a run's checkpoints what was written? Nothing is changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jepa_jax import checkpoint
from jepa_jax.runs import find_checkpoint
from jepa_jax.workdir import CHECKPOINTS

DESCRIPTION = "compare the files of checkpoints with their checksums; status 2 where one is damaged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.description = DESCRIPTION
  parser.add_argument("workdir", metavar="WORKDIR", help="the workdir of a run, or one checkpoint folder in it")
  parser.add_argument("--step", type=int, help="one checkpoint (default: all of the workdir)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(workdir: str, step: int | None = None, overrides: Any = None) -> dict[str, Any]:
  """Returns {"workdir", "whole": whether no checkpoint is damaged, "checkpoints": {step: what was found}}."""
  if overrides:
    raise ValueError(f"--config.{next(iter(overrides))}: verify reads no config")
  folder, newest = find_checkpoint(workdir, step)
  one = step is not None or Path(workdir).expanduser().resolve().parent.name == CHECKPOINTS
  found, whole = {}, True
  for number in [newest] if one else checkpoint.steps(folder):
    try:
      checked = checkpoint.check_whole(folder, number)
      items = ("networks", "training") if checkpoint.read_meta(folder, number).get("format", 1) > 1 else ("state",)
      checkpoint.check_readable(folder, number, items)
      found[number] = "whole" if checked else "NOT COMPARED: it has no checksums; its descriptions can be read"
    except checkpoint.CheckpointError as error:
      if number not in checkpoint.steps(folder):
        found[number] = "was removed by the run meanwhile"
      else:
        found[number], whole = f"DAMAGED: {error}", False
  return {"workdir": str(folder), "whole": whole, "checkpoints": found}


def render(result: dict[str, Any]) -> str:
  """Returns a line for each checkpoint."""
  return "\n".join(f"{result['workdir']}, step {step}: {text}" for step, text in result["checkpoints"].items())
