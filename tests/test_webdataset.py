"""Tar shards as WebDataset writes them: indexed once, read at random."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import CaptionConfig, DataConfig, open_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "jepa_jax" / "tar"


def png(i):
  pixels = np.random.default_rng(i).integers(0, 256, (8, 10, 3), np.uint8)
  Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
  return file.getvalue(), pixels


def write(path, samples):
  """samples: [(name, {ending: bytes})]."""
  with tarfile.open(path, "w") as out:
    for name, files in samples:
      for ending, data in files.items():
        info = tarfile.TarInfo(f"{name}.{ending}")
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))


@pytest.fixture
def root(tmp_path):
  for shard in range(2):
    rows = range(5 * shard, 5 * shard + 5)
    write(
      tmp_path / f"train-{shard:03d}.tar",
      [(f"deep/{i:04d}", {"cls": str(i % 3).encode(), "png": png(i)[0], "txt": f"picture {i}".encode()}) for i in rows],
    )
  write(tmp_path / "val.tar", [("a.b", {"seg.png": png(7)[0]}), ("c", {"json": b'{"label": 1}', "PNG": png(8)[0]})])
  return tmp_path


def config(root, **changes):
  shared = {"source": "webdataset", "canvas_px": 8, "max_aspect": 1.25, "root": str(root), "test": "val"}
  return DataConfig(**shared | changes)


def test_samples_are_read_at_random_and_shards_are_looked_through_once(root, cache, monkeypatch):
  images = open_images(config(root), "train")
  order = np.array([7, 0, 9, 3])
  found = images.read(order)
  np.testing.assert_array_equal(found["label"], order % 3)
  for row, i in enumerate(order):
    np.testing.assert_array_equal(found["canvas"][row, :8, :10], png(i)[1])
  assert images.names[7] == "train-001.tar/deep/0007" and images.num_classes == 3 and len(list(cache.iterdir())) == 1
  monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("looked through again"))
  again = open_images(config(root), "train")
  assert again.fingerprint == images.fingerprint and len(again) == 10


@pytest.mark.parametrize(
  ("pattern", "num"), [("train", 10), ("train-*.tar", 10), ("train-{000..001}.tar", 10), ("train-001.tar", 5)]
)
def test_shards_are_named_by_globs_and_ranges(pattern, num, root):
  assert len(open_images(config(root, train=pattern), "train")) == num


def test_a_name_ends_at_its_first_dot_and_labels_may_lie_in_json(root):
  images = open_images(config(root), "test")
  assert images.names == ["val.tar/a", "val.tar/c"] and images.labels().tolist() == [-1, 1]


def test_captions_are_the_text_files(root):
  captions = CaptionConfig(train="txt", vocab_size=270)
  images = open_images(config(root, captions=captions), "train")
  ids = images.read(np.array([6]))["caption"][0, 0]
  assert images.tokenizer.decode(ids) == "picture 6"
  with pytest.raises(ValueError, match="say 'txt'"):
    open_images(config(root, captions=CaptionConfig(train="json")), "train")


def test_a_changed_shard_is_looked_through_again(root):
  before = open_images(config(root), "train").fingerprint
  write(root / "train-001.tar", [("x", {"jpg": png(1)[0]})])
  images = open_images(config(root), "train")
  assert len(images) == 6 and images.fingerprint != before


def test_what_cannot_be_read_is_named(root):
  with pytest.raises(ValueError, match=r"No shard matches .*valid\*.tar; there is train-000.tar"):
    open_images(config(root, train="valid"), "train")
  (root / "bad.tar").write_bytes(b"x" * 2000)
  with pytest.raises(ValueError, match="bad.tar is damaged or no tar file"):
    open_images(config(root, train="bad.tar"), "train")
  write(root / "words.tar", [("x", {"cls": b"cat", "png": png(1)[0]})])
  with pytest.raises(ValueError, match="x.cls holds 'cat': a class is a whole number"):
    open_images(config(root, train="words.tar"), "train")
  write(root / "empty.tar", [("x", {"txt": b"words"})])
  with pytest.raises(ValueError, match="hold no images"):
    open_images(config(root, train="empty.tar"), "train")
