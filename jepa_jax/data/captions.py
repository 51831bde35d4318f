"""Captions of images: their settings, and the files that hold them."""

from __future__ import annotations

import collections
import contextlib
import csv
import gzip
import html
import io
import json
import logging
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jepa_jax.choices import check_choices
from jepa_jax.data.schema import Column, Columns

logger = logging.getLogger(__name__)

Texts = list[str]
# How a list of captions by image calls the image and its texts: Hugging Face's metadata, Karpathy's and COCO's files.
_NAMES = ("file_name", "filename", "image_path", "image_file", "image_name", "filepath", "file_path", "file", "path")
_NAMES = (*_NAMES, "image", "img", "name", "image_id")
_TEXTS = ("captions", "caption", "sentences", "sentence", "texts", "text", "raw", "comment", "title", "description")
SHOWN = 8  # names in a message
_NONE = "; where these images have no captions, leave them out: --config.data.captions.train="


@dataclass(frozen=True)
class CaptionConfig:
  """Which captions the images have, and how they become numbers; without `train` there are none.

  Attributes:
    train: For npz and folder a file below data.root (or an absolute path): JSON, JSON lines or CSV, also with .gz;
      "FILE:SPLIT" takes the images that the file says are of that split. For tfds the name of the text feature.
    test: The same for the test split; empty: as `train`.
    per_image: Captions of an image that are kept, the first ones; images with fewer have fewer.
    length: Tokens of a caption, its start and end among them; what is longer is cut, the end stays.
    vocab_size: Of the tokenizer, and rows of the text tower's embedding.
    tokenizer: A JSON file of the `tokenizers` library; empty: byte-level BPE, trained on the training captions.
    uncaptioned: What is done with images that have no caption: "refuse", or "drop", which leaves them out.
  """

  train: str = ""
  test: str = ""
  per_image: int = 5
  length: int = 32
  vocab_size: int = 4000
  tokenizer: str = ""
  uncaptioned: Literal["refuse", "drop"] = "refuse"

  def __post_init__(self):
    check_choices(self)
    for name, least in {"per_image": 1, "length": 3, "vocab_size": 260}.items():
      if getattr(self, name) < least:
        why = " (256 bytes, padding, start, end)" if name == "vocab_size" else ""
        raise ValueError(f"{name}={getattr(self, name)} must be at least {least}{why}")
    changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
    if changed and not self.train:
      raise ValueError(f"{changed[0]} is set, but train names no captions: say where they are, or leave it out")

  def of(self, split: str) -> str:
    """What the captions of the split "train" or "test" are called."""
    return self.test if split == "test" and self.test else self.train

  @property
  def columns(self) -> Columns:
    """The column that a row has: the ids of its captions, int32 (per_image, length), -1 after the last of each."""
    return {"caption": Column((self.per_image, self.length), np.int32, fill=-1)} if self.train else {}


def captions_by_image(
  cfg: CaptionConfig, split: str, root: Path, names: Sequence[str] | None, num: int, other: Sequence[str] = ()
) -> list[Texts]:
  """Returns the captions of each of `num` images, [] for one without; names: what the images are called, or None.

  A file that names its images is matched by these names, see `matched`; one that does not holds a list as long as the
  images. other: names of the other split's images; a name that fits images of both splits is warned of. ValueError,
  with the fix, where images and captions do not fit together.
  """
  path, part = file_and_split(root / Path(os.path.expandvars(cfg.of(split))).expanduser())
  found = read_captions(path, part)
  if isinstance(found, list) and len(found) != num:
    raise ValueError(f"{path} holds captions of {len(found)} images, in their order, and there are {num} images{_NONE}")
  if not isinstance(found, list) and names is None:
    raise ValueError(f"{path} names its images, and the images have no names ('names' in an npz file): give a list")
  if not isinstance(found, list):
    names = names or ()
    found = _matched(_placed(found, path, root, [*names, *other]), names, other, path)
  texts = found
  texts = [[text.strip() for text in own][: cfg.per_image] for own in texts]
  for i, own in enumerate(texts):
    if not all(mended(text).strip() for text in own):
      raise ValueError(f"{path}: a caption of {names[i] if names else f'number {i}'} is empty; write it or take it out")
  return texts


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


def _placed(found: Mapping[str, Texts], path: Path, root: Path, names: Sequence[str]) -> dict[str, Texts]:
  """Returns captions by the path of their image; a file that lies among images names them from its own folder on."""
  above = path.parent.relative_to(root).as_posix() if path.is_relative_to(root) else "."
  among = any(name.startswith(f"{above}/") for name in names)
  placed = lambda name: name if name.startswith(("/", f"{above}/")) or not among else posixpath.join(above, name)
  return {posixpath.normpath(placed(name.replace("\\", "/"))): texts for name, texts in found.items()}


