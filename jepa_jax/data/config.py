"""Settings of the data: where the images are, how large the canvas is, how much is read ahead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from jepa_jax.data.captions import CaptionConfig
from jepa_jax.data.label_maps import LabelMapConfig
from jepa_jax.data.sources import SOURCES

# Of the RGB values of ImageNet's training images, in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataConfig:
  """What is read and how; every field is a plain value. One that the chosen source does not read keeps its default.

  | source         | root             | train / test                                        |
  |----------------|------------------|-----------------------------------------------------|
  | `digits`       | -                | - (scikit-learn's 1,797 digits, fixed 1,297 / 500)  |
  | `npz`          | folder           | file names                                          |
  | `folder`       | folder           | sub-folders, each with a folder per class           |
  | `tfds`         | TFDS `data_dir`  | TFDS split strings such as `train[:90%]`            |
  | `array_record` | folder           | globs such as `train-*.array_record`                |
  | `parquet`      | folder           | how files begin, or folders of Arrow files          |
  | `webdataset`   | folder           | tar shards: `train-*.tar`, `train-{000..146}.tar`   |
  | `segmentation` | folder           | splits: train, val, ... (`label_maps.set` says where) |
  | `synthetic`    | -                | - (random pixels; `max_train` of them, 4,096 if 0)  |

  Of npz files "FILE.npz:VALUE" takes the images whose number in the file's array `split` is VALUE.

  Attributes:
    source: One of the names above.
    canvas_px: The shorter side of larger images is scaled down to it; smaller images stay as they are.
    max_aspect: The longer side is kept up to this many times canvas_px, which is the side S of the square uint8 canvas
      that an image lies on; what is beyond is cut off, evenly at both ends. 0: nothing is cut, the *longer* side is
      scaled down to canvas_px (as up to version 0.2).
    channels: 1 or 3; images are converted.
    mean: One number per channel, subtracted from values in [0, 1].
    std: One number per channel, by which the rest is divided.
    root: Folder; `~` and `$VARIABLES` are expanded. For tfds, empty is ~/tensorflow_datasets. For parquet, webdataset
      also "hub:OWNER/NAME[@REVISION]", a data set of the Hugging Face hub, of which the two splits are fetched.
    name: TFDS name, such as `cifar10` or `imagenette/160px-v2`.
    train: The training split.
    test: The test split.
    image_key: Name of the image feature (tfds) or column (parquet).
    label_key: Name of the label feature or column; empty for a data set without labels.
    held_out: Share of the training images that is the test split, for data without one: of every class, by a hash of an
      image's name. 0: data.test is a split of its own.
    max_train: Train on a class-balanced subset of at most this many images; 0 uses all.
    subset_seed: Seed of that subset. With one seed, a smaller subset is contained in a larger one.
    max_bad_share: Share of images that may fail to decode before the run stops (of at least 1,000 images read, so 0.01
      tolerates 10 at the start); 0 stops at the first.
    cache_mb: Decoded canvases stay in host memory if the whole split fits in this many MB; 0 never keeps them.
    num_threads: Threads that decode; 0 uses one per CPU core, at most 32. Does not change what is read.
    prefetch: Batches decoded ahead of the step. Does not change what is read.
    captions: Texts of the images, for methods that learn from them.
    label_maps: Classes of their pixels, for dense evaluation.
  """

  source: str
  canvas_px: int
  max_aspect: float = 1.0
  channels: int = 3
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  root: str = ""
  name: str = ""
  train: str = "train"
  test: str = "test"
  image_key: str = "image"
  label_key: str = "label"
  held_out: float = 0.0
  max_train: int = 0
  subset_seed: int = 0
  max_bad_share: float = 0.01
  cache_mb: int = 1024
  num_threads: int = 0
  prefetch: int = 4
  captions: CaptionConfig = CaptionConfig()
  label_maps: LabelMapConfig = LabelMapConfig()

  def __post_init__(self):
    if self.source not in SOURCES:
      raise ValueError(f"data.source is {self.source!r}; it must be one of {', '.join(SOURCES)}.")
    if self.canvas_px < 8:
      raise ValueError(f"data.canvas_px is {self.canvas_px}; a canvas needs at least 8 pixels a side.")
    if self.max_aspect and not 1 <= self.max_aspect <= 8:
      raise ValueError(
        f"data.max_aspect is {self.max_aspect}; it is the longest side that is kept over the shorter one: from 1, "
        "squares, to 8, or 0. Photographs are 1.3333 or 1.5 most often."
      )
    if self.channels < 1:
      raise ValueError(f"data.channels is {self.channels}; use 1 (grey), 3 (RGB), or as many as the images have.")
    for field in ("mean", "std"):
      if len(numbers := getattr(self, field)) != self.channels:
        raise ValueError(
          f"data.{field} is {numbers}, but data.channels is {self.channels}; give one number per channel, such as "
          f"data.{field}={(0.5,) * self.channels}."
        )
    if min(self.std) <= 0:
      raise ValueError(f"data.std is {self.std}, but images are divided by it; every number must be above 0.")
    for setting, what in SOURCES[self.source].needs.items():
      if not getattr(self, setting):
        raise ValueError(f"data.{setting} is empty; source {self.source!r} needs {what}.")
    if faults := unread_settings(asdict(self)):
      raise ValueError(" ".join(faults.values()))
    if self.captions.train and self.label_maps.set:
      raise ValueError(
        "data.captions and data.label_maps are not read together: leave out the one that is not used, "
        "--config.data.captions.train= or --config.data.label_maps.set="
      )
    if self.source == "segmentation" and not self.label_maps.set:
      raise ValueError(
        "data.label_maps.set is empty; source 'segmentation' needs it: camvid, voc, ade20k, cityscapes or own."
      )
    if self.source == "npz" and self.label_maps.set and not (self.label_maps.train and self.label_maps.test):
      raise ValueError("data.label_maps.train and data.label_maps.test name the files of the label maps: give both.")
    if self.source == "segmentation" and (self.label_maps.train or self.label_maps.test):
      raise ValueError("data.label_maps.train and .test are for source npz; here the set says where they lie.")
    if not 0.0 <= self.held_out < 1.0:
      raise ValueError(f"data.held_out is {self.held_out}; it is a share of the training images below 1, 0 for none.")
    if self.held_out and self.test != DataConfig.test:
      raise ValueError(
        f"data.held_out is {self.held_out} and data.test is {self.test!r}: both say what the test split is; leave one "
        "out."
      )
    if not 0.0 <= self.max_bad_share <= 1.0:
      raise ValueError(f"data.max_bad_share is {self.max_bad_share}; it is a share between 0 and 1.")
    for field, least in {"max_train": 0, "subset_seed": 0, "cache_mb": 0, "num_threads": 0, "prefetch": 1}.items():
      if getattr(self, field) < least:
        raise ValueError(f"data.{field} is {getattr(self, field)}; it must be at least {least}.")

  @property
  def is_small(self) -> bool:
    """Whether pictures are so small that views of them are enlargements as a matter of course."""
    return self.canvas_px <= 64

  @property
  def canvas_side(self) -> int:
    """The side S of the square canvas, px."""
    return round(self.canvas_px * (self.max_aspect or 1))

  @property
  def root_path(self) -> str:
    """`root` with `~` and environment variables expanded."""
    return os.path.expandvars(os.path.expanduser(self.root))

  def split_name(self, split: str) -> str:
    """What the data call the split "train" or "test"."""
    return self.train if split == "train" else self.test


def unread_settings(values: Mapping[str, Any]) -> dict[str, str]:
  """Returns {setting: what is wrong} for the settings in `values` that differ from their default and that nobody reads.

  `values` is the data group of a config as plain values; absent ones have their defaults.
  """
  source, faults = values.get("source"), {}
  if source not in SOURCES:
    return {}
  changed = [f.name for f in fields(DataConfig) if f.name in values and values[f.name] != f.default]
  for group, switch in (("captions", "train"), ("label_maps", "set")):  # as plain values
    if isinstance(own := values.get(group), Mapping) and not own.get(switch):
      changed = [name for name in changed if name != group]
  for setting in changed:
    readers = [name for name, opening in SOURCES.items() if setting in opening.reads]
    if readers and source not in readers:
      faults[setting] = (
        f"data.{setting} is {values[setting]!r}, but source {source!r} does not read it; {', '.join(readers)} "
        f"{'do' if len(readers) > 1 else 'does'}. Leave it out, or choose another data.source."
      )
  if "subset_seed" in changed and str(values.get("max_train", 0)) == "0":
    faults.setdefault(
      "subset_seed",
      f"data.subset_seed is {values['subset_seed']!r}, but data.max_train is 0, so no subset is drawn. Leave it out, "
      "or say in data.max_train how many images to train on.",
    )
  return faults


def reset_unread(values: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `values` without the settings that are read no more since `typed` replaces some of them.

  So `--config.data.source=npz` works on a config file that gives the `name` of a TFDS data set: what only the old
  source reads goes back to its default. What was typed stays, and so does what nobody read in the file: both are the
  user's own faults, which `DataConfig` reports.

  Args:
    values: The data group of a config file or of a checkpoint, plain values.
    typed: What the command line sets in this group: {"source": "npz", "root": ...}, values as they were typed.
  """
  lost = unread_settings({**values, **typed}).keys() - unread_settings(values).keys() - typed.keys()
  for group, switch in (("captions", "train"), ("label_maps", "set")):
    if typed.get(f"{group}.{switch}") == "":  # none any more: nor how they are read
      lost |= {group}
  if "held_out" in typed and "test" not in typed:  # which takes the place of the file's test split
    lost |= {"test"}
  return {setting: value for setting, value in values.items() if setting not in lost}
