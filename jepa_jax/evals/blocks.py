"""What the protocols on features share: checks, blocks of rows that fit the memory given, devices, progress.

A feature set may be larger than the memory: it is a (memory-mapped) array of float16 or float32, and whoever reads it
asks for a block of rows, which alone becomes float32.

Legend: N images, F features, B rows of a block.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jepa_jax.sharding import LOGICAL_AXES, batch_sharding, batch_ways, replicated

MEMORY_GB = 4.0  # of arrays on the host, and as many on each device
EPSILON = 1e-6  # of the LayerNorm; relative to the largest deviation, what counts as a constant feature
_STORED = (np.float16, np.float32)
_REPORT_EVERY_S = 10.0
_PASS_BYTES = 2**24  # of float32, in a pass over a set: larger blocks are no faster

Report = Callable[[str], None]
Normalise = Callable[[np.ndarray], np.ndarray]


# ---------------------------------------------------------------- checks


def check_features(split: str, x) -> np.ndarray:
  """Returns x (N, F), not copied where it is float16 or float32; other types in memory become float32.

  Raises:
    ValueError: another rank, no rows, a value that is not finite, a memory-mapped file of another type.
  """
  if isinstance(x, np.memmap) and x.dtype not in _STORED:
    raise ValueError(
      f"{split} features are stored as {x.dtype}: store them as float16 or float32, else they are copied"
    )
  x = np.asarray(x)
  if x.dtype not in _STORED:
    x = x.astype(np.float32)
  if x.ndim != 2:
    raise ValueError(f"{split} features have shape {x.shape}: expected (images, features); use x.reshape(len(x), -1)")
  if 0 in x.shape:
    raise ValueError(f"{split} features have shape {x.shape}: there is nothing to evaluate")
  _check_finite(split, x)
  return x


def _check_finite(split: str, x_NxF: np.ndarray) -> None:
  num_bad, first, any_infinite = 0, -1, False
  for start, stop in ranges(len(x_NxF), rows_that_fit(x_NxF.shape[1], _PASS_BYTES)):
    finite_B = np.isfinite(x_NxF[start:stop]).all(axis=1)
    if not finite_B.all():
      bad = start + np.flatnonzero(~finite_B)
      first = bad[0] if first < 0 else first
      num_bad += len(bad)
      any_infinite |= bool(np.isinf(x_NxF[bad]).any())
  if num_bad:
    half = x_NxF.dtype == np.float16 and any_infinite
    raise ValueError(
      f"{num_bad} of {len(x_NxF)} {split} features have a NaN or infinite value, the first at index {first}: "
      "the encoder has diverged, or its checkpoint was read wrongly"
      + (", or values above 65504 were stored as float16, which holds no more: store them as float32" if half else "")
    )


def check_labels(split: str, y, num_images: int, num_classes: int) -> np.ndarray:
  """Returns y as int32 (N,); ValueError where it does not fit the features or a label is out of range."""
  y = np.asarray(y)
  if num_classes < 2:
    raise ValueError(f"num_classes = {num_classes}: must be 2 or more")
  if y.shape != (num_images,):
    raise ValueError(f"{split} labels have shape {y.shape}: expected ({num_images},), one per row of the features")
  if not np.issubdtype(y.dtype, np.integer):
    raise ValueError(f"{split} labels are {y.dtype}: expected integers in [0, {num_classes})")
  bad = np.flatnonzero((y < 0) | (y >= num_classes))
  if len(bad):
    raise ValueError(
      f"{len(bad)} of {len(y)} {split} labels are outside [0, {num_classes}), the first is {y[bad[0]]} at index "
      f"{bad[0]}: raise num_classes, or leave out images without a label (-1)"
    )
  return y.astype(np.int32)


def check_labelled(split: str, x, y, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (x (N, F) as of check_features, y int32 (N,)); errors of check_features and check_labels."""
  x_NxF = check_features(split, x)
  return x_NxF, check_labels(split, y, len(x_NxF), num_classes)


def check_same_width(train_NxF: np.ndarray, test_QxF: np.ndarray) -> None:
  """Raises ValueError where the training and the test features differ in width."""
  if train_NxF.shape[1] != test_QxF.shape[1]:
    raise ValueError(
      f"train features have width {train_NxF.shape[1]}, test features {test_QxF.shape[1]}: take both from one encoder"
    )


# ---------------------------------------------------------------- blocks


def memory_bytes(memory_gb: float) -> int:
  """Returns the bytes of a memory_gb; ValueError where it is not above 0."""
  if not memory_gb > 0:
    raise ValueError(f"memory_gb = {memory_gb}: must be above 0 ({MEMORY_GB:g} by default)")
  return int(memory_gb * 1e9)


