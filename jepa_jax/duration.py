"""Lengths of training with their unit: "100ep", "5000steps", "2%"."""

from __future__ import annotations

import dataclasses
import re

_PATTERN = re.compile(r"^\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(ep|epochs?|steps?|%)\s*$")


@dataclasses.dataclass(frozen=True)
class Duration:
  """A length of training; `steps()` turns it into a whole number of optimiser steps."""

  value: float
  unit: str  # "ep" | "steps" | "%"

  @classmethod
  def parse(cls, text: str) -> Duration:
    """Returns the Duration that text spells; ValueError names the three forms."""
    match = _PATTERN.match(str(text))
    if not match:
      raise ValueError(f'{text!r} is not a duration: write epochs ("100ep"), steps ("5000steps") or a share ("2%")')
    unit = {"e": "ep", "s": "steps", "%": "%"}[match[2][0]]
    if not float(match[1]) < 2**31:
      raise ValueError(f"{text!r} is too long: steps are counted up to {2**31 - 1:,}")
    return cls(float(match[1]), unit)

  def steps(self, steps_per_epoch: float, total_steps: int | None = None) -> int:
    """Returns optimiser steps, rounded to the nearest; a share needs total_steps."""
    if self.unit == "steps":
      return round(self.value)
    if self.unit == "ep":
      return round(self.value * steps_per_epoch)
    if total_steps is None:
      raise ValueError(f'"{self}" is a share of the total, so the total itself must be in epochs or steps')
    return round(self.value / 100 * total_steps)

  def __str__(self) -> str:
    return f"{int(self.value) if self.value == int(self.value) else self.value!r}{self.unit}"
