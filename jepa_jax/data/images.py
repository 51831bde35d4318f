"""Images by index, decoded onto canvases: the place where corrupt files are replaced and decoded ones kept.

B rows, S canvas side, C channels.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jepa_jax.data.config import DataConfig
from jepa_jax.data.decode import Fit, decode_image, size_of
from jepa_jax.data.label_maps import decode_values, resized, to_classes
from jepa_jax.data.schema import Column, empty_rows, image_columns
from jepa_jax.data.sources import SOURCES, Source, open_source
from jepa_jax.data.tokenizer import Tokenizer, check_vocabulary, read_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

# max_bad_share is taken of at least this many images: two bad ones among the first hundred say little.
MIN_IMAGES_READ = 1000
# Seconds before a read that failed is tried again. What is gone, or not ours to read, does not come back.
RETRY_S = (0.1, 1.0, 5.0)
_IN_MEMORY = re.compile(r"<_io\.BytesIO object at \w+>")  # what Pillow calls an image that it is given as bytes
FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# Rows a thread decodes at a time: few enough to share a batch of 64 among 8 threads, enough to hide the hand-over.
ROWS_PER_TASK = 8
_SIZES_READ = 16  # images whose size is looked up, to say what there is
_COUNTED = 10_000  # images whose captions are counted


class TooManyBadImages(RuntimeError):
  """More images failed to decode than `data.max_bad_share` allows."""


class StorageFailed(TooManyBadImages):
  """The images could not be read, though they are there: worth another start."""


class BadImages:
  """Counts the images that were read and those that could not be, or did not decode; safe to use from many threads.

  Attributes:
    num_read: Images read since the start of this process.
    num_bad: How many different ones did not decode.
    reasons: The message for every distinct bad image, by name.
  """

  def __init__(self, max_share: float):
    self.max_share, self.num_read, self.num_bad, self._num_unread = max_share, 0, 0, 0
    self.reasons: dict[str, str] = {}
    self._lock = threading.Lock()

  def add_good(self) -> None:
    """Counts one image that decoded."""
    with self._lock:
      self.num_read += 1

  def add_bad(self, name: str, error: Exception, is_read: bool = True) -> None:
    """Counts and logs one image that did not, or was not even read; raises TooManyBadImages past the limit."""
    with self._lock:
      new = name not in self.reasons  # stand-ins and repeats come upon the same one again
      self.num_read += 1
      self.num_bad += new
      self._num_unread += new and not is_read and isinstance(error, OSError) and not isinstance(error, FOR_GOOD)
      self.reasons[name] = f"{type(error).__name__}: {_IN_MEMORY.sub('it', str(error))}"
      too_many = self.num_bad > self.max_share * max(self.num_read, MIN_IMAGES_READ)
    if new:
      what = "does not decode" if is_read else "cannot be read"
      logger.warning("Image %s %s (%s); the next one takes its place.", name, what, self.reasons[name])
    if too_many:
      raise self.failure(self.report())

  def failure(self, text: str) -> TooManyBadImages:
    """Returns the error to end with: of the storage, where most of the bad images are there and cannot be read."""
    return (StorageFailed if 2 * self._num_unread > self.num_bad else TooManyBadImages)(text)

  def report(self) -> str:
    """Returns the counts, the first 20 bad images and what to do."""
    listed = "\n".join(f"  {name}: {reason}" for name, reason in list(self.reasons.items())[:20])
    more = f"\n  and {len(self.reasons) - 20} more" if len(self.reasons) > 20 else ""
    return (
      f"{self.num_bad} of {self.num_read} images did not decode, more than data.max_bad_share = {self.max_share} of at"
      f" least {MIN_IMAGES_READ} allows. Repair or remove them, or raise data.max_bad_share:\n{listed}{more}"
    )


class ImageSet:
  """One split, ready to be read by index: `read(indices)` gives the rows of a batch.

  Attributes:
    columns: Name, shape and dtype of what a row holds: those of an image, and those that the source adds.
    class_names: Names of the classes; empty where the images have no labels.
    map_classes: Names of the classes of pixels; empty where there are no label maps.
    tokenizer: What made numbers of the captions; None where there are none.
    bad: The images that did not decode.
    prefetch: Batches made ahead.
  """

  def __init__(self, source: Source, cfg: DataConfig, tokenizer: Tokenizer | None = None):
    self._source, self._channels = source, cfg.channels
    self.tokenizer, self._captions = tokenizer, cfg.captions
    self._fit = Fit(cfg.canvas_px, cfg.canvas_side, whole=not cfg.max_aspect)
    self.columns, self._own_columns = row_columns(cfg), SOURCES[cfg.source].columns(cfg)
    self.class_names, self.map_classes = source.class_names, getattr(source, "map_classes", ())
    self._number: np.ndarray | None = None  # of each of the source's classes, and -1 for none; see number_as
    self.prefetch = cfg.prefetch
    self.bad = BadImages(cfg.max_bad_share)
    num_threads = cfg.num_threads or min(os.cpu_count() or 1, 32)
    self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode") if num_threads > 1 else None
    size_mb = len(source) * sum(column.row_bytes for column in self.columns.values()) / 1e6
    self._cache = self.empty_rows(len(source)) if size_mb <= cfg.cache_mb else None
    if cfg.cache_mb < size_mb < 8 * cfg.cache_mb:  # a small set, that a little more memory would hold
      logger.info("%d images take %d MB, more than data.cache_mb=%d: decoded anew", len(source), size_mb, cfg.cache_mb)
    self._is_cached = np.zeros(len(source), bool)

  def __len__(self) -> int:
    return len(self._source)

  @functools.cached_property
  def fingerprint(self) -> str:
    """A short text that another set of images or labels does not share, for keeping what was computed from them."""
    return self._source.fingerprint()

  def about(self) -> dict[str, Any]:
    """Returns what a checkpoint says of its training images: how many, the names of their classes, a fingerprint."""
    about = {"images": len(self), "classes": list(self.class_names), "fingerprint": self.fingerprint}
    return about | ({"tokenizer": self.tokenizer.digest} if self.tokenizer else {})

  @property
  def num_classes(self) -> int:
    """Number of classes; 0 where the images have no labels."""
    return len(self.class_names)

  def labels(self) -> np.ndarray:
    """Returns every label, int32 (n,)."""
    labels = self._source.labels()
    return labels if self._number is None else self._number[labels]

  def number_as(self, class_names: tuple[str, ...]) -> None:
    """Numbers the classes as another split does, by their names; ValueError for images of a class that it lacks.

    Two files of one data set may list the same classes in another order, or not all of them.
    """
    if not self.class_names or not class_names or self.class_names == class_names:
      return
    number = {name: i for i, name in enumerate(class_names)}
    foreign = [name for name in self.class_names if name not in number]
    unnamed = lambda names: names == tuple(str(i) for i in range(len(names)))
    numbers = all(name.isdigit() for name in (*self.class_names, *class_names))  # which are names, too: 2 is no 1
    if (
      foreign
      and not numbers
      and len(self.class_names) <= len(class_names)
      and (unnamed(self.class_names) or unnamed(class_names))
    ):
      logger.warning("One of the splits does not name its classes: the test labels are taken as the training labels'")
      self.class_names = class_names
      return
    if unknown := [name for name in foreign if (self._source.labels() == self.class_names.index(name)).any()]:
      raise ValueError(
        f"the test images are of classes that the training images do not have: {', '.join(unknown[:10])}; these have "
        f"{', '.join(class_names[:10])}. Name the classes alike in both splits."
      )
    self._number = np.array([*(number.get(name, -1) for name in self.class_names), -1], np.int32)
    self.class_names, self._is_cached[:] = class_names, False

  def check_captions(self, wanted: int) -> None:
    """Raises a ValueError where no image has so many captions as a step draws: it would see the same ones again."""
    some = np.linspace(0, len(self) - 1, min(len(self), _COUNTED)).astype(int)
    most = max(len(own) for own in self._source.captions(some))  # type: ignore[attr-defined]
    if wanted > most:
      raise ValueError(f"objective.captions={wanted}, and no image has more than {most}: draw {most} or fewer")

  def empty_rows(self, num_rows: int) -> dict[str, np.ndarray]:
    """Returns rows that show nothing: a black canvas, its full size as height and width, label and index -1."""
    return empty_rows(self.columns, num_rows)

  def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the rows of `indices`: canvas uint8 (B, S, S, C); height, width, label, index int32 (B,); more `columns`.

    An image that does not decode is replaced by the next one of the source, and the whole row then shows that one, its
    label and index, too: a function of the index alone, whatever was read before.
    """
    if self._cache is None:
      rows = self.empty_rows(len(indices))
      self._fill(rows, [(row, int(index)) for row, index in enumerate(indices)])
      return rows
    # Two threads may decode the same image at the same time; they write the same bytes.
    missing = np.unique(indices[~self._is_cached[indices]])
    self._fill(self._cache, [(int(index), int(index)) for index in missing])
    self._is_cached[missing] = True
    return {key: array[indices] for key, array in self._cache.items()}

  def close(self) -> None:
    """Ends the decoding threads."""
    if self._pool is not None:
      self._pool.shutdown(wait=False, cancel_futures=True)

  def _fill(self, rows: dict[str, np.ndarray], work: list[tuple[int, int]]) -> None:
    parts = [work[i : i + ROWS_PER_TASK] for i in range(0, len(work), ROWS_PER_TASK)]
    run = map if self._pool is None else self._pool.map
    for _ in run(lambda part: [self._decode_row(rows, row, index) for row, index in part], parts):
      pass

  def _decode_row(self, rows: dict[str, np.ndarray], row: int, wanted: int) -> None:
    for attempt in range(len(self)):
      index = (wanted + attempt) % len(self)
      example = None
      values = None
      try:
        example = self._read(index)
        image = decode_image(example["image"], self._fit, self._channels)
        if self.map_classes:
          values = self._decode_map(example["label_map"])
      except MemoryError:
        raise
      except Exception as error:  # Pillow raises a dozen kinds for broken files, and record readers kinds of their own.
        self.bad.add_bad(example["name"] if example else f"number {index:,}", error, is_read=example is not None)
        continue
      self.bad.add_good()
      height, width = image.shape[:2]
      rows["canvas"][row, :height, :width] = image
      label = example["label"] if self._number is None else self._number[example["label"]]
      for key, value in (("height", height), ("width", width), ("label", label), ("index", index)):
        rows[key][row] = value
      for key, column in self._own_columns.items():
        _write(rows[key], row, column, example[key], f"{key} of {example['name']}")
      if self.tokenizer:
        rows["caption"][row] = self._caption(example)
      if values is not None:
        rows["label_map"][row, :height, :width] = self._label_map(example, values)
      return
    raise self.bad.failure(f"None of the {len(self)} images decodes.\n{self.bad.report()}")

  def _caption(self, example: dict) -> np.ndarray:
    """Returns the ids of the captions of an example, (per_image, length): -1 after the end, and where there is none."""
    assert self.tokenizer
    ids, texts = np.full((self._captions.per_image, self._captions.length), -1), example["captions"]
    try:
      own = self.tokenizer.encode(texts[: len(ids)], ids.shape[1])
    except ValueError as error:
      raise ValueError(f"captions of {example['name']}: {error}") from error
    if not len(own):
      raise ValueError(f"{example['name']} has no captions; leave it out")
    ids[: len(own)] = own
    return ids

  @staticmethod
  def _decode_map(encoded: bytes | np.ndarray) -> np.ndarray:
    try:
      return decode_values(encoded)
    except OSError as error:
      raise OSError(f"its label map is broken: {error}") from error

  def _label_map(self, example: dict, values: np.ndarray) -> np.ndarray:
    """Returns the classes of the pixels of the canvas that an image takes: scaled and cut as the image is."""
    size_hw = size_of(example["image"])
    table = self._source.value_table  # type: ignore[attr-defined]
    classes = to_classes(values, table, size_hw, f"the label map of {example['name']}")
    width, height = self._fit.target(size_hw[1], size_hw[0])
    return self._fit.cut(resized(classes, (height, width)))

  @property
  def names(self) -> list[str] | None:
    """What the images are called, None where the source does not say."""
    names = getattr(self._source, "names", None)
    return None if names is None else [str(name) for name in names]

  def summary(self, counted: bool = True) -> str:
    """Returns in words what there is: how many images, of which sizes and classes; headers of a few are read.

    counted: how many images a class has, for which some sources read every record once.
    """
    sizes = []
    for index in np.unique(np.linspace(0, len(self) - 1, _SIZES_READ).astype(int)):
      with contextlib.suppress(Exception):  # what does not decode is told of when it is read
        sizes.append(size_of(self._source[int(index)]["image"])[::-1])
    smallest, largest = (f"{w} x {h}" for w, h in (min(sizes), max(sizes))) if sizes else ("?", "?")
    parts = [f"{len(self):,} images", f"{smallest} px" if smallest == largest else f"{smallest} to {largest} px"]
    if self.num_classes and not counted:
      parts.append(f"{self.num_classes} classes ({', '.join(self.class_names[:3])}, ...)")
    elif self.num_classes:
      counts = np.bincount(self.labels()[self.labels() >= 0], minlength=self.num_classes)
      each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
      parts.append(f"{self.num_classes} classes of {each} ({', '.join(self.class_names[:3])}, ...)")
      if unlabelled := int((self.labels() < 0).sum()):
        parts.append(f"{unlabelled:,} of no class")
    else:
      parts.append("no labels")
    if self.map_classes:
      parts.append(f"label maps of {len(self.map_classes)} classes")
    return ", ".join(parts)

  def _read(self, index: int) -> dict:
    """Returns an example of the source; a read that fails is tried again: network file systems recover."""
    for wait_s in RETRY_S:
      try:
        return self._source[index]
      except FOR_GOOD:
        raise
      except OSError as error:
        logger.warning("Image number %d cannot be read (%s); trying again in %g s.", index, error, wait_s)
        time.sleep(wait_s)
    return self._source[index]


