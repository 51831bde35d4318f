"""What the data promise: the same batches on any number of hosts and from any step, and honest errors."""

import errno
import io
import itertools
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from jepa_jax.data import (
  DataConfig,
  ImageSet,
  StorageFailed,
  TooManyBadImages,
  eval_batches,
  open_images,
  prefetch_to_device,
  train_batches,
)
from jepa_jax.data.decode import Fit, decode_image
from tests.images import digits, encode, write_folder


def whole(px: int) -> Fit:
  return Fit(px, px, whole=True)


def take(batches, num: int) -> list[dict]:
  taken = list(itertools.islice(batches, num))
  batches.close()
  return taken


def assert_same(left: list[dict], right: list[dict]):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


# ------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("host_count", [2, 4])
def test_hosts_end_to_end_see_the_batches_of_one_host(host_count):
  images = open_images(digits(), "train")
  alone = take(train_batches(images, 64, seed=3), 25)
  parts = [take(train_batches(images, 64, 3, shards=(h,), num_shards=host_count), 25) for h in range(host_count)]
  together = [{key: np.concatenate([row[key] for row in rows]) for key in rows[0]} for rows in zip(*parts)]
  assert_same(alone, together)


def test_a_host_whose_devices_are_apart_along_the_mesh_reads_just_their_rows():
  images = open_images(digits(), "train")
  alone = take(train_batches(images, 64, seed=3), 5)
  outer = take(train_batches(images, 64, 3, shards=(0, 3), num_shards=4), 5)
  for whole, rows in zip(alone, outer):
    for key, array in rows.items():
      np.testing.assert_array_equal(array, np.concatenate([whole[key][:16], whole[key][48:]]))


@pytest.mark.parametrize("cache_mb", [0, 100])
def test_a_run_started_at_step_t_continues_bit_for_bit(cache_mb):
  images = open_images(digits(cache_mb=cache_mb), "train")
  from_start = take(train_batches(images, 100, seed=0), 30)
  for start_step in (1, 12, 13, 29):  # 1,297 images: the first epoch ends within step 12
    again = open_images(digits(cache_mb=cache_mb, num_threads=1, prefetch=1), "train")
    resumed = take(train_batches(again, 100, seed=0, start_step=start_step), 30 - start_step)
    assert_same(resumed, from_start[start_step:])


def test_starting_at_a_late_step_reads_nothing_of_the_steps_before(monkeypatch):
  images = open_images(digits(), "train")
  rows_read = []
  read = images.read
  monkeypatch.setattr(images, "read", lambda indices: rows_read.append(len(indices)) or read(indices))
  take(train_batches(images, 64, seed=0, start_step=10_000_000), 1)
  assert len(rows_read) <= 4 * images.prefetch  # what was made ahead, not ten million batches


def test_every_epoch_shows_every_image_once_in_a_new_order():
  images = open_images(digits(max_train=120), "train")
  shown = [batch["index"] for batch in take(train_batches(images, 24, seed=0), 10)]
  first, second = np.concatenate(shown[:5]), np.concatenate(shown[5:])
  np.testing.assert_array_equal(np.sort(first), np.arange(120))
  np.testing.assert_array_equal(np.sort(second), np.arange(120))
  assert (first != second).mean() > 0.9


def test_a_batch_that_straddles_two_epochs_leaves_no_image_out():
  images = open_images(digits(max_train=50), "train")
  shown = np.concatenate([batch["index"] for batch in take(train_batches(images, 20, seed=0), 5)])
  np.testing.assert_array_equal(np.sort(shown), np.repeat(np.arange(50), 2))


def test_neighbouring_seeds_share_no_epoch():
  images = open_images(digits(max_train=120), "train")
  of_seed_0 = take(train_batches(images, 120, seed=0), 3)
  of_seed_1 = take(train_batches(images, 120, seed=1), 3)
  for a, b in itertools.product(of_seed_0, of_seed_1):
    assert (a["index"] != b["index"]).mean() > 0.9


def test_batches_that_cannot_be_made_say_what_to_change():
  images = open_images(digits(max_train=50), "train")
  with pytest.raises(ValueError, match="batch_size is 64, but there are 50 training images"):
    train_batches(images, 64, seed=0)
  with pytest.raises(ValueError, match="does not divide by 4 shards; use a multiple of 4"):
    train_batches(images, 30, seed=0, num_shards=4)
  with pytest.raises(ValueError, match="shard 2 is not one of 2 shards; it must be 0 to 1"):
    train_batches(images, 30, seed=0, shards=(2,), num_shards=2)


