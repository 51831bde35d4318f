"""Checksums of a folder's files: written beside them when the folder is whole, compared before it is read again.

Orbax writes none (0.12.8): an array with a flipped bit is restored without a word. XXH3 overlooks one damage in 2^64
and is as fast as memory; it is against accidents, not against forgers. A list without "kind" is of CRC-32s, as once.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from jepa_jax.workdir import read_json, write_json

CHECKSUMS = "checksums.json"
_BLOCK = 2**26  # of a file: each has its checksum, so that threads and processes share a large one
_READ = 2**20  # at once: what fits a core's cache


class _CRC32:
  """zlib's, as `hashlib` has its sums."""

  def __init__(self):
    self._value = 0

  def update(self, piece: Any) -> None:
    self._value = zlib.crc32(piece, self._value)

  def intdigest(self) -> int:
    return self._value


_KINDS: dict[str, Callable[[], Any]] = {"xxh3_64": xxhash.xxh3_64, "crc32": _CRC32}
_WRITTEN = "xxh3_64"


def write_checksums(folder: Path, stop: Callable[[], bool] = lambda: False) -> None:
  """Writes <folder>/checksums.json: {"kind", "files": {name: [bytes, [sum of each 64 MiB]]}} of all files below.

  Nothing is written where `stop`, asked at every block, says so.
  """
  sizes = {_name(folder, path): path.stat().st_size for path in _files(folder)}
  places = [(name, start) for name, size in sorted(sizes.items()) for start in range(0, size, _BLOCK)]
  sums: dict[str, list[int]] = {name: [] for name in sorted(sizes)}
  with _pool() as pool:
    sum_of = lambda place: 0 if stop() else _sum(folder / place[0], place[1], _KINDS[_WRITTEN])
    for (name, _), found in zip(places, pool.map(sum_of, places)):
      sums[name].append(found)
  if stop():
    return
  files = {name: [sizes[name], found] for name, found in sums.items()}
  write_json(folder / CHECKSUMS, {"kind": _WRITTEN, "files": files})


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
    kind = content.get("kind", "crc32")
    files = {name: (int(size), list(sums)) for name, (size, sums) in content["files"].items()}
    if any(len(sums) != -(-size // _BLOCK) for size, sums in files.values()):
      raise ValueError("other numbers of sums than of blocks")
  except FileNotFoundError:
    return None
  except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
    return [f"{CHECKSUMS} is no list of checksums"]
  if kind not in _KINDS:  # to call it damage would move a good checkpoint away
    raise ValueError(
      f"{folder / CHECKSUMS} has sums of kind {kind!r}, of a later version: use that, or remove the file"
    )
  make = _KINDS[kind]
  parts = tuple(parts)
  asked = [name for name in sorted(files) if "" in parts or Path(name).parts[0] in parts]
  faults = {name: _wrong_size(folder / name, files[name][0]) for name in asked}
  blocks = [(name, i) for name in asked if not faults[name] for i in range(len(files[name][1]))]
  mine = blocks[share[0] :: share[1]]
  with _pool() as pool:
    found = pool.map(lambda block: _sum(folder / block[0], block[1] * _BLOCK, make), mine)
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


def _sum(path: Path, start: int, make: Callable[[], Any]) -> int:
  """Returns the sum of the block that begins at `start`, made without the lock of the interpreter."""
  found, left, buffer = make(), _BLOCK, memoryview(bytearray(_READ))
  with path.open("rb", buffering=0) as file:
    file.seek(start)
    while left and (count := file.readinto(buffer[: min(_READ, left)])):
      found.update(buffer[:count])
      left -= count
  return found.intdigest()


def _name(folder: Path, path: Path) -> str:
  return path.relative_to(folder).as_posix()


def _files(folder: Path) -> Iterator[Path]:
  return (path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)


def _pool() -> ThreadPoolExecutor:
  return ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
