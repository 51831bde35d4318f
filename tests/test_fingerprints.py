"""Fingerprints change with the data and with nothing else; labels are read from the data once and kept under them."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from jepa_jax.data import DataConfig, open_images, open_source, write_array_record
from jepa_jax.data.sources import label_index
from jepa_jax.data.sources.label_index import indexed_labels
from jepa_jax.data.sources.tfds import TfdsSource
from tests.images import digits, prepare_tiny_pictures, write_folder


@pytest.fixture(scope="module")
def tfds_dirs(tmp_path_factory):
  """Two folders with the same images; the labels of the second are the other way round."""
  folders = [str(tmp_path_factory.mktemp("tfds")) for _ in range(2)]
  prepare_tiny_pictures(*folders)
  return folders


# ----------------------------------------------------------------------------------------------------- fingerprints


def fingerprint(*, split: str = "train", **settings) -> str:
  return open_images(DataConfig(**{"canvas_px": 8} | settings), split).fingerprint


def test_the_fingerprint_of_a_folder_changes_with_its_files_and_not_with_its_place(tmp_path):
  files = write_folder(tmp_path / "here" / "train", 6)
  seen = [fingerprint(source="folder", root=str(tmp_path / "here"))]
  assert fingerprint(source="folder", root=str(tmp_path / "here")) == seen[0]
  (tmp_path / "here").rename(tmp_path / "there")
  assert fingerprint(source="folder", root=str(tmp_path / "there")) == seen[0]
  files = [tmp_path / "there" / file.relative_to(tmp_path / "here") for file in files]
  class2 = files[0].parents[1] / "class2"
  for change in (
    lambda: files[0].write_bytes(files[0].read_bytes() + b"\0"),  # resized
    lambda: files[1].rename(files[1].with_name("new.png")),
    lambda: files[2].unlink(),
    lambda: (files[0].parent / "more.png").write_bytes(b"an image"),
    lambda: files[4].rename(files[0].with_name(files[4].name)),  # now of the other class
    lambda: class2.mkdir() or files[5].rename(class2 / files[5].name),  # one class more
  ):
    change()
    seen.append(fingerprint(source="folder", root=str(tmp_path / "there")))
  assert len(set(seen)) == 7
  (files[0].parent / "notes.txt").write_text("no image")
  assert fingerprint(source="folder", root=str(tmp_path / "there")) == seen[-1]


@pytest.mark.parametrize("layout", ["raw", "encoded"])
def test_the_fingerprint_of_npz_files_changes_with_what_is_in_them(tmp_path, layout):
  raw = {"images": np.zeros((3, 8, 8), np.uint8), "labels": np.array([0, 1, 1])}
  encoded = {"data": np.zeros(9, np.uint8), "offsets": np.array([0, 3, 6, 9]), "labels": np.array([0, 1, 1])}
  contents = raw if layout == "raw" else encoded
  first = next(iter(contents))

  def written(name: str = "train.npz", **changes) -> str:
    np.savez(tmp_path / name, **contents | changes)
    return fingerprint(source="npz", root=str(tmp_path), train=name)

  same = written()
  assert written() == same == written("other.npz")
  others = [written(labels=np.array([0, 0, 1])), written(classes=["a", "b"])]
  others.append(written(**{first: contents[first] + 1}))
  assert len({same, *others}) == 4


def test_the_fingerprint_of_array_records_changes_with_labels_and_files(tmp_path):
  source = open_source(digits(max_train=9), "train")
  settings = {"source": "array_record", "root": str(tmp_path), "train": "t-*"}

  def written(name: str, labels_from: int = 0) -> str:
    examples = [source[i] | {"label": (source[i]["label"] + labels_from) % 10} for i in range(9)]
    write_array_record(tmp_path / name, examples, source.class_names)
    return fingerprint(**settings)

  same = written("t-0.array_record")
  assert written("t-0.array_record") == same
  assert len({same, written("t-0.array_record", labels_from=1), written("t-1.array_record")}) == 3


def test_the_fingerprint_of_tfds_changes_with_the_labels_and_the_split_and_not_with_the_place(tfds_dirs, tmp_path):
  settings = {"source": "tfds", "name": "tiny_pictures"}
  shutil.copytree(tfds_dirs[0], tmp_path / "moved")
  splits = ["train", "train[:50%]", "train[:3]", "train[3:6]"]
  prints = [fingerprint(root=tfds_dirs[0], train=split, **settings) for split in splits]
  prints.append(fingerprint(root=tfds_dirs[1], **settings))
  prints.append(fingerprint(root=tfds_dirs[0], label_key="", **settings))
  assert len(set(prints)) == len(prints)
  assert fingerprint(root=str(tmp_path / "moved"), **settings) == prints[0]


def test_every_split_and_subset_has_a_fingerprint_of_its_own():
  settings = {"source": "digits", "canvas_px": 32}
  subsets = [{"max_train": 9}, {"max_train": 9, "subset_seed": 1}, {"max_train": 10}]
  prints = [fingerprint(**settings | changes) for changes in ({}, *subsets)] + [fingerprint(split="test", **settings)]
  synthetic = {"source": "synthetic", "canvas_px": 8}
  prints += [fingerprint(**synthetic), fingerprint(split="test", **synthetic), fingerprint(**synthetic, max_train=9)]
  assert len(set(prints)) == len(prints) and prints[1] == fingerprint(**settings, max_train=9)


# ------------------------------------------------------------------------------------------------------ label index


@pytest.fixture
def pictures(tfds_dirs, tmp_path):
  """A prepared TFDS data set of this test's own, whose labels are 0, 1, 0, 1, ... for the pictures 0, 1, 2, 3, ..."""
  shutil.copytree(tfds_dirs[0], tmp_path / "data")
  return tmp_path / "data"


