"""Label maps: images whose pixels are classes, beside the images that they are of. What pixel values mean, and checks.

On the host and the device a class is its number from 0 on and VOID is what no class is said of, whatever the files say.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image

from jepa_jax.choices import check_choices
from jepa_jax.data.schema import Column, Columns

VOID = 255
_UNKNOWN = 254  # in a table of values: of no class, and not void either
MOST_CLASSES = 250


def _names(text: str) -> tuple[str, ...]:
  return tuple(text.split())


CAMVID = _names("Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist")
VOC = _names(
  "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
  "pottedplant sheep sofa train tvmonitor"
)
CITYSCAPES = _names(
  "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck bus "
  "train motorcycle bicycle"
)
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of labelIds files
ADE20K_CLASSES = 150

Set = Literal["", "camvid", "voc", "ade20k", "cityscapes", "cityscapes_train_ids", "own"]


@dataclasses.dataclass(frozen=True)
class LabelMapConfig:
  """Which label maps the images have; without `set` there are none.

  Attributes:
    set: What pixel values mean, and, for source segmentation, where files lie. "camvid": 0 to 10, 11 is void; "voc":
      0 to 20, 255 is void; "ade20k": 1 to 150, 0 is void; "cityscapes": labelIds, of which 19 are classes, or, with
      "cityscapes_train_ids", labelTrainIds, 0 to 18; "own": 0 to the number of `classes`, and `void`.
    train, test: For source npz, the files of the label maps, below data.root.
    classes: Names, for "own"; source segmentation reads them from classes.txt, one a line.
    void: For "own", the value that is no class; 255 is one in every set.
  """

  set: Set = ""
  train: str = ""
  test: str = ""
  classes: tuple[str, ...] = ()
  void: int = VOID

  def __post_init__(self):
    check_choices(self)
    changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
    if changed and not self.set:
      raise ValueError(f"{changed[0]} is set, but there are no label maps: say what their values mean by `set`")
    if self.set not in ("", "own") and (self.classes or self.void != VOID):
      raise ValueError(f"set={self.set!r} has classes and a void of its own: leave them out, or say set='own'")
    if len(self.classes) == 1 or len(self.classes) > MOST_CLASSES:
      raise ValueError(f"classes names {len(self.classes)} classes: 2 to {MOST_CLASSES} are told apart")
    if len(set(self.classes)) < len(self.classes):
      raise ValueError("classes names a class twice: give each a name of its own")
    if not 0 <= self.void <= 255:
      raise ValueError(f"void={self.void} is the value of a pixel: 0 to 255, 255 where there is none")
    if self.classes and self.void < len(self.classes):
      raise ValueError(f"void={self.void} is one of the {len(self.classes)} classes: they are 0 to their number less 1")

  def columns(self, canvas_px: int) -> Columns:
    """The column that a row has: the class of every pixel of its canvas, uint8 (S, S), VOID beyond the image."""
    return {"label_map": Column((canvas_px, canvas_px), np.uint8, fill=VOID)} if self.set else {}

  def of(self, split: str) -> str:
    """The file of the split "train" or "test"."""
    return self.test if split == "test" else self.train


def check_classes(cfg: LabelMapConfig, names: tuple[str, ...], where: Any) -> tuple[str, ...]:
  """Returns the names of the classes of a set; `names` are those found beside the data, () for none."""
  known = {"camvid": CAMVID, "voc": VOC, "own": cfg.classes or names}
  known |= dict.fromkeys(("cityscapes", "cityscapes_train_ids"), CITYSCAPES)
  if cfg.set == "ade20k":
    return names or tuple(f"class {i + 1}" for i in range(ADE20K_CLASSES))
  found = tuple(known[cfg.set])
  if len(found) < 2:
    raise ValueError(f"{where}: the classes have no names; give data.label_maps.classes=sky,road,... (two at least)")
  return dataclasses.replace(cfg, classes=found).classes if cfg.set == "own" else found


def value_table(cfg: LabelMapConfig, num_classes: int) -> np.ndarray:
  """Returns the class of every pixel value, uint8 (256,): VOID, or what no pixel may be."""
  table = np.full(256, _UNKNOWN, np.uint8)
  table[VOID] = VOID
  if cfg.set == "cityscapes":
    table[:34] = VOID
    table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return table
  first = 1 if cfg.set == "ade20k" else 0
  table[{"ade20k": 0, "camvid": len(CAMVID)}.get(cfg.set, cfg.void)] = VOID
  table[first : first + num_classes] = np.arange(num_classes)
  return table


def decode_values(encoded: bytes | np.ndarray) -> np.ndarray:
  """Returns the stored values, (h, w) or (h, w, c): of a PNG with a palette the numbers, not the colours."""
  if isinstance(encoded, np.ndarray):
    return encoded
  with Image.open(io.BytesIO(encoded)) as opened:
    return np.asarray(opened)


def to_classes(values: np.ndarray, table: np.ndarray, size_hw: tuple[int, int], what: str) -> np.ndarray:
  """Returns the classes (h, w) uint8 of stored values; `what` is what a message calls them.

  ValueError for another size than the image's, several channels, values of more than 8 bits or of no class.
  """
  if values.ndim == 3 and values.shape[2] == 1:
    values = values[:, :, 0]
  if values.ndim != 2:
    raise ValueError(
      f"{what} has shape {values.shape}: a label map holds one number a pixel, not a colour; store the numbers of the "
      "classes, as 8-bit grey or palette PNG"
    )
  if values.shape != tuple(size_hw):
    raise ValueError(
      f"{what} has {values.shape[0]} x {values.shape[1]} pixels (height x width) and its image {size_hw[0]} x "
      f"{size_hw[1]}, as it is shown (its EXIF orientation applied): store both in one size"
    )
  if values.dtype.kind not in "uib" or values.min(initial=0) < 0 or values.max(initial=0) > 255:
    raise ValueError(f"{what} holds {values.dtype} up to {values.max(initial=0)}: whole numbers from 0 to 255 are read")
  classes = table[values.astype(np.uint8)]
  if (classes == _UNKNOWN).any():
    value = int(values[classes == _UNKNOWN][0])
    raise ValueError(
      f"{what} has a pixel of the value {value}, which is no class and not void: data.label_maps says what values mean "
      "(set, classes, void)"
    )
  return classes


def resized(classes: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
  """Returns classes at another size: of each new pixel the class at its centre; a mean of classes would be no class."""
  if classes.shape == tuple(size_hw):
    return classes
  places = [((np.arange(new) + 0.5) * (old / new)).astype(int) for new, old in zip(size_hw, classes.shape)]
  return classes[np.ix_(*places)]


def about(cfg: LabelMapConfig, names: tuple[str, ...]) -> Mapping[str, Any]:
  """Returns what tells these label maps from others of the same files."""
  return dataclasses.asdict(cfg) | {"classes": list(names)}
