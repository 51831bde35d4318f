"""Tables of images as the Hugging Face hub holds them: parquet files, or what `datasets` has written by save_to_disk.

Images are read at random, and a parquet file is compressed in groups of rows. So parquet is written once, as it comes,
into an Arrow file in the cache, which is mapped into memory; `datasets` does the same. What `save_to_disk` writes is
Arrow already. Neither the `datasets` package nor, for files that are here, a network is needed.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_jax.data.hub import local_root
from jepa_jax.data.sources.captioned import CaptionedSource, captioned_rows
from jepa_jax.data.sources.label_values import as_classes
from jepa_jax.data.sources.source import Opening, Source, digest
from jepa_jax.data.sources.subset import SubsetSource
from jepa_jax.workdir import cache_folder

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

logger = logging.getLogger(__name__)
_SHOWN = 5


class ArrowSource:
  """Rows of an Arrow table: a column of images, encoded, and perhaps one of classes."""

  def __init__(self, table: Any, cfg: DataConfig, split: str, state: str):
    self._images, self._state, self._title = _image_column(table, cfg.image_key, split), state, split
    self._labels, self.class_names = _labels(table, cfg.label_key)
    self._table = table

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict:
    value = self._images[index].as_py()
    image = value["bytes"] if isinstance(value, dict) else value
    name = (isinstance(value, dict) and value.get("path")) or f"{self._title}[{index}]"
    if image is None:
      raise ValueError(f"{name} lies in a file of its own, and not in the table: write it with embed_external_files")
    return {"image": image, "label": int(self._labels[index]), "name": name}

  def texts(self, key: str) -> list[list[str]]:
    """Returns the texts of a column, one or several of each image."""
    if key not in self._table.column_names:
      raise ValueError(f"data.captions.train={key!r} is no column; there are {', '.join(self._table.column_names)}")
    values = self._table[key].to_pylist()
    if not all(value is None or isinstance(value, str | list) for value in values[:_SHOWN]):
      raise ValueError(f"data.captions.train={key!r} holds {self._table[key].type}, and no text or list of texts")
    several = ([value] if isinstance(value, str) else value or [] for value in values)
    return [[text for text in own if isinstance(text, str) and text.strip()] for own in several]

  def labels(self) -> np.ndarray:
    return self._labels

  def fingerprint(self) -> str:
    return digest(self._state, len(self), self._labels, self.class_names)


def open_parquet(cfg: DataConfig, split: str) -> Source:
  """Returns a split of a folder of parquet or Arrow files; ValueError, with the fix, where it cannot be read."""
  files = _files(local_root(cfg), cfg.split_name(split))
  state = digest([(path.name, path.stat().st_size) for path in files])
  where = f"{cfg.split_name(split)} in {cfg.root_path}"
  source = ArrowSource(_table(files, state, where), cfg, where, state)
  key = cfg.captions.of(split)
  if not key:
    return source
  texts = [own[: cfg.captions.per_image] for own in source.texts(key)]
  rows = captioned_rows(cfg, split, [len(own) for own in texts], np.arange(len(source)))
  some: Source = source if len(rows) == len(source) else SubsetSource(source, rows)
  return CaptionedSource(some, [texts[i] for i in rows])


def _files(root: Path, name: str) -> list[Path]:
  """Returns the files of a split: a folder of Arrow files, files of that name, or all that begin so."""
  if not root.is_dir():
    raise ValueError(f"data.root={root} is no folder: say where the parquet files, or what save_to_disk wrote, lie")
  for pattern in (f"{name}/*.arrow", f"{name}/*.parquet", name, f"{name}*.parquet", f"data/{name}*.parquet"):
    found = sorted(path for path in root.glob(pattern) if path.suffix in (".arrow", ".parquet") and path.is_file())
    if found:
      return [path for path in found if not path.name.startswith(("cache-", "."))]
  there = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in (".arrow", ".parquet"))
  said = ", ".join(there[:_SHOWN]) or "no .parquet and no .arrow file"
  raise ValueError(f"{root} has no files of the split {name!r}; it holds {said}. Set data.train and data.test")


def _table(files: Sequence[Path], state: str, where: str) -> Any:
  """Returns all rows, mapped into memory."""
  import pyarrow as pa

  try:
    if files[0].suffix == ".arrow":
      return pa.concat_tables([_mapped(path) for path in files])
    kept = cache_folder("arrow") / f"{digest(str(files[0].parent.resolve()), state)}.arrow"
    if not kept.exists():
      _convert(files, kept, where)
    return _mapped(kept)
  except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowTypeError) as error:
    raise ValueError(
      f"{where}: {files[0].name} or another file is damaged, or they do not fit together: {error}"
    ) from error


def _mapped(path: Path) -> Any:
  import pyarrow as pa

  source = pa.memory_map(str(path))
  try:
    return pa.ipc.open_stream(source).read_all()  # as datasets writes
  except pa.ArrowInvalid:
    return pa.ipc.open_file(source).read_all()


def _convert(files: Sequence[Path], out: Path, where: str) -> None:
  """Writes parquet files as one Arrow file, a group of rows at a time."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  out.parent.mkdir(parents=True, exist_ok=True)
  part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
  size_gb = sum(path.stat().st_size for path in files) / 1e9
  logger.info("%s: %d parquet files (%.1f GB) are written to %s, once", where, len(files), size_gb, out)
  schema = pq.ParquetFile(files[0]).schema_arrow
  try:
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
      for path in files:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
          writer.write_table(pa.Table.from_batches([batch]).cast(schema))
    part.replace(out)
  except OSError as error:
    raise ValueError(
      f"{where} cannot be written to {out.parent} ({error}): make room, or set XDG_CACHE_HOME"
    ) from error
  finally:
    part.unlink(missing_ok=True)