def open_pictures(folder: Path, split: str = "train", **changes):
  settings = {"source": "tfds", "canvas_px": 8, "root": str(folder), "name": "tiny_pictures", "train": split}
  return open_source(DataConfig(**settings | changes), "train")


def index_files(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob("*") if "jepa_jax_labels" in path.name)


def forbid_reading(monkeypatch):
  def fail(*_):
    raise AssertionError("read the labels of records, though there is an index")

  monkeypatch.setattr(TfdsSource, "_read_labels", fail)


def test_tfds_labels_are_read_once_and_then_kept_beside_the_data(pictures, monkeypatch):
  source = open_pictures(pictures)
  expected = [source[i]["label"] for i in range(8)]
  labels = source.labels()
  assert list(labels) == expected and labels.dtype == np.int32 and len(set(expected)) == 2
  (index,) = index_files(pictures)
  assert index.parent == pictures / "tiny_pictures" / "1.0.0"
  assert list(open_pictures(pictures, "train[2:5]").labels()) == expected[2:5]
  forbid_reading(monkeypatch)
  np.testing.assert_array_equal(open_pictures(pictures).labels(), labels)
  np.testing.assert_array_equal(
    open_images(DataConfig("tfds", 8, root=str(pictures), name="tiny_pictures"), "train").labels(), labels
  )
  with pytest.raises(AssertionError, match="read the labels"):
    open_pictures(pictures, "train[1:5]").labels()  # another split has another index
  assert list(open_pictures(pictures, label_key="").labels()) == [-1] * 8


def test_replaced_labels_are_not_read_from_the_index_of_the_old_ones(tfds_dirs, pictures):
  old = open_pictures(pictures).labels()
  (index,) = index_files(pictures)
  kept = index.read_bytes()
  shutil.rmtree(pictures)
  shutil.copytree(tfds_dirs[1], pictures)
  index.write_bytes(kept)
  np.testing.assert_array_equal(open_pictures(pictures).labels(), 1 - old)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of other data", "too few"])
def test_a_damaged_label_index_is_ignored_and_written_again(pictures, monkeypatch, caplog, damage):
  labels = open_pictures(pictures).labels()
  (index,) = index_files(pictures)
  good, fingerprint = index.read_bytes(), open_pictures(pictures).fingerprint()
  middle = len(good) // 2
  match damage:
    case "cut":
      index.write_bytes(good[:middle])
    case "flipped":
      with np.load(index) as file:
        np.savez(index, fingerprint=file["fingerprint"], labels=file["labels"])
      stored = index.read_bytes()
      index.write_bytes(stored.replace(labels.tobytes(), (1 - labels).tobytes()))
    case "empty":
      index.write_bytes(b"")
    case "of other data":
      np.savez(index, fingerprint="0123456789abcdef", labels=labels)
    case "too few":
      np.savez(index, fingerprint=fingerprint, labels=labels[:7])
  np.testing.assert_array_equal(open_pictures(pictures).labels(), labels)
  assert "the labels are read from the data again" in caplog.text
  forbid_reading(monkeypatch)
  np.testing.assert_array_equal(open_pictures(pictures).labels(), labels)


def test_labels_of_data_that_cannot_be_written_are_kept_in_the_users_cache(tmp_path, monkeypatch, caplog):
  labels, nowhere, num_reads = np.arange(5, dtype=np.int32), tmp_path / "read only", []
  read = lambda: num_reads.append(1) or labels
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  for _ in range(2):
    np.testing.assert_array_equal(indexed_labels("abc", nowhere, 5, read), labels)
  assert len(num_reads) == 1 and index_files(tmp_path) == [tmp_path / "cache/jepa_jax/labels/jepa_jax_labels_abc.npz"]
  (tmp_path / "file").write_text("no folder")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  np.testing.assert_array_equal(indexed_labels("abd", nowhere, 5, read), labels)
  assert "The labels cannot be kept" in caplog.text


def test_a_label_index_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
  def killed(file, **_):
    file.write(b"half of it")
    raise KeyboardInterrupt

  monkeypatch.setattr(np, "savez_compressed", killed)
  with pytest.raises(KeyboardInterrupt):
    indexed_labels("abc", tmp_path, 5, lambda: np.arange(5, dtype=np.int32))
  assert index_files(tmp_path) == []


def test_reading_many_labels_is_in_order_and_tells_how_far_it_is(monkeypatch, caplog):
  caplog.set_level(logging.INFO)
  monkeypatch.setattr(label_index, "PROGRESS_EVERY_S", 0.0)
  labels = label_index.read_in_threads(lambda block: [i % 7 for i in block], 1000, "Labels of some/train")
  np.testing.assert_array_equal(labels, np.arange(1000) % 7)
  assert "Labels of some/train: 768 of 1,000 read" in caplog.text
  with pytest.raises(OSError, match="disk on fire"):
    label_index.read_in_threads(lambda _: (_ for _ in ()).throw(OSError("disk on fire")), 1000, "some/train")
