"""Which images and classes a folder holds, and how two splits agree on the numbers of the classes."""

import numpy as np
import pytest

from jepa_jax.data import DataConfig, ImageSet, open_images
from jepa_jax.data.sources import ArraySource
from tests.images import write_folder


def split_of(names, labels):
  source = ArraySource(np.zeros((len(labels), 8, 8), np.uint8), labels, names, "made")
  return ImageSet(source, DataConfig(source="synthetic", canvas_px=8))


@pytest.mark.parametrize("cached", [False, True])
def test_classes_are_numbered_by_name_where_a_split_lists_them_otherwise(cached):
  test = split_of(("dog", "cat", "owl"), [0, 0, 1, -1])  # no image of an owl
  if cached:
    test.read(np.arange(4))
  test.number_as(("cat", "cow", "dog"))
  assert test.labels().tolist() == test.read(np.arange(4))["label"].tolist() == [2, 2, 0, -1]
  assert test.num_classes == 3
  test.number_as(("cat", "cow", "dog"))  # once more changes nothing
  assert test.labels().tolist() == [2, 2, 0, -1]


def test_images_of_a_class_that_was_not_trained_on_are_refused():
  with pytest.raises(ValueError, match="classes that the training images do not have: owl; these have cat, dog"):
    split_of(("cat", "owl"), [0, 1]).number_as(("cat", "dog"))


@pytest.mark.parametrize(("names", "others"), [(("0", "1"), ("cat", "dog", "owl")), (("cat", "dog"), ("0", "1", "2"))])
def test_classes_without_names_keep_their_numbers(names, others, caplog):
  test = split_of(names, [1, 0])
  test.number_as(others)
  assert test.labels().tolist() == [1, 0] and "does not name its classes" in caplog.text


def test_hidden_folders_links_in_circles_and_empty_folders_are_no_classes(tmp_path, caplog):
  files = write_folder(tmp_path / "train", 4)
  for folder in (".thumbnails", "class0/.thumbnails"):
    (tmp_path / "train" / folder).mkdir()
    (tmp_path / "train" / folder / "small.png").write_bytes(files[0].read_bytes())
  (tmp_path / "train" / "class1" / "again").symlink_to(tmp_path / "train", target_is_directory=True)
  (tmp_path / "train" / "drafts").mkdir()
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere" / "more.png").write_bytes(files[0].read_bytes())
  (tmp_path / "train" / "class0" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
  images = open_images(DataConfig("folder", 8, root=str(tmp_path)), "train")
  assert len(images) == 5 and images.class_names == ("class0", "class1") and "no classes: drafts" in caplog.text
  flat = open_images(DataConfig("folder", 8, root=str(tmp_path), train="train/class1"), "train")
  assert len(flat) == 2 and flat.class_names == ()


def test_folders_that_link_to_each_other_are_walked_once_each(tmp_path):
  files = write_folder(tmp_path / "train", 4)
  one, other = files[0].parent, files[-1].parent
  (one / "other").symlink_to(other, target_is_directory=True)
  (other / "one").symlink_to(one, target_is_directory=True)
  images = open_images(DataConfig("folder", 8, root=str(tmp_path)), "train")
  assert len(images) == 8  # each folder, and once more what it links to


def test_integers_for_names_are_matched_as_names(caplog):
  """Folders sort 10 before 2, and an npz file counts: the same ten classes, numbered otherwise."""
  names = tuple(str(i) for i in range(11))
  test = split_of(names, [2, 10])
  test.number_as(tuple(sorted(names)))
  assert test.labels().tolist() == [sorted(names).index("2"), sorted(names).index("10")] and not caplog.text
