"""One file per protocol: a new one is its file and its name in `_FILES`. `EvalConfig` says which a run uses."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from jepa_jax.choices import check_choices, did_you_mean
from jepa_jax.evals.base import Data as Data
from jepa_jax.evals.base import Monitor as Monitor
from jepa_jax.evals.base import Protocol as Protocol
from jepa_jax.evals.base import Result as Result
from jepa_jax.evals.base import Splits as Splits
from jepa_jax.evals.base import Subject as Subject
from jepa_jax.evals.dense import DenseSettings
from jepa_jax.evals.table import cell_text as cell_text
from jepa_jax.evals.table import print_table as print_table
from jepa_jax.evals.tuning import TuningSettings
from jepa_jax.objectives import Objective

# Each ends with PROTOCOL = ...
_FILES = ("knn", "linear", "fewshot", "ijepa", "attentive", "fine_tuning", "label_free")
_FILES += ("segmentation", "dense_retrieval", "dense_predictor")
_FILES += ("mrr", "retrieval", "zero_shot", "predictor_tuning")
PROTOCOLS: dict[str, type[Protocol]] = {name: importlib.import_module(f"{__name__}.{name}").PROTOCOL for name in _FILES}
PIXEL_PX = 32  # raw-pixel baselines look at this size at most
SHARED: dict[str, type] = {
  "tuning": TuningSettings,
  "dense": DenseSettings,
}  # groups that several protocols read, see `Protocol.shares`


@dataclasses.dataclass(frozen=True)
class _EvalSettings:
  """Which protocols (`names`), and what they share; each protocol's own settings stand under its name.

  Attributes:
    batch_size: images that go through the encoder at a time, over all devices.
    view_px: side of the evaluation view; 0 is the encoder's own image size.
    view_width_px: its width, where it is no square; view_px is its height then.
    crop_fraction: share of the shorter side that is kept; .875 is the usual 256 -> 224.
    seed: of draws, splits and what starts at random.
    precision: of stored features. "auto" is half where those of both splits would take more than memory_gb.
    memory_gb: what probes may hold of the features, on the host and on the devices: a bound, whatever the data set.
  """

  names: tuple[str, ...] = ("knn", "linear", "fewshot")
  batch_size: int = 256
  view_px: int = 0
  view_width_px: int = 0
  crop_fraction: float = 1.0
  seed: int = 0
  precision: Literal["auto", "float16", "float32"] = "auto"
  memory_gb: float = 4.0

  def __post_init__(self):
    check_choices(self)
    check_evals(self.names)
    if self.view_width_px < 0:
      raise ValueError(f"view_width_px={self.view_width_px} is the width of the view, or 0 for a square")
    if self.batch_size < 1 or self.view_px < 0 or not 0 < self.crop_fraction <= 1 or self.memory_gb <= 0:
      raise ValueError("batch_size is at least 1, view_px 0 or more, crop_fraction in (0, 1], memory_gb positive")
    for name in (*PROTOCOLS, *SHARED):
      group = getattr(self, name)
      if group != type(group)() and not (readers := self._readers(name)) & set(self.names):
        raise ValueError(
          f"evals.{name} is set, but evals.names={','.join(self.names)} asks for nothing that reads it: leave it out, "
          f"or ask for {' or '.join(sorted(readers))}"
        )

  def _readers(self, group: str) -> set[str]:
    """The names that, where they are asked for, bring a protocol that reads this group of settings."""
    reads = {name for name, protocol in PROTOCOLS.items() if group == name or group in protocol.shares}
    return reads | {name for name, protocol in PROTOCOLS.items() if reads & set(protocol.beside)}

  def in_half(self, num_bytes: int) -> bool:
    """Whether the features of both splits, which take so many bytes in single precision, are stored in half."""
    if self.precision != "auto":
      return self.precision == "float16"
    return num_bytes > self.memory_gb * 1e9

  @property
  def asked(self) -> dict[str, Protocol]:
    """The protocols to run, by name: some bring those that their numbers are read against."""
    names = [*self.names, *(other for name in self.names for other in PROTOCOLS[name].beside)]
    return {name: getattr(self, name) for name in dict.fromkeys(names)}


if TYPE_CHECKING:
  EvalConfig = Any
else:
  _GROUPS = [(name, cls, dataclasses.field(default=cls())) for name, cls in {**PROTOCOLS, **SHARED}.items()]
  EvalConfig = dataclasses.make_dataclass("EvalConfig", _GROUPS, bases=(_EvalSettings,), frozen=True)
  EvalConfig.__doc__, EvalConfig.__module__ = _EvalSettings.__doc__, __name__


def check_evals(names: tuple[str, ...]) -> None:
  """Raises a ValueError that lists the known protocols where a name is none of them."""
  for name in names:
    if name not in PROTOCOLS:
      raise ValueError(
        f"unknown evaluation {name!r}; choose from {', '.join(PROTOCOLS)}{did_you_mean(name, PROTOCOLS)}"
      )


def only_asked(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
  """Returns the plain settings of EvalConfig for these protocols alone: what others read goes back to its default."""
  known = [name for name in names if name in PROTOCOLS]  # of others EvalConfig says that they are none
  asked = {*known, *(other for name in known for other in PROTOCOLS[name].beside)}
  kept = asked | {group for name in asked for group in PROTOCOLS[name].shares}
  gone = {*PROTOCOLS, *SHARED} - kept
  return {key: value for key, value in values.items() if key not in gone} | {"names": list(names)}


def online_monitor(objective: Objective) -> Monitor | None:
  """Returns what protocols watch in training with the networks themselves, all in one; None where none does."""
  found = [monitor for protocol in PROTOCOLS.values() if (monitor := protocol.monitor(objective))]
  watch = lambda *args: {name: value for monitor in found for name, value in monitor.watch(*args).items()}
  references = {name: value for monitor in found for name, value in monitor.references.items()}
  return Monitor(watch, references) if found else None
