"""The architecture, as it is: which room imports which, which library has one door, how long a file is."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from jepa_jax.objectives import METHODS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jepa_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES, MAX_FUNCTION = 400, 60

# A room is a folder or a file of jepa_jax/. Leaves import nothing of ours, and any room may import them.
LEAVES = {"choices", "duration", "flops", "sharding", "streams", "workdir"}
# Room -> the rooms that it imports besides the leaves: what is, not what may be. Compared exactly, so a new import is a
# changed line here, and an arrow that nobody needs any more fails too. A room stands below all that it imports.
IMPORTS: dict[str, str] = {
  "data": "",
  "distributed": "",
  "goodput": "",
  "faked_devices": "",
  "huge_pages": "",
  "losses": "",
  "models": "",
  "low_rank": "",
  "optim": "low_rank",
  "telemetry": "",
  "figure": "",
  "curves": "figure telemetry",
  "shipped": "",
  "shorthand": "",
  "views": "",
  "theory": "losses",
  "upgrade": "data",
  "checksums": "",
  "checkpoint": "checksums distributed",
  "objectives": "data losses models views",  # of the data only how captions look
  "step": "objectives theory views",
  "evals": "data distributed losses models objectives optim theory views",
  "config": "checkpoint data evals models objectives optim shipped shorthand step telemetry",
  "experiment": "config data evals low_rank objectives optim step views",
  "plan": "config data evals experiment models objectives views",
  "runs": "checkpoint config data experiment objectives upgrade views",
  "starts": "checkpoint config data distributed experiment runs step",
  "subjects": "config data distributed evals experiment objectives runs views",
  "evaluate": "config data distributed evals runs subjects",
  "look": "config data",
  "features": "config data evals evaluate runs subjects",
  "follow": "checkpoint data evals evaluate",
  "verify": "checkpoint runs",
  "tokenizer": "config data runs",
  "holder": "distributed",
  "frozen": "data distributed evals experiment objectives step subjects",
  "train": "checkpoint config curves data distributed experiment frozen goodput holder runs starts step telemetry "
  "views",
  "weights": "checkpoint config data evals evaluate experiment features models objectives runs step views",
  "show": "config data evals evaluate figure losses objectives runs subjects views",
  "report": "checkpoint config curves data evals figure goodput runs shipped show telemetry theory views",
  "study": "config data evals evaluate experiment figure goodput losses models objectives runs step telemetry theory "
  "train views",
  "bench": "checkpoint checksums config data distributed evals experiment goodput huge_pages losses models objectives "
  "optim plan runs step telemetry views weights",  # measures whole runs, too
  # The rest by their names.
  "flags": "evals",
  "__main__": "config data distributed evals evaluate faked_devices flags follow huge_pages telemetry train weights",
}
# Library -> the rooms that import it, compared exactly: one door each, so that replacing it is one file's work.
DOORS: dict[str, str] = {
  "flax": "models",
  "orbax": "checkpoint",
  "grain": "data",
  "tensorflow_datasets": "data",
  "tokenizers": "data",
  "ftfy": "data",
  "array_record": "data",
  "pyarrow": "bench data features",
  "cv2": "data",
  "pillow_heif": "data",
  "tifffile": "data",
  "tensorflow": "",
  "absl": "",
  "transformers": "",  # reads what we write, in the tests
  "argparse": "__main__ bench features flags look report study tokenizer verify",  # they add flags to a parser
  "wandb": "telemetry",
  "tensorboardX": "telemetry",
  "torch": "bench weights",  # bench compares with it
  "safetensors": "weights",
  "huggingface_hub": "data",
}
# Someone with a codebase of their own copies these rooms: beyond the standard library they need only this.
PURE_ROOMS = LEAVES | {"losses", "views", "theory"}
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
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
      found += [name.value for name in node.args if isinstance(name, ast.Constant)]
  return found


def imported_rooms(source: str) -> set[str]:
  """Returns the rooms that a source imports; the package's version is in none."""
  ours = [module.split(".")[1] for module in imported_modules(source) if module.startswith("jepa_jax.")]
  return set(ours) - {"__version__"}


