"""Tables of images as the Hugging Face hub and `datasets` write them, made here with pyarrow."""

from __future__ import annotations

import fnmatch
import io
import json

import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import CaptionConfig, DataConfig, open_images

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HUB = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "jepa_jax" / "arrow"


def png(i, size=(10, 8)):
  pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)
  Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
  return file.getvalue(), pixels


def rows(start, stop, **columns):
  image = pa.array([{"bytes": png(i)[0], "path": f"{i}.png"} for i in range(start, stop)])
  table = {"image": image, "label": pa.array([i % 2 for i in range(start, stop)])} | columns
  return pa.table(table).replace_schema_metadata({"huggingface": json.dumps(HUB)})


@pytest.fixture
def hub(tmp_path):
  """data/train-0000i-of-00002.parquet, as the hub has them."""
  (tmp_path / "data").mkdir()
  for i in range(2):
    pq.write_table(rows(6 * i, 6 * i + 6), tmp_path / "data" / f"train-0000{i}-of-00002.parquet", row_group_size=4)
  pq.write_table(rows(12, 16), tmp_path / "data" / "test-00000-of-00001.parquet")
  return tmp_path


def config(root, **changes):
  return DataConfig(**{"source": "parquet", "canvas_px": 8, "max_aspect": 1.25, "root": str(root)} | changes)


def check(images, indices):
  found = images.read(np.arange(len(images)))
  assert len(images) == len(indices) and images.class_names == ("cat", "dog")
  np.testing.assert_array_equal(found["label"], [i % 2 for i in indices])
  for row, i in enumerate(indices):
    np.testing.assert_array_equal(found["canvas"][row, :8, :10], png(i)[1])


def test_parquet_of_the_hub_is_read_at_random_from_one_file_that_is_written_once(hub, cache):
  check(open_images(config(hub), "train"), range(12))
  (kept,) = cache.glob("*.arrow")
  time = kept.stat().st_mtime_ns
  check(open_images(config(hub), "train"), range(12))
  check(open_images(config(hub), "test"), range(12, 16))
  assert kept.stat().st_mtime_ns == time and len(list(cache.iterdir())) == 2


def test_other_files_of_the_same_name_are_other_images(hub, cache):
  before = open_images(config(hub), "train").fingerprint
  pq.write_table(rows(20, 27), hub / "data" / "train-00001-of-00002.parquet")
  images = open_images(config(hub), "train")
  check(images, [*range(6), *range(20, 27)])
  assert images.fingerprint != before


def test_what_save_to_disk_writes_is_mapped_as_it_is(tmp_path, cache):
  for split, (start, stop) in {"train": (0, 5), "test": (5, 8)}.items():
    (tmp_path / split).mkdir()
    for part, (a, b) in enumerate([(start, start + 2), (start + 2, stop)]):
      path = str(tmp_path / split / f"data-0000{part}-of-00002.arrow")
      with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, rows(0, 1).schema) as writer:
        writer.write_table(rows(a, b))
    (tmp_path / split / "cache-1234.arrow").write_bytes(b"of somebody's map()")
  check(open_images(config(tmp_path), "train"), range(5))
  check(open_images(config(tmp_path), "test"), range(5, 8))
  assert not cache.exists()


def test_classes_by_name_plain_bytes_and_tables_without_labels(tmp_path):
  pq.write_table(
    pa.table({"pixels": pa.array([png(i)[0] for i in range(3)]), "kind": pa.array(["b", "a", None])}),
    tmp_path / "train.parquet",
  )
  images = open_images(config(tmp_path, image_key="pixels", label_key="kind"), "train")
  assert images.class_names == ("a", "b") and images.labels().tolist() == [1, 0, -1]
  assert open_images(config(tmp_path, image_key="pixels"), "train").num_classes == 0


