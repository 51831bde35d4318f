"""Captions of images: their settings, and which image has which."""

from __future__ import annotations

import collections
import logging
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jepa_jax.choices import check_choices
from jepa_jax.data.caption_files import SHOWN, Texts, file_and_split, mended, read_captions
from jepa_jax.data.schema import Column, Columns

logger = logging.getLogger(__name__)

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


class Names(NamedTuple):
  """What the images of a split are called, below data.root; the folder that they lie in, "" where they lie in none.

  `other`: names of images of the other split, and `other_folder` theirs.
  """

  own: Sequence[str]
  folder: str = ""
  other: Sequence[str] = ()
  other_folder: str = ""

  def swapped(self) -> Names:
    return Names(self.other, self.other_folder, self.own, self.folder)


def captions_by_image(cfg: CaptionConfig, split: str, root: Path, names: Names | None, num: int) -> list[Texts]:
  """Returns the captions of each of `num` images, [] for one without; names: what the images are called, or None.

  A file that names its images is matched by these names, see `keys_of`; one that does not holds a list as long as the
  images. ValueError, with the fix, where images and captions do not fit together.
  """
  path, part = file_and_split(root / Path(os.path.expandvars(cfg.of(split))).expanduser())
  found, called = read_captions(path, part), names.own if names else None
  if isinstance(found, list) and len(found) != num:
    raise ValueError(f"{path} holds captions of {len(found)} images, in their order, and there are {num} images{_NONE}")
  if not isinstance(found, list) and names is None:
    raise ValueError(f"{path} names its images, and the images have no names ('names' in an npz file): give a list")
  if not isinstance(found, list):
    assert names
    given = "" if split == "train" or cfg.test else " (data.captions.test is empty: it is the file of training)"
    found = _matched(_placed(found, path, root, names), names, f"{path}{given}", cfg.of("train") == cfg.of("test"))
  texts = [[text.strip() for text in own][: cfg.per_image] for own in found]
  for i, own in enumerate(texts):
    if not all(mended(text).strip() for text in own):
      raise ValueError(
        f"{path}: a caption of {called[i] if called else f'number {i}'} is empty; write it or take it out"
      )
  return texts


def _placed(found: Mapping[str, Texts], path: Path, root: Path, names: Names) -> dict[str, Texts]:
  """Returns captions by the path of their image, below root where it lies there.

  A file that lies among images names them from its own folder on.
  """
  root, folder = root.resolve(), path.parent.resolve()
  above = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else "."
  among = any(name.startswith(f"{above}/") for name in (*names.own, *names.other))

  def place(name: str) -> str:
    name = name.replace("\\", "/")
    if name.startswith("/"):
      here = os.path.realpath(posixpath.dirname(name)) + "/" + posixpath.basename(name)
      return here.removeprefix(f"{root.as_posix()}/") if here.startswith(f"{root.as_posix()}/") else name
    if among and not name.startswith(f"{above}/"):
      name = posixpath.join(above, name)
    return re.sub(r"^(\.\./)+", "", posixpath.normpath(name))

  placed: dict[str, Texts] = {}
  for name, texts in found.items():
    placed.setdefault(place(name), []).extend(texts)
  return placed


def _matched(found: Mapping[str, Texts], names: Names, where: str, is_shared: bool) -> list[Texts]:
  """Returns the captions of each name, [] where there are none; is_shared: both splits have theirs from there."""
  keys = keys_of(found, names)
  if not any(keys):
    given, there = ", ".join(list(found)[:SHOWN]), ", ".join(names.own[:SHOWN])
    raise ValueError(f"{where} names other images ({given}) than there are ({there}); name them alike{_NONE}")
  taken = set(keys_of(found, names.swapped())) if is_shared and names.other else set()
  if both := [key for key in keys if key and key in taken]:
    logger.warning(
      "%s: %d names, such as %s, fit images of both splits, which get the same captions; write the split's folder "
      "before them, or give data.captions.test a file of its own",
      *(where, len(both), both[0]),
    )
  return [found[key] if key else [] for key in keys]


def keys_of(found: Iterable[str], names: Names) -> list[str]:
  """Returns for each image the one of `found` that means it, "" for none; paths, / between their parts.

  In this order: the image's path; the end of it ("cat/a.jpg" of "train/cat/a.jpg"); a path that ends in it; one that
  ends in what lies below the split's folder ("Images/a.jpg" of "test/a.jpg"); one that agrees in the last part alone.
  The last two are none in the folder of the other split, and the very last none in any folder that images lie in: there
  "cat/1.jpg" is not "dog/1.jpg". What fits several images, or an image of which several fit, counts as none.
  """
  found = list(dict.fromkeys(found))
  plain = [posixpath.normpath(name.replace("\\", "/")) for name in names.own]
  below = [name.removeprefix(f"{names.folder}/") if names.folder else name for name in plain]
  there, last = set(found), posixpath.basename
  depths = {name.count("/") + 1 for name in (*plain, *below)} | {1}
  ending = {depth: _by_end(found, depth) for depth in depths}
  folders = {part for name in (*plain, *names.other) for part in name.split("/")[:-1]}
  foreign = _foreign(names)
  ends = lambda name: ("/".join(name.split("/")[i:]) for i in range(1, name.count("/") + 1))
  longer = lambda end: ending[end.count("/") + 1].get(end, [])
  allowed = lambda key: not foreign(key)
  alone = lambda key: allowed(key) and folders.isdisjoint(key.split("/")[:-1])

  def levels(name: str, inside: str) -> Iterable[list[str]]:
    yield [name] if name in there else []
    yield [end for end in ends(name) if end in there][:1]
    yield longer(name)
    yield [key for key in longer(inside) if allowed(key)]
    yield [key for key in longer(last(name)) if alone(key)]

  claims: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)  # key -> (level, image)
  for i, (name, inside) in enumerate(zip(plain, below, strict=True)):
    level, fits = next(((level, fits) for level, fits in enumerate(levels(name, inside)) if fits), (0, []))
    if len(fits) == 1:
      claims[fits[0]].append((level, i))
  keys = [""] * len(plain)
  for key, claimed in claims.items():
    best = [i for level, i in claimed if level == min(claimed)[0]]
    if len(best) == 1:
      keys[best[0]] = key
  return keys


def _by_end(found: Sequence[str], depth: int) -> dict[str, list[str]]:
  """Returns {last parts, so many: the names that end so}, of names that have more parts, or as many."""
  ending: dict[str, list[str]] = {}
  for name in found:
    parts = name.split("/")
    if len(parts) >= depth:
      ending.setdefault("/".join(parts[-depth:]), []).append(name)
  return ending


def _foreign(names: Names) -> Callable[[str], bool]:
  """Returns a function that says of a path whether it lies in the other split's folder, and not in this one's."""
  own, other = names.folder.split("/"), names.other_folder.split("/")
  same = len(os.path.commonprefix([own, other]))
  inside = lambda path, folder: bool(folder) and f"/{folder}/" in f"/{posixpath.dirname(path)}/"
  ours, theirs = "/".join(own[same:]), "/".join(other[same:])
  return lambda path: inside(path, theirs) and not inside(path, ours)
