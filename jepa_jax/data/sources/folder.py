"""Image files, one folder per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_jax.data.captions import Names
from jepa_jax.data.sources.captioned import with_captions
from jepa_jax.data.sources.source import Opening, Source, digest

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

logger = logging.getLogger(__name__)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
# File sizes are asked for in blocks by many threads: on a network disk each answer is a wait.
SIZE_THREADS = 16
SIZES_PER_TASK = 1024


class FolderSource:
  """Image files, one folder per class (files may lie deeper); without class folders every label is -1."""

  def __init__(self, folder: Path, class_names: Sequence[str] | None = None):
    self._folder, self.class_names = str(folder), tuple(class_names or ())
    self._paths = sorted(os.path.relpath(path, self._folder) for path in images_below(self._folder))
    if class_names is None:
      self.class_names = _classes_of(self._paths, folder)
    number = {name: i for i, name in enumerate(self.class_names)}
    self._labels = np.array([number.get(path.split(os.sep)[0], -1) for path in self._paths], np.int32)
    if not self._paths:
      raise ValueError(f"{folder} holds no images. Expected {folder}/<class name>/<image>.jpg (or png, webp, ...).")
    if self.class_names and (self._labels < 0).any():
      stray = self._paths[int(np.argmin(self._labels))]
      raise ValueError(f"{stray} in {folder} lies in none of the training split's class folders; move or remove it.")

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
    return digest(self._paths, sizes, self.class_names)


def images_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
  """Yields the paths of the images in a folder and below; hidden files and folders (.thumbnails) are no part of it.

  No more than names is asked for: it matters for a million files on a network disk. `above`: the folders that it lies
  in; a link that leads back to one of them would have it walk in circles.
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
        yield from images_below(entry.path, (*above, real))
      elif is_image_name(entry.name):
        yield entry.path


def _size(path: str) -> int:
  try:
    return os.stat(path).st_size
  except FileNotFoundError:  # a link that leads nowhere: a bad image when it is read
    return -1


def is_image_name(file_name: str) -> bool:
  """Returns whether a file is taken for an image: by its ending, and not hidden."""
  return file_name.lower().endswith(IMAGE_ENDINGS) and not file_name.startswith(".")


def open_folder(cfg: DataConfig, split: str) -> Source:
  """Returns the images below the folder of the split, with their captions, if the config names any.

  Labels are numbered by the class folders of the training split.

  So a test split that lacks a class keeps the training labels. ValueError where there are no images.
  """
  root = Path(cfg.root_path)
  folder, train = root / cfg.split_name(split), root / cfg.train
  if not folder.is_dir():
    there = _folders_in(root) if root.is_dir() else ["nothing (there is no such folder)"]
    raise ValueError(
      f"{folder} is no folder; {root} holds {', '.join(there)}. Set data.root, data.train and data.test."
    )
  if folder == train or not train.is_dir():
    source = FolderSource(folder)
  else:
    holds_one = lambda name: next(images_below(str(train / name), (os.path.realpath(train),)), None)
    source = FolderSource(folder, [name for name in _folders_in(train) if holds_one(name)])
  if not cfg.captions.train:
    return source
  own, other = (os.path.normpath(cfg.split_name(name)) for name in (split, "train" if split == "test" else "test"))
  below = sorted(images_below(str(root / other))) if other != own and (root / other).is_dir() else []
  called = [os.path.normpath(os.path.join(own, name)) for name in source.names]
  names = Names(called, own.removeprefix("."), [os.path.relpath(path, root) for path in below], other.removeprefix("."))
  return with_captions(source, cfg, split, names)


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
  reads=("root", "train", "test", "subset_seed", "captions"),
  needs={"root": "the folder that holds the splits"},
)
