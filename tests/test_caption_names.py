"""Which image a caption is of: names of files and of images, whole or in part, of one split and of the other."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jepa_jax.data import CaptionConfig, DataConfig, open_images, open_source
from jepa_jax.data.captions import Names, keys_of
from tests.test_captions import CSV, TEXTS, config, folder

__all__ = ["folder"]  # a fixture


@pytest.mark.parametrize(
  ("found", "names", "expected"),
  [
    (["train/p/a.png", "test/p/a.png"], ["test/p/a.png"], ["test/p/a.png"]),
    (["train/p/a.png"], ["test/p/a.png"], [""]),  # of the other split
    (["p/a.png", "q/a.png"], ["test/p/a.png", "test/q/a.png"], ["p/a.png", "q/a.png"]),  # below the split
    (["a.png"], ["test/p/a.png"], ["a.png"]),
    (["a.png"], ["test/p/a.png", "test/q/a.png"], ["", ""]),  # of which?
    (["x/a.png", "y/a.png"], ["test/p/a.png"], [""]),
    (["val2014/a.png"], ["test/p/a.png"], ["val2014/a.png"]),
    (["cat/1.png", "cat/3.png"], ["test/dog/1.png", "test/cat/3.png"], ["", "cat/3.png"]),  # a cat is no dog
    (["/old/data/test/p/a.png", "flickr/test/p/b.png"], ["test/p/a.png", "test/p/b.png"], None),  # from further above
    (["/test/data/train/p/a.png"], ["train/p/a.png"], None),  # a folder above is no split
    (["Images/a.png"], ["test/a.png"], None),
    (["test/p/a.png", "a.png"], ["test/p/a.png", "test/q/a.png"], ["test/p/a.png", "a.png"]),
  ],
)
def test_a_name_means_one_image_or_none(found, names, expected):
  folder = names[0].split("/")[0]
  other = {"train": "test", "test": "train"}[folder]
  assert keys_of(found, Names(names, folder, [f"{other}/p/a.png"], other)) == (expected or found)


def test_splits_with_a_folder_in_common_and_names_in_npz_files_are_told_apart(tmp_path):
  nested = Names(["flickr/test/1.png"], "flickr/test", ["flickr/train/1.png"], "flickr/train")
  assert keys_of(["flickr/train/1.png"], nested) == [""] == keys_of(["train/1.png"], nested)
  assert keys_of(["test/1.png"], nested) == ["test/1.png"]
  for split in ("train", "test"):
    np.savez(tmp_path / f"{split}.npz", images=np.zeros((1, 8, 8), np.uint8), names=np.array([f"{split}/a.png"]))
  (tmp_path / "captions.csv").write_text("image,caption\ntrain/a.png,one\n")
  own = {"channels": 1, "mean": (0.5,), "std": (0.5,), "captions": CaptionConfig(train="captions.csv")}
  cfg = DataConfig(source="npz", root=str(tmp_path), canvas_px=8, train="train.npz", test="test.npz", **own)
  assert open_source(cfg, "train").captions() == [["one"]]
  with pytest.raises(ValueError, match=r"captions.test is empty: it is the file of training\) names other images"):
    open_source(cfg, "test")
  np.savez(tmp_path / "train.npz", images=np.zeros((3, 8, 8), np.uint8), names=np.array([b"a.png", b"b.png"]))
  with pytest.raises(ValueError, match="has 3 images and 2 'names'"):
    open_source(cfg, "train")
  np.savez(tmp_path / "train.npz", images=np.zeros((1, 8, 8), np.uint8), names=np.array([b"train/a.png"]))
  assert open_source(cfg, "train").captions() == [["one"]]


def test_paths_are_matched_wherever_they_begin(folder, tmp_path, monkeypatch):
  for prefix in (f"{folder}/", "./", "", "..\\data\\"):
    lines = "".join(f"{prefix}train/pets/{name},{name}\n" for name in TEXTS)
    (folder / "captions.csv").write_text("image,caption\n" + lines)
    assert open_source(config(folder), "train").captions() == [[name] for name in TEXTS]
  (folder / "train" / "captions.csv").write_text("image,caption\n" + "".join(f"pets/{n},one\n" for n in TEXTS))
  monkeypatch.chdir(folder)
  absolute = str(folder / "train" / "captions.csv")
  with pytest.raises(ValueError, match="names other images"):  # of training, though root is relative and they are not
    open_source(dataclasses.replace(config(folder, train=absolute), root="."), "test")


def test_the_same_name_written_in_several_ways_has_all_its_captions(folder):
  (folder / "captions.csv").write_text("image,caption\npets/a.png,one\npets\\a.png,two\n./pets/a.png,three\n")
  cfg = config(folder, per_image=5, uncaptioned="drop")
  assert open_source(cfg, "train").captions() == [["one", "two", "three"]]


def test_captions_of_training_images_do_not_go_to_test_images_of_the_same_name(folder, caplog):
  warned = lambda: [record for record in caplog.records if record.levelname == "WARNING"]
  (folder / "captions.csv").write_text("image,caption\n" + "".join(f"train/pets/{n},one\n" for n in TEXTS))
  assert len(open_images(config(folder), "train")) == 3
  with pytest.raises(ValueError, match="names other images"):
    open_images(config(folder), "test")
  assert not warned()
  (folder / "captions.csv").write_text(CSV)
  open_images(config(folder), "test")
  assert "3 names, such as a.png, fit images of both splits" in caplog.text
  (folder / "test.csv").write_text(CSV)
  caplog.clear()
  open_images(config(folder, test="test.csv"), "test")  # a file of its own says which
  assert not warned()


def test_a_file_that_lies_among_the_images_names_them_from_there_on(folder):
  for split in ("train", "test"):
    lines = [json.dumps({"file_name": f"pets/{name}", "text": f"{split} {name}"}) for name in TEXTS]
    (folder / split / "metadata.jsonl").write_text("\n".join(lines))
  both = {"train": "train/metadata.jsonl", "test": "test/metadata.jsonl"}
  cfg = config(folder, **both)
  assert open_source(cfg, "test")[1]["captions"] == ["test b.png"]
  with pytest.raises(ValueError, match="names other images"):  # those of training
    open_source(config(folder, train=both["train"]), "test")
