"""Images of one's own, without a test split or labels: from a folder to features, in words, files and Python."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import jepa_jax.__main__ as cli
from jepa_jax import look
from jepa_jax.data import DataConfig, canvases_of, open_images
from jepa_jax.data.sources.held_out import held_out_rows
from jepa_jax.evals import label_free
from jepa_jax.evaluate import evaluate
from jepa_jax.runs import load_encoder
from tests.test_evaluate_networks import save
from tests.tiny import tiny_experiment, tiny_values

NAMES = [f"{i}.jpg" for i in range(200)]


# ---------------------------------------------------------------- a held-out part


def test_every_class_gives_its_share_and_no_image_is_in_both():
  labels = np.repeat([0, 1, -1], [100, 60, 40])
  train, test = (held_out_rows(labels, NAMES, 0.1, split) for split in ("train", "test"))
  assert sorted([*train, *test]) == list(range(200))
  assert [int((labels[test] == label).sum()) for label in (0, 1, -1)] == [10, 6, 4]


def test_an_image_more_moves_few_others_and_their_order_none():
  labels = np.zeros(200, int)
  of = lambda names: {names[i] for i in held_out_rows(labels[: len(names)], names, 0.2, "test")}
  before, without, turned = of(NAMES), of(NAMES[:-1]), of(NAMES[::-1])
  assert turned == before and len(before ^ without) <= 2


def test_a_class_of_one_image_cannot_be_split():
  with pytest.raises(ValueError, match="cannot split one image, b.jpg, the only one of its class"):
    held_out_rows(np.array([0, 1, 0]), ["a.jpg", "b.jpg", "c.jpg"], 0.5, "train")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """A flat folder of 20 grey pictures of several sizes, one of which is damaged."""
  root = tmp_path_factory.mktemp("pictures")
  for i in range(20):
    pixels = np.random.default_rng(i).integers(0, 256, (16 + i, 20, 3), np.uint8)
    Image.fromarray(pixels).save(root / f"{i:02d}.png")
  (root / "05.png").write_bytes(b"no image")
  return root


def folder(root, **changes):
  return DataConfig(**{"source": "folder", "canvas_px": 16, "root": str(root), "train": "."} | changes)


def test_a_flat_folder_is_split(pictures):
  train, test = (open_images(folder(pictures, held_out=0.25), split) for split in ("train", "test"))
  assert (len(train), len(test)) == (15, 5) and not {*train.names} & {*test.names}
  assert train.fingerprint != test.fingerprint and train.num_classes == 0


def test_two_ways_to_say_the_test_split_are_one_too_many(pictures):
  with pytest.raises(ValueError, match="both say what the test split is"):
    folder(pictures, held_out=0.1, test="val")
  with pytest.raises(ValueError, match="a share of the training images below 1"):
    folder(pictures, held_out=1.0)


def test_one_line_says_what_there_is(pictures, tmp_path):
  assert open_images(folder(pictures), "train").summary() == "20 images, 20 x 16 to 20 x 35 px, no labels"
  for name in ("cat", "dog"):
    (tmp_path / name).mkdir()
    for i in range(2 + (name == "dog")):
      Image.new("RGB", (8, 9)).save(tmp_path / name / f"{i}.png")
  said = open_images(folder(tmp_path), "train").summary()
  assert said == "5 images, 8 x 9 px, 2 classes of 2 to 3 (cat, dog, ...)"


# ---------------------------------------------------------------- without labels


def test_features_of_equal_share_have_the_rank_of_their_number_and_equal_ones_have_one():
  rank, about = label_free.measured(np.eye(8, 20, dtype=np.float32))
  assert (
    rank == pytest.approx(8, rel=1e-4) and about["most"] == 8 and about["mean_cosine"] == pytest.approx(0, abs=1e-6)
  )
  assert about["uniformity"] == pytest.approx(-4)  # exp(-2 * 2): every distance is the square root of 2
  rank, about = label_free.measured(np.ones((8, 20), np.float32))
  assert rank == pytest.approx(1, rel=1e-3) and about["mean_cosine"] == pytest.approx(1)
  assert about["uniformity"] == pytest.approx(0, abs=1e-5)  # of float32


def test_images_without_labels_are_evaluated_by_what_needs_none(pictures, workdir):
  own = {"data.source": "folder", "data.root": str(pictures), "data.train": ".", "data.held_out": "0.5"}
  own |= {"data.max_train": "0"}
  with pytest.raises(ValueError, match="What needs none: --evals=label_free"):
    evaluate(workdir, None, own, ("knn",), show=False)
  rows = evaluate(workdir, None, own, ("label_free",), show=False).rows
  assert len(rows) == 3 and all(1 <= columns["RankMe"] <= 10 for columns in rows.values())


# ---------------------------------------------------------------- features


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return save(tmp_path_factory.mktemp("lejepa"), run := tiny_experiment(), run.init())


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_features_of_a_folder_lie_in_one_file_with_their_names(ending, pictures, workdir, tmp_path, capsys):
  out = tmp_path / f"features{ending}"
  command = ["features", f"--workdir={workdir}", f"--images={pictures}", f"--out={out}", "--json"]
  assert cli.main(command) == 0
  said = json.loads(capsys.readouterr().out)
  assert said["images"] == 19 and list(said["skipped"]) == ["05.png"]
  if ending == ".npz":
    found = np.load(out)
    names, features = found["names"], found["features"]
    assert set(found.files) == {"names", "features"}  # no labels
  else:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(out)
    names, features = table["name"].to_pylist(), np.array(table["features"].to_pylist())
  assert len(names) == 19 and "05.png" not in names and features.shape == (19, said["width"])
  encoder = load_encoder(workdir)
  np.testing.assert_allclose(features, encoder([pictures / name for name in names], batch_size=8), atol=1e-5)


def test_features_of_the_runs_own_images_have_labels(workdir, tmp_path):
  out = tmp_path / "features.npz"
  assert cli.main(["features", f"--workdir={workdir}", "--split=train", f"--out={out}"]) == 0
  found = np.load(out)
  assert len(found["features"]) == len(found["labels"]) == 64 and len(found["class_names"]) == 10


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--out=x.csv"], "ends in .npz or .parquet"),
    (["--out=nowhere/x.npz"], "no folder nowhere"),
    (["--out=x.npz", "--images=nowhere"], "--images=nowhere is no folder"),
    (["--out=x.npz", "--config.optim.lr=1"], "evaluation takes its networks from the checkpoint"),
  ],
)
def test_what_cannot_be_written_or_read_is_named(arguments, message, workdir, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert cli.main(["features", f"--workdir={workdir}", *arguments]) == cli.INPUT_ERROR
  assert message in capsys.readouterr().err


def test_an_encoder_takes_paths_pictures_and_arrays_of_any_size(pictures, workdir):
  encoder = load_encoder(workdir)
  path = pictures / "07.png"
  with Image.open(path) as opened:
    forms = [path, str(path), opened.copy(), np.asarray(opened), np.asarray(opened)[None]]
  found = [encoder(form) for form in forms]
  assert found[0].shape == (1, 16)
  for other in found[1:]:
    np.testing.assert_allclose(other, found[0], atol=1e-5)
  several = encoder([path, pictures / "19.png", path], batch_size=2)
  np.testing.assert_allclose(several[[0, 2]], np.repeat(found[0], 2, 0), atol=1e-5)
  assert np.abs(several[1] - several[0]).max() > 1e-4


def test_a_turned_photograph_is_seen_upright(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
  exif = Image.Exif()
  exif[274] = 6  # to be turned by 90 degrees
  Image.fromarray(pixels).save(path := tmp_path / "a.png", exif=exif)
  cfg = folder(tmp_path, canvas_px=32)
  with Image.open(path) as opened:
    read, given = (canvases_of([form], cfg) for form in (path, opened.copy()))
  assert (read["height"][0], read["width"][0]) == (given["height"][0], given["width"][0]) == (20, 12)
  np.testing.assert_array_equal(read["canvas"], given["canvas"])


def test_sixteen_bits_and_palettes_look_alike_from_a_file_and_from_a_picture(tmp_path):
  numbers = np.arange(64).reshape(8, 8)
  pictures = {
    "deep": Image.fromarray((1000 * numbers).astype(np.uint16)),
    "palette": Image.fromarray(numbers.astype(np.uint8)).convert("P"),
  }
  for name, image in pictures.items():
    image.save(path := tmp_path / f"{name}.png")
    read, given = (canvases_of([form], folder(tmp_path)) for form in (path, image))
    np.testing.assert_array_equal(read["canvas"], given["canvas"])


def test_a_start_reads_no_labels_to_say_what_there_is(tmp_path, monkeypatch):
  for name in ("cat", "dog"):
    (tmp_path / name).mkdir()
    Image.new("RGB", (8, 9)).save(tmp_path / name / "0.png")
  images = open_images(folder(tmp_path), "train")
  monkeypatch.setattr(images, "labels", lambda: pytest.fail("labels may mean to read every record"))
  assert images.summary(counted=False) == "2 images, 8 x 9 px, 2 classes (cat, dog, ...)"


def test_what_is_no_image_is_named(pictures, workdir):
  encoder = load_encoder(workdir)
  with pytest.raises(ValueError, match=r"05.png is no image that can be read"):
    encoder([pictures / "04.png", pictures / "05.png"])
  with pytest.raises(ValueError, match=r"image 0 is no image .* float32 \(4, 4, 3\); give uint8"):
    encoder([np.zeros((4, 4, 3), np.float32)])
  with pytest.raises(ValueError, match="give at least one"):
    encoder([])


# ---------------------------------------------------------------- looked at before training


def tiny_file(tmp_path, pictures):
  values = tiny_values(
    data={"source": "folder", "canvas_px": 16, "root": str(pictures), "train": ".", "held_out": 0.25}
  )
  path = tmp_path / "own.py"
  path.write_text(f"def get_config():\n  return {values!r}\n")
  return path


def test_data_are_looked_at_before_training(pictures, tmp_path, capsys):
  path = tiny_file(tmp_path, pictures)
  assert cli.main(["data", "inspect", f"--config={path}"]) == 0
  said = capsys.readouterr().out
  assert "train: 15 images" in said and "test: 5 images" in said and "05.png" in said and "no labels" in said
  assert cli.main(["data", "inspect", f"--config={path}", "--config.data.held_out=0", "--config.data.test=gone"]) == 0
  assert "test: cannot be opened" in capsys.readouterr().out


def test_mean_and_deviation_are_those_of_the_pixels(tmp_path):
  pixels = [np.random.default_rng(i).integers(0, 256, (8 + i, 9, 3), np.uint8) for i in range(5)]
  for i, image in enumerate(pixels):
    Image.fromarray(image).save(tmp_path / f"{i}.png")
  found = look.stats(open_images(folder(tmp_path, canvas_px=32), "train"), 100)
  whole = np.concatenate([image.reshape(-1, 3) for image in pixels]) / 255
  np.testing.assert_allclose(found["mean"], whole.mean(0), atol=1e-4)
  np.testing.assert_allclose(found["std"], whole.std(0), atol=1e-4)
  printed = look.render({"action": "stats"} | found)
  assert printed.startswith('"--config.data.mean=(') and ',)" "--config.data.std=(' in printed


# ---------------------------------------------------------------- written as ArrayRecord


def test_a_folder_is_written_as_array_records_and_read_back(pictures, tmp_path):
  typed = {"data.source": "folder", "data.root": str(pictures), "data.train": ".", "data.held_out": "0.25"}
  typed |= {"data.canvas_px": "16"}
  out = tmp_path / "records"
  result = look.run("write", "lejepa_imagenette", out=str(out), per_file=6, overrides=typed)
  assert result["splits"] == {"train": 15, "test": 5} and len(list(out.glob("train-*.array_record"))) == 3
  assert "--config.data.train='train-*.array_record'" in look.render(result)
  before = open_images(folder(pictures, held_out=0.25), "train")
  data = {"source": "array_record", "root": str(out), "train": "train-*.array_record", "test": "test-*.array_record"}
  after = open_images(DataConfig(canvas_px=16, **data), "train")
  rows = np.arange(15)
  for name in ("canvas", "height", "width", "index"):
    np.testing.assert_array_equal(before.read(rows)[name], after.read(rows)[name])
  with pytest.raises(ValueError, match="holds files, and none is overwritten"):
    look.run("write", "lejepa_imagenette", out=str(out), overrides=typed)


@pytest.mark.parametrize(("action", "out"), [("write", ""), ("stats", "somewhere")])
def test_only_write_has_a_folder_to_write_to(action, out):
  with pytest.raises(ValueError, match="--out names the folder that `data write`"):
    look.run(action, "lejepa_digits", out=out)
