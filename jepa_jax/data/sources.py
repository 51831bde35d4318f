"""Random-access sources of images. Each knows its length, its classes and its labels; none decodes.

`source[i]` is a dict: `image` (encoded bytes, or a uint8 array of shape (h, w), (h, w, 1) or (h, w, 3)), `label` (int,
-1 where there is none), `name` (what a message calls this image), and an array for each of the source's own `columns`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from jepa_jax.data import records
from jepa_jax.data.config import DataConfig
from jepa_jax.data.schema import Columns

SYNTHETIC_TRAIN_IMAGES = 4096
SYNTHETIC_TEST_IMAGES = 512
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
NPZ_LAYOUTS = "'images' uint8 (n, h, w[, c]) and 'labels', or 'data' uint8, 'offsets' (n + 1) and 'labels'"


class Source(Protocol):
  """Images by index, in a fixed order.

  Attributes:
    class_names: Names of the classes; empty where the images have no labels.
    columns: What a row holds beside its image, label and index; `source[i][name]` is an array of that shape.
  """

  class_names: tuple[str, ...]
  columns: Columns

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict: ...

  def labels(self) -> np.ndarray:
    """Returns every label, int32 (n,)."""
    ...


class ArraySource:
  """Images that lie in memory as one uint8 array (n, h, w[, c])."""

  columns: Columns = {}

  def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], name: str):
    self._images, self._labels, self._name = images, np.asarray(labels, np.int32), name
    self.class_names = tuple(class_names)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict:
    return {"image": self._images[index], "label": int(self._labels[index]), "name": f"{self._name}[{index}]"}

  def labels(self) -> np.ndarray:
    return self._labels


class EncodedSource(ArraySource):
  """Encoded files that lie in memory end to end: file i is `data[offsets[i]:offsets[i + 1]]`."""

  def __init__(self, data: np.ndarray, offsets: np.ndarray, labels, class_names: Sequence[str], name: str):
    super().__init__(data, labels, class_names, name)
    self._offsets = offsets

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, index: int) -> dict:
    image = self._images[self._offsets[index] : self._offsets[index + 1]].tobytes()
    return {"image": image, "label": int(self._labels[index]), "name": f"{self._name}[{index}]"}


class FolderSource:
  """Image files, one folder per class (files may lie deeper); without class folders every label is -1."""

  columns: Columns = {}

  def __init__(self, folder: Path, class_names: Sequence[str]):
    self._folder, self.class_names = str(folder), tuple(class_names)
    # os.walk asks the file system for no more than names: it matters for a million files on a network disk.
    found = [(where, name) for where, _, names in os.walk(self._folder, followlinks=True) for name in names]
    paths = [os.path.relpath(os.path.join(where, name), self._folder) for where, name in found if is_image_name(name)]
    self._paths = sorted(paths)
    number = {name: i for i, name in enumerate(self.class_names)}
    self._labels = np.array([number.get(path.split(os.sep)[0], -1) for path in self._paths], np.int32)
    if not self._paths:
      raise ValueError(f"{folder} holds no images. Expected {folder}/<class name>/<image>.jpg (or png, webp, ...).")
    if self.class_names and (self._labels < 0).any():
      stray = self._paths[int(np.argmin(self._labels))]
      raise ValueError(f"{stray} in {folder} lies in none of the training split's class folders; move or remove it.")

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict:
    name = self._paths[index]
    image = Path(self._folder, name).read_bytes()
    return {"image": image, "label": int(self._labels[index]), "name": name}

  def labels(self) -> np.ndarray:
    return self._labels


def is_image_name(file_name: str) -> bool:
  """Returns whether a file is taken for an image: by its ending, and not hidden."""
  return file_name.lower().endswith(IMAGE_ENDINGS) and not file_name.startswith(".")


class SyntheticSource:
  """Random pixels, a function of (split, index) alone: for measuring speed without a data set."""

  class_names = tuple(str(i) for i in range(10))
  columns: Columns = {}

  def __init__(self, num_images: int, side_px: int, channels: int, split: str):
    self._num_images, self._shape, self._split = num_images, (side_px, side_px, channels), split

  def __len__(self) -> int:
    return self._num_images

  def __getitem__(self, index: int) -> dict:
    generator = np.random.default_rng((int(self._split == "test"), index))
    pixels = np.frombuffer(generator.bytes(int(np.prod(self._shape))), np.uint8).reshape(self._shape)
    return {"image": pixels, "label": index % 10, "name": f"synthetic-{self._split}[{index}]"}

  def labels(self) -> np.ndarray:
    return np.arange(self._num_images, dtype=np.int32) % 10


class SubsetSource:
  """The given indices of another source."""

  def __init__(self, source: Source, indices: np.ndarray):
    self._source, self._indices = source, indices
    self.class_names, self.columns = source.class_names, source.columns

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict:
    return self._source[int(self._indices[index])]

  def labels(self) -> np.ndarray:
    return self._source.labels()[self._indices]


def balanced_subset(labels: np.ndarray, num_images: int, seed: int) -> np.ndarray:
  """Returns sorted indices of `num_images` images, classes as equal in number as the labels allow.

  Classes take turns giving their next image in a seeded order, so a small class gives all it has, and the subset of n
  images lies within the subset of n + 1 (which is what makes curves over the number of images comparable).
  """
  order = np.random.default_rng(seed).permutation(len(labels))
  turn = np.empty(len(labels), np.int64)
  for label in np.unique(labels):
    of_label = np.flatnonzero(labels[order] == label)
    turn[of_label] = np.arange(len(of_label))
  return np.sort(order[np.argsort(turn, kind="stable")[:num_images]])


def read_digits(split: str) -> ArraySource:
  """Returns scikit-learn's 8 x 8 digits (values 0..16) scaled to 0..255 and, bicubically, to 32 x 32.

  The split is stratified and fixed: 1,297 to train, 500 to test. Both hold digits of the same writers.
  """
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  pixels, labels = load_digits(return_X_y=True)
  train, test = train_test_split(np.arange(1797), test_size=500, stratify=labels, random_state=0)
  chosen = np.sort(train if split == "train" else test)
  small = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
  large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in small]
  return ArraySource(np.stack(large), labels[chosen], [str(i) for i in range(10)], f"digits-{split}")


def read_npz(folder: Path, file_name: str) -> ArraySource:
  """Returns the images of one .npz file, of either layout (`NPZ_LAYOUTS`), read into memory once."""
  path = folder / file_name
  path = path if path.suffix else path.with_suffix(".npz")
  if not path.is_file():
    there = ", ".join(sorted(p.name for p in folder.glob("*.npz"))) or "no .npz file"
    raise ValueError(f"{path} does not exist; {folder} holds {there}. Set data.train and data.test to file names.")
  with np.load(path, allow_pickle=False) as archive:
    arrays = {key: archive[key] for key in archive.files}
  raw, encoded = {"images", "labels"} <= arrays.keys(), {"data", "offsets", "labels"} <= arrays.keys()
  if not (raw or encoded):
    raise ValueError(f"{path} holds {', '.join(sorted(arrays))}; it needs {NPZ_LAYOUTS}.")
  labels = arrays["labels"].astype(np.int32)
  names_key = next((k for k in ("class_names", "classes", "wnids") if k in arrays), None)
  names = [str(n) for n in arrays[names_key]] if names_key else [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
  records.check_labels(labels, names, str(path))
  num_images = len(arrays["images"]) if raw else len(arrays["offsets"]) - 1
  if len(labels) != num_images:
    raise ValueError(f"{path} has {num_images} images and {len(labels)} labels; it needs one label per image.")
  if raw and (arrays["images"].dtype != np.uint8 or arrays["images"].ndim not in (3, 4)):
    found = f"{arrays['images'].dtype} {arrays['images'].shape}"
    raise ValueError(f"'images' in {path} is {found}; it needs uint8 (n, h, w) or (n, h, w, c). Save 0..255 as uint8.")
  if raw:
    return ArraySource(arrays["images"], labels, names, path.name)
  return EncodedSource(arrays["data"], arrays["offsets"], labels, names, path.name)


def read_folder(root: Path, sub_folder: str, train_folder: str) -> FolderSource:
  """Returns the images below `root/sub_folder`, labels numbered by the class folders of the training split.

  So a test split that lacks a class keeps the training labels. ValueError where there are no images.
  """
  folder = root / sub_folder
  if not folder.is_dir():
    there = _folders_in(root) if root.is_dir() else ["nothing (there is no such folder)"]
    raise ValueError(
      f"{folder} is no folder; {root} holds {', '.join(there)}. Set data.root, data.train and data.test."
    )
  train = root / train_folder
  return FolderSource(folder, _folders_in(train) if train.is_dir() else _folders_in(folder))


def _folders_in(folder: Path) -> list[str]:
  return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def open_source(cfg: DataConfig, split: str) -> Source:
  """Returns the source of `split` ("train" or "test"); ValueError, with the fix, where it cannot be read."""
  if split not in ("train", "test"):
    raise ValueError(f"split is {split!r}; it must be 'train' or 'test'.")
  source = _open_whole(cfg, split)
  if split == "train" and 0 < cfg.max_train < len(source):
    return SubsetSource(source, balanced_subset(source.labels(), cfg.max_train, cfg.subset_seed))
  return source


def _open_whole(cfg: DataConfig, split: str) -> Source:
  chosen = cfg.train if split == "train" else cfg.test
  match cfg.source:
    case "digits":
      return read_digits(split)
    case "npz":
      return read_npz(Path(cfg.root_path), chosen)
    case "folder":
      return read_folder(Path(cfg.root_path), chosen, cfg.train)
    case "tfds":
      return records.TfdsSource(cfg.name, cfg.root_path, chosen, cfg.image_key, cfg.label_key)
    case "array_record":
      return records.ArrayRecordSource(Path(cfg.root_path), chosen)
  num_images = (cfg.max_train or SYNTHETIC_TRAIN_IMAGES) if split == "train" else SYNTHETIC_TEST_IMAGES
  return SyntheticSource(num_images, cfg.canvas_px, cfg.channels, split)
