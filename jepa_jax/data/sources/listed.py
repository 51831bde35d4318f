"""Image files named by a table: CSV, TSV or JSON lines with a column of paths and perhaps one of classes."""

from __future__ import annotations

import collections
import csv
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_jax.data.sources.label_values import as_classes

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

logger = logging.getLogger(__name__)
LIST_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson")
# What the column of paths is called: by Hugging Face's metadata files, pandas users and tools for labelling.
PATHS = ("file_name", "image", "image_path", "filename", "path", "filepath", "file_path", "file", "img", "name")
CLASSES = ("label", "labels", "class", "class_name", "class_id", "category", "target", "species")
_SHOWN = 5
_LOOKED_FOR = 2000  # files: on a network disk each answer is a wait; others that are not there are bad images


def is_list(path: Path) -> bool:
  """Returns whether this is a file that names images."""
  return path.suffix.lower() in LIST_ENDINGS and path.is_file()


def read_list(path: Path, root: Path, cfg: DataConfig) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
  """Returns the paths of the images, from root on, labels (n,) and the names of the classes.

  Paths begin at the list's folder, or else at root. The columns are `data.image_key` and `data.label_key`, where there
  are such, else those of `PATHS` and `CLASSES`. ValueError, with the line that mends it, for a list that cannot be read
  or that names files which are not there.
  """
  rows = _rows(path)
  if not rows:
    raise ValueError(f"{path} names no images")
  columns = list(dict.fromkeys(name for row in rows for name in row))
  place = _column(columns, cfg.image_key, "image", PATHS, path)
  if place is None:
    raise ValueError(
      f"{path} has the columns {', '.join(columns)}: which one holds the paths? Say it: data.image_key=..."
    )
  if unsaid := [number for number, row in enumerate(rows, 1) if not str(row.get(place) or "").strip()]:
    raise ValueError(f"{path}: row {unsaid[0]} has no {place!r}: write it or take the row out")
  paths = _below([str(row[place]).strip() for row in rows], path, root)
  classes = _column([name for name in columns if name != place], cfg.label_key, "label", CLASSES, path)
  if classes is None:
    logger.info("%s has no column of classes (%s): its images have no labels", path, ", ".join(columns))
    return paths, np.full(len(paths), -1, np.int32), ()
  return paths, *as_classes(
    _values([row.get(classes) for row in rows]), None, f"the labels, column {classes!r} of {path},"
  )


def _rows(path: Path) -> list[Mapping[str, Any]]:
  try:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() in (".csv", ".tsv"):
      first = text.split("\n", 1)[0]
      mark = "\t" if "\t" in first else ";" if ";" in first and "," not in first else ","
      reader = csv.DictReader(io.StringIO(text), delimiter=mark, strict=True, skipinitialspace=True)
      rows: list[Mapping[str, Any]] = list(reader)
      if odd := next((row for row in rows if None in row), None):
        raise ValueError(f"a row has more cells than the header: {list(odd.values())[:3]}")
    else:
      rows = [json.loads(line) for line in text.splitlines() if line.strip()]
      if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no object of JSON")
  except (UnicodeDecodeError, csv.Error, ValueError) as error:
    raise ValueError(f"{path} cannot be read as a list of images: {error}") from error
  return rows


def _column(columns: Sequence[str], asked: str, default: str, usual: Sequence[str], path: Path) -> str | None:
  """Returns the column that is asked for, or the first of the usual ones, None where there is none."""
  lower = {name.strip().lower(): name for name in columns if name}
  if asked in columns:
    return asked
  if asked not in ("", default):  # the default is no promise
    raise ValueError(f"{path} has no column {asked!r}, but {', '.join(columns)}")
  return next((lower[name] for name in usual if name in lower), None)


def _below(named: list[str], path: Path, root: Path) -> list[str]:
  """Returns the paths as they lie below root; ValueError for files that are not there."""
  named = [os.path.normpath(name) for name in named]
  some = [named[i] for i in np.unique(np.linspace(0, len(named) - 1, min(len(named), _LOOKED_FOR)).astype(int))]
  missing = {base: [name for name in some if not (base / name).is_file()] for base in (path.parent, root)}
  base = min(missing, key=lambda base: len(missing[base]))
  if missing[base]:
    raise ValueError(
      f"{path} names files that are not there, {len(missing[base]):,} of {len(some):,} that were looked for, such as "
      f"{', '.join(missing[base][:_SHOWN])}: paths begin at {path.parent}, or at data.root={root}"
    )
  name, times = collections.Counter(named).most_common(1)[0]
  if times > 1:
    raise ValueError(f"{path} names {name} {times} times: an image stands in one row")
  found = [os.path.relpath(base / name, root) for name in named]  # also of absolute ones, where they lie below root
  if any(name.startswith("..") for name in found):
    logger.warning("%s names files outside of data.root=%s: elsewhere they will not be found", path, root)
  return found


def _values(cells: list[Any]) -> np.ndarray:
  """Returns the cells as numbers where all of them are, else as text; an empty one is no class."""
  text = ["" if cell is None else str(cell).strip() for cell in cells]
  try:
    numbers = np.array([-1.0 if cell == "" else float(cell) for cell in text])  # pandas writes 1.0 where one is missing
  except ValueError:
    return np.array(text, str)
  return numbers if (numbers == np.round(numbers)).all() else np.array(text, str)
