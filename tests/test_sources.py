"""Every source gives the images and labels that were put into it, and says what is missing."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from jepa_jax.config import to_dict
from jepa_jax.data import (
  DataConfig,
  open_images,
  open_source,
  reset_unread,
  unread_settings,
  write_array_record,
)
from jepa_jax.data.decode import Fit, decode_image
from jepa_jax.data.sources import balanced_subset
from tests.images import digits, encode, flat_image, prepare_tiny_pictures, run_python

# -------------------------------------------------------------------------------------------------------- sources


def test_digits_are_split_once_and_for_all():
  train, test = open_source(digits(), "train"), open_source(digits(), "test")
  assert (len(train), len(test), train.class_names) == (1297, 500, tuple("0123456789"))
  assert np.bincount(test.labels()).min() >= 48
  train_pixels = {train[i]["image"].tobytes() for i in range(len(train))}
  assert not train_pixels & {test[i]["image"].tobytes() for i in range(len(test))}
  image = train[0]["image"]
  assert image.shape == (32, 32) and image.dtype == np.uint8 and image.max() > 200
  # This split stands behind every published digits number: it must not change.
  assert (int(train.labels()[:100].sum()), int(test.labels()[:100].sum())) == (447, 417)


@pytest.mark.parametrize("layout", ["raw", "encoded"])
def test_npz_files_of_both_layouts_hold_the_same_images(tmp_path, layout):
  images = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)
  labels = np.array([2, 0, 1, 1, 0], np.uint8)
  if layout == "raw":
    np.savez(tmp_path / "some.npz", images=images, labels=labels)
  else:
    files = [encode(image) for image in images]
    data = np.frombuffer(b"".join(files), np.uint8)
    offsets = np.cumsum([0] + [len(file) for file in files])
    np.savez(tmp_path / "some.npz", data=data, offsets=offsets, labels=labels, classes=["a", "b", "c"])
  read = open_images(DataConfig("npz", 9, root=str(tmp_path), train="some.npz"), "train")
  rows = read.read(np.array([3, 0]))
  np.testing.assert_array_equal(rows["canvas"][:, :, :7], images[[3, 0]])
  np.testing.assert_array_equal(rows["label"], [1, 2])
  assert read.class_names == (tuple("012") if layout == "raw" else tuple("abc"))


def test_class_folders_are_numbered_by_the_training_split(tmp_path, monkeypatch):
  for path in ("train/cat/1.png", "train/bird/x/2.JPEG", "train/dog/3.webp", "test/dog/4.png", "train/dog/._3.webp"):
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encode(flat_image(1)))
  (tmp_path / "train/notes.txt").write_text("not an image")
  monkeypatch.setenv("PICTURES", str(tmp_path))
  train, test = (open_source(DataConfig("folder", 8, root="$PICTURES"), split) for split in ("train", "test"))
  assert train.class_names == test.class_names == ("bird", "cat", "dog")
  assert [train[i]["name"] for i in range(3)] == ["bird/x/2.JPEG", "cat/1.png", "dog/3.webp"]
  assert len(train) == 3 and list(test.labels()) == [2]


def test_a_folder_without_classes_is_unlabelled(tmp_path):
  (tmp_path / "train").mkdir()
  (tmp_path / "train" / "a.png").write_bytes(encode(flat_image(1)))
  images = open_images(DataConfig("folder", 8, root=str(tmp_path)), "train")
  assert images.num_classes == 0 and images.read(np.array([0]))["label"] == [-1]


def test_array_record_files_give_back_what_was_written(tmp_path):
  source = open_source(digits(max_train=30), "train")
  write_array_record(tmp_path / "train-0.array_record", [source[i] for i in range(20)], source.class_names)
  write_array_record(tmp_path / "train-1.array_record", [source[i] for i in range(20, 30)], source.class_names)
  cfg = DataConfig("array_record", 32, root=str(tmp_path), train="train-*", max_train=25)
  records = open_source(cfg, "train")
  assert len(records) == 25 and records.class_names == source.class_names
  whole = open_source(DataConfig("array_record", 32, root=str(tmp_path), train="train-*"), "train")
  np.testing.assert_array_equal(whole.labels(), source.labels())
  for i in (0, 19, 20, 29):
    assert whole[i]["name"] == source[i]["name"] and whole[i]["label"] == source[i]["label"]
    np.testing.assert_array_equal(decode_image(whole[i]["image"], Fit(32, 32), 1)[..., 0], source[i]["image"])


TFDS_READER = """
import json, sys, numpy as np
from jepa_jax.data import DataConfig, open_images
images = open_images(DataConfig("tfds", 8, root=sys.argv[1], name="tiny_pictures", train="train[:75%]"), "train")
rows = images.read(np.arange(len(images)))
assert "tensorflow" not in sys.modules
print(json.dumps([images.class_names, rows["canvas"][:, 4, 5, 0].tolist(), rows["label"].tolist(), len(images)]))
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("tfds"))
  prepare_tiny_pictures(folder)
  return folder