def _is_struct_of(kind: Any, field: str) -> bool:
  import pyarrow as pa

  return pa.types.is_struct(kind) and any(kind.field(i).name == field for i in range(kind.num_fields))


def _image_column(table: Any, key: str, where: str) -> Any:
  import pyarrow as pa

  encoded = lambda kind: _is_struct_of(kind, "bytes") or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
  fits = [field.name for field in table.schema if encoded(field.type)]
  if key not in table.column_names or key not in fits:
    there = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
    hint = f"; set data.image_key={fits[0]}" if fits else "; none of them holds encoded images"
    raise ValueError(f"data.image_key={key!r} is no column of images of {where}, which has {there}{hint}")
  return table[key]


def _labels(table: Any, key: str) -> tuple[np.ndarray, tuple[str, ...]]:
  """Returns labels int32 (n,) and the names of the classes; -1 and () where the table has none."""
  import pyarrow as pa

  if key not in table.column_names:
    if key not in ("", "label"):  # the default is no promise
      raise ValueError(f"data.label_key={key!r} is no column; there are {', '.join(table.column_names)}")
    logger.info("The table has no column %r: its images have no labels; it has %s", key, ", ".join(table.column_names))
    return np.full(len(table), -1, np.int32), ()
  column, where = table[key], f"the labels, column {key!r},"
  if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
    return as_classes(np.array(column.fill_null("").to_pylist(), str), None, where)
  if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
    raise ValueError(f"data.label_key={key!r} holds {column.type}: classes are whole numbers or text")
  values = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
  names = _class_names(table.schema.metadata, key)
  return as_classes(values.fill_null(-1).to_numpy(), names or None, where)


def _class_names(metadata: Any, key: str) -> tuple[str, ...]:
  """Returns the names that `datasets` keeps in the metadata of a table."""
  try:
    features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    return tuple(features[key]["names"])
  except (KeyError, TypeError, ValueError):
    return ()


PARQUET = Opening(
  open_parquet,
  reads=("root", "train", "test", "image_key", "label_key", "subset_seed", "captions"),
  needs={"root": "the folder that holds the files"},
)