# ------------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("host_count", [1, 2, 4])
def test_evaluation_shows_every_image_once_in_order_and_masks_the_padding(host_count):
  images = open_images(digits(), "test")
  parts = [list(eval_batches(images, 64, shards=(h,), num_shards=host_count)) for h in range(host_count)]
  batches = [{key: np.concatenate([row[key] for row in rows]) for key in rows[0]} for rows in zip(*parts, strict=True)]
  assert [len(batch["mask"]) for batch in batches] == [64] * 8
  index, mask, label = (np.concatenate([batch[key] for batch in batches]) for key in ("index", "mask", "label"))
  np.testing.assert_array_equal(index[mask], np.arange(500))
  np.testing.assert_array_equal(label[mask], images.labels())
  padding = batches[-1]["canvas"][~batches[-1]["mask"]]
  assert len(padding) == 12 and not padding.any() and (label[~mask] == -1).all()
  assert_same(batches, list(eval_batches(images, 64)))


def test_a_host_whose_devices_are_apart_evaluates_just_their_rows():
  images = open_images(digits(), "test")
  outer = list(eval_batches(images, 64, shards=(0, 3), num_shards=4))
  for whole, rows in zip(eval_batches(images, 64), outer, strict=True):
    for key, array in rows.items():
      np.testing.assert_array_equal(array, np.concatenate([whole[key][:16], whole[key][48:]]))


# ---------------------------------------------------------------------------------------------------- corrupt images


@pytest.mark.parametrize("cache_mb", [0, 10])
def test_a_corrupt_image_is_replaced_by_the_next_counted_and_named(tmp_path, caplog, cache_mb):
  files = write_folder(tmp_path / "train", 12, corrupt=(4, 11))  # 4 is index 2; 11 is the last, so index 0 follows it
  cfg = DataConfig("folder", 8, root=str(tmp_path), cache_mb=cache_mb)
  images = open_images(cfg, "train")
  rows = images.read(np.arange(12))
  np.testing.assert_array_equal(rows["index"], [0, 1, 3, 3, 4, 5, 6, 7, 8, 9, 10, 0])
  values = [int(file.stem) for file in files]
  np.testing.assert_array_equal(rows["canvas"][:, 0, 0, 0], np.array(values)[rows["index"]])
  np.testing.assert_array_equal(rows["label"], images.labels()[rows["index"]])
  assert (images.bad.num_bad, images.bad.num_read) == (2, 14)
  assert set(images.bad.reasons) == {"class0/004.png", "class1/011.png"}
  assert "class0/004.png does not decode" in caplog.text


def test_batches_with_a_corrupt_image_are_still_a_function_of_the_step(tmp_path):
  write_folder(tmp_path / "train", 20, corrupt=(3, 8, 9))
  cfg = DataConfig("folder", 8, root=str(tmp_path), cache_mb=0)
  whole = take(train_batches(open_images(cfg, "train"), 8, seed=1), 6)
  assert_same(take(train_batches(open_images(cfg, "train"), 8, seed=1, start_step=4), 2), whole[4:])


def test_evaluation_masks_a_corrupt_image_instead_of_scoring_its_neighbour_twice(tmp_path):
  write_folder(tmp_path / "train", 6, corrupt=(2,))
  images = open_images(DataConfig("folder", 8, root=str(tmp_path), test="train"), "test")
  (batch,) = eval_batches(images, 6)
  np.testing.assert_array_equal(batch["mask"], [True, False, True, True, True, True])


def test_too_many_corrupt_images_stop_the_run_and_are_listed(tmp_path):
  write_folder(tmp_path / "train", 20, corrupt=range(0, 20, 4))
  cfg = DataConfig("folder", 8, root=str(tmp_path), max_bad_share=0.003, cache_mb=0)
  batches = train_batches(open_images(cfg, "train"), 10, seed=0)
  with pytest.raises(
    TooManyBadImages, match=r"(?s)data.max_bad_share = 0.003.*class0/0\d\d.png: UnidentifiedImageError"
  ):
    take(batches, 20)


def test_no_corrupt_image_is_tolerated_with_a_share_of_zero(tmp_path):
  write_folder(tmp_path / "train", 6, corrupt=(0,))
  images = open_images(DataConfig("folder", 8, root=str(tmp_path), max_bad_share=0.0), "train")
  with pytest.raises(TooManyBadImages, match="class0/000.png"):
    images.read(np.arange(6))


def test_truncated_files_count_as_corrupt(tmp_path):
  files = write_folder(tmp_path / "train", 4)
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
  files[1].write_bytes(encode(noise, "JPEG")[:900])
  images = open_images(DataConfig("folder", 64, root=str(tmp_path)), "train")
  images.read(np.arange(4))
  assert list(images.bad.reasons) == ["class0/002.png"]


# -------------------------------------------------------------------------------------------------------- prefetch


def test_prefetched_batches_arrive_in_order_sharded_and_equal():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  images = open_images(digits(), "train")
  expected = take(train_batches(images, 16, seed=0), 5)
  with prefetch_to_device(train_batches(images, 16, seed=0), sharding) as batches:
    arrived = list(itertools.islice(batches, 5))
  assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(arrived))
  assert_same(jax.device_get(arrived), expected)


