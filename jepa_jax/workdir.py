"""A run's folder: what its files are called, how they are written whole, and which format they have."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jepa_jax import __version__

# Of checkpoints and config.json. 1: up to version 0.2 (items `encoder` and `state`, encoder.kind, ...), which
# `upgrade.py` reads. 2: items `networks` and `training`.
FORMAT = 2

CONFIG, METRICS, GOODPUT, COMPLETE = "config.json", "metrics.jsonl", "goodput.json", "complete.json"
HOLDER, WANDB = "holder.json", "wandb.json"
VIEWS, CURVES = "views.png", "curves.png"
TOKENIZER = "tokenizer.json"
CHECKPOINTS, DAMAGED = "checkpoints", "checkpoints_damaged"
EVALS, FEATURES, TENSORBOARD, PROFILE = "evals", "features", "tensorboard", "profile"


def cache_folder(name: str) -> Path:
  """Returns where what can be made again is kept between runs: $XDG_CACHE_HOME/jepa_jax/<name>; it may not exist."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepa_jax" / name


def local_workdir(workdir: str | Path) -> Path:
  """Returns the absolute path of a run's folder; ValueError for a file, and for an object store, which would become a
  local folder."""
  if "://" in str(workdir):
    raise ValueError(f"--workdir={workdir}: object stores are not supported yet; mount the bucket and give its path")
  path = Path(workdir).expanduser().resolve()
  check_can_hold(path / CONFIG, f"--workdir={workdir}")
  return path


def check_can_hold(path: Path, what: str) -> None:
  """Raises a ValueError, which begins with `what`, where a file stands in the place of a folder above path."""
  for above in path.absolute().parents:
    if above.exists():
      if not above.is_dir():
        raise ValueError(f"{what}: {above} is a file, where a folder is needed; choose another place")
      return


def write_whole(path: Path, content: str | Callable[[Path], Any], overwrite: bool = True) -> None:
  """Writes a file, or a folder, at once or not at all; two processes may write the same one.

  content: the text, or a function that writes to the path it is given. Without `overwrite` a ValueError where something
  is there already.
  """
  if not overwrite and path.exists():
    raise ValueError(f"{path} exists already and is not overwritten; choose another name, or move it away")
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
  try:
    if isinstance(content, str):
      temporary.write_text(content)
    else:
      content(temporary)
    temporary.replace(path)
  finally:
    if temporary.is_dir():
      shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
  """Writes a value as JSON, at once or not at all."""
  write_whole(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
  """Returns what a file of ours holds; ValueError that names it where it is no JSON, or holds no `kind`."""
  try:
    found = json.loads(path.read_text())
  except IsADirectoryError as error:
    raise ValueError(f"{path} is a folder, where a file should be: move it away") from error
  except ValueError as error:  # JSON's, or that of bytes that are no text
    raise ValueError(f"{path} is not whole JSON ({error}): remove it, or get it back from a copy") from error
  if not isinstance(found, kind):
    raise ValueError(f"{path} holds {str(found)[:40]!r} and no {kind.__name__}: remove it, or get it back from a copy")
  return found


def write_end(workdir: str | Path, step: int) -> None:
  """Marks the run in workdir as ended after `step` steps, for whoever follows it."""
  write_json(Path(workdir) / COMPLETE, {"step": step})


def read_end(workdir: str | Path) -> int | None:
  """Returns the step at which the run ended, or None while it has not; a file that says no step is no end."""
  try:
    return int(read_json(Path(workdir) / COMPLETE)["step"])
  except (FileNotFoundError, ValueError, KeyError, TypeError):  # also where it is removed between a look and a read
    return None


def remove_end(workdir: str | Path) -> None:
  """Removes the mark: the run goes on."""
  (Path(workdir) / COMPLETE).unlink(missing_ok=True)


@functools.cache
def written_by() -> dict[str, str]:
  """Returns the version of jepa_jax and the commit of its checkout ("-dirty" with changes), or "unknown"."""
  commit = "unknown"
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    git = lambda *words: subprocess.run(
      ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()
    # Fails where this file is installed inside somebody's own checkout, whose commit is not ours.
    git("ls-files", "--error-unmatch", Path(__file__).name)
    commit = git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or commit
  return {"version": __version__, "commit": commit}


@functools.cache
def code_digest(*classes: type, only: tuple[str, ...] = ("",)) -> str:
  """Returns ten letters that stand for the source of this package, or of these parts of it, and of the classes' files.

  What was computed is kept under it: a commit does not say what was changed since.
  """
  parts = [Path(__file__).parent / part for part in only]
  paths = {path for part in parts for path in ([part] if part.suffix else part.rglob("*.py"))}
  files = [getattr(sys.modules[cls.__module__], "__file__", None) for cls in classes]  # none in a notebook
  found = hashlib.sha256()
  for path in sorted(paths | {Path(file) for file in files if file}):
    found.update(path.read_bytes())
  return found.hexdigest()[:10]


def check_format(number: int, where: Any, by: Mapping[str, str] | None = None) -> None:
  """Raises a ValueError for a format that is newer than this code."""
  if number > FORMAT:
    by = by or {}
    raise ValueError(
      f"{where} has format {number}, and this code (version {__version__}) reads up to {FORMAT}: it was written by "
      f"version {by.get('version', 'unknown')}, commit {by.get('commit', 'unknown')}; use that one, or a newer"
    )
