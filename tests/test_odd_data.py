"""Data as people have them: lists, labels in other forms, channels first, many channels, HEIF, files of other kinds."""

from __future__ import annotations

import io
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from jepa_jax import look
from jepa_jax.data import CaptionConfig, DataConfig, open_images, open_source
from jepa_jax.data.decode import Fit, decode_image
from jepa_jax.data.sources import folder as folder_source
from jepa_jax.data.sources.label_values import as_classes
from jepa_jax.train import train
from jepa_jax.views import ColorSettings
from jepa_jax.views.color import apply_color, sample_color
from tests.tiny import tiny_config

# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
  ("values", "names", "labels", "classes"),
  [
    ([0, 2, -1], None, [0, 2, -1], ("0", "1", "2")),
    ([[1.0], [0.0]], None, [1, 0], ("0", "1")),
    (np.array([True, False]), None, [1, 0], ("0", "1")),
    (["dog", "cat", ""], None, [1, 0, -1], ("cat", "dog")),
    (np.array([b"dog", b"cat"]), ("dog", "cat"), [0, 1], ("dog", "cat")),
    ([1, 3, 2], None, [0, 2, 1], ("1", "2", "3")),
    ([1, 2], ("a", "b", "c"), [1, 2], ("a", "b", "c")),
    (np.array([7], np.uint64), None, [7], tuple("01234567")),
    ([], None, [], ()),
  ],
)
def test_labels_are_taken_as_they_are_written(values, names, labels, classes):
  found, called = as_classes(np.asarray(values), names, "labels")
  assert found.tolist() == labels and found.dtype == np.int32 and called == classes


def test_two_splits_that_count_from_one_agree(tmp_path):
  """Also where the first class is missing in one of them: names tell."""
  for name, labels in (("train", [1, 2, 3]), ("test", [2, 3, 3])):
    np.savez(tmp_path / f"{name}.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array(labels))
  train, test = (open_images(DataConfig("npz", 8, root=str(tmp_path)), split) for split in ("train", "test"))
  test.number_as(train.class_names)
  assert train.labels().tolist() == [0, 1, 2] and test.labels().tolist() == [1, 2, 2]


@pytest.mark.parametrize(
  ("train", "test", "found"),
  [
    (np.arange(12) % 10 + 1, np.arange(12) % 8 + 2, np.arange(12) % 8 + 1),  # the test split lacks the first class
    (np.array([1, 2, 3, 3]), np.array([-1, 1, 3, 3]), np.array([-1, 0, 2, 2])),
    (np.array([0, 1, 2, 2]), np.array([2, 2, 1, 1]), np.array([2, 2, 1, 1])),
  ],
)
def test_numbers_are_names_in_both_splits(tmp_path, train, test, found):
  for name, labels in (("train", train), ("test", test)):
    np.savez(tmp_path / f"{name}.npz", images=np.zeros((len(labels), 8, 8), np.uint8), labels=labels)
  first, second = (open_images(DataConfig("npz", 8, root=str(tmp_path)), split) for split in ("train", "test"))
  second.number_as(first.class_names)
  assert second.labels().tolist() == found.tolist()


def test_two_single_classes_of_other_numbers_are_not_one(tmp_path):
  for name, label in (("train", 0), ("test", 1)):
    np.savez(tmp_path / f"{name}.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.full(3, label))
  first, second = (open_images(DataConfig("npz", 8, root=str(tmp_path)), split) for split in ("train", "test"))
  with pytest.raises(ValueError, match="classes that the training images do not have: 1"):
    second.number_as(first.class_names)


def test_identifiers_make_no_class_for_every_number_below_them():
  labels, names = as_classes(np.array([20240101, -1, 20240105, 20240101]), None, "labels")
  assert labels.tolist() == [0, -1, 1, 0] and names == ("20240101", "20240105")


# ---------------------------------------------------------------- npz and npy


def test_channels_first_are_turned(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 9), np.uint8)
  np.savez(tmp_path / "train.npz", images=images)
  read = open_source(DataConfig("npz", 9, root=str(tmp_path)), "train")[2]["image"]
  np.testing.assert_array_equal(read, images[2].transpose(1, 2, 0))


def test_one_array_of_images_needs_no_archive(tmp_path):
  np.save(tmp_path / "stack.npy", np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8))
  images = open_images(DataConfig("npz", 8, root=str(tmp_path), train="stack.npy", held_out=0.4), "train")
  assert images.summary() == "3 images, 8 x 8 px, no labels"
  np.save(tmp_path / "stack.npy", np.zeros((5, 8, 8)))
  with pytest.raises(ValueError, match="'images' in .*stack.npy is float64"):
    open_images(DataConfig("npz", 8, root=str(tmp_path), train="stack.npy"), "train")