def _matched(found: Mapping[str, Texts], names: Sequence[str], other: Sequence[str], path: Path) -> list[Texts]:
  """Returns the captions of each name, [] where there are none; see `keys_of`."""
  keys, taken = keys_of(found, names, other), set(keys_of(found, other, names))
  if not any(keys):
    given, there = ", ".join(list(found)[:SHOWN]), ", ".join(names[:SHOWN])
    raise ValueError(f"{path} names other images ({given}) than there are ({there}); name them alike{_NONE}")
  if both := [key for key in keys if key and key in taken]:
    logger.warning(
      "%s: %d names, such as %s, fit images of both splits, which get the same captions; write the split's folder "
      "before them, or give data.captions.test a file of its own",
      *(path, len(both), both[0]),
    )
  return [found[key] if key else [] for key in keys]


def keys_of(found: Iterable[str], names: Sequence[str], other: Sequence[str] = ()) -> list[str]:
  """Returns for each name the one of `found` that means it, "" for none: paths, / between their parts.

  It is the name itself, or what is left of it without its first folders; else one that agrees in the last part alone,
  if that is unambiguous, and it does not lie in the folder of `other`, names of images that are not meant.
  """
  found, plain = list(found), [posixpath.normpath(name.replace("\\", "/")) for name in names]
  there = set(found)
  first = lambda given: {name.split("/")[0] for name in given if "/" in name}
  foreign = first(other) - first(plain)
  last = posixpath.basename
  theirs, ours = (collections.Counter(map(last, given)) for given in (found, plain))
  alone = lambda name: theirs[last(name)] == ours[last(name)] == 1 and foreign.isdisjoint(name.split("/")[:-1])
  short = {last(name): name for name in found if alone(name)}
  ends = lambda name: ("/".join(name.split("/")[i:]) for i in range(name.count("/") + 1))
  keys = [next((end for end in ends(name) if end in there), short.get(last(name), "")) for name in plain]
  claims = collections.Counter(keys)
  return [key if claims[key] == 1 else "" for key in keys]


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
    name, texts = _first(own, _NAMES), _first(own, _TEXTS)
    if part and str(own["split"]) != part:
      continue
    # Karpathy's COCO says the folder beside: the name alone is not enough where two folders have it.
    folder = f"{own['filepath']}/" if name != "filepath" and own.get("filepath") else ""
    found.setdefault(f"{folder}{own[name]}", []).extend(_texts(own[texts]))
  return found


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
  head = _header(rows[0]) if rows else None
  place, texts_at = (_first_of(head, _NAMES), _first_of(head, _TEXTS)) if head else (0, 1)
  split_at = head.index("split") if head and "split" in head else None
  if split_at is None:
    _no_parts(part)
  columns = len(head) if head else 2
  found: dict[str, Texts] = {}
  for number, row in enumerate(rows[bool(head) :], 1 + bool(head)):
    if 2 < columns == len(row) + 1 and (found_number := re.fullmatch(r"\s*(\d+)\s+(\S.*)", row[-1])):
      row = [*row[:-1], *found_number.groups()]  # a line of Flickr30k's results.csv lacks the separator here
    if len(row) < 2 or len(row) <= max(place, texts_at, split_at or 0):
      raise ValueError(f"line {number} has {len(row)} cells of {columns}: {separator.join(row)[:60]!r}")
    # A caption that is not quoted may hold the separator: what is too much belongs to it.
    more = max(len(row) - columns, 0)
    after = lambda at, more=more: at + more * (at > texts_at)
    if part and split_at is not None and row[after(split_at)].strip() != part:
      continue
    name = row[after(place)].strip()
    base, hash_, number_of = name.rpartition("#")
    numbered = hash_ and number_of.isdigit() and "." in base  # Flickr's "a.jpg#0"
    caption = separator.join(row[texts_at : texts_at + more + 1]).strip()
    found.setdefault(base if numbered else name, []).extend(_cell(caption))
  return found


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
  """Returns what separates the columns, by the first line: a tab, else | or ; behind a name of the image's column."""
  if "\t" in first:
    return "\t"
  return next((mark for mark in "|;" if first.split(mark)[0].strip().lower() in _NAMES), ",")


def _rows(lines: Sequence[str], separator: str) -> list[list[str]]:
  """Returns the cells of every line. Quotes are part of a text, but where they enclose cells as CSV has it."""
  if separator in "\t|":
    return [line.split(separator) for line in lines]
  read = lambda part: list(csv.reader(io.StringIO(part), delimiter=separator, strict=True))
  try:
    return read("\n".join(lines))
  except csv.Error:  # a quote that is none of CSV's: line by line, and as it stands where that does not help
    rows = []
    for line in lines:
      try:
        rows += read(line)
      except csv.Error:
        rows.append(line.split(separator))
    return rows


def _cell(text: str) -> Texts:
  """Returns the captions in one cell: itself, or those of a list in JSON, as data sets of the hub have it."""
  if text.startswith("[") and text.endswith("]"):
    with contextlib.suppress(ValueError):
      value = json.loads(text)
      if isinstance(value, list) and all(isinstance(own, str) for own in value):
        return [own.strip() for own in value]
  return [text]
