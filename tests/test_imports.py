"""The architecture, enforced: who may import whom, which library has one door, how long a file may be."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jepa_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 420

# A room is a folder or a file of jepa_jax/. Leaves import nothing of ours; any room may import them.
LEAVES = {"sharding", "duration", "files", "flops"}
METHOD = {"losses", "views", "models", "objectives"}
BELOW_TRAIN = METHOD | {
  "config",
  "step",
  "optim",
  "data",
  "evals",
  "checkpoint",
  "telemetry",
  "theory",
  "distributed",
  "goodput",
}
# Room -> rooms it may import besides itself and the leaves. Arrows point one way; a new room gets its line here.
ALLOWED: dict[str, set[str]] = {
  "sharding": set(),
  "duration": set(),
  "files": set(),
  "flops": set(),
  "losses": set(),
  "views": set(),
  "theory": {"losses"},
  "models": set(),
  "objectives": {"losses", "views", "models"},
  "optim": set(),
  "step": {"objectives", "losses", "views", "models", "optim", "theory"},
  "data": {"distributed"},
  "evals": METHOD | {"data", "theory", "distributed"},
  "checkpoint": {"distributed"},
  "distributed": set(),
  "goodput": set(),
  "telemetry": {"losses", "theory", "distributed"},
  "weights": BELOW_TRAIN | {"experiment", "evaluate", "train"},  # makes whole workdirs out of other people's weights
  "config": BELOW_TRAIN,
  "experiment": BELOW_TRAIN,
  "evaluate": BELOW_TRAIN | {"experiment"},
  "follow": BELOW_TRAIN | {"evaluate"},
  "plan": BELOW_TRAIN | {"experiment"},
  "bench": BELOW_TRAIN | {"experiment", "plan", "train", "evaluate", "weights"},  # measures whole runs, too
  "train": BELOW_TRAIN | {"experiment", "evaluate"},
  "study": BELOW_TRAIN | {"experiment", "train", "evaluate"},
  "show": BELOW_TRAIN | {"experiment", "evaluate"},
  "__main__": BELOW_TRAIN | {"experiment", "train", "evaluate", "follow", "plan", "bench", "study", "show", "weights"},
  "__init__": set(),
}
# Library -> the rooms that may import it: one door each, so that replacing it is one file's work.
DOORS: dict[str, set[str]] = {
  "flax": {"models"},
  "orbax": {"checkpoint"},
  "grain": {"data"},
  "tensorflow_datasets": {"data"},
  "array_record": {"data"},
  "tensorflow": set(),
  "absl": {"__main__"},
  "argparse": {"__main__", "bench", "study"},  # bench/ adds its flags to a parser it is given
  "wandb": {"telemetry"},
  "tensorboardX": {"telemetry"},
  "torch": {"weights", "bench"},  # bench compares with it
  "transformers": {"weights"},
  "safetensors": {"weights"},
  "huggingface_hub": {"weights"},
}
# Someone with a codebase of their own copies these rooms: beyond the standard library they need only this.
PURE_ROOMS = {"losses", "views", "theory"}
PURE_LIBRARIES = {"jax", "jaxlib", "numpy", "scipy", "jepa_jax"}


def room_of(path: Path) -> str:
  """Returns the folder or the file name directly under jepa_jax/."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str) -> list[str]:
  """Returns every imported module of a source as a dotted path, also those imported inside functions."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      module = "." * node.level + (node.module or "")
      # `from jepa_jax import losses` names a room; `from jepa_jax.losses import sigreg` has it in the module already.
      found += [f"{module}.{alias.name}" for alias in node.names] if module == "jepa_jax" else [module]
  return found


def broken_rules(room: str, source: str) -> list[str]:
  """Returns one sentence per forbidden import of a file in `room`."""
  problems = []
  for module in imported_modules(source):
    top, _, rest = module.partition(".")
    other = rest.partition(".")[0]
    if not top:
      problems.append(f"relative import {module}: write the full path")
    elif top == "jepa_jax" and other in ALLOWED and other not in {room} | LEAVES | ALLOWED[room]:
      problems.append(f"{room} may not import jepa_jax.{other}")
    elif room not in DOORS.get(top, {room}):
      problems.append(f"{room} may not import {top}: its door is {sorted(DOORS[top]) or 'nowhere'}")
    elif room in PURE_ROOMS and top not in PURE_LIBRARIES | sys.stdlib_module_names:
      problems.append(f"{room} may not import {top}: it stays pure (jax, numpy, scipy)")
  return problems


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_keeps_the_rules(path: Path):
  room, source = room_of(path), path.read_text()
  assert room in ALLOWED, f"{room} is a new room: say in ALLOWED what it may import"
  assert not (problems := broken_rules(room, source)), "\n".join(problems)
  num_lines = len(source.splitlines())
  assert num_lines <= MAX_LINES, f"{num_lines} lines: split the file (at most {MAX_LINES})"


def test_every_import_points_one_way():
  """ALLOWED itself has no cycle, so no pair of rooms can come to need each other."""
  done: set[str] = set()
  while len(done) < len(ALLOWED):
    ready = {room for room, below in ALLOWED.items() if room not in done and below - {room} <= done}
    assert ready, f"these rooms import each other in a circle: {sorted(set(ALLOWED) - done)}"
    done |= ready


def test_no_drawer_for_odds_and_ends():
  drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
  paths = [p for folder in ("jepa_jax", "configs", "tests") for p in (ROOT / folder).rglob("*")]
  assert not [str(p) for p in paths if p.suffix in {"", ".py"} and drawers & set(p.stem.lower().split("_"))]


@pytest.mark.parametrize(
  ("room", "source"),
  [
    ("losses", "import flax.linen as nn"),
    ("losses", "import optax"),
    ("losses", "from jepa_jax.models import vit"),
    ("views", "def f():\n  from jepa_jax import objectives"),
    ("models", "from orbax.checkpoint import v1"),
    ("models", "import jepa_jax.train"),
    ("objectives", "import flax"),
    ("objectives", "from jepa_jax.step import TrainState"),
    ("data", "import tensorflow as tf"),
    ("evals", "from jepa_jax.train import main"),
    ("step", "from jepa_jax.config import Config"),
    ("train", "import argparse"),
    ("train", "from absl import flags"),
    ("plan", "from jepa_jax import train"),
    ("theory", "from . import bounds"),
  ],
)
def test_a_forbidden_import_is_found(room: str, source: str):
  assert len(broken_rules(room, source)) == 1


@pytest.mark.parametrize(
  ("room", "source"),
  [
    (
      "losses",
      "import dataclasses\nimport jax.numpy as jnp\nfrom scipy import stats\nfrom jepa_jax.sharding import constrain",
    ),
    ("models", "import flax.linen as nn\nfrom jepa_jax.models.interface import EncoderOutput"),
    ("data", "import grain\nimport tensorflow_datasets as tfds"),
    ("objectives", "from jepa_jax import losses\nfrom jepa_jax import __version__"),
    ("__main__", "import argparse\nfrom jepa_jax.train import train"),
  ],
)
def test_an_allowed_import_passes(room: str, source: str):
  assert broken_rules(room, source) == []
