"""One .npz file per split."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_jax.data.caption_files import file_and_split
from jepa_jax.data.captions import Names
from jepa_jax.data.decode import upper_byte
from jepa_jax.data.label_maps import check_classes
from jepa_jax.data.sources.captioned import with_captions
from jepa_jax.data.sources.label_mapped import LabelMappedSource
from jepa_jax.data.sources.label_values import as_classes
from jepa_jax.data.sources.source import ArraySource, Opening, Source, digest
from jepa_jax.data.sources.subset import SubsetSource

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

LAYOUTS = "'images' uint8 (n, h, w[, c]), or 'data' uint8 and 'offsets' (n + 1), and 'labels' where there are any"


class EncodedSource(ArraySource):
  """Encoded files that lie in memory end to end: file i is `data[offsets[i]:offsets[i + 1]]`."""

  def __init__(self, data: np.ndarray, offsets: np.ndarray, labels, class_names: Sequence[str], name: str):
    super().__init__(data, labels, class_names, name)
    self._offsets = offsets

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def pixels(self, index: int) -> bytes:
    return self._images[self._offsets[index] : self._offsets[index + 1]].tobytes()

  def fingerprint(self) -> str:
    return digest(self._images, self._offsets, self._labels, self.class_names)


def open_npz(cfg: DataConfig, split: str) -> Source:
  """Returns the images of one .npz file, of either layout (`LAYOUTS`), read into memory once.

  "FILE.npz:VALUE" takes those whose number or name in the file's array `split` is VALUE.
  """
  folder = Path(cfg.root_path)
  path, part = _file(cfg, split)
  if not path.is_file():
    there = ", ".join(sorted(p.name for p in folder.glob("*.npz"))) or "no .npz file"
    raise ValueError(f"{path} does not exist; {folder} holds {there}. Set data.train and data.test to file names.")
  arrays = _read(path)
  raw, encoded = "images" in arrays, {"data", "offsets"} <= arrays.keys()
  if not (raw or encoded):
    raise ValueError(f"{path} holds {', '.join(sorted(arrays))}; it needs {LAYOUTS}.")
  if raw:
    arrays["images"] = _checked_images(arrays["images"], cfg.channels, path)
  num_images = len(arrays["images"]) if raw else len(arrays["offsets"]) - 1
  labels, class_names = _labels(arrays, num_images, path)
  if not raw and (np.diff(arrays["offsets"]).min(initial=0) < 0 or arrays["offsets"][-1] > len(arrays["data"])):
    raise ValueError(f"'offsets' in {path} do not rise from 0 to the {len(arrays['data'])} bytes of 'data'.")
  source: Source = _images(arrays, labels, class_names, path.name)
  rows = _rows(arrays, part, len(source), path)
  if cfg.label_maps.set:
    source = _with_label_maps(source, cfg, split, arrays, path)
    return source if rows is None else SubsetSource(source, rows)
  names = _names(cfg, split, arrays, len(source), path) if cfg.captions.train else None
  return with_captions(source, cfg, split, names, rows)


def _checked_images(images: np.ndarray, channels: int, path: Path) -> np.ndarray:
  """Returns images uint8 (n, h, w[, c]); those with their channels first are turned."""
  images = upper_byte(images)
  if images.dtype != np.uint8 or images.ndim not in (3, 4):
    scale = "(255 * images).round().astype('uint8')" if images.dtype.kind == "f" else "images.astype('uint8')"
    raise ValueError(
      f"'images' in {path} is {images.dtype} {images.shape}; it needs uint8 (n, h, w) or (n, h, w, c), from 0 to 255, "
      f"such as {scale}."
    )
  fits = lambda number: number in (1, 3, 4, channels)
  if images.ndim == 4 and not fits(images.shape[3]) and fits(images.shape[1]):
    return np.moveaxis(images, 1, 3)  # as PyTorch keeps them
  if images.ndim == 4 and not fits(images.shape[3]):
    raise ValueError(
      f"'images' in {path} are {images.shape}: {images.shape[3]} channels, which come last, and data.channels is "
      f"{channels}; set it to that, with as many numbers in data.mean and data.std (`data stats` measures them)."
    )
  return images


def _with_label_maps(source: Source, cfg: DataConfig, split: str, arrays: dict[str, np.ndarray], path: Path) -> Source:
  """Returns a source with the label maps of a second file, of either layout, in the order of the images."""
  of = Path(cfg.root_path) / cfg.label_maps.of(split)
  if not of.is_file():
    raise ValueError(f"data.label_maps.{split}: {of} does not exist")
  maps = _read(of)
  if "names" in maps and "names" not in arrays:
    raise ValueError(f"{of} has 'names' and {path} has none: write them in both, or in neither")
  names = _own_names(arrays, len(source), path) or [f"{path.name}[{i}]" for i in range(len(source))]
  if "names" in maps and _own_names(maps, len(maps["names"]), of) != names:
    raise ValueError(f"{of} names other images than {path}, or in another order: write both in one order")
  if not {"data", "offsets"} <= maps.keys() and "images" not in maps:
    raise ValueError(f"{of} holds {', '.join(sorted(maps))}; it needs {LAYOUTS}.")
  label_maps = _images(maps, np.empty(0), (), of.name)
  if len(label_maps) != len(source):
    raise ValueError(
      f"{of} holds {len(label_maps)} label maps and {path} {len(source)} images: it needs one for each image."
    )
  key = next((k for k in ("class_names", "classes") if k in maps), None)
  classes = check_classes(cfg.label_maps, tuple(str(name) for name in maps[key]) if key else (), of)
  read = lambda index: label_maps.pixels(index)
  return LabelMappedSource(source, read, names, cfg.label_maps, classes, label_maps.fingerprint())


def _images(arrays: dict[str, np.ndarray], labels, class_names: Sequence[str], name: str) -> ArraySource:
  """Returns the images of a file's arrays, of either layout."""
  if "images" in arrays:
    return ArraySource(arrays["images"], labels, class_names, name)
  return EncodedSource(arrays["data"], arrays["offsets"], labels, class_names, name)