def rows_that_fit(width: int, num_bytes: int) -> int:
  """Returns how many float32 rows of this width take num_bytes; at least 1."""
  return max(1, num_bytes // (4 * width))


def ranges(num_rows: int, most: int) -> Iterator[tuple[int, int]]:
  """Yields (start, stop) of as few blocks of at most `most` rows as there can be; sizes differ by 1 at most.

  So a program that is compiled for the shape of a block is compiled twice at most, and no block needs padding.
  """
  num_blocks = math.ceil(num_rows / most)
  for i in range(num_blocks):
    yield i * num_rows // num_blocks, (i + 1) * num_rows // num_blocks


def as_float32(x_BxF: np.ndarray) -> np.ndarray:
  """Returns a block as float32 in memory: the only place where stored features are widened."""
  return np.asarray(x_BxF, np.float32)


def l2_normalised(x_BxF: np.ndarray) -> np.ndarray:
  """Returns x (..., F) as float32 with rows of length 1; rows of zeros stay zero."""
  x_BxF = as_float32(x_BxF)
  norm_Bx1 = np.linalg.norm(x_BxF, axis=-1, keepdims=True)
  return x_BxF / np.where(norm_Bx1 > 0, norm_Bx1, 1.0)


def layer_normalised(x_BxF: np.ndarray) -> np.ndarray:
  """Returns x (B, F) as float32, every row less its mean over its deviation."""
  x_BxF = as_float32(x_BxF)
  return (x_BxF - x_BxF.mean(axis=1, keepdims=True)) / np.sqrt(x_BxF.var(axis=1, keepdims=True) + EPSILON)


def mean_and_deviation(x_NxF: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the float32 mean (F,) and standard deviation (F,) of some rows, in one pass with float64 sums.

  Blocks are merged by their means and squared deviations (Chan, Golub, LeVeque 1983), so that a large mean costs no
  digits of a small deviation.
  """
  mean_F, squares_F, count = np.zeros(x_NxF.shape[1]), np.zeros(x_NxF.shape[1]), 0
  for start, stop in ranges(len(rows), rows_that_fit(x_NxF.shape[1], _PASS_BYTES)):
    block_BxF = x_NxF[rows[start:stop]].astype(np.float64)
    block_mean_F, size = block_BxF.mean(axis=0), stop - start
    block_BxF -= block_mean_F
    step_F = block_mean_F - mean_F
    mean_F += step_F * (size / (count + size))
    squares_F += np.einsum("bf,bf->f", block_BxF, block_BxF) + step_F**2 * (count * size / (count + size))
    count += size
  return mean_F.astype(np.float32), np.sqrt(squares_F / count).astype(np.float32)


# ---------------------------------------------------------------- devices


@dataclasses.dataclass(frozen=True)
class Devices:
  """Where arrays live: `rows` splits axis 0 over the devices, `columns` axis 1, `whole` has all of it on each."""

  rows: Sharding
  columns: Sharding
  whole: Sharding
  ways: int


def devices_of(mesh: Mesh | None) -> Devices:
  """Returns the devices of a mesh, over which a batch is split; None is the first local device."""
  if mesh is None:
    one = SingleDeviceSharding(jax.local_devices()[0])
    return Devices(one, one, one, 1)
  columns = NamedSharding(mesh, PartitionSpec(None, LOGICAL_AXES["batch"]))
  return Devices(batch_sharding(mesh), columns, replicated(mesh), batch_ways(mesh))


# ---------------------------------------------------------------- progress


class Progress:
  """Says how far a loop is and how long it still takes, at most every ten seconds.

  `before` is what earlier parts of the loop have done: set it where a part begins, and `at` counts from there.
  """

  def __init__(self, report: Report | None, title: str, total: int):
    self._report, self._title, self._total = report, title, total
    self.before = 0
    self._began_s = self._said_s = time.monotonic()

  def at(self, done: int) -> None:
    """Reports, where it is time, that `before` + `done` of the total are done."""
    done, now_s = self.before + done, time.monotonic()
    if self._report is None or not 0 < done < self._total or now_s - self._said_s < _REPORT_EVERY_S:
      return
    self._said_s = now_s
    left_s = (now_s - self._began_s) / done * (self._total - done)
    left = f"{left_s / 60:.0f} min" if left_s >= 60 else f"{left_s:.0f} s"
    self._report(f"{self._title} {done:,}/{self._total:,}, {left} left")