def test_sixteen_bits_are_read_by_their_upper_eight(tmp_path):
  np.save(tmp_path / "stack.npy", np.full((4, 8, 8), 0x7F03, np.uint16))
  images = open_images(DataConfig("npz", 8, root=str(tmp_path), train="stack.npy"), "train")
  assert (images.read(np.arange(4))["canvas"][:, 0, 0] == 0x7F).all()


# ---------------------------------------------------------------- many channels


@pytest.mark.parametrize(("fit", "shape"), [(Fit(16, 20), (16, 20, 6)), (Fit(32, 40), (32, 40, 6))])
def test_an_image_of_six_channels_is_scaled_as_six_pictures_are(fit, shape):
  """By much and by little, for which there are two ways."""
  image = np.random.default_rng(0).integers(0, 256, (40, 60, 6), np.uint8)
  read = decode_image(image, fit, 6)
  assert read.shape == shape
  for band in range(6):
    np.testing.assert_array_equal(read[:, :, band], decode_image(image[:, :, band], fit, 1)[:, :, 0])


def test_channels_first_and_sixteen_bits_are_the_same_picture():
  image = np.random.default_rng(0).integers(0, 256, (40, 60, 6), np.uint8)
  read = decode_image(image, Fit(16, 20), 6)
  np.testing.assert_array_equal(read, decode_image(image.transpose(2, 0, 1), Fit(16, 20), 6))
  for dtype in ("<u2", ">u2"):
    np.testing.assert_array_equal(read, decode_image((image.astype(np.uint16) * 256 + 7).astype(dtype), Fit(16, 20), 6))


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (np.zeros((8, 8, 5), np.uint8), r"it is \(8, 8, 5\), and data.channels is 6"),
    (np.zeros((8, 8, 6), np.float32), "its pixels are float32, whose range it does not say"),
  ],
)
def test_other_pixels_are_bad_images(image, message):
  with pytest.raises(ValueError, match=message):
    decode_image(image, Fit(8, 8), 6)


@pytest.mark.parametrize("planar", [False, True])
def test_a_tiff_of_six_bands_is_read(tmp_path, planar):
  tifffile = pytest.importorskip("tifffile")
  (tmp_path / "train").mkdir()
  image = np.random.default_rng(0).integers(0, 256, (8, 9, 6), np.uint8)
  stored = image.transpose(2, 0, 1) if planar else image
  config = "separate" if planar else "contig"
  tifffile.imwrite(tmp_path / "train" / "a.tif", stored, photometric="minisblack", planarconfig=config)
  cfg = DataConfig("folder", 9, channels=6, mean=(0.5,) * 6, std=(0.25,) * 6, root=str(tmp_path))
  rows = open_images(cfg, "train").read(np.array([0]))
  np.testing.assert_array_equal(rows["canvas"][0, :8, :9], image)


@pytest.mark.parametrize(("mode", "ending"), [("RGBA", "png"), ("CMYK", "jpg")])
def test_pictures_of_four_bands_are_read_where_four_are_asked_for(tmp_path, mode, ending):
  (tmp_path / "train").mkdir()
  image = np.random.default_rng(0).integers(0, 256, (8, 9, 4), np.uint8)
  Image.fromarray(image, mode).save(tmp_path / "train" / f"a.{ending}")
  cfg = DataConfig("folder", 9, channels=4, mean=(0.5,) * 4, std=(0.25,) * 4, root=str(tmp_path))
  rows = open_images(cfg, "train").read(np.array([0]))
  with Image.open(tmp_path / "train" / f"a.{ending}") as stored:
    np.testing.assert_array_equal(rows["canvas"][0, :8, :9], np.asarray(stored))
  grey = io.BytesIO()
  Image.fromarray(image[:, :, 0]).save(grey, "PNG")
  with pytest.raises(ValueError, match=r"it is \(8, 9, 1\), and data.channels is 4"):
    decode_image(grey.getvalue(), Fit(9, 9), 4)


def test_a_run_on_six_channels_trains_and_draws_the_first_three(tmp_path):
  rng = np.random.default_rng(0)
  for name, num in (("train", 64), ("test", 16)):
    np.savez(tmp_path / f"{name}.npz", images=rng.integers(0, 256, (num, 16, 16, 6), np.uint8))
  data = {"source": "npz", "root": str(tmp_path), "canvas_px": 16, "channels": 6}
  data |= {"mean": (0.5,) * 6, "std": (0.25,) * 6}
  jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8, "grayscale_p": 0.2}
  train(tiny_config(data=data, total="2steps", objective__views__color=jitter, log__views=2), tmp_path / "run")
  assert np.asarray(Image.open(tmp_path / "run" / "views.png")).shape[2] == 3