def row_columns(cfg: DataConfig) -> dict[str, Column]:
  """Returns what a row of these data holds: the columns of an image, and those of the source; nothing is read."""
  images, extra = image_columns(cfg) | dict(cfg.captions.columns), SOURCES[cfg.source].columns(cfg)
  images |= dict(cfg.label_maps.columns(cfg.canvas_side))
  # Examples hold `image` and `name` beside their columns, and evaluation adds `mask` to a batch.
  if taken := extra.keys() & {*images, "image", "name", "mask"}:
    raise ValueError(f"a source cannot add a column called {', '.join(sorted(taken))}: choose another name.")
  return images | dict(extra)


def _write(rows: np.ndarray, row: int, column: Column, value: np.ndarray, what: str) -> None:
  """Writes one value; ValueError where numpy would stretch or truncate it to fit."""
  value = np.asarray(value)
  if value.shape != column.shape or not np.can_cast(value.dtype, column.dtype, "same_kind"):
    found, declared = f"{value.dtype} {value.shape}", f"{np.dtype(column.dtype)} {column.shape}"
    raise ValueError(f"{what} is {found}, but the source declares {declared}; make its columns say what it gives.")
  rows[row] = value


def open_images(cfg: DataConfig, split: str, tokenizer: Tokenizer | None = None) -> ImageSet:
  """Returns the images of `split` ("train" or "test"); ValueError, with the fix, where they cannot be read.

  Captions become numbers by the tokenizer given, that of a run, or else by the one of the config.
  """
  source = open_source(cfg, split)
  if not cfg.captions.train:
    return ImageSet(source, cfg)
  tokenizer = tokenizer or make_tokenizer(cfg)
  check_vocabulary(tokenizer, cfg.captions)
  return ImageSet(source, cfg, tokenizer)


@functools.lru_cache(maxsize=2)
def make_tokenizer(cfg: DataConfig) -> Tokenizer:
  """Returns the tokenizer that a config names, or one trained on the captions of its training images."""
  if cfg.captions.tokenizer:
    return read_tokenizer(Path(os.path.expandvars(cfg.captions.tokenizer)).expanduser())
  texts = open_source(cfg, "train").captions()  # type: ignore[attr-defined]
  return train_tokenizer((text for own in texts for text in own), cfg.captions.vocab_size)
