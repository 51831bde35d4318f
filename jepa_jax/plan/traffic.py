"""What a compiled step reads from and writes to memory, by what it is for, read from the program's text.

Most of a vision transformer's step waits for memory and not for products, so bytes say more than FLOPs. Every kernel
(a fusion, a product, a copy, a call of a library) reads its operands once and writes its results once; loops count as
often as they run, once where their length cannot be read. Of a slice, taken or written in place, the slice counts; a
scatter counts the whole buffer. Caches are not modelled; what the program itself keeps in a TPU's vector memory, and
the room in which cuBLAS and cuDNN work, count nothing.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jepa_jax.plan import products
from jepa_jax.plan.hlo import reached, reference, sizes_of, split

# First match decides; searched in the op_name that XLA keeps of the function that asked for it.
CATEGORIES = (
  ("residuals", re.compile(r"dynamic_(update_)?(index|slice)|broadcast_in_dim$")),
  ("attention, products", re.compile(r"attn/(qkv|proj)\b|/(q|kv)/dot_general")),
  ("attention", re.compile(r"/attn\b|dot_product_attention|fmha")),
  ("convolutions and batch norms", re.compile(r"stage\d|stem")),
  ("norms", re.compile(r"/norm\d?\b|standardise")),
  ("mlp", re.compile(r"/mlp\b|/fc\d\b|erf")),
  ("patches", re.compile(r"patch_embed|_embed_patches|pos_embed")),
  ("predictor, rest", re.compile(r"Predictor")),
  ("encoder, rest", re.compile(r"jvp\((ViT|ResNet|ConvNet|MLP)\)")),
)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "domain"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency", "copy-done", "slice-done", "async-done"}
_FREE |= {"all-reduce-done", "all-gather-done", "collective-permute-done"}
_FREE |= {"while", "conditional", "call"}  # what they run is counted
_LAYERS = re.compile(r"jit\(\w*\)/|while/body/|closed_call/|checkpoint/|remat2?/|rematted_computation/")
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\([1-9]\)[^}]*\}")  # the memory space in the layout: not HBM
_WORKSPACE = re.compile(r", [su]8\[\d*\](\{0\})?\)$")  # the last result of a library's call
_SLICES = ("dynamic-slice", "slice", "gather")


class Instruction(NamedTuple):
  """One line of a program's text; `bytes` of its result."""

  name: str
  opcode: str
  bytes: int
  operands: tuple[str, ...]
  line: str
  is_root: bool


class Kernel(NamedTuple):
  """What runs as one: its opcode, the name of what it is for, bytes and FLOPs per run, runs, whether in every step."""

  opcode: str
  op_name: str
  bytes: int
  flops: int  # of products; 0 unless they were asked for
  runs: int
  every_step: bool

  @property
  def category(self) -> str:
    return next((name for name, pattern in CATEGORIES if pattern.search(self.op_name)), "rest")


def traffic(found: Iterable[Kernel]) -> dict[str, int]:
  """Returns bytes per step by category, the largest first; "total" comes last. What stands in a branch is left out."""
  counts = collections.Counter()
  for kernel in found:
    counts[kernel.category] += kernel.bytes * kernel.runs * kernel.every_step
  return dict(counts.most_common()) | {"total": counts.total()}


def roofline(found: Iterable[Kernel], gb_per_s: float, tflop_per_s: float) -> list[dict]:
  """Returns a row per category, the longest first: kernels that run in a step, GB, TFLOP, and milliseconds.

  Each kernel takes what its bytes take at gb_per_s or its FLOPs at tflop_per_s, whichever is longer: nothing of
  launches, tiles that do not fit or kernels that run side by side. For programs for NVIDIA GPUs.
  """
  rows = collections.defaultdict(lambda: {"kernels": 0, "gb": 0.0, "tflop": 0.0, "ms": 0.0})
  for kernel in found:
    if kernel.every_step:
      row = rows[kernel.category]
      row["kernels"] += kernel.runs
      row["gb"] += kernel.runs * kernel.bytes / 1e9
      row["tflop"] += kernel.runs * kernel.flops / 1e12
      row["ms"] += kernel.runs * _ms(kernel, gb_per_s, tflop_per_s)
  return sorted(({"category": name, **row} for name, row in rows.items()), key=lambda row: -row["ms"])


def largest_kernels(found: Iterable[Kernel], gb_per_s: float, tflop_per_s: float, num: int = 12) -> list[dict]:
  """Returns the kernels that take longest by `roofline`, those of one name together: runs, GB, ms, and what they do."""
  rows = collections.defaultdict(lambda: {"kernels": 0, "gb": 0.0, "ms": 0.0})
  for kernel in found:
    if kernel.every_step:
      row = rows[kernel.category, kernel.opcode, _LAYERS.sub("", kernel.op_name)]
      row["kernels"] += kernel.runs
      row["gb"] += kernel.runs * kernel.bytes / 1e9
      row["ms"] += kernel.runs * _ms(kernel, gb_per_s, tflop_per_s)
  named = [dict(zip(("category", "opcode", "op_name"), key)) | row for key, row in rows.items()]
  return sorted(named, key=lambda row: -row["ms"])[:num]