def test_an_error_in_the_thread_reaches_the_consumer_after_the_good_batches():
  def broken():
    yield from (1, 2)
    raise OSError("disk on fire")

  batches = prefetch_to_device(broken(), lambda x: 10 * x)
  assert [next(batches), next(batches)] == [10, 20]
  with pytest.raises(OSError, match="disk on fire"):
    next(batches)
  assert list(batches) == []


def test_the_end_of_the_batches_ends_the_prefetched_ones():
  assert list(prefetch_to_device(iter(range(5)), lambda x: x)) == [0, 1, 2, 3, 4]


def test_waiting_is_measured():
  def slow():
    for i in range(3):
      time.sleep(0.05)
      yield i

  batches = prefetch_to_device(slow(), lambda x: x)
  next(batches)
  assert batches.last_wait_ms > 20
  time.sleep(0.3)
  next(batches)
  assert batches.last_wait_ms < 20  # it lay ready for 0.25 s


def test_closing_and_forgetting_both_stop_the_thread():
  def alive():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]

  with prefetch_to_device(itertools.count(), lambda x: x) as batches:
    next(batches)
    assert len(alive()) == 1
  assert not alive() and list(batches) == []
  forgotten = prefetch_to_device(itertools.count(), lambda x: x)
  next(forgotten)
  del forgotten
  assert not alive()


def test_no_more_batches_are_made_ahead_than_asked_for():
  made = []
  with prefetch_to_device((made.append(i) or i for i in range(100)), lambda x: x, size=2) as batches:
    next(batches)
    time.sleep(0.3)
    assert len(made) <= 4  # one used, two ready, one in the thread's hands


# ------------------------------------------------------------------------------------------------ reads that fail
class Failing:
  """A source whose reads of image 2 raise, `times` times; the others are black."""

  class_names = ("a",)

  def __init__(self, error, times=10**9):
    self._error, self.left, self.reads = error, times, 0

  def __len__(self):
    return 4

  def __getitem__(self, index):
    if index == 2:
      self.reads += 1
      if self.left:
        self.left -= 1
        raise self._error
    return {"image": np.zeros((8, 8, 3), np.uint8), "label": 0, "name": f"failing[{index}]"}


def images_of(source, monkeypatch, **settings):
  monkeypatch.setattr("jepa_jax.data.images.RETRY_S", (0.0, 0.0, 0.0))
  return ImageSet(source, DataConfig("folder", 8, root="x", cache_mb=0, **settings))


def test_a_read_that_fails_once_changes_nothing(monkeypatch, caplog):
  images = images_of(Failing(OSError(errno.EIO, "Input/output error"), 1), monkeypatch)
  np.testing.assert_array_equal(images.read(np.arange(4))["index"], np.arange(4))
  assert images.bad.num_bad == 0 and "number 2 cannot be read" in caplog.text


@pytest.mark.parametrize(
  ("error", "reads", "fails_with"),
  [
    (OSError(errno.EIO, "Input/output error"), 4, StorageFailed),
    (FileNotFoundError(errno.ENOENT, "No such file", "a/2.png"), 1, TooManyBadImages),
    (RuntimeError("corrupted record"), 1, TooManyBadImages),  # what array_record raises
  ],
)
def test_what_cannot_be_read_is_a_bad_image_and_says_so(monkeypatch, error, reads, fails_with):
  source = Failing(error)
  images = images_of(source, monkeypatch)
  np.testing.assert_array_equal(images.read(np.arange(4))["index"], [0, 1, 3, 3])
  assert source.reads == reads and images.bad.reasons == {"number 2": f"{type(error).__name__}: {error}"}
  with pytest.raises(TooManyBadImages, match="number 2") as caught:
    images_of(Failing(error), monkeypatch, max_bad_share=0.0).read(np.arange(4))
  assert caught.type is fails_with


def test_a_link_that_leads_nowhere_is_a_bad_image(tmp_path):
  files = write_folder(tmp_path / "train", 6)
  files[2].unlink()
  files[2].symlink_to(tmp_path / "gone.png")
  images = open_images(DataConfig("folder", 8, root=str(tmp_path)), "train")
  assert images.fingerprint and images.read(np.arange(6))["index"][2] == 3


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")])
def test_pixels_of_no_known_range_are_refused_not_clipped(dtype, kind):
  buffer = io.BytesIO()
  Image.fromarray(np.full((8, 8), 70_000, dtype)).save(buffer, "TIFF")
  with pytest.raises(ValueError, match=kind):
    decode_image(buffer.getvalue(), whole(8), 3)


def test_broken_images_are_no_fault_of_the_storage(tmp_path):
  """Pillow raises OSError for a truncated file: what is read and does not decode is not worth another start."""
  files = write_folder(tmp_path / "train", 6)
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
  files[1].write_bytes(encode(noise, "JPEG")[:900])
  images = open_images(DataConfig("folder", 64, root=str(tmp_path), max_bad_share=0.0), "train")
  with pytest.raises(TooManyBadImages, match="class0/002.png: OSError") as caught:
    images.read(np.arange(6))
  assert caught.type is TooManyBadImages
