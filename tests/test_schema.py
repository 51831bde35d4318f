"""The columns of a row: those that a source adds go wherever the image goes."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jepa_jax.data import (
  Column,
  DataConfig,
  ImageSet,
  abstract_batch,
  empty_rows,
  eval_batches,
  open_images,
  prefetch_to_device,
  row_columns,
  train_batches,
  zero_batch,
)
from jepa_jax.data.sources import SOURCES, ArraySource, Opening
from tests.images import digits
from tests.tiny import tiny_experiment


class Captioned(ArraySource):
  """Twelve flat images, each with a caption of 7 numbers and a (2, 3) array; those in `broken` do not decode."""

  def __init__(self, broken=()):
    values = np.arange(12, dtype=np.uint8)
    super().__init__(np.broadcast_to(values[:, None, None], (12, 8, 8)), values % 3, ["a", "b", "c"], "captioned")
    self.broken = broken

  def __getitem__(self, index):
    example = super().__getitem__(index)
    example |= {"image": b"broken"} if index in self.broken else {}
    return example | {"caption": index + np.arange(7), "pose": np.full((2, 3), index / 2, np.float32)}


COLUMNS = {"caption": Column((7,), np.int32, fill=-1), "pose": Column((2, 3), np.float32)}


@pytest.fixture(autouse=True)
def source_with_columns(monkeypatch):
  monkeypatch.setitem(SOURCES, "digits", Opening(lambda cfg, split: Captioned(), columns=lambda cfg: COLUMNS))


def captioned(broken=(), **changes) -> ImageSet:
  return ImageSet(Captioned(broken), DataConfig(**{"source": "digits", "canvas_px": 8, "num_threads": 2} | changes))


def assert_captions_match(rows: dict, index):
  np.testing.assert_array_equal(rows["index"], index)
  np.testing.assert_array_equal(rows["canvas"][:, 0, 0, 0], index)
  np.testing.assert_array_equal(rows["caption"], index[:, None] + np.arange(7))
  np.testing.assert_array_equal(rows["pose"], np.broadcast_to(index[:, None, None] / 2, (len(index), 2, 3)))
  assert rows["caption"].dtype == np.int32 and rows["pose"].dtype == np.float32


@pytest.mark.parametrize("cache_mb", [0, 10])
def test_columns_of_a_source_are_read_with_their_image_or_its_stand_in(cache_mb):
  images = captioned(broken=(4, 11), cache_mb=cache_mb)
  for _ in range(2):  # the second time from the cache, if there is one
    assert_captions_match(images.read(np.arange(12)), np.array([0, 1, 2, 3, 5, 5, 6, 7, 8, 9, 10, 0]))
  assert list(images.columns) == ["canvas", "height", "width", "label", "index", "caption", "pose"]


def test_columns_of_a_source_go_through_the_batches_to_the_device():
  images = captioned()
  for batch in itertools.islice(train_batches(images, 4, seed=0), 4):
    assert_captions_match(batch, batch["index"])
  *_, last = eval_batches(images, 8)
  assert_captions_match({key: array[last["mask"]] for key, array in last.items()}, np.arange(8, 12))
  assert (last["caption"][~last["mask"]] == -1).all() and not last["pose"][~last["mask"]].any()
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  with prefetch_to_device(train_batches(images, 4, seed=0), sharding) as batches:
    arrived = next(batches)
  assert_captions_match(jax.device_get(arrived), jax.device_get(arrived["index"]))
  expected = abstract_batch(images.columns, 4, sharding)
  assert {key: (x.shape, x.dtype, x.sharding) for key, x in arrived.items()} == {
    key: (x.shape, x.dtype, x.sharding) for key, x in expected.items()
  }


def test_an_experiment_knows_the_columns_without_the_data(monkeypatch):
  """So plans, restored networks and pictures of a method that reads captions need no data."""
  never = lambda cfg, split: pytest.fail("opened")
  monkeypatch.setitem(SOURCES, "digits", Opening(never, columns=lambda cfg: COLUMNS))
  batch = tiny_experiment(data__source="digits", data__max_train=0).abstract_batch
  assert (batch["caption"].shape, batch["caption"].dtype, batch["pose"].shape) == ((16, 7), np.int32, (16, 2, 3))


def test_shapes_zeros_and_empty_rows_of_a_batch_are_those_of_its_columns():
  columns = row_columns(digits())
  abstract, empty = abstract_batch(columns, 3), empty_rows(columns, 3)
  zeros = jax.eval_shape(lambda: zero_batch(abstract))
  read = open_images(digits(), "train").read(np.arange(3))
  for rows in (abstract, zeros, empty):
    assert {key: (x.shape, x.dtype) for key, x in rows.items()} == {key: (x.shape, x.dtype) for key, x in read.items()}
  assert not empty["canvas"].any() and (empty["height"] == 32).all() and (empty["index"] == -1).all()


@pytest.mark.parametrize(
  ("column", "message"),
  [
    (
      {"caption": Column((), np.int32)},
      r"captioned\[0\] is int64 \(7,\), but the source declares int32 \(\)",
    ),
    ({"pose": Column((2, 3), np.int32)}, r"is float32 \(2, 3\), but the source declares int32 \(2, 3\)"),
    ({"label": Column()}, "cannot add a column called label: choose another name"),
    ({"mask": Column()}, "cannot add a column called mask"),
  ],
)
def test_columns_that_are_not_what_they_say_are_refused(monkeypatch, column, message):
  monkeypatch.setitem(SOURCES, "digits", Opening(lambda cfg, split: Captioned(), columns=lambda cfg: column))
  with pytest.raises(ValueError, match=message):
    captioned().read(np.arange(2))