def _ms(kernel: Kernel, gb_per_s: float, tflop_per_s: float) -> float:
  return max(kernel.bytes / (gb_per_s * 1e9), kernel.flops / (tflop_per_s * 1e12)) * 1e3


def kernels(hlo_text: str, with_flops: bool = False) -> Iterator[Kernel]:
  """Yields the kernels of a compiled program's text; with_flops, for NVIDIA's only, reads FLOPs, else they are 0."""
  lines, entry = split(hlo_text)
  computations = {name: _instructions(body) for name, body in lines.items()}
  for root, runs, every_step, _ in reached(lines, entry):
    known = {x.name: x for x in computations.get(root, ())}
    for x in known.values():
      if x.opcode not in _FREE:
        flops = _flops(x, known, computations) if with_flops else 0
        yield Kernel(x.opcode, _op_name(x.line), _bytes(x, known, computations), flops, runs, every_step)


def _instructions(body: list[str]) -> list[Instruction]:
  found = []
  for line in body:
    if match := _INSTRUCTION.match(line):
      root, name, shapes, opcode, rest = match.groups()
      inside = rest[: _closing(rest)]
      operands = tuple(re.findall(r"%?([\w.\-]+)(?=,|$)", re.sub(r"/\*.*?\*/", "", inside)))
      if "__cublas" in rest or "__cudnn" in rest:
        shapes = _WORKSPACE.sub(")", shapes)
      sizes = sizes_of(_ON_CHIP.sub("", shapes))
      if opcode in ("copy-start", "slice-start"):  # (copy, original, token)
        sizes = sizes_of(_ON_CHIP.sub("", shapes.split("}")[0] + "}"))[:1]
      found.append(Instruction(name, opcode, sum(sizes), operands, line, bool(root)))
  return found


def _closing(text: str) -> int:
  depth = 1
  for i, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if not depth:
      return i
  return len(text)


def _op_name(line: str) -> str:
  match = re.search(r'op_name="([^"]*)"', line)
  return match[1] if match else ""


def _flops(x: Instruction, known: dict[str, Instruction], computations: dict[str, list[Instruction]]) -> int:
  """Of its product, or of those in a fusion."""
  if x.opcode == "fusion":
    inner = computations.get(reference(x.line, "calls"), [])
    by_name = {y.name: y for y in inner}
    return sum(_flops(y, by_name, computations) for y in inner)
  return products.flops(x.opcode, x.line, [known[name].line for name in x.operands if name in known])


def _bytes(x: Instruction, known: dict[str, Instruction], computations: dict[str, list[Instruction]]) -> int:
  """What it reads and what it writes."""
  size = lambda name: known[name].bytes if name in known else 0
  if x.opcode == "dynamic-update-slice":
    return 2 * size(x.operands[1])
  if x.opcode in _SLICES:
    return 2 * x.bytes
  inner = computations.get(reference(x.line, "calls"), []) if x.opcode == "fusion" else []
  if not inner:
    return x.bytes + sum(size(name) for name in set(x.operands))
  parameters = {int(y.operands[0]): y for y in inner if y.opcode == "parameter"}
  return _written(x, inner) + sum(_read(parameters[i], inner, size(name)) for i, name in enumerate(x.operands))


def _written(x: Instruction, inner: list[Instruction]) -> int:
  """Bytes that a fusion writes: of a buffer that it changes in place, what it changes."""
  by_name = {y.name: y for y in inner}
  root = next((y for y in inner if y.is_root), inner[-1])
  outputs = [by_name[name] for name in root.operands if name in by_name] if root.opcode == "tuple" else [root]
  update = lambda y: by_name[y.operands[1]].bytes if y.operands[1] in by_name else 0
  in_place = lambda y: _through_bitcasts(y, by_name).opcode == "dynamic-update-slice"
  return sum(update(_through_bitcasts(y, by_name)) if in_place(y) else y.bytes for y in outputs)


def _through_bitcasts(x: Instruction, by_name: dict[str, Instruction]) -> Instruction:
  while x.opcode in ("bitcast", "copy") and x.operands and x.operands[0] in by_name:
    x = by_name[x.operands[0]]
  return x


def _read(parameter: Instruction, inner: list[Instruction], size: int) -> int:
  """Bytes of an operand that a fusion reads: slices where it only takes slices, none where it only writes into it."""
  names, users = {parameter.name}, []
  for y in inner:  # in order: bitcasts follow what they rename
    if names & set(y.operands):
      if y.opcode == "bitcast":
        names.add(y.name)
      else:
        users.append(y)
  if not users:
    return 0 if len(inner) > 1 else size
  if all(y.opcode in _SLICES or (y.opcode == "dynamic-update-slice" and y.operands[0] in names) for y in users):
    return min(size, sum(y.bytes for y in users if y.opcode in _SLICES))
  return size
