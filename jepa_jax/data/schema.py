"""The columns of a row: name, shape, dtype, and what stands where there is no image. S canvas side, C channels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Column:
  """One column of every row.

  Attributes:
    shape: Shape of one row's value, () for a number.
    dtype: Its dtype, in host memory and on the device.
    fill: The value in every place of a row without an image, such as the padding of the last batch.
  """

  shape: tuple[int, ...] = ()
  dtype: DTypeLike = np.int32
  fill: float = 0

  @property
  def row_bytes(self) -> int:
    """Bytes of one row's value."""
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


Columns = Mapping[str, Column]


def image_columns(cfg: DataConfig) -> dict[str, Column]:
  """Returns the columns that every source fills: canvas uint8 (S, S, C); height, width, label, index int32.

  A row without an image shows a black canvas, its full size as height and width, and -1 as label and index.
  """
  size = cfg.canvas_side
  return {
    "canvas": Column((size, size, cfg.channels), np.uint8),
    "height": Column(fill=size),
    "width": Column(fill=size),
    "label": Column(fill=-1),
    "index": Column(fill=-1),
  }


def empty_rows(columns: Columns, num_rows: int) -> dict[str, np.ndarray]:
  """Returns rows without images: arrays (num_rows, *shape) that hold each column's `fill`."""
  # Pages of zeros are not touched before they are written: a large cache takes no memory until it is filled.
  make = lambda c: np.full((num_rows, *c.shape), c.fill, c.dtype) if c.fill else np.zeros((num_rows, *c.shape), c.dtype)
  return {name: make(column) for name, column in columns.items()}


def abstract_batch(columns: Columns, batch_size: int, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a global batch (B, *shape), every column with this sharding."""
  shape = lambda c: jax.ShapeDtypeStruct((batch_size, *c.shape), c.dtype, sharding=sharding)
  return {name: shape(column) for name, column in columns.items()}


def zero_batch(abstract: Any) -> Any:
  """Returns zeros of these shapes, black images: what networks are initialised with, inside jit."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