def test_saturation_hue_and_grey_leave_six_channels_as_they_are():
  import jax

  settings = ColorSettings(saturation=0.9, hue=0.5, p=1.0, grayscale_p=1.0)
  image = jax.random.uniform(jax.random.key(0), (6, 8, 8))
  np.testing.assert_array_equal(apply_color(image, sample_color(jax.random.key(1), settings), settings), image)


def test_mean_and_deviation_are_measured_before_they_are_known(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 4), np.uint8)
  np.savez(tmp_path / "train.npz", images=images)
  typed = {"data.source": "npz", "data.root": str(tmp_path), "data.channels": "4"}
  measured = look.run("stats", "lejepa_cifar10", overrides=typed)
  np.testing.assert_allclose(measured["mean"], (images / 255).mean((0, 1, 2)), atol=1e-4)


# ---------------------------------------------------------------- lists of files


@pytest.fixture
def pictures(tmp_path):
  """Six pictures in a folder below root, whose folders are no classes."""
  for i in range(6):
    place = tmp_path / "pictures" / ("x", "y")[i % 2]
    place.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), i).save(place / f"{i}.png")
  return tmp_path


def listed(root, name, text, **changes):
  (root / name).write_text(text)
  return open_images(DataConfig("folder", 8, root=str(root), train=name, **changes), "train")


@pytest.mark.parametrize(
  ("name", "text", "labels", "classes"),
  [
    ("a.csv", "path,label\npictures/x/0.png,cat\npictures/y/1.png,dog\n", [0, 1], ("cat", "dog")),
    ("pictures/metadata.csv", "file_name,class\nx/0.png,2\ny/1.png,1\n", [1, 0], ("1", "2")),
    ("a.tsv", "Image\tCategory\npictures/x/0.png\tb, c\npictures/y/1.png\t\n", [0, -1], ("b, c",)),
    ("a.csv", "image;label\npictures/x/0.png;0\npictures/y/1.png;1\n", [0, 1], ("0", "1")),
    ("pictures/metadata.jsonl", '{"file_name": "x/0.png"}\n{"file_name": "y/1.png"}\n', [-1, -1], ()),
    ("a.csv", "which,of\npictures/x/0.png,s\npictures/y/1.png,t\n", [0, 1], ("s", "t")),
  ],
)
def test_a_list_names_the_images_and_their_classes(pictures, name, text, labels, classes):
  keys = {"image_key": "which", "label_key": "of"} if "which" in text else {}
  images = listed(pictures, name, text, **keys)
  assert images.labels().tolist() == labels and images.class_names == classes
  assert [os.path.basename(path) for path in images.names] == ["0.png", "1.png"]
  assert images.read(np.array([1]))["canvas"][0, 0, 0, 0] == 1


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("path,label\n", "names no images"),
    ("a,b\nx,y\n", "has the columns a, b: which one holds the paths.* data.image_key"),
    ("path\npictures/x/0.png\nnowhere.png\n", "names files that are not there, 1 of 2 .* such as nowhere.png"),
    ("path\npictures/x/0.png\npictures/x/0.png\n", "names pictures/x/0.png 2 times"),
    ("path,label\npictures/x/0.png\n", None),  # a row without its last cell has no class
    ("path,label\npictures/x/0.png,a,b\n", "more cells than the header"),
    ("path,label\n,a\n", "row 1 has no 'path'"),
    ('path\n"pictures/x/0.png\n', "cannot be read as a list of images"),
  ],
)
def test_a_list_that_cannot_be_is_named_with_what_mends_it(pictures, text, message):
  if message is None:
    assert listed(pictures, "list.csv", text).labels().tolist() == [-1]
    return
  with pytest.raises(ValueError, match=message) as caught:
    listed(pictures, "list.csv", text)
  assert "list.csv" in str(caught.value)


def test_a_label_that_is_missing_in_the_first_line_is_no_reason_to_drop_all(pictures):
  lines = ['{"file_name": "pictures/x/0.png"}', '{"file_name": "pictures/y/1.png", "label": "a"}']
  assert listed(pictures, "list.jsonl", "\n".join(lines)).labels().tolist() == [-1, 0]


def test_whole_floats_are_numbers_in_lists_too(pictures):
  images = listed(pictures, "list.csv", "path,label\npictures/x/0.png,1.0\npictures/y/1.png,\n")
  assert images.class_names == ("1",) and images.labels().tolist() == [0, -1]


def test_another_label_in_a_list_is_another_fingerprint(pictures):
  lists = (
    "path,label\npictures/x/0.png,a\npictures/y/1.png,b\n",
    "path,label\npictures/x/0.png,b\npictures/y/1.png,a\n",
  )
  first, second = (listed(pictures, "list.csv", text) for text in lists)
  assert first.class_names == second.class_names and first.fingerprint != second.fingerprint


