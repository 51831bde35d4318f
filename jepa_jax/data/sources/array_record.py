"""ArrayRecord files of our own, read and written.

The format, little-endian, one record per image: the four bytes `JJX1`, the label (int32, -1 for none), the bytes in the
name (uint16), the name (UTF-8), and then the encoded image (JPEG, PNG, WebP, ...) to the end of the record. Beside
every `x.array_record` lies `x.array_record.json` with `class_names` and `labels`, so that classes can be balanced
without reading a single image.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from jepa_jax.data.sources.source import Opening, allow_open_files, check_labels, digest
from jepa_jax.workdir import read_json, write_whole

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

_MAGIC = b"JJX1"
_HEADER = struct.Struct("<4siH")


class ArrayRecordSource:
  """The images of all files that match `root/pattern`, in the order of their names, written by `write_array_record`."""

  def __init__(self, root: Path, pattern: str):
    from grain.sources import ArrayRecordDataSource

    paths = [p for p in sorted(root.glob(pattern)) if p.suffix != ".json"]
    if not paths:
      raise ValueError(f"No file matches {root / pattern}. Set data.train and data.test to globs such as 'train-*'.")
    self._files = [(path.name, path.stat().st_size) for path in paths]
    indices = [_read_index(path) for path in paths]
    self.class_names = tuple(indices[0]["class_names"])
    for path, index in zip(paths, indices):
      if tuple(index["class_names"]) != self.class_names:
        raise ValueError(f"{path} and {paths[0]} name different classes; write all files with the same class_names.")
    self._labels = np.concatenate([np.asarray(index["labels"], np.int32) for index in indices])
    # Without names the classes are called by their numbers, as in .npz files.
    self.class_names = self.class_names or tuple(str(i) for i in range(int(self._labels.max(initial=-1)) + 1))
    check_labels(self._labels, self.class_names, str(root / pattern))
    allow_open_files(len(paths), str(root / pattern))
    try:
      self._records: Sequence[bytes] = ArrayRecordDataSource([str(p) for p in paths])  # pyright: ignore
    except RuntimeError as error:
      raise ValueError(f"a file of {root / pattern} is damaged or no ArrayRecord ({error}). Write it again.") from error
    if len(self._records) != len(self._labels):
      counts = f"{len(self._records)} records and {len(self._labels)} labels"
      raise ValueError(f"{root / pattern} has {counts}; a file was not written to its end. Write it again.")

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> dict:
    return unpack_record(self._records[index])

  def labels(self) -> np.ndarray:
    return self._labels

  def fingerprint(self) -> str:
    return digest(self._files, self._labels, self.class_names)


def write_array_record(path: str | Path, examples: Iterable[dict], class_names: Sequence[str] = ()) -> int:
  """Writes `examples` as one ArrayRecord file with its index beside it, and returns how many there were.

  An example is what every source gives: `image` (encoded bytes, or a uint8 array, stored as PNG), `label` and `name`.
  So `write_array_record(path, (source[i] for i in range(len(source))), source.class_names)` converts any source.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  # One record per group: what random access needs.
  writer = ArrayRecordWriter(str(path), "group_size:1")
  labels = []
  for example in examples:
    writer.write(pack_record(example))
    labels.append(int(example["label"]))
  writer.close()
  # The index comes last, so that a file without one is known to be incomplete.
  write_whole(_index_path(Path(path)), json.dumps({"class_names": list(class_names), "labels": labels}))
  return len(labels)


def pack_record(example: dict) -> bytes:
  """Returns one record, as the top of this file describes it."""
  image = example["image"]
  if not isinstance(image, bytes):
    buffer = io.BytesIO()
    Image.fromarray(np.squeeze(image)).save(buffer, "PNG")
    image = buffer.getvalue()
  name = str(example["name"]).encode()
  return _HEADER.pack(_MAGIC, int(example["label"]), len(name)) + name + image


def unpack_record(record: bytes) -> dict:
  """Returns the `image` bytes, `label` and `name` of one record."""
  if record[:4] != _MAGIC:
    raise ValueError("This ArrayRecord file was not written by jepa_jax.data.write_array_record; convert it with that.")
  _, label, name_bytes = _HEADER.unpack_from(record)
  start = _HEADER.size + name_bytes
  return {"image": record[start:], "label": label, "name": record[_HEADER.size : start].decode()}


def _index_path(path: Path) -> Path:
  return path.with_name(path.name + ".json")


def _read_index(path: Path) -> dict:
  if not _index_path(path).is_file():
    raise ValueError(f"{_index_path(path)} is missing; write {path.name} with jepa_jax.data.write_array_record.")
  index = read_json(_index_path(path))
  if not all(isinstance(index.get(key), list) for key in ("class_names", "labels")):
    raise ValueError(f"{_index_path(path)} has no lists 'class_names' and 'labels'; write {path.name} again.")
  return index


def open_array_record(cfg: DataConfig, split: str) -> ArrayRecordSource:
  """Returns the images of all files that match the glob of the split; ValueError where one is missing or unfinished."""
  return ArrayRecordSource(Path(cfg.root_path), cfg.split_name(split))


ARRAY_RECORD = Opening(
  open_array_record, reads=("root", "train", "test", "subset_seed"), needs={"root": "the folder that holds the files"}
)
