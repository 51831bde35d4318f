"""TFDS data sets stored as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_jax.data.caption_files import mended
from jepa_jax.data.sources.captioned import captioned_rows
from jepa_jax.data.sources.label_index import indexed_labels, read_in_threads
from jepa_jax.data.sources.source import Opening, Source, allow_open_files, digest
from jepa_jax.data.sources.subset import SubsetSource

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

logger = logging.getLogger(__name__)

# Two preparations of one data set can agree in every size, so the fingerprint holds some records as well.
RECORDS_IN_FINGERPRINT = 32
CAPTIONED_RECORDS = 100_000  # whose captions a tokenizer is trained on


class TfdsSource:
  """A split of a prepared TFDS data set, read through `tfds.data_source` classes without TensorFlow or the network."""

  def __init__(self, name: str, data_dir: str, split: str, image_key: str, label_key: str, captions_key: str = ""):
    import tensorflow_datasets as tfds

    builder = _find_tfds_builder(name, data_dir)
    features = builder.info.features
    first = captions_key.split("/")[0]
    for field, key in {"image_key": image_key, "label_key": label_key, "captions.train": first}.items():
      if key and key not in features:
        raise ValueError(f"data.{field} is {key!r}, but {name} has {', '.join(sorted(features))}.")
    if captions_key:
      _check_texts(features, captions_key, name)
    try:
      # The bytes stay encoded: we decode them ourselves, so that a corrupt image does not stop the run.
      decoders = {image_key: tfds.decode.SkipDecoding()}
      self._records = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
      raise ValueError(_other_format_hint(name, data_dir, builder.info.file_format)) from error
    except (ValueError, KeyError) as error:
      splits = ", ".join(builder.info.splits)
      raise ValueError(f"{split!r} is no split of {name}; it has {splits} (slices: 'train[:90%]').") from error
    allow_open_files(len(builder.info.splits[split].file_instructions), f"{name}, split {split!r},")
    self._builder, self._files = builder, builder.info.splits[split].file_instructions
    self._title, self._image_key, self._label_key = f"{name}/{split}", image_key, label_key
    self._captions_key = captions_key
    self._labels: np.ndarray | None = None
    self._is_damaged = False
    self.class_names = tuple(getattr(features[label_key], "names", None) or ()) if label_key else ()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    record = self._records[index]
    label = int(record[self._label_key]) if self.class_names else -1  # a number that names no class is no label
    example = {"image": record[self._image_key], "label": label, "name": f"{self._title}[{index}]"}
    return example | ({"captions": self._captions(record)} if self._captions_key else {})

  def captions(self, indices: Sequence[int] | None = None) -> list[list[str]]:
    """Returns the captions of the images, or of these, that have any; of many, those of evenly spread ones."""
    asked = np.arange(len(self)) if indices is None else np.asarray(indices, int)
    some = np.linspace(0, len(asked) - 1, min(len(asked), CAPTIONED_RECORDS)).astype(int)
    return [own for i in asked[some] if (own := self._stored_captions(int(i)))]

  def _captions(self, record: dict) -> list[str]:
    value: Any = record
    for key in self._captions_key.split("/"):
      value = value[key]
    return _texts(np.atleast_1d(value).tolist())

  def _stored_captions(self, index: int) -> list[str] | None:
    """Returns the captions of an image, None of a damaged record, which counts as a bad image when its turn comes."""
    own = self._stored(index, self._captions_key)
    return None if own is None else _texts(own.bytes_list.value)

  def num_captions(self) -> np.ndarray:
    """Returns how many captions each image has, int32 (n,): read from all records once, and kept beside the labels."""
    return self._indexed(digest(self.fingerprint(), self._captions_key), "Captions", self._read_counts)

  def _indexed(self, fingerprint: str, what: str, read_block: Callable[[range], list[int]]) -> np.ndarray:
    """Returns a number of each image: from the index of this fingerprint, else from all records."""
    read = lambda: read_in_threads(read_block, len(self), f"{what} of {self._title}")
    folder, whole = Path(str(self._builder.data_path)), lambda: not self._is_damaged  # a repaired one has them
    return indexed_labels(fingerprint, folder, len(self), read, whole)

  def labels(self) -> np.ndarray:
    if not self.class_names:
      return np.full(len(self), -1, np.int32)
    if self._labels is None:
      # TFDS keeps no index of labels: where ours is missing, every record is read.
      self._labels = self._indexed(self.fingerprint(), "Labels", self._read_labels)
    return self._labels

  def fingerprint(self) -> str:
    paths = [self._builder.data_path / file.filename for file in self._files]  # data_path may be a bucket
    files = [(path.name, path.stat().length, file.skip, file.take) for path, file in zip(paths, self._files)]
    some = np.linspace(0, len(self) - 1, min(len(self), RECORDS_IN_FINGERPRINT)).astype(int)
    records = b"".join(self._record(int(i)) or b"damaged" for i in some)
    settings = self._builder.info.full_name, self._image_key, self._label_key, self.class_names
    return digest(settings, files, np.frombuffer(records, np.uint8))

  def _read_labels(self, block: range) -> list[int]:
    values = (self._stored(i, self._label_key) for i in block)
    return [-1 if own is None else int(own.int64_list.value[0]) for own in values]

  def _read_counts(self, block: range) -> list[int]:
    # A damaged record is no image without captions.
    return [1 if own is None else len(own) for own in map(self._stored_captions, block)]

  def _stored(self, index: int, key: str) -> Any:
    """Returns one feature of a record as it is stored, None of a damaged record."""
    from tensorflow_datasets.proto import tf_example_pb2

    # The message alone, without TFDS's features: a third of the time, and PartialDecoding would need TensorFlow.
    record = self._record(index)
    return None if record is None else tf_example_pb2.Example.FromString(record).features.feature[key]

  def _record(self, index: int) -> bytes | None:
    """Returns a record, or None for one that is damaged: when its turn comes, it counts as a bad image."""
    try:
      return self._records.data_source[index]
    except RuntimeError as error:  # array_record knows no other
      if "Postscript" in str(error) or "FooterMetadata" in str(error):
        file = f"a file of {self._builder.data_path} ({self._title})"
        raise ValueError(f"{file} is damaged or was not written to its end ({error}). Prepare it again.") from error
      self._is_damaged = True
      logger.warning("Record %d of %s is damaged (%s)", index, self._title, error)
      return None


def open_tfds(cfg: DataConfig, split: str) -> Source:
  """Returns a split of the data set `cfg.name`; ValueError, with the command that prepares it, if it is missing."""
  captions = cfg.captions.of(split)
  source = TfdsSource(cfg.name, cfg.root_path, cfg.split_name(split), cfg.image_key, cfg.label_key, captions)
  if not captions:
    return source
  rows = captioned_rows(cfg, split, source.num_captions(), np.arange(len(source)))
  return source if len(rows) == len(source) else SubsetSource(source, rows)


def _texts(stored: Iterable[bytes]) -> list[str]:
  """Returns those of the stored texts of which something is left."""
  return [text for text in (own.decode() for own in stored) if mended(text).strip()]


def _check_texts(features: Any, key: str, name: str) -> None:
  """Raises a ValueError where "a/b" leads to no text, or list of texts, of an example."""
  import tensorflow_datasets as tfds

  inside = lambda feature: feature.feature if isinstance(feature, tfds.features.Sequence) else feature
  found = features
  for part in key.split("/"):
    found = inside(found)
    if not isinstance(found, tfds.features.FeaturesDict) or part not in found:
      there = ", ".join(sorted(found)) if isinstance(found, tfds.features.FeaturesDict) else type(found).__name__
      raise ValueError(f"data.captions.train={key!r} leads nowhere in {name}: it has {there}")
    found = found[part]
  found = inside(found)
  if isinstance(found, tfds.features.FeaturesDict):
    raise ValueError(
      f"data.captions.train={key!r} holds {', '.join(sorted(found))} in {name}: give one of them, {key}/.."
    )
  if found.shape != () or np.dtype(found.np_dtype).kind not in "OSU":
    raise ValueError(f"data.captions.train={key!r} is no text in {name}, but {type(found).__name__} {found.shape}")


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


def _other_format_hint(name: str, data_dir: str, file_format: Any) -> str:
  """Returns what to do with a set that lies there in another format: a folder of TFDS holds each set in one."""
  old = (data_dir or "~/tensorflow_datasets").rstrip("/")
  new, kind = f"{old}_array_record", getattr(file_format, "value", file_format)
  call = f"tfds.builder({name!r}, data_dir={new!r}, file_format='array_record')"
  return (
    f"{name} was not prepared as ArrayRecord, but as {kind}, in {old}, which holds each set in one format. Prepare it "
    f'once more, in another folder, and set data.root={new}: python -c "import tensorflow_datasets as tfds; {call}'
    f".download_and_prepare(download_dir='{old}/downloads')\" "
    "(nothing is downloaded again; most sets need TensorFlow for this step). "
    "Of a builder of your own, which TFDS does not know by name: "
    f"MyBuilder(data_dir={new!r}, file_format='array_record').download_and_prepare()"
  )


def _prepare_hint(name: str, data_dir: str) -> str:
  arguments = f"{name!r}, data_dir={data_dir!r}" if data_dir else repr(name)
  call = f"tfds.builder({arguments}, file_format='array_record').download_and_prepare()"
  return (
    "Training downloads nothing. Prepare it once with this command (many data sets need TensorFlow for that step, and"
    f' only for that: pip install tensorflow): python -c "import tensorflow_datasets as tfds; {call}"'
  )


TFDS = Opening(
  open_tfds,
  reads=("root", "name", "train", "test", "image_key", "label_key", "subset_seed", "captions"),
  needs={"name": "a data set name such as 'cifar10'"},
)
