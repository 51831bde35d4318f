"""Checksums of a folder's files: written beside them when the folder is whole, compared before it is read again.

Orbax writes none (0.12.8): an array with a flipped bit is restored without a word. CRC-32 finds any damage of up to 32
bits in a row for certain and overlooks one in 4 billion of others; it is against accidents, not against forgers.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jepa_jax.workdir import read_json, write_json

CHECKSUMS = "checksums.json"
_BLOCK = 2**26  # of a file: each has its checksum, so that threads and processes share a large one
_READ = 2**22


def write_checksums(folder: Path, stop: Callable[[], bool] = lambda: False) -> None:
  """Writes <folder>/checksums.json: {"files": {name: [bytes, [CRC-32 of each 64 MiB]]}} of all files below.

  Nothing is written where `stop`, asked at every block, says so.
  """
  sizes = {_name(folder, path): path.stat().st_size for path in _files(folder)}
  places = [(name, start) for name, size in sorted(sizes.items()) for start in range(0, size, _BLOCK)]
  sums: dict[str, list[int]] = {name: [] for name in sorted(sizes)}
  with _pool() as pool:
    sum_of = lambda place: 0 if stop() else _sum(folder / place[0], place[1])
    for (name, _), found in zip(places, pool.map(sum_of, places)):
      sums[name].append(found)
  if stop():
    return
  write_json(folder / CHECKSUMS, {"files": {name: [sizes[name], found] for name, found in sums.items()}})


def mark_damaged(folder: Path, reason: str) -> None:
  """Writes down, where there are no checksums, what was found when the folder was read: `damage` says it again."""
  if not (folder / CHECKSUMS).exists():
    write_json(folder / CHECKSUMS, {"damaged": reason})


def damage(folder: Path, parts: Iterable[str] = ("",), share: tuple[int, int] = (0, 1)) -> list[str] | None:
  """Returns what is wrong, one line for each file, or None where the folder has no checksums.

  parts: names directly in the folder whose files are compared; "": all. share: (i, n) compares every n-th block of
  64 MiB from the i-th on, so that n processes together compare all. OSError where a file cannot be read.
  """
  try:
    content = read_json(folder / CHECKSUMS)
    if isinstance(reason := content.get("damaged"), str):
      return [reason]
    files = {name: (int(size), list(sums)) for name, (size, sums) in content["files"].items()}
  except FileNotFoundError:
    return None
  except (ValueError, TypeError, KeyError, AttributeError):
    return [f"{CHECKSUMS} is no list of checksums"]
  parts = tuple(parts)
  asked = [name for name in sorted(files) if "" in parts or Path(name).parts[0] in parts]
  faults = {name: _wrong_size(folder / name, files[name][0]) for name in asked}
  blocks = [(name, i) for name in asked if not faults[name] for i in range(len(files[name][1]))]
  mine = blocks[share[0] :: share[1]]
  with _pool() as pool:
    found = pool.map(lambda block: _sum(folder / block[0], block[1] * _BLOCK), mine)
    for (name, i), value in zip(mine, found):
      if value != files[name][1][i]:
        faults[name] = "holds other bytes than were written"
  return [f"{name} {fault}" for name, fault in faults.items() if fault]


def _wrong_size(path: Path, expected: int) -> str:
  try:
    size = path.stat().st_size
  except (FileNotFoundError, NotADirectoryError):
    return "is missing"
  return "" if size == expected else f"has {size:,} bytes, not {expected:,}"


def _sum(path: Path, start: int) -> int:
  """Returns the CRC-32 of the block that begins at `start`; zlib works without the lock of the interpreter."""
  found, left = 0, _BLOCK
  with path.open("rb") as file:
    file.seek(start)
    while left and (piece := file.read(min(_READ, left))):
      found, left = zlib.crc32(piece, found), left - len(piece)
  return found


def _name(folder: Path, path: Path) -> str:
  return path.relative_to(folder).as_posix()


def _files(folder: Path) -> Iterator[Path]:
  return (path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)


def _pool() -> ThreadPoolExecutor:
  return ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
