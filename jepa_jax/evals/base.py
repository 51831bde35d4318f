"""The seam between evaluation and a protocol: what a protocol is given for a row of the table, and what it yields."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jepa_jax.data import ImageSet, Tokenizer
from jepa_jax.objectives import Objective

log = logging.getLogger(__name__)
Tree = Any
Value = float | tuple[float, float] | None  # percent, or (mean, standard deviation)


class Features(NamedTuple):
  """What a network makes of every image of a split that decodes: (N, D) pooled, (N, F) probe, labels and indices (N,).

  Arrays are of half or single precision and may lie on disk (np.memmap): read them in blocks.
  """

  pooled: np.ndarray
  probe: np.ndarray
  label: np.ndarray
  index: np.ndarray  # of each row's image in its split


class Splits(NamedTuple):
  """The same of the training and of the test images."""

  train: Features
  test: Features


class Result(NamedTuple):
  """One cell of the table, and what there is to say of how it came about (plain values, for JSON)."""

  row: str
  column: str
  value: Value
  detail: Any = None


@dataclasses.dataclass(frozen=True)
class Data:
  """The images of both splits and what is seen of them: view_fn(batch) -> normalised images_BxHxWxC."""

  train: ImageSet
  test: ImageSet
  view_fn: Callable[[Tree], jax.Array]
  view_hw: tuple[int, int]
  crop_fraction: float
  canvas_px: int  # the shorter side of images that are larger
  max_aspect: float
  encoder_px: int  # the encoder's own image size
  tokenizer: Tokenizer | None = None  # of the run's captions

  @property
  def num_classes(self) -> int:
    return self.train.num_classes


@dataclasses.dataclass(frozen=True)
class Subject:
  """What one row of the table is about.

  `features(name)` makes the features of a network, or finds them, `features(name, ("test",))` those of one split alone;
  `made(what, features_fn, splits, cost)` those that a function makes of the image encoder's variables and a batch, of
  images that take `cost` times what the usual view does; `what` stands for the function;
  `variables(name)` are what it is applied to,
  `abstract[name]` their shapes; `networks()` are the whole {"params", "target", "state"} of a checkpoint. `gives` says
  which of "features", "encoder", "networks" and columns of the data there are: pixels have features only, random
  weights no trained predictor. `settings` is EvalConfig; `about()` stands for the images, what is seen of them, and the
  weights.
  """

  row: str
  gives: frozenset[str]
  settings: Any
  data: Data
  mesh: Mesh
  objective: Objective
  features: Callable[..., Splits]
  made: Callable[..., Mapping[str, Features]]
  variables: Callable[[str], Tree]
  abstract: Mapping[str, Tree]
  networks: Callable[[], Mapping[str, Tree]]
  about: Callable[[], str]

  def room(self) -> dict[str, Any]:
    """Returns what probes of features may use: devices, memory, and where they tell how far they are."""
    return {"mesh": self.mesh, "memory_gb": self.settings.memory_gb, "report": log.info}

  def apply_fn(self, name: str = "image") -> Callable[[Tree, jax.Array], Any]:
    return self.objective.networks()[name].apply_fn


class Monitor(NamedTuple):
  """What a protocol shows in training: watch(params, target, batch, keys_B) -> {metric: value}, inside the jitted step;
  references: metric -> the value that it should be read against."""

  watch: Callable[[Tree, Tree, Tree, jax.Array], dict[str, jax.Array]]
  references: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Protocol:
  """A protocol is its settings, in a file of its own: `evals.<name>.<setting>`.

  needs: what of a row it takes ("features", "encoder", "networks", or a column that a source adds, such as "caption"),
    and "labels" unless it does without. Rows that lack it are left out.
  reads: the networks whose features it takes, where it needs any.
  splits: of which images.
  shares: groups of EvalConfig that it reads besides its own, such as "tuning".
  beside: protocols that its numbers are read against: they run with it.
  """

  needs: ClassVar[frozenset[str]] = frozenset({"features", "labels"})
  reads: ClassVar[tuple[str, ...]] = ("image",)
  splits: ClassVar[tuple[str, ...]] = ("train", "test")
  shares: ClassVar[tuple[str, ...]] = ()
  beside: ClassVar[tuple[str, ...]] = ()

  def check(self, subject: Subject) -> None:
    """Raises a ValueError, before anything is compiled, where this row cannot be evaluated so."""

  def prepare(self, subject: Subject) -> None:
    """Makes what takes all processes: features. Those other than the first do nothing else for a protocol."""
    if "features" in self.needs:
      [subject.features(network, self.splits) for network in self.reads]

  def run(self, subject: Subject) -> Iterator[Result]:
    """Yields its cells as they come: of the subject's row, or of a baseline of its own."""
    raise NotImplementedError

  @classmethod
  def monitor(cls, objective: Objective) -> Monitor | None:
    """Returns what of it can be watched in training, for an objective that has what it takes."""
    return None

  def applies(self, subject: Subject) -> bool:
    return self.needs - {"labels"} <= subject.gives
