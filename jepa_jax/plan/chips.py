"""Published numbers of the chips that a step can be compiled for, and how their topologies are named.

Units: GiB for memory, GB/s (1e9) for bandwidths, TFLOP/s (1e12, dense bfloat16) for the matrix units, all per chip.
Sources, read in 2026. TPU: https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e, .../tpu7x (their
tables "System architecture"). `ici_gb_s` is the published "bidirectional ICI bandwidth": all links of a chip, both
directions added, so a chip sends at most half of it. v4's page has no such line; 540 is twice its all-reduce bandwidth
(1.1 PB/s over 4096 chips), rounded to six links of 90. NVIDIA: data sheets of A100, H100, H200 and B200 (SXM), NVLink
in both directions for `ici_gb_s`, one network card of a DGX per GPU for `dcn_gb_s`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from jepa_jax.plan.gpus import GPUS


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip. `dims` sides in its topology; XLA sees `devices` devices per chip, which share its numbers."""

  name: str
  dims: int
  max_chips: int  # of one slice: connected by ICI
  hbm_gib: float
  hbm_gb_s: float
  peak_tflop_s: float
  ici_gb_s: float
  dcn_gb_s: float | None  # to other slices; None: not published per chip
  devices: int = 1
  libtpu_name: str = ""
  libtpu_config: str = "default"
  is_gpu: bool = False

  @property
  def device_bytes(self) -> int:
    """Memory of one device."""
    return int(self.hbm_gib / self.devices * 2**30)


def _gpu(name: str, peak_tflop_s: float, nvlink_gb_s: float, nic_gb_s: float) -> Chip:
  gpu = GPUS[name]
  return Chip(name, 1, 8, gpu.memory_bytes / 2**30, gpu.memory_gb_s, peak_tflop_s, nvlink_gb_s, nic_gb_s, is_gpu=True)


CHIPS: dict[str, Chip] = {
  c.name: c
  for c in (
    # Two cores act as one device ("megacore"), as on the machines themselves.
    Chip("v4", 3, 4096, 32, 1200, 275, 540, None, libtpu_config="megacore"),
    Chip("v5e", 2, 256, 16, 819, 197, 400, 25 / 8),  # two NICs of 100 Gb/s per host of 8 chips
    Chip("v5p", 3, 8960, 95, 2765, 459, 1200, 50 / 8, libtpu_config="megacore"),
    Chip("v6e", 2, 256, 32, 1638, 918, 800, 100 / 8),
    Chip("7x", 3, 9216, 192, 7380, 2307, 1200, 100 / 8, devices=2, libtpu_name="tpu7x"),
    _gpu("a100", 312, 600, 25),
    _gpu("a100-40", 312, 600, 25),
    _gpu("h100", 989, 900, 50),
    _gpu("h200", 989, 900, 50),
    _gpu("b200", 2250, 1800, 50),
  )
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "v7x": "7x", "tpu7x": "7x", "ironwood": "7x"}
EXAMPLES = (
  "v4:4x4x4",
  "v5e:4x4",
  "v5e:16x16",
  "v5p:4x4x8",
  "v6e:16x16",
  "7x:4x4x4",
  "a100:8",
  "a100-40:8",
  "h100:1",
  "h200:8",
  "b200:8",
  "cpu:8",
)


@dataclasses.dataclass(frozen=True)
class Topology:
  """What to compile for: `num_slices` slices of `sides` chips, or (chip None) that many fake CPU devices."""

  chip: Chip | None
  sides: tuple[int, ...]
  num_slices: int = 1

  @property
  def num_chips(self) -> int:
    return math.prod(self.sides) * self.num_slices

  @property
  def name(self) -> str:
    """The canonical text, such as "v5e:16x16" or "2 x v5e:16x16"."""
    text = f"{self.chip.name if self.chip else 'cpu'}:{_text(self.sides)}"
    return text if self.num_slices == 1 else f"{self.num_slices} x {text}"


def parse_topology(text: str, num_slices: int = 1) -> Topology:
  """Returns the Topology of "v5e:16x16", "v5p:4x4x8", "cpu:8"; a ValueError names the nearest that exists."""
  kind, _, shape = text.strip().lower().partition(":")
  kind = _ALIASES.get(kind, kind)
  if kind not in CHIPS and kind != "cpu":
    near = difflib.get_close_matches(kind, [*CHIPS, *_ALIASES, "cpu"], n=1, cutoff=0.3)
    hint = f"did you mean {_ALIASES.get(near[0], near[0])}? " if near else ""
    raise ValueError(
      f"--topology={text}: unknown chip {kind!r}; {hint}Known: {', '.join([*CHIPS, 'cpu'])}; "
      f"for example {', '.join(EXAMPLES)}"
    )
  if num_slices < 1:
    raise ValueError(f"--num-slices={num_slices} must be at least 1")
  if not re.fullmatch(r"\d+(x\d+)*", shape) or 0 in (sides := tuple(int(s) for s in shape.split("x"))):
    raise ValueError(f"--topology={text}: write the chip and its sides, for example {_example(kind)}")
  if kind == "cpu":
    if len(sides) > 1 or num_slices > 1:
      raise ValueError(f"--topology={text}: fake CPU devices have one number and one slice, for example cpu:8")
    return Topology(None, sides)
  check = _check_gpus if CHIPS[kind].is_gpu else _check_sides
  check(text, CHIPS[kind], sides, num_slices)
  return Topology(CHIPS[kind], sides, num_slices)


def _check_gpus(text: str, chip: Chip, sides: tuple[int, ...], num_slices: int) -> None:
  if len(sides) > 1 or math.prod(sides) > chip.max_chips or num_slices > 1:
    raise ValueError(
      f"--topology={text}: GPUs are planned on one host, connected by NVLink: write one number up to {chip.max_chips}, "
      f"for example {_example(chip.name)}, and no --num-slices"
    )


def _check_sides(text: str, chip: Chip, sides: tuple[int, ...], num_slices: int) -> None:
  if len(sides) != chip.dims:
    raise ValueError(
      f"--topology={text}: {chip.name} is a {chip.dims}-D torus, so write {chip.dims} sides, for example "
      f"{_example(chip.name)}"
    )
  if math.prod(sides) > chip.max_chips:
    raise ValueError(
      f"--topology={text}: {math.prod(sides)} chips, but a slice of {chip.name} has at most {chip.max_chips}; take "
      "several with --num-slices"
    )
  near = tuple(max(2, 2 * round(s / 2)) for s in sides[:2]) + sides[2:]  # a host holds 2 x 2 chips
  if sides != near and sides != (1, 1):
    raise ValueError(
      f"--topology={text}: hosts hold 2 x 2 chips, so the first two sides are even; nearest: {chip.name}:{_text(near)}"
    )


def _text(sides: tuple[int, ...]) -> str:
  return "x".join(map(str, sides))


def _example(kind: str) -> str:
  return next(e for e in EXAMPLES if e.startswith(kind + ":"))
