"""Disturbs small runs at random moments, starts them again, and compares their ends with an undisturbed run's.

Runs are made one after the other until all faults are spent; each one must end with the state of the undisturbed run,
bit for bit, and with its metrics, each step once. Two faults are stand-ins: the full disk is a limit on the size of
files, set from outside while the run goes on (Linux); and since an image that breaks halfway rightly changes what is
learned, one image is broken from the beginning in all runs, and "corrupt image" breaks it in another way.
"""

from __future__ import annotations

import argparse
import collections
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jepa_jax.bench.disturbed import (
  STEPS,
  Disturbed,
  NotSafeToKill,
  Undisturbed,
  require,
)
from jepa_jax.bench.fault_kinds import KINDS, OF_ONE_PROCESS
from jepa_jax.checkpoint import DamagedCheckpoint
from jepa_jax.goodput import ACTIVITIES
from jepa_jax.goodput import read as read_goodput

DESCRIPTION = "Kill and damage runs at random; their final state must equal an undisturbed run's, bit for bit."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`, under their own names."""
  parser.add_argument("--kills", type=int, default=50, metavar="N", help="how many faults (default: 50)")
  parser.add_argument("--seed", type=int, default=0, help="draws the faults and their moments (default: 0)")
  parser.add_argument("--kinds", nargs="+", default=(), metavar="KIND", help=f"of: {', '.join(KINDS)} (default: all)")
  parser.add_argument("--num-processes", type=int, default=1, metavar="N", help="of every run (default: 1)")
  parser.add_argument("--workdir", default="", help="an empty folder (default: a temporary one, kept on failure)")


def run(kills: int = 50, seed: int = 0, kinds: Sequence[str] = (), workdir: str = "", num_processes: int = 1) -> dict:
  """Returns how many faults of which kind the runs survived, as a dict that JSON can hold; progress goes to stderr.

  NotSafeToKill, and the files are kept, at the first difference from the undisturbed run.
  """
  kinds = tuple(kinds or (kind for kind in KINDS if num_processes == 1 or kind not in OF_ONE_PROCESS))
  if unknown := [kind for kind in kinds if kind not in KINDS]:
    raise ValueError(f"unknown faults {unknown}; choose from {', '.join(KINDS)}")
  if kills < 1 or num_processes < 1:
    raise ValueError(f"--kills={kills} and --num-processes={num_processes} must be at least 1")
  folder = Path(workdir or tempfile.mkdtemp(prefix="jepa_jax_faults_")).expanduser().resolve()
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.iterdir()):
    raise ValueError(f"--workdir={folder} is not empty; name a new folder")
  try:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every item that was damaged on purpose
    _say("the undisturbed run, twice")
    result = disturb(Undisturbed(folder, num_processes, seed), kills, np.random.default_rng(seed), kinds)
  except (NotSafeToKill, DamagedCheckpoint) as error:
    raise NotSafeToKill(f"NOT SAFE TO KILL: {error}\nThe files are kept in {folder}") from error
  if not workdir:
    shutil.rmtree(folder)
  return result | {"num_processes": num_processes, "seed": seed, "jax_version": jax.__version__}


def disturb(reference: Undisturbed, kills: int, rng: np.random.Generator, kinds: Sequence[str]) -> dict:
  """Returns what `run` does, given the undisturbed run; first every kind once, then as often as KINDS says."""
  began, counts, deck = time.monotonic(), collections.Counter(), list(rng.permutation(kinds))
  runs = [Disturbed(reference, "run1", rng)]
  while counts.total() < kills:
    trial = runs[-1]
    deck = deck or list(rng.permutation([kind for kind in kinds for _ in range(KINDS[kind][0])]))
    if KINDS[deck[-1]][1](trial):
      counts[kind := str(deck.pop())] += 1
      _say(f"{counts.total()}/{kills} {kind}: {trial.workdir.name}, newest checkpoint {trial.newest}")
    if trial.newest == STEPS and counts.total() < kills:  # what came too late for it goes to the next run
      trial.finish()
      _say(f"{trial.workdir.name} ended like the undisturbed run, after {trial.starts} starts")
      runs.append(Disturbed(reference, f"run{len(runs) + 1}", rng))
  runs[-1].finish()
  if "kill in evaluation" in kinds:
    tables = [reference.table(workdir) for workdir in (reference.workdir, runs[-1].workdir)]
    require(tables[0] == tables[1], f"the tables of the undisturbed run and of {runs[-1].workdir} differ: {tables}")
  seconds = collections.Counter()
  for trial in runs:
    seconds.update(read_goodput(trial.workdir))
  return {
    "faults": {kind: counts[kind] for kind in kinds} | {"all": counts.total()},
    "runs": len(runs),
    "starts": sum(trial.starts for trial in runs),
    "saves_cut_short": sum(trial.saves_cut_short for trial in runs),
    "damaged_checkpoints_set_aside": sum(trial.set_aside for trial in runs),
    "damaged_where_training_needs_nothing": sum(trial.unharmed for trial in runs),
    "steps_repeated": sum(trial.steps_repeated for trial in runs),
    "state_sha256": reference.hash,
    "all_runs_ended_with_it": True,  # else NotSafeToKill
    "seconds_of_the_runs": {name: round(seconds[name], 1) for name in ACTIVITIES},
    "wall_s": round(time.monotonic() - began, 1),
  }


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
