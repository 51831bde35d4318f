"""Images and their label maps as the data sets of segmentation lie on disk.

| `data.label_maps.set` | images                             | label maps                                            |
|-----------------------|------------------------------------|-------------------------------------------------------|
| `camvid`              | `<split>/*.png`                    | `<split>annot/*.png`                                  |
| `ade20k`              | `images/<split>/*.jpg`             | `annotations/<split>/*.png`                           |
| `voc`                 | `JPEGImages/*.jpg`                 | `SegmentationClass/*.png` (or `SegmentationClassAug`) |
| `cityscapes`          | `leftImg8bit/<split>/<city>/*.png` | `gtFine/<split>/<city>/*_gtFine_labelIds.png`         |
| `cityscapes_train_ids` | the same                          | `gtFine/<split>/<city>/*_gtFine_labelTrainIds.png`    |
| `own`                 | `images/<split>/*` or `images/*`   | `masks/<split>/*.png` or `masks/*.png`                |

The splits of voc are lists: `ImageSets/Segmentation/<split>.txt`; of own `<split>.txt` where there is such a file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_jax.data.label_maps import check_classes
from jepa_jax.data.sources.folder import images_below
from jepa_jax.data.sources.label_mapped import LabelMappedSource
from jepa_jax.data.sources.source import Opening, Source, digest

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

_SHOWN = 3
Pair = tuple[Path, Path]  # of an image, and of its label map


class FilesSource:
  """Image files in a given order, without labels."""

  class_names: tuple[str, ...] = ()

  def __init__(self, root: Path, names: Sequence[str]):
    self._root, self._names = root, names

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> dict:
    name = self._names[index]
    return {"image": (self._root / name).read_bytes(), "label": -1, "name": name}

  def labels(self) -> np.ndarray:
    return np.full(len(self), -1, np.int32)

  def fingerprint(self) -> str:
    return sizes_digest(self._root, self._names)


def sizes_digest(root: Path, names: Sequence[str]) -> str:
  """Returns a digest of the names and sizes of files."""
  return digest(list(names), [(root / name).stat().st_size for name in names])


def open_segmentation(cfg: DataConfig, split: str) -> Source:
  """Returns the images of a split with their label maps; ValueError, with the fix, for what is missing."""
  root, called, maps = Path(cfg.root_path), cfg.split_name(split), cfg.label_maps
  if not root.is_dir():
    raise ValueError(f"data.root={root} is no folder: say where the data set lies")
  pairs = sorted(_PAIRS[maps.set](root, called))
  if not pairs:
    raise ValueError(f"{root} holds no images of the split {called!r} as data.label_maps.set={maps.set!r} has them")
  if missing := [label_map for _, label_map in pairs if not label_map.is_file()]:
    shown = ", ".join(str(path) for path in missing[:_SHOWN])
    raise ValueError(
      f"{len(missing)} of {len(pairs)} images have no label map, such as {shown}: add them, or take the images out"
    )
  if absent := [image for image, _ in pairs if not image.is_file()]:
    raise ValueError(f"{absent[0]} is listed and not there ({len(absent)} of {len(pairs)}): correct the list")
  below = [[os.path.relpath(pair[i], root) for pair in pairs] for i in (0, 1)]
  images, label_maps = below
  classes = check_classes(maps, _class_names(root, maps.set), root)
  read = lambda index: (root / label_maps[index]).read_bytes()
  return LabelMappedSource(FilesSource(root, images), read, images, maps, classes, sizes_digest(root, label_maps))


def _class_names(root: Path, set_name: str) -> tuple[str, ...]:
  """Returns the names that lie beside the data, () where there are none."""
  if set_name == "own" and (path := root / "classes.txt").is_file():
    return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
  if set_name == "ade20k" and (path := root / "objectInfo150.txt").is_file():
    rows = [
      line.rstrip("\n").split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines()[1:] if line.strip()
    ]
    return tuple(row[-1].strip() for row in rows)
  return ()


def _of_stem(folder: Path, images: Iterator[str] | Sequence[str], masks: Path) -> Iterator[Pair]:
  """Yields the images below a folder with the label maps that have their paths, and end in .png."""
  for path in images:
    yield Path(path), (masks / os.path.relpath(path, folder)).with_suffix(".png")


def _camvid(root: Path, split: str) -> Iterator[Pair]:
  yield from _of_stem(root / split, _below(root / split), root / f"{split}annot")


def _ade20k(root: Path, split: str) -> Iterator[Pair]:
  yield from _of_stem(root / "images" / split, _below(root / "images" / split), root / "annotations" / split)


def _voc(root: Path, split: str) -> Iterator[Pair]:
  # The names of trainaug are of label maps that others have added, in a folder of their own.
  masks = next((root / name for name in ("SegmentationClassAug", "SegmentationClass") if (root / name).is_dir()), root)
  own = root / "SegmentationClass"
  for name in _listed(root / "ImageSets" / "Segmentation" / f"{split}.txt"):
    name = Path(name.split()[0]).stem
    label_map = own / f"{name}.png"
    yield root / "JPEGImages" / f"{name}.jpg", label_map if label_map.is_file() else masks / f"{name}.png"


def _cityscapes(root: Path, split: str, ids: str = "labelIds") -> Iterator[Pair]:
  folder = root / "leftImg8bit" / split
  for path in _below(folder):
    name = os.path.relpath(path, folder).removesuffix("_leftImg8bit.png")
    yield Path(path), root / "gtFine" / split / f"{name}_gtFine_{ids}.png"


def _own(root: Path, split: str) -> Iterator[Pair]:
  images, masks = root / "images", root / "masks"
  if (path := root / f"{split}.txt").is_file():
    by_stem = {os.path.splitext(os.path.relpath(path, images))[0]: path for path in _below(images)}
    for name in _listed(path):
      stem = os.path.splitext(name)[0] if name not in by_stem else name
      yield Path(by_stem.get(stem, images / name)), masks / f"{stem}.png"
  elif (images / split).is_dir():
    yield from _of_stem(images / split, _below(images / split), masks / split)
  else:
    raise ValueError(
      f"{root} has no folder images/{split} (with masks/{split} beside it) and no list {split}.txt of names: one of "
      "them says which images belong to the split; set data.train and data.test"
    )


_PAIRS = {"camvid": _camvid, "ade20k": _ade20k, "voc": _voc, "cityscapes": _cityscapes, "own": _own}
_PAIRS["cityscapes_train_ids"] = functools.partial(_cityscapes, ids="labelTrainIds")


def _below(folder: Path) -> list[str]:
  if not folder.is_dir():
    raise ValueError(f"{folder} is no folder: set data.root, data.train and data.test")
  return sorted(images_below(str(folder)))


def _listed(path: Path) -> list[str]:
  if not path.is_file():
    raise ValueError(
      f"{path} does not exist: it lists the images of the split; set data.root, data.train and data.test"
    )
  return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


SEGMENTATION = Opening(
  open_segmentation,
  reads=("root", "train", "test", "subset_seed", "label_maps"),
  needs={"root": "the folder of the data set"},
)