def imported_libraries(source: str) -> set[str]:
  return {module.partition(".")[0] for module in imported_modules(source)} - {"jepa_jax"}


def broken_rules(room: str, source: str) -> list[str]:
  """Returns one sentence per import of a file in `room` that the tables do not have."""
  here = {room} | LEAVES | set(IMPORTS.get(room, "").split())
  others = {room} if room in LEAVES else here
  problems = [f"{room} does not import jepa_jax.{other}" for other in sorted(imported_rooms(source) - others)]
  for library in sorted(imported_libraries(source)):
    if not library:
      problems.append("relative import: write the full path")
    elif room not in DOORS.get(library, room).split():
      problems.append(f"{room} does not import {library}: its door is {DOORS[library] or 'nowhere'}")
    elif room in PURE_ROOMS and library not in PURE_LIBRARIES | sys.stdlib_module_names:
      problems.append(f"{room} does not import {library}: it stays pure (jax, numpy, scipy)")
  return problems


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_keeps_the_rules(path: Path):
  assert not (problems := broken_rules(room_of(path), path.read_text())), "\n".join(problems)


def test_the_table_of_rooms_is_what_is_imported():
  found: dict[str, set[str]] = {room_of(path): set() for path in FILES}
  for path in FILES:
    found[room_of(path)] |= imported_rooms(path.read_text()) - {room_of(path)}
  used = set().union(*found.values())
  assert {room: " ".join(sorted(rooms - LEAVES)) for room, rooms in found.items()} == IMPORTS | {
    room: "" for room in {"__init__"} | LEAVES
  }
  assert used >= LEAVES and not any(found[leaf] for leaf in LEAVES)


def test_the_table_of_doors_is_what_is_imported():
  found: dict[str, set[str]] = {library: set() for library in DOORS}
  for path in FILES:
    for library in imported_libraries(path.read_text()) & DOORS.keys():
      found[library].add(room_of(path))
  assert {library: " ".join(sorted(rooms)) for library, rooms in found.items()} == DOORS


def test_every_import_points_one_way():
  """A room imports rooms above it only, so no pair of rooms can come to need each other."""
  above: set[str] = set()
  for room, imported in IMPORTS.items():
    assert set(imported.split()) <= above, f"{room} stands above {sorted(set(imported.split()) - above)}"
    above.add(room)
  for room in PURE_ROOMS - LEAVES:
    assert set(IMPORTS[room].split()) <= PURE_ROOMS, f"{room} is copied with the rooms that it imports"


@pytest.mark.parametrize("folder", ["jepa_jax", "configs", "tests"])
def test_no_file_is_too_long(folder):
  lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
  assert not {name: n for name, n in lengths.items() if n > MAX_LINES}, f"split what has more than {MAX_LINES} lines"


# What every method goes through, and may know none of.
OF_ALL_METHODS = [
  "train",
  "step",
  "evaluate",
  "subjects",
  "experiment",
  "runs",
  "starts",
  "telemetry",
  "sharding",
  "optim",
]


@pytest.mark.parametrize("room", OF_ALL_METHODS)
def test_no_name_of_a_method_where_all_go_through(room):
  # "clip" is what is done to gradients, too.
  names = {*(config.name for config in METHODS), "i-jepa", "sigreg", "vicreg", "dino", "mae"} - {"clip"}
  found = set(re.findall(r"[a-z][a-z0-9-]*", (PACKAGE / f"{room}.py").read_text().lower())) & names
  assert not found


def test_no_function_is_too_long():
  """Sixty lines, and the loop."""
  lengths = {
    f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
  }
  assert {name for name, length in lengths.items() if length > MAX_FUNCTION} == {"jepa_jax/train.py:_train"}


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
    ("plan", "import importlib\nimportlib.import_module('jepa_jax.train')"),
    ("theory", "from . import bounds"),
    ("streams", "from jepa_jax.choices import did_you_mean"),
    ("workdir", "import optax"),
    ("data", "from jepa_jax.files import write_whole"),  # no such room
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
