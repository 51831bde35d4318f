"""A source with a label map beside every image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jepa_jax.data.label_maps import LabelMapConfig, about, value_table
from jepa_jax.data.sources.source import Source, digest


class LabelMappedSource:
  """A source whose examples have `label_map`, as it is stored: bytes of an image file, or an array.

  Attributes:
    map_classes: Names of the classes of pixels.
    value_table: The class of every stored value, uint8 (256,).
    names: What the images are called.
  """

  def __init__(
    self,
    source: Source,
    read: Callable[[int], bytes | np.ndarray],
    names: Sequence[str],
    cfg: LabelMapConfig,
    map_classes: tuple[str, ...],
    state: str,
  ):
    self._source, self._read, self._cfg, self._state = source, read, cfg, state
    self.class_names, self.names, self.map_classes = source.class_names, names, map_classes
    self.value_table = value_table(cfg, len(map_classes))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict:
    return self._source[index] | {"label_map": self._read(index)}

  def labels(self) -> np.ndarray:
    return self._source.labels()

  def fingerprint(self) -> str:
    return digest(self._source.fingerprint(), self._state, dict(about(self._cfg, self.map_classes)))