def test_absolute_paths_below_root_are_those_below_root(pictures):
  relative = listed(pictures, "a.csv", "path\npictures/x/0.png\n")
  absolute = listed(pictures, "b.csv", f"path\n{pictures}/pictures/x/0.png\n")
  assert relative.names == absolute.names and relative.fingerprint == absolute.fingerprint


def test_a_list_of_test_images_does_not_get_the_captions_of_training(pictures):
  """As folders do not: a name below the training images' folder never means a test image."""
  for split, i in (("x", 0), ("y", 1)):
    (pictures / "pictures" / split / "same.png").write_bytes((pictures / "pictures" / split / f"{i}.png").read_bytes())
    (pictures / "pictures" / split / "metadata.csv").write_text("file_name\nsame.png\n")
  (pictures / "pictures" / "x" / "texts.jsonl").write_text('{"file_name": "same.png", "text": "of training"}\n')
  captions = {"train": "pictures/x/texts.jsonl", "length": 8, "vocab_size": 300}
  lists = {"train": "pictures/x/metadata.csv", "test": "pictures/y/metadata.csv"}
  cfg = DataConfig("folder", 8, root=str(pictures), captions=CaptionConfig(**captions), **lists)
  assert open_source(cfg, "train").captions() == [["of training"]]
  with pytest.raises(ValueError, match="names other images"):
    open_source(cfg, "test")


def test_a_column_that_is_asked_for_and_is_none_is_named(pictures):
  with pytest.raises(ValueError, match="has no column 'kind', but label"):
    listed(pictures, "list.csv", "path,label\npictures/x/0.png,a\n", label_key="kind")


def test_a_list_is_held_out_from_as_a_folder_is(pictures):
  text = "path,label\n" + "".join(f"pictures/{'xy'[i % 2]}/{i}.png,{'ab'[i % 2]}\n" for i in range(6))
  (pictures / "list.csv").write_text(text)
  cfg = DataConfig("folder", 8, root=str(pictures), train="list.csv", held_out=0.34)
  train, test = (open_images(cfg, split) for split in ("train", "test"))
  assert (len(train), len(test)) == (4, 2) and sorted(test.labels()) == [0, 1]


# ---------------------------------------------------------------- other files in a folder


def test_what_is_left_out_of_a_folder_is_counted(pictures, caplog):
  for name in ("a.HEIC", "b.heic", "notes.txt", "README", ".hidden.heic"):
    (pictures / "pictures" / "x" / name).write_bytes(b"?")
  folder_source.image_endings.cache_clear()
  with caplog.at_level(logging.INFO):
    endings = folder_source.image_endings()
    open_source(DataConfig("folder", 8, root=str(pictures), train="pictures", label_key=""), "train")
  if ".heic" not in endings:
    assert "left out: 2 .heic, 1 .txt, 1 without an ending (.heic and .heif are read with: pip" in caplog.text
  else:
    assert "left out: 1 .txt, 1 without an ending" in caplog.text


def test_a_folder_of_other_kinds_alone_says_which(tmp_path):
  (tmp_path / "a.psd").write_bytes(b"?")
  with pytest.raises(ValueError, match="holds no images; it holds 1 .psd. Expected"):
    open_source(DataConfig("folder", 8, root=str(tmp_path), train="."), "train")


def test_heif_is_read_where_its_plugin_is_installed(tmp_path):
  heif = pytest.importorskip("pillow_heif")
  pixels = np.full((16, 24, 3), (200, 30, 90), np.uint8)
  buffer = io.BytesIO()
  heif.from_pillow(Image.fromarray(pixels)).save(buffer, quality=-1)
  (tmp_path / "a.heic").write_bytes(buffer.getvalue())
  images = open_images(DataConfig("folder", 16, max_aspect=1.5, root=str(tmp_path), train="."), "train")
  read = images.read(np.array([0]))["canvas"][0, :16, :24]
  assert np.abs(read.astype(int) - pixels).max() <= 4


def test_a_folder_of_classes_with_a_stray_image_says_that_a_list_would_do(pictures):
  Image.new("L", (8, 8)).save(pictures / "pictures" / "stray.png")
  with pytest.raises(ValueError, match="stray.png .* lies in none of the class folders .x, y.: .*data.train=list.csv"):
    open_source(DataConfig("folder", 8, root=str(pictures), train="pictures"), "train")


def test_a_set_in_another_format_of_tfds_says_how_to_write_it_again():
  from jepa_jax.data.sources.tfds import _other_format_hint

  said = _other_format_hint("cifar10", "/data/", "tfrecord")
  assert "as tfrecord, in /data, which" in said and "data.root=/data_array_record" in said
  assert "data_dir='/data_array_record', file_format='array_record').download_and_prepare(download_dir='/data/" in said
  assert json.dumps(said).count("tfds.builder('cifar10'") == 1
