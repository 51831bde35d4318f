"""Random-access sources of images. Each knows its length, its classes and its labels; none decodes.

`source[i]` is a dict: `image` (encoded bytes, or a uint8 array of shape (h, w), (h, w, 1) or (h, w, 3)), `label` (int,
-1 where there is none), `name` (what a message calls this image), and an array for each of the source's own `columns`.
A new source is one file that ends in its `Opening`, and one line in `SOURCES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jepa_jax.data.sources.array_record import ARRAY_RECORD
from jepa_jax.data.sources.array_record import write_array_record as write_array_record
from jepa_jax.data.sources.digits import DIGITS
from jepa_jax.data.sources.folder import FOLDER
from jepa_jax.data.sources.held_out import held_out_rows
from jepa_jax.data.sources.npz import NPZ
from jepa_jax.data.sources.parquet import PARQUET
from jepa_jax.data.sources.segmentation import SEGMENTATION
from jepa_jax.data.sources.source import ArraySource as ArraySource
from jepa_jax.data.sources.source import Opening, Source
from jepa_jax.data.sources.subset import SubsetSource, balanced_subset
from jepa_jax.data.sources.synthetic import SYNTHETIC
from jepa_jax.data.sources.tfds import TFDS
from jepa_jax.data.sources.webdataset import WEBDATASET

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

SOURCES: dict[str, Opening] = {
  "digits": DIGITS,
  "npz": NPZ,
  "folder": FOLDER,
  "tfds": TFDS,
  "array_record": ARRAY_RECORD,
  "parquet": PARQUET,
  "webdataset": WEBDATASET,
  "segmentation": SEGMENTATION,
  "synthetic": SYNTHETIC,
}


def open_source(cfg: DataConfig, split: str) -> Source:
  """Returns the source of `split` ("train" or "test"); ValueError, with the fix, where it cannot be read."""
  if split not in ("train", "test"):
    raise ValueError(f"split is {split!r}; it must be 'train' or 'test'.")
  if cfg.held_out:
    source = SOURCES[cfg.source].open(cfg, "train")
    names = getattr(source, "names", None) or [str(i) for i in range(len(source))]
    source = SubsetSource(source, held_out_rows(source.labels(), names, cfg.held_out, split))
  else:
    source = SOURCES[cfg.source].open(cfg, split)
  if split == "train" and 0 < cfg.max_train < len(source):
    return SubsetSource(source, balanced_subset(source.labels(), cfg.max_train, cfg.subset_seed))
  return source
