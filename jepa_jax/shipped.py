"""The configs that come with the project: found by name, from a clone and from an installed wheel."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

from jepa_jax.choices import did_you_mean

_PACKAGE = Path(__file__).resolve().parent
# A wheel holds them inside the package, a clone beside it.
FOLDER = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)


class Shipped(NamedTuple):
  """A config: its name, its variants (the default first, () for one experiment) and the first line that it says."""

  name: str
  variants: tuple[str, ...]
  about: str


def shipped() -> list[Shipped]:
  """Returns every config of the project, by name; none of them is run."""
  found = []
  for path in sorted(FOLDER.glob("*.py")):
    tree = ast.parse(path.read_text())
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    variants = ast.literal_eval(assigned["VARIANTS"]) if "VARIANTS" in assigned else ()
    found.append(Shipped(path.stem, tuple(variants), (ast.get_docstring(tree) or "").split("\n")[0]))
  return [config for config in found if not config.name.startswith("_")]


def find_config(name: str | Path) -> Path:
  """Returns the file of a config: a path, or the name of one that comes with the project, with or without .py.

  A path configs/NAME.py that is not there is looked for among those, too: commands of the docs work in any folder.
  ValueError, with the near names, where there is none.
  """
  path = Path(name)
  if path.is_file():
    return path
  stem = path.name.removesuffix(".py")
  if path.parent in (Path(), Path("configs")) and (FOLDER / f"{stem}.py").is_file():
    return FOLDER / f"{stem}.py"
  near = did_you_mean(stem, [config.name for config in shipped()])
  beside = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent != Path() and path.parent.is_dir() else []
  there = f"; in {path.parent}/: {', '.join(beside)}" if beside else ""
  what = "it is a folder" if path.is_dir() else "there is no such file, and the project has no config of that name"
  raise ValueError(f"--config={name}: {what}{near}{there} (`python -m jepa_jax configs` lists those that do)")


def add_arguments(parser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("--json", action="store_true", help="print JSON")


def run(overrides: dict[str, str] | None = None) -> dict[str, dict]:
  """Returns {name: {"variants", "about"}} of every config that comes with the project."""
  if overrides:
    raise ValueError(f"configs lists configs and changes none: leave out --config.{next(iter(overrides))}")
  return {config.name: {"variants": list(config.variants), "about": config.about} for config in shipped()}


def render(found: dict[str, dict]) -> str:
  """Returns a line for each."""
  name = lambda key, value: key + (f":{'|'.join(value['variants'])}" if value["variants"] else "")
  lines = [(name(key, value), value["about"]) for key, value in found.items()]
  width = min(max(len(left) for left, _ in lines), 44)
  return "\n".join(f"{left:{width}s}  {about}" for left, about in lines)
