"""Image files: one folder per class, all in one folder, or named by a list."""

from __future__ import annotations

import collections
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_jax.data.captions import Names
from jepa_jax.data.sources.captioned import with_captions
from jepa_jax.data.sources.listed import is_list, read_list
from jepa_jax.data.sources.source import Opening, Source, digest

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

logger = logging.getLogger(__name__)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
_HEIF = (".heic", ".heif")
_HEIF_HINT = " (.heic and .heif are read with: pip install pillow-heif)"
_ENDINGS_SHOWN = 6
# File sizes are asked for in blocks by many threads: on a network disk each answer is a wait.
SIZE_THREADS = 16
SIZES_PER_TASK = 1024


class FolderSource:
  """Image files below a folder, with a label each."""

  def __init__(
    self, folder: Path, paths: list[str], labels: np.ndarray, class_names: Sequence[str], is_listed: bool = False
  ):
    self._is_listed = is_listed  # paths do not tell the classes
    self._folder, self._paths, self._labels, self.class_names = str(folder), paths, labels, tuple(class_names)

  @property
  def names(self) -> Sequence[str]:
    """The path of every image below the folder."""
    return self._paths

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict:
    name = self._paths[index]
    image = Path(self._folder, name).read_bytes()
    return {"image": image, "label": int(self._labels[index]), "name": name}

  def labels(self) -> np.ndarray:
    return self._labels

  def fingerprint(self) -> str:
    blocks = [self._paths[i : i + SIZES_PER_TASK] for i in range(0, len(self._paths), SIZES_PER_TASK)]
    size_of = lambda block: [_size(os.path.join(self._folder, path)) for path in block]
    with ThreadPoolExecutor(SIZE_THREADS) as pool:
      sizes = list(pool.map(size_of, blocks))
    return digest(self._paths, sizes, self.class_names, *([self._labels] if self._is_listed else []))


def by_folders(folder: Path, class_names: Sequence[str] | None = None) -> FolderSource:
  """Returns the images of one folder per class (files may lie deeper); without class folders every label is -1."""
  others: collections.Counter[str] = collections.Counter()
  paths = sorted(os.path.relpath(path, folder) for path in images_below(str(folder), others=others))
  if others:
    hint = _HEIF_HINT if others.keys() & _HEIF else ""
    logger.info("%s: files that are left out: %s%s", folder, _counted(others), hint)
  if not paths:
    there = f"; it holds {_counted(others)}" if others else ""
    raise ValueError(
      f"{folder} holds no images{there}. Expected {folder}/<class name>/<image>.jpg (or png, webp, ...)."
    )
  names = _classes_of(paths, folder) if class_names is None else tuple(class_names)
  number = {name: i for i, name in enumerate(names)}
  labels = np.array([number.get(path.split(os.sep)[0], -1) for path in paths], np.int32)
  if names and (labels < 0).any():
    stray = paths[int(np.argmin(labels))]
    raise ValueError(
      f"{stray} in {folder} lies in none of the class folders ({', '.join(names[:5])}{', ...' if names[5:] else ''}): "
      "move or remove it. Where folders are no classes, name the images in a list (data.train=list.csv)."
    )
  return FolderSource(folder, paths, labels, names)


def _counted(others: Mapping[str, int]) -> str:
  """Returns "12 .heic, 3 .txt", the most frequent first."""
  ranked = sorted(others.items(), key=lambda item: (-item[1], item[0]))
  return ", ".join(f"{number:,} {ending}" for ending, number in ranked[:_ENDINGS_SHOWN])


