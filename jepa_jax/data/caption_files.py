"""Files of captions: JSON, JSON lines, CSV and its relatives, as they are published."""

from __future__ import annotations

import ast
import collections
import contextlib
import csv
import gzip
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Texts = list[str]
# How a list of captions by image calls the image and its texts: Hugging Face's metadata, Karpathy's and COCO's files.
_NAMES = ("file_name", "filename", "image_path", "image_file", "image_name", "filepath", "file_path", "file", "path")
_NAMES = (*_NAMES, "image", "img", "name", "image_id")
_TEXTS = ("captions", "caption", "sentences", "sentence", "texts", "text", "raw", "comment", "title", "description")
SHOWN = 8  # names in a message


def mended(text: str) -> str:
  """Returns a text from the web as it was meant: wrong decodings repaired, HTML's entities resolved twice."""
  if not text.isascii():
    import ftfy

    text = ftfy.fix_text(text)
  return html.unescape(html.unescape(text)) if "&" in text else text


def file_and_split(path: Path) -> tuple[Path, str]:
  """Returns the path and the split of "FILE:SPLIT"; "" where there is such a file, or none is named."""
  file, colon, part = path.name.rpartition(":")
  return (path.with_name(file), part) if colon and not path.is_file() else (path, "")


def read_captions(path: Path, part: str = "") -> dict[str, Texts] | list[Texts]:
  """Returns {image: texts} of a file, or a list of texts where it names no images; `part`: of this split alone.

  JSON: {image: text or texts}, a list of texts, a list of objects with a name and texts, Karpathy's
  {"images": [{"filename", "split", "sentences": [{"raw"}]}]} and COCO's {"images", "annotations"}. JSON lines: objects.
  Lines: with or without a header, the image, then the caption (the first separator ends the name), separated by a tab,
  a comma, or, with a header, | or ;; also Flickr's "image.jpg#0<tab>caption". A column `split`, where there is one. A
  line with more cells than the header has separators in its caption.
  """
  if not path.is_file():
    folder = path.parent
    names = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else ["nothing"]
    there = ", ".join(names[:SHOWN])
    raise ValueError(f"data.captions: {path} does not exist; {folder} holds {there}")
  packed = path.suffix.lower() == ".gz"
  try:
    raw = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    text = raw.decode("utf-8-sig")
  except (OSError, EOFError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is no text in UTF-8 ({error}); write it again") from error
  kind = Path(path.stem if packed else path.name).suffix.lower()
  try:
    if kind == ".json":
      found = _of_json(json.loads(text), part)
    elif kind in (".jsonl", ".ndjson"):
      found = _of_objects([json.loads(line) for line in text.split("\n") if line.strip()], part)
    else:
      found = _of_lines(text, part)
  except (ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
    said = f"nothing is called {error}" if isinstance(error, KeyError) else error
    raise ValueError(f"{path} holds captions in no known form ({said}): see docs/multimodal.md") from error
  if not found:
    said = f"says of no image that it is of the split {part!r}" if part else "holds no caption"
    raise ValueError(f"{path} {said}")
  return found


def _of_json(value: Any, part: str) -> dict[str, Texts] | list[Texts]:
  if isinstance(value, list):
    if value and isinstance(value[0], Mapping):
      return _of_objects(value, part)
    _no_parts(part)
    return [_texts(own) for own in value]
  if "annotations" in value and "images" in value:  # COCO
    _no_parts(part)
    name = {image["id"]: image["file_name"] for image in value["images"]}
    if twice := [own for own, count in collections.Counter(name.values()).items() if count > 1]:
      raise ValueError(f"two images are called {twice[0]!r}")
    found: dict[str, Texts] = {own: [] for own in name.values()}
    for note in value["annotations"]:
      if note["image_id"] not in name:
        raise ValueError(f"an annotation is of the image {note['image_id']!r}, which is not listed under images")
      found[name[note["image_id"]]].append(note["caption"])
    return found
  if isinstance(value.get("images"), list):  # Karpathy
    return _of_objects(value["images"], part)
  _no_parts(part)
  return {image: _texts(own) for image, own in value.items()}


def _no_parts(part: str) -> None:
  if part:
    raise ValueError(f"it does not say which split an image is of, and {part!r} is asked for")


def _of_objects(objects: Iterable[Mapping[str, Any]], part: str) -> dict[str, Texts]:
  found: dict[str, Texts] = {}
  for own in objects:
    name, texts = _named(own), _first(own, _TEXTS)
    if part and str(own["split"]) != part:
      continue
    found.setdefault(name, []).extend(_texts(own[texts]))
  return found


def _named(own: Mapping[str, Any]) -> str:
  """Returns what an image is called by its columns: with its folders, where one of them, or `filepath`, tells them."""
  name = str(own[_first(own, _NAMES)]).strip().replace("\\", "/")
  others = [str(own[key]).strip().replace("\\", "/") for key in _NAMES if own.get(key)]
  if longer := [other for other in others if other.endswith(f"/{name}")]:
    return max(longer, key=len)
  folder = str(own.get("filepath") or "").strip()  # Karpathy's COCO has the folder beside the name
  return f"{folder}/{name}" if folder and folder != name else name


def _first(own: Mapping[str, Any], names: Sequence[str]) -> str:
  key = next((name for name in names if name in own), None)
  if key is None:
    raise ValueError(f"an image has {', '.join(own)}, and none of {', '.join(names)}")
  return key


def _texts(value: Any) -> Texts:
  if isinstance(value, str):
    return [value]
  if isinstance(value, Mapping):
    return _texts(value[_first(value, _TEXTS)])
  if not isinstance(value, Sequence):
    raise ValueError(f"a caption is {value!r}, and no text")
  return [text for own in value for text in _texts(own)]


def _of_lines(text: str, part: str) -> dict[str, Texts]:
  lines = [line for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
  separator = _separator(lines[0]) if lines else ","
  rows = _rows(lines, separator)
  header = _header(rows[0]) if rows else None
  head = header or [_NAMES[0], _TEXTS[0]]
  texts_at, columns = _first_of(head, _TEXTS), len(head)
  if "split" not in head:
    _no_parts(part)
  found: dict[str, Texts] = {}
  for number, row in enumerate(rows[bool(header) :], 1 + bool(header)):
    row = _mended_row(row, head, separator)
    if len(row) < columns:
      raise ValueError(f"line {number} has {len(row)} cells of {columns}: {separator.join(row)[:60]!r}")
    # A caption that is not quoted may hold the separator: what is too much belongs to it.
    end = texts_at + len(row) - columns + 1
    cells = dict(zip(head, [*row[:texts_at], separator.join(row[texts_at:end]), *row[end:]], strict=True))
    if part and cells["split"].strip() != part:
      continue
    name = _named(cells)
    base, hash_, number_of = name.rpartition("#")
    numbered = hash_ and number_of.isdigit() and "." in base  # Flickr's "a.jpg#0"
    found.setdefault(base if numbered else name, []).extend(_cell(cells[head[texts_at]].strip()))
  return found


def _mended_row(row: list[str], head: Sequence[str], separator: str) -> list[str]:
  """Returns the row; one of Flickr30k's results.csv lacks the separator between the number and the comment."""
  if separator != "|" or head[-2] != "comment_number" or len(row) != len(head) - 1:
    return row
  found = re.fullmatch(r"\s*(\d+)\s+(\S.*)", row[-1])
  return [*row[:-1], *found.groups()] if found else row


def _header(first: Sequence[str]) -> list[str] | None:
  """Returns the names of the columns, None where the first line is a caption; ValueError for one that says too little.

  A name or a text alone makes a header, where nothing in the line looks like a file."""
  head = [cell.strip().lower() for cell in first]
  has_name, has_text = (any(cell in names for cell in head) for names in (_NAMES, _TEXTS))
  if not (has_name or has_text) or (not (has_name and has_text) and any(re.search(r"\.\w+$", cell) for cell in head)):
    return None
  for names in (_NAMES, _TEXTS):
    _first_of(head, names)
  return head


def _first_of(head: Sequence[str], names: Sequence[str]) -> int:
  place = next((head.index(name) for name in names if name in head), None)
  if place is None:
    raise ValueError(f"the columns are {', '.join(head)}, and none of {', '.join(names)}")
  return place


def _separator(first: str) -> str:
  """Returns what separates the columns, by the first line: what makes a header of it; else a tab, else a comma."""
  for mark in "\t|;":
    cells = {cell.strip().strip('"').lower() for cell in first.split(mark)}
    if cells & set(_NAMES) and cells & set(_TEXTS):
      return mark
  return "\t" if "\t" in first else ","


def _rows(lines: Sequence[str], separator: str) -> list[list[str]]:
  """Returns the cells of every line. Quotes are part of a text, but where they enclose cells as CSV has it."""
  if separator in "\t|":
    return [[_unquoted(cell) for cell in line.split(separator)] for line in lines]
  read = lambda part: list(csv.reader(io.StringIO(part), delimiter=separator, strict=True))
  with contextlib.suppress(csv.Error):
    rows = read("\n".join(lines))
    if not any(re.search(rf"\n[^\n]*\.\w+{separator}", cell) for row in rows for cell in row):
      return rows  # else an open quote has swallowed lines that begin with a file of their own
  rows = []
  for line in lines:  # a quote that is none of CSV's: line by line, and as it stands where that does not help
    try:
      rows += read(line)
    except csv.Error:
      rows.append(line.split(separator))
  return rows


def _unquoted(cell: str) -> str:
  """Returns a cell without the quotes of CSV, told by the doubled ones inside; other quotes are text."""
  inner = cell.strip()[1:-1]
  is_quoted = re.fullmatch(r'"(?:[^"]|"")*"', cell.strip()) and '""' in inner
  return inner.replace('""', '"') if is_quoted else cell


def _cell(text: str) -> Texts:
  """Returns the captions in one cell: itself, or those of a list, in JSON or as Python writes it."""
  if text.startswith("[") and text.endswith("]"):
    for read in (json.loads, ast.literal_eval):
      with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        value = read(text)
        if isinstance(value, list) and value and all(isinstance(own, str) for own in value):
          return [own.strip() for own in value]
  return [text]
