"""Checksums of a folder's files: written beside them when the folder is whole, compared before it is read again.

Orbax writes none (0.12.8): an array with a flipped bit is restored without a word.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jepa_jax.workdir import read_json, write_json

CHECKSUMS = "checksums.json"
_BLOCK = 2**22


def write_checksums(folder: Path) -> None:
  """Writes <folder>/checksums.json: the size and the SHA-256 of every file below."""
  paths = sorted(_files(folder))
  with _pool() as pool:
    found = list(pool.map(_of_file, paths))
  write_json(folder / CHECKSUMS, {str(path.relative_to(folder)): entry for path, entry in zip(paths, found)})


def mark_damaged(folder: Path, reason: str) -> None:
  """Writes down, where there are no checksums, what was found when the folder was read: `damage` says it again."""
  write_json(folder / CHECKSUMS, {"damaged": reason})


def damage(folder: Path, parts: Iterable[str] = ("",), share: tuple[int, int] = (0, 1)) -> list[str] | None:
  """Returns what is wrong, one line for each file, or None where the folder has no checksums.

  parts: names directly in the folder whose files are compared; "": all. share: (i, n) compares every n-th file from the
  i-th on, so that n processes together compare all. OSError where a file is there and cannot be read.
  """
  try:
    expected = read_json(folder / CHECKSUMS)
    if isinstance(reason := expected.get("damaged"), str):
      return [reason]
    entries = {name: (int(size), str(digest)) for name, (size, digest) in expected.items()}
  except FileNotFoundError:
    return None
  except (ValueError, TypeError, AttributeError):
    return [f"{CHECKSUMS} is no list of checksums"]
  parts, top = tuple(parts), lambda name: Path(name).parts[0]
  asked = [name for name in sorted(entries) if "" in parts or top(name) in parts]
  there = {str(path.relative_to(folder)) for path in _files(folder)}
  lines = [f"{name} is missing" for name in asked if name not in there]
  asked = [name for name in asked if name in there][share[0] :: share[1]]
  with _pool() as pool:
    found = pool.map(lambda name: _compared(folder / name, *entries[name]), asked)
    return lines + [f"{name} {fault}" for name, fault in zip(asked, found) if fault]


def _compared(path: Path, size: int, digest: str) -> str:
  now = path.stat().st_size
  if now != size:
    return f"has {now:,} bytes, not {size:,}"
  return "" if _of_file(path)[1] == digest else "holds other bytes than were written"


def _of_file(path: Path) -> tuple[int, str]:
  found, size = hashlib.sha256(), 0
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      found.update(block)  # without the lock of the interpreter
      size += len(block)
  return size, found.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
  return (path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)


def _pool() -> ThreadPoolExecutor:
  return ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
