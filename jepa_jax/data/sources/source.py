"""What a source is, how one is opened, and the one whose images lie in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jepa_jax.data.schema import Columns

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig


_files_to_open: dict[str, int] = {}
_OTHER_FILES = 512  # what libraries, sockets and checkpoints open besides


class Source(Protocol):
  """Images by index, in a fixed order.

  Attributes:
    class_names: Names of the classes; empty where the images have no labels.
  """

  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict: ...

  def labels(self) -> np.ndarray:
    """Returns every label, int32 (n,)."""
    ...

  def fingerprint(self) -> str:
    """Returns a short text that another set of images or labels does not share.

    What was computed from the data is kept under it. Where the data lie is not part of it, and it is quick for a
    million files: their names and sizes are looked at, not what is in them.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Opening:
  """How a source is opened: what its file declares, and the table of sources holds.

  Attributes:
    open: (settings, "train" or "test") -> the whole split; ValueError, with the fix, where it cannot be read.
    reads: The settings of DataConfig that this source reads and another one does not. Where it reads none of its own,
      a value other than the default is an error.
    needs: Those that must not be empty, and what they are.
    columns: settings -> what a row holds beside image, label and index; `source[i][name]` is an array of that shape.
      They follow from the settings alone: plans and restored networks are made without the data.
  """

  open: Callable[[DataConfig, str], Source]
  reads: tuple[str, ...] = ()
  needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  columns: Callable[[DataConfig], Columns] = lambda _: {}


class ArraySource:
  """Images that lie in memory as one uint8 array (n, h, w[, c])."""

  def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], name: str):
    self._images, self._labels, self._name = images, np.asarray(labels, np.int32), name
    self.class_names = tuple(class_names)

  def __len__(self) -> int:
    return len(self._images)

  def pixels(self, index: int) -> np.ndarray | bytes:
    """Returns one image as it lies here."""
    return self._images[index]

  def __getitem__(self, index: int) -> dict:
    return {"image": self.pixels(index), "label": int(self._labels[index]), "name": f"{self._name}[{index}]"}

  def labels(self) -> np.ndarray:
    return self._labels

  def fingerprint(self) -> str:
    return digest(self._images, self._labels, self.class_names)


def allow_open_files(num_files: int, where: str) -> None:
  """Raises this process's limit of open files so that a reader can keep so many open; ValueError where it may not."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  others = sum(num for place, num in _files_to_open.items() if place != where)  # the other split is open, too
  needed = num_files + others + _OTHER_FILES
  too_few = lambda limit: limit != resource.RLIM_INFINITY and limit < needed
  if too_few(hard):
    raise ValueError(
      f"{where} has {num_files:,} files, which are all kept open, and this process may open {hard:,}: raise the limit "
      f"(ulimit -n {needed} before starting; LimitNOFILE or nofile for a service), or write fewer, larger files."
    )
  if too_few(soft):
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
  _files_to_open[where] = num_files


def digest(*parts: Any) -> str:
  """Returns 16 hexadecimal digits that tell these parts (arrays, or plain values that JSON can hold) from others."""
  sha = hashlib.sha256()
  for part in parts:
    is_array = isinstance(part, np.ndarray)
    sha.update(json.dumps([part.dtype.str, part.shape] if is_array else part).encode() + b"\n")
    if is_array:
      sha.update(np.ascontiguousarray(part))
  return sha.hexdigest()[:16]


def check_labels(labels: np.ndarray, class_names: Sequence[str], where: str) -> None:
  """Raises ValueError where a label is the number of no class."""
  if len(labels) and int(labels.max()) >= len(class_names):
    raise ValueError(
      f"{where} has labels up to {int(labels.max())}, but names {len(class_names)} classes; name every "
      "class, or label an image of unknown class -1."
    )
