"""Which collectives a compiled program runs per step, read from its text.

A program's text is a list of computations; a loop's body stands there once however often it runs, and TPU programs
spread one asynchronous collective over several fusions that share its channel. Both are undone here: the text is walked
from its entry, bodies count as often as their loop runs, and a channel counts once per computation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (?P<shapes>.*?) (?P<kind>{'|'.join(KINDS)}|ragged-all-to-all)(?P<start>-start)?\(")
_SEND = re.compile(r' = (?P<shapes>.*?) send\(.*_xla_megascale_transfer_type="(?P<type>\w+)"')
_RUNS_OTHERS = (" while(", " conditional(", " call(", "calls=")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective among `group` devices; bytes are of whole arrays: gathered, or before they are scattered.

  `link` is "dcn" between slices (bytes are then what a device hands over), else "ici". `runs` per step; `every_step` is
  False inside a branch; `unknown_loop` where a loop around it has no readable length (counted once).
  """

  kind: str
  link: str
  group: int
  largest_bytes: int
  bytes: int
  runs: int
  every_step: bool
  unknown_loop: bool = False

  @property
  def sent_bytes(self) -> float:
    """Bytes that every chip sends per run, with the best algorithm: a ring, or its equal on a torus."""
    share = (self.group - 1) / self.group
    if self.kind == "all-reduce":
      return 2 * share * self.bytes
    if self.kind == "all-gather" and self.link == "dcn":  # `bytes` are what a chip hands to the network: one part
      return (self.group - 1) * self.bytes
    return self.bytes * (1.0 if self.kind in ("collective-permute", "one-to-one") else share)


def collectives(hlo_text: str, num_devices: int, num_slices: int = 1) -> list[Collective]:
  """Returns every collective of a compiled program's text, loops and asynchronous pieces resolved."""
  computations, entry = split(hlo_text)
  found: list[Collective] = []
  for line, where, runs, every_step, unknown in _walk(computations, entry):
    shapes, kind, link = _read(line, where)
    if kind:
      group = num_slices if link == "dcn" else _group_size(line, num_devices)
      largest, total = max(shapes, default=0), sum(shapes)
      found.append(Collective(kind, link, group, largest, total, runs, every_step, unknown))
  return found


def split(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns computation name -> its lines that matter, and the name of the entry."""
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    if header := _HEADER.match(line):
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    else:
      lines.append(line)
  return computations, entry


def reached(computations, entry) -> Iterator[tuple[str, int, bool, bool]]:
  """Yields (computation, runs, every_step, unknown_loop) of the entry and of all that it runs, but for fusions."""
  stack = [(entry, 1, True, False)]
  while stack:
    root, runs, every_step, unknown = stack.pop()
    yield root, runs, every_step, unknown
    for _, line in _lines(computations, root):
      if " while(" in line:
        count = _trip_count(line, computations)
        stack.append((reference(line, "body"), runs * (count or 1), every_step, unknown or count is None))
      elif " conditional(" in line:
        stack += [(branch, runs, False, unknown) for branch in _branches(line)]
      elif " call(" in line:
        stack.append((reference(line, "to_apply"), runs, every_step, unknown))


def _lines(computations, root) -> Iterator[tuple[str, str]]:
  """Yields (computation, line) of a computation and of its fusions, which belong to it."""
  pieces = [root]
  while pieces:
    name = pieces.pop()
    for line in computations.get(name, ()):
      yield name, line
      if "calls=" in line:
        pieces.append(reference(line, "calls"))


def _walk(computations, entry) -> Iterator[tuple[str, str, int, bool, bool]]:
  """Yields (line, computation, runs, every_step, unknown_loop) for every collective reached from the entry."""
  for root, runs, every_step, unknown in reached(computations, entry):
    channels = set()
    for name, line in _lines(computations, root):
      if any(mark in line for mark in _RUNS_OTHERS) or not (_COLLECTIVE.search(line) or _SEND.search(line)):
        continue
      channel = re.search(r"channel_id=(\d+)", line)
      if not (channel and channel[1] in channels):
        channels |= {channel[1]} if channel else set()
        yield line, name, runs, every_step, unknown


def reference(line: str, field: str) -> str:
  match = re.search(rf"\b{field}=%?([\w.\-]+)", line)
  return match[1] if match else ""


def _branches(line: str) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", line)
  names = (
    listed[1].split(",") if listed else [reference(line, "true_computation"), reference(line, "false_computation")]
  )
  return [name.strip().lstrip("%") for name in names]


def _trip_count(line: str, computations: dict[str, list[str]]) -> int | None:
  """A scan's condition is `counter < constant` from 0; XLA writes the count on the loop where it knows it."""
  if known := re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', line):
    return int(known[1])
  condition = "\n".join(computations.get(reference(line, "condition"), ()))
  limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", condition)
  return int(limits[0]) if len(limits) == 1 and "direction=LT" in condition else None


def _read(line: str, where: str) -> tuple[list[int], str, str]:
  """Returns (bytes of each whole array, kind, link) of one instruction."""
  if send := _SEND.search(line):
    return sizes_of(send["shapes"])[:1], send["type"].lower().replace("_", "-"), "dcn"
  match = _COLLECTIVE.search(line)
  assert match
  sizes, kind = sizes_of(match["shapes"]), match["kind"]
  if match["start"] and kind != "all-reduce":  # (operands, results, tokens)
    sizes = [size for size in sizes if size > 4] or sizes
    sizes = sizes[len(sizes) // 2 :]
  if kind == "all-reduce" and where.startswith("all-reduce-scatter"):  # how TPU programs write a reduce-scatter
    kind = "reduce-scatter"
  elif kind == "reduce-scatter":  # its result is one part
    sizes = [size * _group_size(line, 1) for size in sizes]
  return sizes, kind, "ici"


def sizes_of(shapes: str) -> list[int]:
  return [_BYTES.get(t, 4) * math.prod(int(d) for d in dims.split(",") if d) for t, dims in _ARRAY.findall(shapes)]


def _group_size(line: str, num_devices: int) -> int:
  """Reads the three spellings of replica_groups: {{0,1},{2,3}}, [2,4]<=[8], mesh['a'=2,'b'=4] ... {'b'}."""
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return len(match[1].split(","))
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
    return int(match[1])
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
    sizes = dict(pair.split("=") for pair in match[1].split(","))
    return math.prod(int(sizes[axis]) for axis in match[2].split(",") if axis)
  return 2 if "source_target_pairs" in line else num_devices


def by_kind(found: list[Collective]) -> dict[tuple[str, str, bool], list[Collective]]:
  """Groups by (kind, link, every_step), most bytes sent first."""
  groups: dict[tuple[str, str, bool], list[Collective]] = defaultdict(list)
  for c in found:
    groups[c.kind, c.link, c.every_step].append(c)
  return dict(sorted(groups.items(), key=lambda item: -sum(c.runs * c.sent_bytes for c in item[1])))
