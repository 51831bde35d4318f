"""Labels kept in a file, for data that would have to be read from end to end to learn them."""

from __future__ import annotations

import logging
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jepa_jax.workdir import cache_folder, write_whole

logger = logging.getLogger(__name__)

# More threads than cores: on a network disk most of them wait.
READ_THREADS = 16
LABELS_PER_TASK = 256
PROGRESS_EVERY_S = 10.0


def indexed_labels(
  fingerprint: str,
  folder: Path,
  num_images: int,
  read: Callable[[], np.ndarray],
  whole: Callable[[], bool] = lambda: True,
) -> np.ndarray:
  """Returns the labels, int32 (n,), of the data with this fingerprint: from the index, else from `read`.

  Those are kept, if they are `whole`. The index is a file in the data's `folder`, or, where that cannot be written, in
  the user's cache. One that is damaged or belongs to other data is written again.
  """
  name = f"jepa_jax_labels_{fingerprint}.npz"
  places = folder / name, cache_folder("labels") / name
  for path in places:
    labels = _load(path, fingerprint, num_images)
    if labels is not None:
      return labels
  labels = read()
  if not whole():
    return labels
  try:
    if not folder.is_dir():  # a bucket
      raise FileNotFoundError(folder)
    _save(places[0], fingerprint, labels)
  except OSError:  # or read-only
    try:
      _save(places[1], fingerprint, labels)
    except OSError as error:
      logger.warning("The labels cannot be kept (%s): the next run reads them all again.", error)
  return labels


def read_in_threads(read_block: Callable[[range], list[int]], num_images: int, title: str) -> np.ndarray:
  """Returns a number for each image, int32 (n,), and says now and then how many are read: `title` is what it reads."""
  labels, began_s = np.empty(num_images, np.int32), time.monotonic()
  said_s = began_s
  blocks = [range(i, min(i + LABELS_PER_TASK, num_images)) for i in range(0, num_images, LABELS_PER_TASK)]
  pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="labels")
  try:
    for block, part in zip(blocks, pool.map(read_block, blocks)):
      labels[block.start : block.stop] = part
      now_s = time.monotonic()
      if now_s - said_s >= PROGRESS_EVERY_S:
        left_s = (now_s - began_s) / block.stop * (num_images - block.stop)
        logger.info("%s: %s of %s read, %.0f s left", title, f"{block.stop:,}", f"{num_images:,}", left_s)
        said_s = now_s
  finally:
    pool.shutdown(cancel_futures=True)
  return labels


def _load(path: Path, fingerprint: str, num_images: int) -> np.ndarray | None:
  try:
    with np.load(path, allow_pickle=False) as file:  # the zip format checks its contents against a CRC
      stored, labels = str(file["fingerprint"]), file["labels"]
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    logger.warning("The label index %s cannot be read (%s); the labels are read from the data again.", path, error)
    return None
  if stored != fingerprint or labels.shape != (num_images,) or labels.dtype != np.int32:
    logger.warning("The label index %s belongs to other data; the labels are read from the data again.", path)
    return None
  return labels


def _save(path: Path, fingerprint: str, labels: np.ndarray) -> None:
  def write(temporary: Path) -> None:
    with open(temporary, "wb") as file:  # given a name, numpy would add an ending to it
      np.savez_compressed(file, fingerprint=np.array(fingerprint), labels=labels)

  write_whole(path, write)