def test_tfds_is_read_without_tensorflow_and_survives_a_corrupt_image(tfds_dir):
  class_names, values, labels, num_images = json.loads(run_python(TFDS_READER, tfds_dir))
  assert (class_names, num_images) == (["cat", "dog"], 6)
  assert len(values) == 6 and 5 not in values
  assert [value % 2 for value in values] == labels


def test_a_damaged_record_of_tfds_is_a_bad_image_and_a_damaged_file_is_named(tfds_dir, tmp_path):
  """The fingerprint and the labels look at records before training does."""
  folder = shutil.copytree(tfds_dir, tmp_path / "data")
  settings = dict(root=str(folder), name="tiny_pictures", train="train", max_bad_share=1.0)
  (path,) = folder.rglob("*train.array_record-*")
  sound = path.read_bytes()
  open_ = lambda: open_images(DataConfig("tfds", 8, **settings), "train")
  path.write_bytes(sound[:110] + bytes(30) + sound[140:])
  images = open_()
  assert images.fingerprint and sorted(images.labels())[0] == -1 and (images.labels() >= 0).sum() == 7
  assert (images.read(np.arange(8))["label"] >= 0).all() and images.bad.num_bad == 2  # and the one that is no picture
  assert not list(folder.rglob("jepa_jax_labels*"))  # a repaired record has its label again
  assert not any("0x" in reason for reason in images.bad.reasons.values() if "BytesIO" in reason)
  path.write_bytes(sound[:65_560] + bytes(60) + sound[65_620:])
  with pytest.raises(ValueError, match="tiny_pictures/train. is damaged or was not written to its end"):
    _ = open_().fingerprint


def test_tfds_errors_say_how_to_prepare_the_data(tfds_dir, tmp_path):
  def opened(**changes):
    return open_source(
      DataConfig(**{"source": "tfds", "canvas_px": 8, "root": tfds_dir, "name": "tiny_pictures"} | changes), "train"
    )

  with pytest.raises(
    ValueError, match=r"tfds.builder\('cifar10', data_dir=.*file_format='array_record'\).download_and"
  ):
    opened(name="cifar10")
  with pytest.raises(ValueError, match=r"no data set 'cifra10'; near: .*cifar10"):
    opened(name="cifra10")
  with pytest.raises(ValueError, match="'val' is no split of tiny_pictures; it has t"):
    opened(train="val")
  with pytest.raises(ValueError, match="data.image_key is 'picture', but tiny_pictures has image, label"):
    opened(image_key="picture")
  assert list(opened(label_key="").labels()) == [-1] * 8


def test_synthetic_images_are_a_function_of_the_index():
  cfg = DataConfig("synthetic", 16, max_train=100)
  first, again = (open_images(cfg, "train").read(np.array([7, 99])) for _ in range(2))
  np.testing.assert_array_equal(first["canvas"], again["canvas"])
  assert len(open_source(cfg, "train")) == 100
  assert (first["canvas"] != open_images(cfg, "test").read(np.array([7, 99]))["canvas"]).mean() > 0.9