def _file(cfg: DataConfig, split: str) -> tuple[Path, str]:
  """Returns the file of a split, and which of its images are asked for, "" for all."""
  path, part = file_and_split(Path(cfg.root_path) / cfg.split_name(split))
  return path if path.suffix else path.with_suffix(".npz"), part


def _names(cfg: DataConfig, split: str, arrays: dict[str, np.ndarray], num_images: int, path: Path) -> Names | None:
  """Returns what the images are called, and those of the other split, if that is another file; None without names."""
  own = _own_names(arrays, num_images, path)
  if own is None:
    return None
  other, _ = _file(cfg, "train" if split == "test" else "test")
  theirs: Sequence[str] = ()
  if other != path and other.is_file():
    theirs = _text(_read(other, only="names").get("names", ()))
  return Names(own, other=theirs)


def _own_names(arrays: dict[str, np.ndarray], num_images: int, path: Path) -> list[str] | None:
  """Returns what the images of a file are called, None without names; ValueError where there are more or fewer."""
  if "names" not in arrays:
    return None
  if len(arrays["names"]) != num_images:
    raise ValueError(f"{path} has {num_images} images and {len(arrays['names'])} 'names'; it needs one for each image.")
  return _text(arrays["names"])


def _text(names: Sequence) -> list[str]:
  return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _labels(arrays: dict[str, np.ndarray], num_images: int, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
  """Returns every image's label and the names of the classes; -1 and no names where the file holds no labels."""
  names_key = next((k for k in ("class_names", "classes", "wnids") if k in arrays), None)
  names = _text(arrays[names_key]) if names_key else None
  labels, names = as_classes(
    arrays.get("labels", arrays.get("label", np.full(num_images, -1))), names, f"'labels' in {path}"
  )
  if len(labels) != num_images:
    raise ValueError(f"{path} has {num_images} images and {len(labels)} labels; it needs one label per image.")
  return labels, names


def _rows(arrays: dict[str, np.ndarray], part: str, num_images: int, path: Path) -> np.ndarray | None:
  """Returns the indices of the images of this split, None for all."""
  if not part:
    return None
  of = np.array([str(value) for value in arrays.get("split", ())])
  if len(of) != num_images:
    raise ValueError(f"{path}:{part} asks for a split, and the file has no array 'split' of {num_images} values")
  if not (of == part).any():
    raise ValueError(f"{path} has no image of the split {part!r}; it has {', '.join(sorted(set(of))[:10])}")
  return np.flatnonzero(of == part)


def _read(path: Path, only: str = "") -> dict[str, np.ndarray]:
  try:
    if path.suffix == ".npy":  # images and nothing else
      return {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
      raise ValueError("it holds one array, as .npy files do: call it so")
    with archive:
      return {key: archive[key] for key in archive.files if only in ("", key)}
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    # numpy's own advice, allow_pickle=True, would run code from the file.
    reason = "it holds Python objects, not arrays" if "pickle" in str(error) else error
    raise ValueError(f"{path} is damaged or no file of np.savez ({reason}). Write it again.") from error


NPZ = Opening(
  open_npz,
  reads=("root", "train", "test", "subset_seed", "captions", "label_maps"),
  needs={"root": "the folder that holds the files"},
)
