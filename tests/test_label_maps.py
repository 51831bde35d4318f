"""Label maps: what values mean, how files lie, and that a map is scaled and cut as its image is."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import VOID, DataConfig, LabelMapConfig, open_images
from jepa_jax.data.label_maps import check_classes, resized, to_classes, value_table

CLASSES = ("sky", "road", "tree")


def write(path, array, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path, **options)


def picture(size_hw, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), np.uint8)


def stripes(size_hw, values):
  """Vertical stripes of equal width, one for each value."""
  return np.broadcast_to(np.asarray(values, np.uint8)[np.arange(size_hw[1]) * len(values) // size_hw[1]], size_hw)


def segmentation(root, set_name, train="train", test="val", **settings):
  maps = LabelMapConfig(set=set_name, **settings)
  return DataConfig("segmentation", 8, root=str(root), train=train, test=test, max_aspect=2.0, label_maps=maps)


def camvid(root, values=(0, 10, 11, 255)):
  for split in ("train", "val"):
    for i in range(2):
      write(root / split / f"{i}.png", picture((8, 12), i))
      write(root / f"{split}annot" / f"{i}.png", np.array(stripes((8, 12), values)))
  return "camvid", (0, 10, VOID, VOID), 11


def ade20k(root):
  for split in ("train", "val"):
    write(root / "images" / split / "ADE_1.jpg", picture((8, 12)))
    write(root / "annotations" / split / "ADE_1.png", np.array(stripes((8, 12), (0, 1, 150))))
  return "ade20k", (VOID, 0, 149), 150


def voc(root):
  for split, name in (("train", "2007_1"), ("val", "2007_2")):
    write(root / "JPEGImages" / f"{name}.jpg", picture((8, 12)))
    coloured = Image.fromarray(np.array(stripes((8, 12), (0, 20, 255)))).convert("P")
    coloured.putdata(list(stripes((8, 12), (0, 20, 255)).ravel()))
    coloured.putpalette([7, 9, 200] * 256)  # the colours say nothing
    (root / "SegmentationClass").mkdir(exist_ok=True)
    coloured.save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{name}\n")
  return "voc", (0, 20, VOID), 21


def cityscapes(root):
  for split in ("train", "val"):
    name = f"{split}/bonn/bonn_000000_000019"
    write(root / "leftImg8bit" / f"{name}_leftImg8bit.png", picture((8, 16)))
    write(root / "gtFine" / f"{name}_gtFine_labelIds.png", np.array(stripes((8, 16), (0, 7, 8, 33))))
  return "cityscapes", (VOID, 0, 1, 18), 19


def own(root):
  for split in ("train", "val"):
    write(root / "images" / split / "deep" / "a.jpg", picture((8, 12)))
    write(root / "masks" / split / "deep" / "a.png", np.array(stripes((8, 12), (2, 0, 255))))
  (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
  return "own", (2, 0, VOID), 3


def cityscapes_train_ids(root):
  expected = cityscapes(root)[1:]  # the others lie beside them
  for split in ("train", "val"):
    path = root / "gtFine" / split / "bonn" / "bonn_000000_000019_gtFine_labelTrainIds.png"
    write(path, np.array(stripes((8, 16), (255, 0, 1, 18))))
  return "cityscapes_train_ids", *expected


@pytest.mark.parametrize("layout", [camvid, ade20k, voc, cityscapes, cityscapes_train_ids, own])
def test_the_layouts_of_the_field_are_read_and_values_become_classes(layout, tmp_path):
  set_name, expected, num_classes = layout(tmp_path)
  cfg = segmentation(tmp_path, set_name)
  for split in ("train", "test"):
    images = open_images(cfg, split)
    rows = images.read(np.array([0]))
    height, width = rows["height"][0], rows["width"][0]
    assert images.num_classes == 0 and len(images.map_classes) == num_classes and rows["label"][0] == -1
    np.testing.assert_array_equal(rows["label_map"][0, :height, :width], stripes((height, width), expected))
    assert (rows["label_map"][0, height:] == VOID).all() and (rows["label_map"][0, :, width:] == VOID).all()
    assert images.names and images.names[0].endswith((".png", ".jpg"))


def test_own_lists_name_the_images_of_a_split(tmp_path):
  for name in ("a", "b", "c"):
    write(tmp_path / "images" / f"{name}.jpg", picture((8, 8)))
    write(tmp_path / "masks" / f"{name}.png", np.array(stripes((8, 8), (0, 1))))
  (tmp_path / "train.txt").write_text("a\nb.jpg\n")
  (tmp_path / "val.txt").write_text("c\n")
  cfg = segmentation(tmp_path, "own", classes=CLASSES)
  assert [open_images(cfg, split).names for split in ("train", "test")] == [
    ["images/a.jpg", "images/b.jpg"],
    ["images/c.jpg"],
  ]


def test_names_of_ade20k_are_read_beside_the_data(tmp_path):
  ade20k(tmp_path)
  assert open_images(segmentation(tmp_path, "ade20k"), "train").map_classes[0] == "class 1"
  rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t.1\t1\t1\tthing {i}, other" for i in range(1, 151))]
  (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
  assert open_images(segmentation(tmp_path, "ade20k"), "train").map_classes[149] == "thing 150, other"


@pytest.mark.parametrize("size_hw", [(8, 12), (12, 8), (20, 60), (60, 20), (9, 50)])
def test_a_map_is_scaled_turned_and_cut_as_its_image(size_hw, tmp_path):
  """An image whose colours are its classes: on the canvas they still are, but for where colours mix."""
  values = (0, 1, 2, 0, 1)
  label = np.array(stripes(size_hw, values))
  grey = np.repeat((100 * label)[..., None], 3, 2).astype(np.uint8)
  for split in ("train", "val"):
    write(tmp_path / "images" / split / "a.png", grey)
    write(tmp_path / "masks" / split / "a.png", label)
  rows = open_images(segmentation(tmp_path, "own", classes=CLASSES), "train").read(np.array([0]))
  height, width = rows["height"][0], rows["width"][0]
  shown, classes = rows["canvas"][0, :height, :width, 0], rows["label_map"][0, :height, :width]
  agree = np.abs(shown.astype(float) - 100.0 * classes) < 50
  assert (classes != VOID).all() and agree.mean() > 0.7 and max(height, width) <= 16


def test_nearest_takes_the_class_at_the_centre_of_a_new_pixel():
  np.testing.assert_array_equal(resized(np.array([[0, 1, 2, 3, 4, 5]], np.uint8), (1, 3))[0], [1, 3, 5])
  np.testing.assert_array_equal(resized(np.array([[7, 9]], np.uint8), (2, 4)), [[7, 7, 9, 9]] * 2)
  same = np.eye(3, dtype=np.uint8)
  assert resized(same, (3, 3)) is same


def test_a_subset_keeps_its_maps_and_names(tmp_path):
  camvid(tmp_path)
  cfg = DataConfig(
    "segmentation", 8, root=str(tmp_path), train="train", test="val", max_train=1, label_maps=LabelMapConfig("camvid")
  )
  images = open_images(cfg, "train")
  assert len(images) == 1 and len(images.names) == 1 and len(images.map_classes) == 11
  assert (images.read(np.array([0]))["label_map"] != VOID).any()


def encoded(arrays):
  files = []
  for array in arrays:
    Image.fromarray(array).save(file := io.BytesIO(), "PNG")
    files.append(np.frombuffer(file.getvalue(), np.uint8))
  return {"data": np.concatenate(files), "offsets": np.cumsum([0, *map(len, files)])}


@pytest.mark.parametrize("as_files", [True, False])
def test_npz_files_of_images_and_maps(as_files, tmp_path):
  images, maps = [picture((8, 12), i) for i in range(3)], [np.array(stripes((8, 12), (i, 11))) for i in range(3)]
  np.savez(
    tmp_path / "images.npz", **(encoded(images) if as_files else {"images": np.stack(images)}), names=["x", "y", "z"]
  )
  np.savez(tmp_path / "maps.npz", **(encoded(maps) if as_files else {"images": np.stack(maps)}))
  maps = LabelMapConfig(set="camvid", train="maps.npz", test="maps.npz")
  cfg = DataConfig("npz", 8, root=str(tmp_path), train="images.npz", test="images.npz", max_aspect=1.5, label_maps=maps)
  found = open_images(cfg, "train")
  rows = found.read(np.arange(3))
  assert found.names == ["x", "y", "z"] and rows["label_map"].shape == (3, 12, 12)
  np.testing.assert_array_equal(rows["label_map"][:, 0, 0], [0, 1, 2])


def test_what_maps_mean_is_part_of_what_the_images_are(tmp_path):
  own(tmp_path)
  names = ("a", "b", "c")
  prints = [open_images(segmentation(tmp_path, "own", **s), "train").fingerprint for s in ({}, {"classes": names}, {})]
  assert prints[0] == prints[2] != prints[1]


# ---------------------------------------------------------------- refusals


def test_maps_that_do_not_fit_are_named_with_the_fix():
  table = value_table(LabelMapConfig("own", classes=CLASSES), 3)
  good = np.zeros((4, 6), np.uint8)
  assert (to_classes(good[..., None], table, (4, 6), "m") == 0).all()
  with pytest.raises(ValueError, match=r"m has 4 x 6 pixels .* and its image 6 x 4"):
    to_classes(good, table, (6, 4), "m")
  with pytest.raises(ValueError, match="not a colour"):
    to_classes(np.zeros((4, 6, 3), np.uint8), table, (4, 6), "m")
  with pytest.raises(ValueError, match="value 3, which is no class and not void"):
    to_classes(good + 3, table, (4, 6), "m")
  with pytest.raises(ValueError, match="from 0 to 255"):
    to_classes(good.astype(np.int32) + 300, table, (4, 6), "m")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"classes": CLASSES}, "classes is set, but there are no label maps"),
    ({"set": "camvid", "void": 3}, "has classes and a void of its own"),
    ({"set": "own", "classes": CLASSES, "void": 2}, "void=2 is one of the 3 classes"),
    ({"set": "own", "classes": ("a",)}, "2 to 250 are told apart"),
    ({"set": "own", "classes": ("a", "a")}, "names a class twice"),
    ({"set": "cityscape"}, "cityscapes"),
  ],
)
def test_settings_that_cannot_be_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    LabelMapConfig(**settings)


def test_classes_without_names_are_asked_for():
  with pytest.raises(ValueError, match=r"data.label_maps.classes=sky,road"):
    check_classes(LabelMapConfig("own"), (), "here")


def test_missing_files_are_named(tmp_path):
  camvid(tmp_path)
  (tmp_path / "trainannot" / "1.png").unlink()
  with pytest.raises(ValueError, match=r"1 of 2 images have no label map, such as .*trainannot/1.png"):
    open_images(segmentation(tmp_path, "camvid"), "train")
  with pytest.raises(ValueError, match="nowhere is no folder"):
    open_images(segmentation(tmp_path, "camvid", train="nowhere"), "train")
  with pytest.raises(ValueError, match=r"no folder images/train .* and no list train.txt"):
    open_images(segmentation(tmp_path, "own", classes=CLASSES), "train")


def test_a_map_of_another_size_ends_the_reading_and_is_named(tmp_path):
  camvid(tmp_path)
  write(tmp_path / "trainannot" / "1.png", np.zeros((4, 6), np.uint8))
  images = open_images(segmentation(tmp_path, "camvid"), "train")
  with pytest.raises(ValueError, match=r"the label map of train/1.png has 4 x 6 pixels"):
    images.read(np.array([1]))


def test_sources_say_what_they_need():
  with pytest.raises(ValueError, match="label_maps.set is empty"):
    DataConfig("segmentation", 8, root="x")
  with pytest.raises(ValueError, match="give both"):
    DataConfig("npz", 8, root="x", label_maps=LabelMapConfig("camvid"))
  with pytest.raises(ValueError, match="does not read it"):
    DataConfig("folder", 8, root="x", label_maps=LabelMapConfig("camvid"))