def test_a_subset_is_balanced_seeded_and_contained_in_the_larger_one():
  labels = np.repeat([0, 1, 2], [5, 50, 50])
  small, large = balanced_subset(labels, 12, seed=0), balanced_subset(labels, 60, seed=0)
  assert list(np.bincount(labels[small])) == [4, 4, 4]
  assert sorted(np.bincount(labels[large])) == [5, 27, 28]
  assert set(small) <= set(large) and len(set(large)) == 60
  assert set(small) != set(balanced_subset(labels, 12, seed=1))
  cfg = digits(max_train=100)
  assert len(open_source(cfg, "train")) == 100 and len(open_source(cfg, "test")) == 500


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"source": "imagenet"},
      "must be one of digits, npz, folder, tfds, array_record, parquet",
    ),
    ({"canvas_px": 4}, "data.canvas_px is 4; a canvas needs at least 8"),
    ({"channels": 0}, "data.channels is 0; use 1"),
    ({"channels": 3}, r"data.mean is \(0.5,\), but data.channels is 3; .*data.mean=\(0.5, 0.5, 0.5\)"),
    ({"std": (0.2, 0.2, 0.2)}, r"data.std is \(0.2, 0.2, 0.2\), but data.channels is 1; .*data.std=\(0.5,\)"),
    ({"std": (0.0,)}, r"data.std is \(0.0,\), but images are divided by it"),
    ({"source": "npz"}, "data.root is empty"),
    ({"source": "tfds"}, "data.name is empty"),
    ({"max_bad_share": 1.5}, "between 0 and 1"),
    ({"prefetch": 0}, "data.prefetch is 0; it must be at least 1"),
    ({"name": "mnist"}, "data.name is 'mnist', but source 'digits' does not read it; tfds does. Leave it out"),
    (
      {"train": "train[:50%]"},
      "source 'digits' does not read it; npz, folder, tfds, array_record, parquet",
    ),
    ({"source": "synthetic", "root": "/data"}, "data.root is '/data', but source 'synthetic' does not read it"),
    ({"source": "npz", "root": "/data", "image_key": "x"}, "data.image_key is 'x', but source 'npz' does not read it"),
    ({"source": "npz", "root": "/data", "label_key": ""}, "data.label_key is '', but source 'npz' does not"),
    ({"subset_seed": 3}, "data.subset_seed is 3, but data.max_train is 0, so no subset is drawn"),
    ({"source": "synthetic", "max_train": 9, "subset_seed": 3}, "source 'synthetic' does not read it; digits, npz"),
  ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    digits(**changes)


def test_settings_that_nobody_reads_may_keep_their_defaults():
  values = {field.name: getattr(digits(), field.name) for field in dataclasses.fields(DataConfig)}
  assert {"name", "image_key", "subset_seed", "captions"} <= values.keys() and unread_settings(to_dict(digits())) == {}
  assert unread_settings(values) == {} and DataConfig(**values) == digits()
  assert set(unread_settings(values | {"name": "mnist", "subset_seed": 1, "prefetch": 9})) == {"name", "subset_seed"}


CIFAR = {"source": "tfds", "name": "cifar10", "canvas_px": 32, "test": "test[:50%]", "image_key": "img"}
DIGITS = {"source": "digits", "canvas_px": 32}


@pytest.mark.parametrize(
  ("values", "typed", "lost"),
  [
    (CIFAR, {}, set()),
    (CIFAR, {"name": "mnist"}, set()),
    (CIFAR, {"source": "npz", "root": "/data"}, {"name", "image_key"}),
    (CIFAR, {"source": "digits"}, {"name", "image_key", "test"}),
    (CIFAR, {"source": "digits", "name": "mnist"}, {"image_key", "test"}),  # what was typed is for DataConfig to refuse
    (DIGITS | {"name": "mnist"}, {"source": "npz"}, set()),  # and so is a fault of the file itself
    (DIGITS | {"max_train": 9, "subset_seed": 1}, {"max_train": "0"}, {"subset_seed"}),
    (CIFAR, {"source": "no such source"}, set()),
  ],
)
def test_settings_of_the_old_source_go_when_the_command_line_names_a_new_one(values, typed, lost):
  kept = reset_unread(values, typed)
  assert kept == {setting: value for setting, value in values.items() if setting not in lost}


def test_a_config_for_one_source_is_used_with_another():
  typed = {"source": "npz", "root": "/data", "train": "a.npz", "test": "b.npz"}
  cfg = DataConfig(**reset_unread(CIFAR, typed) | typed)
  assert (cfg.name, cfg.image_key, cfg.train) == ("", "image", "a.npz")
  typed |= {"name": "mnist"}
  with pytest.raises(ValueError, match="data.name is 'mnist', but source 'npz' does not read it"):
    DataConfig(**reset_unread(CIFAR, typed) | typed)


