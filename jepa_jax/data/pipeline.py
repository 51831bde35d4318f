"""Batches as a pure function of the step: there is no iterator state, so there is none to save."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jepa_jax.data.images import ImageSet

if TYPE_CHECKING:  # imported where it is used: a fifth of what importing this project takes
  import grain

# Grain's threads only wait for the decoding ones; two keep those busy across the end of a batch.
BATCHES_AT_A_TIME = 2
Rows = dict[str, np.ndarray]


def train_batches(
  images: ImageSet,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  shards: Sequence[int] = (0,),
  num_shards: int = 1,
  join: Callable[[Rows], Rows] | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
  """Returns an endless iterator over this host's rows of the batches of steps `start_step`, `start_step + 1`, ...

  `batch_size` is global. The batch is cut into `num_shards` blocks of rows, end to end, and this host gets those that
  its devices hold (`sharding.local_shards`), so the rows of all hosts are the batch that one alone would see. Every
  epoch has a new order and shows every image once; where B does not divide the number of images, a batch holds the end
  of one epoch and the start of the next. Keys as `ImageSet.read`, and what `join` adds to the rows. The iterator has
  `close()`. ValueError where the set is smaller than a batch or the shards do not divide it.
  """
  import grain

  if not 0 < batch_size <= len(images):
    raise ValueError(f"batch_size is {batch_size}, but there are {len(images)} training images; use at most that many.")
  num_rows = _rows_per_shard(batch_size, shards, num_shards)
  # Grain seeds epoch e with seed + e, so neighbouring seeds would share their epochs; hashing the seed sets them apart.
  order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  order = grain.MapDataset.range(len(images)).shuffle(order_seed).repeat()
  # Shuffled before it is cut by host: the other way round, the batches would depend on the number of hosts.
  blocks = order.batch(num_rows)

  def read(step: int) -> Rows:
    rows = images.read(np.concatenate([blocks[step * num_shards + i] for i in shards]))
    return join(rows) if join else rows

  return _read_ahead(grain.MapDataset.range(start_step, sys.maxsize).map(read), images.prefetch)


def eval_batches(
  images: ImageSet, batch_size: int, shards: Sequence[int] = (0,), num_shards: int = 1
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
  """Returns an iterator over this host's rows of all images, once, in order; keys as `ImageSet.read`, `mask` bool (B,).

  `batch_size` is global, and `shards` are this host's blocks of rows, as in `train_batches`: all hosts get equally many
  batches. `mask` is False where a row is no image of its own: the padding of the last batch (black, label and index
  -1), or what stands in for an image that does not decode.
  """
  import grain

  if batch_size < 1:
    raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
  num_rows = _rows_per_shard(batch_size, shards, num_shards)
  in_batch = np.concatenate([np.arange(i * num_rows, (i + 1) * num_rows) for i in shards])

  def read(step: int) -> dict[str, np.ndarray]:
    wanted = step * batch_size + in_batch
    exists = wanted < len(images)
    shown = images.read(wanted[exists])
    rows = images.empty_rows(len(wanted))
    for key, array in shown.items():
      rows[key][exists] = array
    return rows | {"mask": exists & (rows["index"] == wanted)}

  num_steps = -(-len(images) // batch_size)
  return _read_ahead(grain.MapDataset.range(num_steps).map(read), images.prefetch)


def row_batches(
  images: ImageSet, rows_N: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]]:
  """Yields (rows, batch, which of them are images asked for, bool (B,)) of these images, in order, all of one shape.

  The last batch is filled up with rows it has already; like a stand-in for an image that does not decode, they do not
  count.
  """
  for start in range(0, len(rows_N), batch_size):
    rows_B = np.resize(rows_N[start : start + batch_size], batch_size)
    batch = images.read(rows_B)
    yield rows_B, batch, (np.arange(batch_size) < len(rows_N) - start) & (batch["index"] == rows_B)


def _read_ahead(batches: grain.MapDataset, prefetch: int) -> grain.DatasetIterator[dict[str, np.ndarray]]:
  import grain

  num_threads = min(prefetch, BATCHES_AT_A_TIME)
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))


def _rows_per_shard(batch_size: int, shards: Sequence[int], num_shards: int) -> int:
  if batch_size % num_shards:
    raise ValueError(f"batch_size {batch_size} does not divide by {num_shards} shards; use a multiple of {num_shards}.")
  for shard in shards:
    if not 0 <= shard < num_shards:
      raise ValueError(f"shard {shard} is not one of {num_shards} shards; it must be 0 to {num_shards - 1}.")
  return batch_size // num_shards
