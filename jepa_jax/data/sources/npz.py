"""One .npz file per split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_jax.data.sources.source import ArraySource, Opening, check_labels, digest

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

LAYOUTS = "'images' uint8 (n, h, w[, c]) and 'labels', or 'data' uint8, 'offsets' (n + 1) and 'labels'"


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

  def fingerprint(self) -> str:
    return digest(self._images, self._offsets, self._labels, self.class_names)


def open_npz(cfg: DataConfig, split: str) -> ArraySource:
  """Returns the images of one .npz file, of either layout (`LAYOUTS`), read into memory once."""
  folder = Path(cfg.root_path)
  path = folder / cfg.split_name(split)
  path = path if path.suffix else path.with_suffix(".npz")
  if not path.is_file():
    there = ", ".join(sorted(p.name for p in folder.glob("*.npz"))) or "no .npz file"
    raise ValueError(f"{path} does not exist; {folder} holds {there}. Set data.train and data.test to file names.")
  with np.load(path, allow_pickle=False) as archive:
    arrays = {key: archive[key] for key in archive.files}
  raw, encoded = {"images", "labels"} <= arrays.keys(), {"data", "offsets", "labels"} <= arrays.keys()
  if not (raw or encoded):
    raise ValueError(f"{path} holds {', '.join(sorted(arrays))}; it needs {LAYOUTS}.")
  labels = arrays["labels"].astype(np.int32)
  names_key = next((k for k in ("class_names", "classes", "wnids") if k in arrays), None)
  names = [str(n) for n in arrays[names_key]] if names_key else [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
  check_labels(labels, names, str(path))
  num_images = len(arrays["images"]) if raw else len(arrays["offsets"]) - 1
  if len(labels) != num_images:
    raise ValueError(f"{path} has {num_images} images and {len(labels)} labels; it needs one label per image.")
  if raw and (arrays["images"].dtype != np.uint8 or arrays["images"].ndim not in (3, 4)):
    found = f"{arrays['images'].dtype} {arrays['images'].shape}"
    raise ValueError(f"'images' in {path} is {found}; it needs uint8 (n, h, w) or (n, h, w, c). Save 0..255 as uint8.")
  if raw:
    return ArraySource(arrays["images"], labels, names, path.name)
  return EncodedSource(arrays["data"], arrays["offsets"], labels, names, path.name)


NPZ = Opening(
  open_npz, reads=("root", "train", "test", "subset_seed"), needs={"root": "the folder that holds the files"}
)