def images_below(
  folder: str, above: tuple[str, ...] = (), others: collections.Counter[str] | None = None
) -> Iterator[str]:
  """Yields the paths of the images in a folder and below; hidden files and folders (.thumbnails) are no part of it.

  No more than names is asked for: it matters for a million files on a network disk. `above`: the folders that it lies
  in; a link that leads back to one of them would have it walk in circles. `others` counts the files that are taken for
  no images, by their endings.
  """
  real = os.path.realpath(folder)
  above = above or tuple(str(parent) for parent in Path(real).parents)
  if real in above:
    return
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      if entry.is_dir():
        yield from images_below(entry.path, (*above, real), others)
      elif is_image_name(entry.name):
        yield entry.path
      elif others is not None:
        others[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1


def _size(path: str) -> int:
  try:
    return os.stat(path).st_size
  except FileNotFoundError:  # a link that leads nowhere: a bad image when it is read
    return -1


def is_image_name(file_name: str) -> bool:
  """Returns whether a file is taken for an image: by its ending, and not hidden."""
  return file_name.lower().endswith(image_endings()) and not file_name.startswith(".")


@functools.cache
def image_endings() -> tuple[str, ...]:
  """Returns the endings of what is read: Pillow's, and those of its plugin for HEIF where that is installed."""
  try:
    import pillow_heif
  except ImportError:
    return IMAGE_ENDINGS
  pillow_heif.register_heif_opener()
  return (*IMAGE_ENDINGS, *_HEIF)


def open_folder(cfg: DataConfig, split: str) -> Source:
  """Returns the images below the folder of the split, or that its list names, with their captions, if there are any.

  Labels are numbered by the class folders of the training split.

  So a test split that lacks a class keeps the training labels. ValueError where there are no images.
  """
  root = Path(cfg.root_path)
  folder, train = root / cfg.split_name(split), root / cfg.train
  if is_list(folder):
    source = FolderSource(root, *read_list(folder, root, cfg), is_listed=True)
    return with_captions(source, cfg, split, _listed_names(source, cfg, split) if cfg.captions.train else None)
  if not folder.is_dir():
    there = _folders_in(root) if root.is_dir() else ["nothing (there is no such folder)"]
    raise ValueError(
      f"{folder} is no folder; {root} holds {', '.join(there)}. Set data.root, data.train and data.test."
    )
  if folder == train or not train.is_dir():
    source = by_folders(folder)
  else:
    holds_one = lambda name: next(images_below(str(train / name), (os.path.realpath(train),)), None)
    source = by_folders(folder, [name for name in _folders_in(train) if holds_one(name)])
  if not cfg.captions.train:
    return source
  own, other = (os.path.normpath(cfg.split_name(name)) for name in (split, "train" if split == "test" else "test"))
  below = sorted(images_below(str(root / other))) if other != own and (root / other).is_dir() else []
  called = [os.path.normpath(os.path.join(own, name)) for name in source.names]
  names = Names(called, own.removeprefix("."), [os.path.relpath(path, root) for path in below], other.removeprefix("."))
  return with_captions(source, cfg, split, names)


def _listed_names(source: FolderSource, cfg: DataConfig, split: str) -> Names:
  """Returns what the images of a list are called, and those of the other split, below data.root."""
  root = Path(cfg.root_path)
  own, other = (root / cfg.split_name(name) for name in (split, "train" if split == "test" else "test"))
  inside = lambda path: os.path.relpath(path if path.is_dir() else path.parent, root).removeprefix(".")
  theirs: list[str] = []
  if is_list(other) and other != own:
    theirs = read_list(other, root, cfg)[0]
  elif other.is_dir():
    theirs = sorted(os.path.relpath(path, root) for path in images_below(str(other)))
  return Names(source.names, inside(own), theirs, inside(other) if theirs else "")


def _classes_of(paths: Sequence[str], folder: Path) -> tuple[str, ...]:
  """Returns the names of the folders that hold an image; a class of which there is none cannot be learned."""
  found = {path.split(os.sep)[0] for path in paths if os.sep in path}
  if empty := sorted(set(_folders_in(folder)) - found):
    logger.warning("%s: folders without an image are no classes: %s", folder, ", ".join(empty[:10]))
  return tuple(sorted(found))


def _folders_in(folder: Path) -> list[str]:
  return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


FOLDER = Opening(
  open_folder,
  reads=("root", "train", "test", "image_key", "label_key", "subset_seed", "captions"),
  needs={"root": "the folder that holds the splits"},
)