def test_missing_data_is_named_with_what_is_there_instead(tmp_path):
  (tmp_path / "empty").mkdir()
  np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
  np.savez(tmp_path / "floats.npz", images=np.zeros((3, 4, 4)), labels=np.zeros(3))
  for cfg, message in (
    (DataConfig("folder", 8, root=str(tmp_path)), "train is no folder; .* holds empty"),
    (DataConfig("folder", 8, root=str(tmp_path / "no")), "there is no such folder"),
    (DataConfig("folder", 8, root=str(tmp_path), train="empty"), "holds no images. Expected .*/<class name>/"),
    (DataConfig("npz", 8, root=str(tmp_path)), "train.npz does not exist; .* holds floats.npz, other.npz"),
    (DataConfig("npz", 8, root=str(tmp_path), train="other"), "holds pictures; it needs 'images' uint8"),
    (DataConfig("npz", 8, root=str(tmp_path), train="floats"), "is float64 .*; it needs uint8"),
    (DataConfig("array_record", 8, root=str(tmp_path), train="t-*"), "No file matches"),
    (DataConfig("array_record", 8, root=str(tmp_path), train="other.npz"), "other.npz.json is missing"),
  ):
    with pytest.raises(ValueError, match=message):
      open_source(cfg, "train")
  with pytest.raises(ValueError, match="must be 'train' or 'test'"):
    open_source(digits(), "validation")


def test_label_that_is_the_number_of_no_class_is_an_error(tmp_path):
  images = np.zeros((3, 8, 8), np.uint8)
  np.savez(tmp_path / "some.npz", images=images, labels=[0, 1, 2], classes=["a", "b"])
  with pytest.raises(ValueError, match="labels up to 2, but names 2 classes"):
    open_images(DataConfig(source="npz", canvas_px=8, root=str(tmp_path), train="some.npz"), "train")


def test_many_files_raise_the_limit_of_open_ones_or_name_it(monkeypatch):
  from jepa_jax.data.sources import source

  limits, set_to = (256, 4096), []
  monkeypatch.setattr(source.resource, "getrlimit", lambda _: limits)
  monkeypatch.setattr(source.resource, "setrlimit", lambda _, values: set_to.append(values))
  monkeypatch.setattr(source, "_files_to_open", {})
  source.allow_open_files(1024, "train-*")
  source.allow_open_files(64, "val-*")
  assert set_to == [(1024 + 512, 4096), (1088 + 512, 4096)]
  with pytest.raises(ValueError, match=r"more-\* has 4,000 files.*may open 4,096.*ulimit -n 5600"):
    source.allow_open_files(4000, "more-*")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "damaged or no file of np.savez"),
    (b"PK\x03\x04 cut short", "damaged or no file of np.savez"),
    (b"<html>", "damaged or no file of np.savez"),
    ({"labels": np.array([0.5, 1.5])}, "'labels' in .* are float64"),
    ({"labels": np.array([-5, 1])}, "run from -5 to 1; classes are 0, 1, 2"),
    ({"labels": np.array([0, 2**32])}, "run from 0 to 4294967296"),
    ({"labels": np.eye(2, dtype=int)}, r"\(2, 2\), a row for each image: give labels.argmax\(1\)"),
    ({"labels": np.array(["a", "b"]), "class_names": np.array(["a", "c"])}, "the class 'b', which is none of a, c"),
    ({"labels": np.array([1, 2]), "class_names": np.array(["a", "b"])}, "run from 1 to 2, .* write labels - 1"),
    ({"labels": np.array([None, 1], object)}, "Python objects"),
    ({"class_names": np.array(["a", "a"])}, "two classes are called 'a'"),
    ({"images": np.zeros((2, 8, 8, 6), np.uint8)}, "6 channels, which come last, and data.channels is 3"),
    ({"images": np.zeros((2, 8, 8))}, r"is float64 .* \(255 \* images\).round\(\)"),
  ],
)
def test_an_npz_that_cannot_be_is_named_with_the_reason(tmp_path, content, message):
  if isinstance(content, bytes):
    (tmp_path / "train.npz").write_bytes(content)
  else:
    np.savez(tmp_path / "train.npz", **{"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([0, 1])} | content)
  with pytest.raises(ValueError, match=message) as caught:
    open_images(DataConfig("npz", 8, root=str(tmp_path)), "train")
  assert "train.npz" in str(caught.value) and "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"class_names": 3, "labels": []}'])
def test_an_index_of_array_records_that_is_none_is_named(tmp_path, text):
  write_array_record(tmp_path / "train.array_record", [{"image": np.zeros((8, 8), np.uint8), "label": 0, "name": "a"}])
  (tmp_path / "train.array_record.json").write_text(text)
  with pytest.raises(ValueError, match="train.array_record.json"):
    open_images(DataConfig("array_record", 8, root=str(tmp_path), train="train.array_record"), "train")
