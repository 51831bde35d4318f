"""Tar shards as WebDataset writes them: a sample is the files that share a name up to its first dot.

The place of every file is looked up once and kept in the cache; then a sample is read by itself, at random, so that the
batch of a step is what it is with every other source. Nothing is streamed in order or shuffled in a buffer.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_jax.data.hub import local_root
from jepa_jax.data.sources.captioned import captioned_rows
from jepa_jax.data.sources.folder import image_endings
from jepa_jax.data.sources.source import Opening, Source, allow_open_files, digest
from jepa_jax.data.sources.subset import SubsetSource
from jepa_jax.workdir import cache_folder, read_json, write_json

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

logger = logging.getLogger(__name__)
_THREADS = 16  # that read the headers of shards
_SHOWN = 3


class TarSource:
  """Samples with an image: {"name", "shard", "image": [offset, size], "label", "text": [offset, size] or None}."""

  def __init__(self, paths: Sequence[Path], samples: list[list[Any]], captions: bool, state: str):
    self._paths, self._samples, self._captions, self._state = paths, samples, captions, state
    self._labels = np.array([sample[4] for sample in samples], np.int32)
    self.class_names = tuple(map(str, range(int(self._labels.max(initial=-1)) + 1)))
    allow_open_files(len(paths), str(paths[0].parent))
    self._files = [open(path, "rb") for path in paths]  # noqa: SIM115  (closed with the source)

  def __len__(self) -> int:
    return len(self._samples)

  @property
  def names(self) -> list[str]:
    """The shard and the name of every sample."""
    return [f"{self._paths[shard].name}/{name}" for name, shard, *_ in self._samples]

  def __getitem__(self, index: int) -> dict:
    name, shard, offset, size, label, text = self._samples[index]
    image = os.pread(self._files[shard].fileno(), size, offset)
    example = {"image": image, "label": label, "name": f"{self._paths[shard].name}/{name}"}
    return example | ({"captions": self._texts(shard, text)} if self._captions else {})

  def _texts(self, shard: int, place: list[int] | None) -> list[str]:
    if place is None:
      return []
    text = os.pread(self._files[shard].fileno(), place[1], place[0]).decode("utf-8", "replace").strip()
    return [text] if text else []

  def captions(self, indices: Sequence[int] | None = None) -> list[list[str]]:
    """Returns the text of every sample, or of these."""
    asked = range(len(self)) if indices is None else indices
    return [self._texts(self._samples[int(i)][1], self._samples[int(i)][5]) for i in asked]

  def labels(self) -> np.ndarray:
    return self._labels

  def fingerprint(self) -> str:
    return digest(self._state, len(self), self._labels)


def open_webdataset(cfg: DataConfig, split: str) -> Source:
  """Returns the samples of the shards that match; ValueError, with the fix, where there are none."""
  root, pattern = local_root(cfg), cfg.split_name(split)
  globs = [name if name.endswith(".tar") else f"{name}*.tar" for name in _braces(pattern)]
  paths = sorted({path for glob in globs for path in root.glob(glob)})
  if not paths:
    there = ", ".join(sorted(p.name for p in root.glob("*.tar*"))[:_SHOWN]) if root.is_dir() else "nothing"
    raise ValueError(
      f"No shard matches {root / globs[0]}; there is {there or 'no .tar file'}. Set data.train and data.test to globs, "
      "or ranges such as 'train-{000..146}.tar'; compressed shards (.tar.gz) cannot be read at random: unpack them."
    )
  captions = cfg.captions.of(split)
  if captions not in ("", "txt"):
    raise ValueError(f"data.captions.train={captions!r}: captions of tar shards are their .txt files; say 'txt'")
  state = digest([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
  samples = _index(paths, state)
  if not samples:
    raise ValueError(f"{paths[0]} and the other shards hold no images ({', '.join(image_endings()[:4])}, ...)")
  source = TarSource(paths, samples, bool(captions), digest([(path.name, path.stat().st_size) for path in paths]))
  if not captions:
    return source
  counts = [int(sample[5] is not None) for sample in samples]
  rows = captioned_rows(cfg, split, counts, np.arange(len(source)), source.names)
  return source if len(rows) == len(source) else SubsetSource(source, rows)


def _braces(pattern: str) -> list[str]:
  """Returns the names that "train-{00..11}.tar" stands for."""
  found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
  if not found:
    return [pattern]
  first, last = found.groups()
  numbers = range(int(first), int(last) + 1)
  return [name for i in numbers for name in _braces(pattern.replace(found[0], str(i).zfill(len(first)), 1))]


def _index(paths: Sequence[Path], state: str) -> list[list[Any]]:
  """Returns [name, shard, offset, size, label, place of the text or None] of every sample, from the cache or anew."""
  kept = cache_folder("tar") / f"{digest(str(paths[0].parent.resolve()), state)}.json"
  try:
    return read_json(kept, list)
  except (OSError, ValueError):
    pass
  logger.info("Looking up the samples of %d shards, once", len(paths))
  with ThreadPoolExecutor(_THREADS) as pool:
    shards = list(pool.map(lambda i: list(_samples_of(paths[i], i)), range(len(paths))))
  samples = [sample for shard in shards for sample in shard]
  try:
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, samples)
  except OSError as error:
    logger.warning("The index of the shards is not kept (%s): the next start makes it again", error)
  return samples


def _samples_of(path: Path, shard: int) -> Iterator[list[Any]]:
  """Yields the samples of a shard that hold an image."""
  key, files = "", {}
  try:
    with tarfile.open(path, "r:") as opened, open(path, "rb") as raw:
      for member in opened:
        if not member.isfile() or os.path.basename(member.name).startswith("."):
          continue
        folder, _, base = member.name.rpartition("/")
        name, _, ending = base.partition(".")
        here = f"{folder}/{name}".lstrip("/")
        if here != key:
          yield from _sample(raw, shard, key, files)
          key, files = here, {}
        files[ending.lower()] = [member.offset_data, member.size]
      yield from _sample(raw, shard, key, files)
  except (tarfile.TarError, EOFError) as error:
    raise ValueError(f"{path} is damaged or no tar file ({error}): write it again") from error


def _sample(raw: Any, shard: int, key: str, files: dict[str, list[int]]) -> Iterator[list[Any]]:
  image = next((place for ending, place in files.items() if f".{ending.rpartition('.')[2]}" in image_endings()), None)
  if image is None:
    return
  read = lambda place: (raw.seek(place[0]), raw.read(place[1]))[1]
  label = -1
  if "cls" in files:
    text = read(files["cls"]).decode("ascii", "replace").strip()
    if not text.isdigit():
      raise ValueError(f"{raw.name}: {key}.cls holds {text[:20]!r}: a class is a whole number from 0 on")
    label = int(text)
  elif "json" in files:
    found = json.loads(read(files["json"]) or b"null")
    label = found["label"] if isinstance(found, dict) and isinstance(found.get("label"), int) else -1
  yield [key, shard, *image, label, files.get("txt")]


WEBDATASET = Opening(
  open_webdataset,
  reads=("root", "train", "test", "subset_seed", "captions"),
  needs={"root": "the folder that holds the shards"},
)