def test_a_split_is_held_out_and_captions_are_a_column(tmp_path):
  texts = pa.array([["a dog", "it runs"], ["a cat"], [], None, ["a boat"]], pa.list_(pa.string()))
  pq.write_table(rows(0, 5, text=texts), tmp_path / "train.parquet")
  assert [len(open_images(config(tmp_path, held_out=0.4), split)) for split in ("train", "test")] == [3, 2]
  captions = CaptionConfig(train="text", uncaptioned="drop", vocab_size=270)
  images = open_images(config(tmp_path, captions=captions), "train")
  assert len(images) == 3 and images.names is None
  decoded = [images.tokenizer.decode(ids) for ids in images.read(np.arange(3))["caption"][:, 0]]
  assert decoded == ["a dog", "a cat", "a boat"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"train": "valid"}, r"no files of the split 'valid'; it holds data/test-00000-of-00001.parquet"),
    ({"image_key": "picture"}, r"data.image_key='picture' is no column .* image \(struct.*set data.image_key=image"),
    ({"image_key": "label"}, "set data.image_key=image"),
    ({"label_key": "kind"}, "data.label_key='kind' is no column; there are image, label"),
    ({"root": "nowhere"}, "nowhere is no folder"),
    ({"captions": CaptionConfig(train="label")}, "holds int64, and no text"),
    ({"captions": CaptionConfig(train="text")}, "'text' is no column"),
  ],
)
def test_what_is_not_there_is_named(hub, changes, message):
  with pytest.raises(ValueError, match=message):
    open_images(config(**({"root": hub} | changes)), "train")


def test_a_damaged_file_is_named_and_leaves_nothing_behind(hub, cache):
  path = hub / "data" / "train-00001-of-00002.parquet"
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ValueError, match="damaged"):
    open_images(config(hub), "train")
  assert not list(cache.iterdir())


def test_images_that_lie_elsewhere_are_bad_ones(tmp_path):
  image = pa.array([{"bytes": png(0)[0], "path": "0.png"}, {"bytes": None, "path": "/gone/1.png"}])
  pq.write_table(pa.table({"image": image}), tmp_path / "train.parquet")
  images = open_images(config(tmp_path), "train")
  assert images.read(np.array([1]))["index"][0] == 0 and "embed_external_files" in str(images.bad.reasons)


def test_a_data_set_is_fetched_by_its_id_its_splits_alone_and_read_as_a_folder(hub, monkeypatch):
  library, asked = pytest.importorskip("huggingface_hub"), []

  def fetched(name, repo_type, revision, allow_patterns):
    asked.append((name, repo_type, revision, allow_patterns))
    return str(hub)

  monkeypatch.setattr(library, "snapshot_download", fetched)
  source = open_images(config("hub:owner/pets@v2"), "train")
  assert len(source) == len(open_images(config(hub), "train")) == 12
  name, kind, revision, patterns = asked[0]
  assert (name, kind, revision) == ("owner/pets", "dataset", "v2")
  seen = [path.relative_to(hub).as_posix() for path in hub.rglob("*.parquet")]
  assert all(any(fnmatch.fnmatch(path, pattern) for pattern in patterns) for path in seen)
  assert not any(fnmatch.fnmatch("validation-00000.parquet", pattern) for pattern in patterns)
  open_images(config("hub:owner/pets", held_out=0.5), "train")
  assert not any("test" in pattern for pattern in asked[-1][3])


def test_a_data_set_that_cannot_be_fetched_is_named_with_what_to_do(monkeypatch):
  library = pytest.importorskip("huggingface_hub")

  def offline(*_, **__):
    raise OSError("no network")

  monkeypatch.setattr(library, "snapshot_download", offline)
  with pytest.raises(ValueError, match=r"data.root=hub:owner/pets: .*no network.*would lie in .*or give a folder"):
    open_images(config("hub:owner/pets"), "train")
  with pytest.raises(ValueError, match="data.root=hub:a/b/c is no id of the hub: write hub:OWNER/NAME"):
    open_images(config("hub:a/b/c"), "train")
