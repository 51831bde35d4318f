"""Sources that read record files by index: TFDS data sets stored as ArrayRecord, and ArrayRecord files of our own.

Our format, little-endian, one record per image: the four bytes `JJX1`, the label (int32, -1 for none), the bytes in the
name (uint16), the name (UTF-8), and then the encoded image (JPEG, PNG, WebP, ...) to the end of the record. Beside
every `x.array_record` lies `x.array_record.json` with `class_names` and `labels`, so that classes can be balanced
without reading a single image.
"""

from __future__ import annotations

import difflib
import io
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jepa_jax.data.schema import Columns

_MAGIC = b"JJX1"
_HEADER = struct.Struct("<4siH")


def check_labels(labels: np.ndarray, class_names: Sequence[str], where: str) -> None:
  """Raises ValueError where a label is the number of no class."""
  if len(labels) and int(labels.max()) >= len(class_names):
    raise ValueError(
      f"{where} has labels up to {int(labels.max())}, but names {len(class_names)} classes; name every "
      "class, or label an image of unknown class -1."
    )


class ArrayRecordSource:
  """The images of all files that match `root/pattern`, in the order of their names, written by `write_array_record`."""

  columns: Columns = {}

  def __init__(self, root: Path, pattern: str):
    from grain.sources import ArrayRecordDataSource

    paths = [p for p in sorted(root.glob(pattern)) if p.suffix != ".json"]
    if not paths:
      raise ValueError(f"No file matches {root / pattern}. Set data.train and data.test to globs such as 'train-*'.")
    indices = [_read_index(path) for path in paths]
    self.class_names = tuple(indices[0]["class_names"])
    for path, index in zip(paths, indices):
      if tuple(index["class_names"]) != self.class_names:
        raise ValueError(f"{path} and {paths[0]} name different classes; write all files with the same class_names.")
    self._labels = np.concatenate([np.asarray(index["labels"], np.int32) for index in indices])
    # Without names the classes are called by their numbers, as in .npz files.
    self.class_names = self.class_names or tuple(str(i) for i in range(int(self._labels.max(initial=-1)) + 1))
    check_labels(self._labels, self.class_names, str(root / pattern))
    self._records: Sequence[bytes] = ArrayRecordDataSource([str(p) for p in paths])  # pyright: ignore
    if len(self._records) != len(self._labels):
      counts = f"{len(self._records)} records and {len(self._labels)} labels"
      raise ValueError(f"{root / pattern} has {counts}; a file was not written to its end. Write it again.")

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> dict:
    return unpack_record(self._records[index])

  def labels(self) -> np.ndarray:
    return self._labels


class TfdsSource:
  """A split of a prepared TFDS data set, read through `tfds.data_source` classes without TensorFlow or the network."""

  columns: Columns = {}

  def __init__(self, name: str, data_dir: str, split: str, image_key: str, label_key: str):
    import tensorflow_datasets as tfds

    builder = _find_tfds_builder(name, data_dir)
    features = builder.info.features
    for field, key in {"image_key": image_key, "label_key": label_key}.items():
      if key and key not in features:
        raise ValueError(f"data.{field} is {key!r}, but {name} has {', '.join(sorted(features))}.")
    try:
      # The bytes stay encoded: we decode them ourselves, so that a corrupt image does not stop the run.
      decoders = {image_key: tfds.decode.SkipDecoding()}
      self._records = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
      raise ValueError(f"{name} was not prepared as ArrayRecord. {_prepare_hint(name, data_dir)}") from error
    except (ValueError, KeyError) as error:
      splits = ", ".join(builder.info.splits)
      raise ValueError(f"{split!r} is no split of {name}; it has {splits} (slices: 'train[:90%]').") from error
    self._title, self._image_key, self._label_key = f"{name}/{split}", image_key, label_key
    self.class_names = tuple(getattr(features[label_key], "names", None) or ()) if label_key else ()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    record = self._records[index]
    label = int(record[self._label_key]) if self.class_names else -1  # a number that names no class is no label
    return {"image": record[self._image_key], "label": label, "name": f"{self._title}[{index}]"}

  def labels(self) -> np.ndarray:
    # TFDS keeps no index of labels, so this reads every record once; only a class-balanced subset asks for it.
    return np.array([self[i]["label"] for i in range(len(self))], np.int32)


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
  _index_path(Path(path)).write_text(json.dumps({"class_names": list(class_names), "labels": labels}))
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
  return json.loads(_index_path(path).read_text())


def _find_tfds_builder(name: str, data_dir: str) -> Any:
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder, registered

  # From the prepared files alone: the code of a data set may import TensorFlow, and its set-up asks the network.
  try:
    return read_only_builder.builder_from_files(name, data_dir=data_dir or None)
  except registered.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    base = name.split("/")[0].split(":")[0]
    near = difflib.get_close_matches(base, known, n=3)
    hint = f" TFDS has no data set {base!r}; near: {', '.join(near)}." if base not in known and near else ""
    where = data_dir or "~/tensorflow_datasets"
    raise ValueError(f"{name} is not prepared in {where}.{hint} {_prepare_hint(name, data_dir)}") from error


def _prepare_hint(name: str, data_dir: str) -> str:
  arguments = f"{name!r}, data_dir={data_dir!r}" if data_dir else repr(name)
  call = f"tfds.builder({arguments}, file_format='array_record').download_and_prepare()"
  return (
    "Training downloads nothing. Prepare it once with this command (many data sets need TensorFlow for that step, and"
    f' only for that: pip install tensorflow): python -c "import tensorflow_datasets as tfds; {call}"'
  )
