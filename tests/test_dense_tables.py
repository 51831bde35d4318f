"""Dense evaluation from a checkpoint: floors, ceiling and heads in one table; any mesh alike; what is refused."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import DataConfig, LabelMapConfig, open_images
from jepa_jax.evals import dense_floors
from jepa_jax.evals.dense import DenseSettings, tokens_fn
from jepa_jax.evals.dense_fit import DenseModel, fit_dense
from jepa_jax.evals.dense_retrieval import DenseRetrieval
from jepa_jax.evaluate import evaluate
from jepa_jax.models import ViTConfig
from jepa_jax.models.transformer import standardise
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.show import segmentation as show
from jepa_jax.views import (
  Pixels,
  Windows,
  image_windows,
)
from jepa_jax.weights.convert import flatten, unflatten, unstack
from tests.test_evaluate_networks import save
from tests.test_tuning import IJEPA
from tests.test_weights_parity import our_layers
from tests.tiny import MLP, VIT, tiny_experiment

# ---------------------------------------------------------------- the whole


def write_set(root, num=24, size_hw=(16, 24)):
  """Pictures of blocks whose brightness is their class, but for a quarter that is void; standing ones among them."""
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for folder in ("images", "masks"):
      (root / folder / split).mkdir(parents=True)
    for i in range(num):
      height, width = size_hw if i % 3 else size_hw[::-1]
      label = rng.integers(0, 3, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
      image = np.clip(40 + 80.0 * label + 10 * rng.standard_normal(label.shape), 0, 255).astype(np.uint8)
      label[:4, :4] = 255
      Image.fromarray(image).save(root / "images" / split / f"{'odd' if i % 2 else 'even'}{i}.png")
      Image.fromarray(label).save(root / "masks" / split / f"{'odd' if i % 2 else 'even'}{i}.png")


OVERRIDES = {
  "data.source": "segmentation",
  "data.train": "train",
  "data.test": "val",
  "data.max_train": "0",
  "data.max_aspect": "1.5",
  "data.label_maps.set": "own",
  "data.label_maps.classes": "('dark','grey','bright')",
  "evals.dense.steps": "60",
  "evals.dense.selection_steps": "20",
  "evals.dense.learning_rates": "(1e-2,3e-2)",
  "evals.dense.subset": "odd",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  write_set(folder := tmp_path_factory.mktemp("set"))
  return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  encoder = VIT | {"patch_size": 4, "pos_embed": "sincos", "init": "fan_in"}
  run = tiny_experiment(objective=IJEPA, encoder=encoder)
  return save(tmp_path_factory.mktemp("ijepa"), run, run.init())


@pytest.fixture(scope="module")
def table(root, workdir):
  asked = OVERRIDES | {"data.root": str(root)}
  return evaluate(workdir, overrides=asked, names=("segmentation", "dense_retrieval"), show=False)


def test_frozen_patches_tell_classes_apart_and_floors_do_not(table):
  rows, this = table.rows, table.this
  floors = [rows[name]["mIoU"] for name in (dense_floors.ONE_CLASS, dense_floors.POSITIONS)]
  ceiling = rows["true labels per patch of 4 x 4 px"]["mIoU"]
  assert 5 < floors[0] < 25 and floors[0] <= floors[1] < 45 and ceiling > 99
  for column in ("mIoU", "retrieval mIoU"):
    assert floors[1] + 10 < rows[this][column] <= 100, column
    assert rows[this][f"{column}, odd"] != rows[this][column]
  assert rows["random encoder"]["mIoU"] > floors[1] and "raw pixels" not in rows


def test_predictors_and_a_tuned_encoder_stand_beside_one_another(root, workdir):
  asked = OVERRIDES | {"data.root": str(root), "evals.dense.learning_rates": "(3e-2,)", "evals.dense.steps": "30"}
  found = evaluate(workdir, None, asked, ("dense_predictor",), baselines=False, show=False)
  variants = [f"mIoU, {name}" for name in ("tuned encoder", "random predictor", "predictor")]
  assert set(found.row) == {*variants, *(f"{name}, odd" for name in variants)}
  assert all(15 < found.row[name] <= 100 for name in variants)


def test_what_was_found_is_said_by_class(table):
  detail = table.details[table.this]["mIoU"]
  assert set(detail["iou"]) == {"dark", "grey", "bright"} and detail["learning_rate"] in (1e-2, 3e-2)
  assert len(detail["held_out"]) == 2 and detail["pixel_accuracy"] >= detail["class_accuracy"] - 20


def test_the_picture_is_of_the_head_in_the_table_and_its_pixels_add_up(root, workdir, table, tmp_path):
  asked = OVERRIDES | {"data.root": str(root)}
  found = show.run(workdir, images=24, out=tmp_path / "maps.png", overrides=asked)
  assert found["mean_iou"] == pytest.approx(table.row["mIoU"], rel=1e-3)
  num = {path.name: (np.asarray(Image.open(path)) != 255).sum() for path in (root / "masks" / "val").glob("*.png")}
  weights = [num[name.split("/")[-1]] for name in found["right"]]
  whole = np.average(list(found["right"].values()), weights=weights)
  assert whole == pytest.approx(table.details[table.this]["mIoU"]["pixel_accuracy"], abs=0.02)
  assert min(found["right_by_patch"].values()) > 99  # blocks of 8 px, patches of 4
  assert Image.open(found["picture"]).size[1] > 24 * 100


def test_a_picture_of_what_is_not_there_is_refused(root, workdir, tmp_path):
  with pytest.raises(ValueError, match="images=25 of 24 test images: ask for 1 to 24"):
    show.run(workdir, images=25, overrides=OVERRIDES | {"data.root": str(root)})
  with pytest.raises(ValueError, match="have no label maps: set data.label_maps.set"):
    show.run(workdir)
  (tmp_path / "file").touch()
  for out, message in ((tmp_path / "file" / "x.png", "file cannot be made"), ("x.txt", "ends in .png")):
    with pytest.raises(ValueError, match=message):
      show.run(workdir, out=out, overrides=OVERRIDES | {"data.root": str(root)})


def test_colours_of_classes_differ_and_void_is_black():
  assert not show.colored(np.array([[0, 255]]), show.palette(11))[0, 1].any()  # void is black, no class is
  assert show.palette(150).max(-1).min() > 0.3 and len(np.unique(show.palette(150).round(3), axis=0)) == 150
  assert show.right(np.full((2, 2), 255), np.zeros((2, 2))) is None


def test_a_head_learns_from_drawn_crops_too(root, workdir):
  asked = OVERRIDES | {"data.root": str(root), "evals.dense.augment": "True", "evals.dense.learning_rates": "(3e-2,)"}
  found = evaluate(workdir, None, asked, ("segmentation",), baselines=False, show=False)
  assert found.row["mIoU"] > 40


def plain_subject(root, mesh, grids=None):
  """A row of the table with made-up features of patches: their brightness and noise."""
  maps = LabelMapConfig("own", classes=("dark", "grey", "bright"))
  shared = {"source": "segmentation", "root": str(root), "train": "train", "test": "val", "channels": 1}
  cfg = DataConfig(canvas_px=16, max_aspect=1.5, mean=(0.5,), std=(0.5,), label_maps=maps, **shared)
  train, test = open_images(cfg, "train"), open_images(cfg, "test")
  data = types.SimpleNamespace(train=train, test=test, canvas_px=16, encoder_px=16, view_hw=(16, 16))
  objective = types.SimpleNamespace(pixels=Pixels((0.5,), (0.5,)), interpolation="bilinear", encoder=None)
  settings = types.SimpleNamespace(seed=0, batch_size=64)
  return types.SimpleNamespace(row="made up", mesh=mesh, data=data, objective=objective, settings=settings)


def test_one_device_and_eight_find_the_same(root):
  """Features are the mean brightness of patches, exactly: what is left is how pixels are counted and heads trained."""
  of = Windows(16, (16, 16), 8, 1.5)
  settings = DenseSettings(batch_size=8, steps=6, learning_rates=(1e-2,), dropout=0.5, subset="odd")
  found = []
  for num in (1, 8):
    subject = plain_subject(root, make_mesh(MeshConfig(data=num), jax.devices()[:num]))
    grids = {}
    for split in ("train", "test"):
      images = getattr(subject.data, split)
      views = image_windows(images.read(np.arange(len(images))), of, subject.objective.pixels)
      means = views.reshape(len(images), of.num, 4, 4, 4, 4).mean((3, 5))
      grids[split] = np.asarray(jnp.stack([means, means**2], -1))
    rows = {split: np.arange(len(grid)) for split, grid in grids.items()}
    found.append(fit_dense(subject, settings, of, DenseModel(grids), rows).found)
  for name in ("", "odd"):
    np.testing.assert_allclose(found[0][name]["iou"], found[1][name]["iou"], atol=0.3)


def test_void_is_no_neighbour(root):
  subject = plain_subject(root, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
  of = Windows(16, (16, 16), 16, 1.5)
  grids = np.ones((24, of.num, 4, 4, 2), np.float32)
  keys, shares = DenseRetrieval(k=3).remembered(subject, of, grids, np.arange(24))
  # Every image has two windows that meet, of which the first has one patch of void in a corner.
  assert len(keys) == 24 * (2 * 16 - 1) and np.allclose(shares.sum(-1), 1)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"window": (8,)}, "height, width"),
    ({"subset": "("}, "no regular expression"),
    ({"learning_rates": ()}, "at least one"),
    ({"dropout": 1.0}, "drops nothing"),
    ({"steps": 0}, "1 or more"),
    ({"stride": -1}, "0 .chosen for you. or more"),
  ],
)
def test_settings_that_cannot_be_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    DenseSettings(**settings)


@pytest.mark.parametrize(
  ("changes", "names", "message"),
  [
    ({"evals.dense.window": "(10,10)"}, ("segmentation",), r"no whole number of patches of 4: .* 8 or 12"),
    ({"evals.dense.window": "(32,32)"}, ("segmentation",), "does not lie within images of 16 px"),
    ({"evals.dense.subset": "nobody"}, ("segmentation",), "finds none of the names"),
    ({"evals.dense.augment": "True", "evals.dense.window": "(12,16)"}, ("segmentation",), "draws square crops"),
    ({"evals.dense_retrieval.k": "100000"}, ("dense_retrieval",), "neighbours of .* patches in memory"),
    ({"evals.dense.window": "(16,24)"}, ("segmentation",), r"do not reach all of images/val/\w+.png"),
  ],
)
def test_what_cannot_be_evaluated_is_refused(changes, names, message, root, workdir):
  with pytest.raises(ValueError, match=message):
    evaluate(
      workdir, overrides=OVERRIDES | {"data.root": str(root)} | changes, names=names, baselines=False, show=False
    )


def test_protocols_need_label_maps_positions_and_a_predictor(root, tmp_path):
  asked = OVERRIDES | {"data.root": str(root)}
  lejepa = save(tmp_path / "a", run := tiny_experiment(), run.init())
  with pytest.raises(ValueError, match="needs label_map"):
    evaluate(lejepa, names=("segmentation",), show=False)
  with pytest.raises(ValueError, match="needs a predictor"):
    evaluate(lejepa, None, asked, ("dense_predictor",), show=False)
  mlp = save(tmp_path / "b", run := tiny_experiment(encoder=MLP, objective__views__local_crops__num=0), run.init())
  with pytest.raises(ValueError, match="says nothing of positions"):
    evaluate(mlp, None, asked, ("segmentation",), show=False)


def stripes(root, values=(0, 1), num=10, size_hw=(16, 16)):
  """A set of left and right halves, black and white."""
  for split in ("train", "val"):
    for name in ("images", "masks"):
      (root / name / split).mkdir(parents=True, exist_ok=True)
    for i in range(num):
      label = np.arange(size_hw[1]) >= size_hw[1] // 2
      label = np.broadcast_to(label, size_hw)
      Image.fromarray((200 * label).astype(np.uint8)).save(root / "images" / split / f"{i}.png")
      Image.fromarray(np.asarray(values, np.uint8)[label.astype(int)]).save(root / "masks" / split / f"{i}.png")
  return OVERRIDES | {"data.root": str(root), "data.label_maps.classes": "('left','right')", "evals.dense.subset": ""}


def evaluated(workdir, asked, *names):
  return evaluate(workdir, None, asked, names or ("segmentation",), baselines=False, show=False)


def test_masks_of_0_and_255_are_one_class_and_void_and_that_is_said(tmp_path, workdir):
  with pytest.raises(ValueError, match="only 'left' is in the label maps .* store 0 and 1, not 0 and 255"):
    evaluated(workdir, stripes(tmp_path, (0, 255)))


def test_a_class_that_no_training_image_shows_is_warned_of(tmp_path, workdir, caplog):
  asked = stripes(tmp_path) | {"data.label_maps.classes": "('left','right','nobody')"}
  evaluated(workdir, asked | {"evals.dense.learning_rates": "(1e-2,)", "evals.dense.steps": "2"})
  assert "No training image shows nobody" in caplog.text


def test_an_encoder_that_has_diverged_is_not_scored(tmp_path):
  run = tiny_experiment()
  broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, run.init())
  workdir = save(tmp_path / "run", run, broken)
  with pytest.raises(ValueError, match="features have a NaN .* the encoder has diverged"):
    evaluated(workdir, stripes(tmp_path))


def test_rows_of_features_are_those_of_their_images_when_a_broken_one_is_mended(tmp_path, workdir):
  asked = stripes(tmp_path) | {"evals.dense.learning_rates": "(1e-2,)", "evals.dense.steps": "2"}
  path = tmp_path / "images" / "train" / "4.png"
  whole = path.read_bytes()
  path.write_bytes(whole[:20] + b"x" * (len(whole) - 20))  # as long as before: nobody notices
  evaluated(workdir, asked)
  path.write_bytes(whole)
  assert 0 <= evaluated(workdir, asked | {"evals.dense.steps": "3"}).row["mIoU"] <= 100
  path.write_bytes(whole[:20] + b"x" * (len(whole) - 20))
  assert 0 <= evaluated(workdir, asked | {"evals.dense.steps": "4"}).row["mIoU"] <= 100


@pytest.mark.parametrize(
  ("changes", "names", "message"),
  [
    ({"evals.dense.batch_size": "4"}, ("segmentation",), "batch_size=4 is less than the 8 devices"),
    ({}, ("segmentation",), "3 training images are fewer than the 8 devices"),
    ({"data.max_aspect": "0"}, ("segmentation",), "max_aspect=0 scales the longer side"),
    (
      {"evals.dense_retrieval.memory": "3", "evals.dense_retrieval.k": "2"},
      ("dense_retrieval",),
      "fewer than 4 training",
    ),
    ({"evals.memory_gb": "1e-6"}, ("dense_retrieval",), r"may take .* set evals.dense_retrieval.memory=\d+ or less"),
  ],
)
def test_what_is_too_small_or_too_large_is_refused_before_anything_is_made(changes, names, message, tmp_path, workdir):
  made = lambda: {path.name for path in (workdir / "features").glob("*")}
  before = made()
  with pytest.raises(ValueError, match=message):
    evaluated(workdir, stripes(tmp_path, num=4) | changes, *names)
  assert made() == before


def test_small_images_are_not_cut_and_one_that_is_too_long_is_named(tmp_path, workdir):
  asked = stripes(tmp_path, size_hw=(10, 15)) | {"data.max_aspect": "1"}
  with pytest.raises(ValueError, match=r"do not reach all of images/\w+/0.png: .*smaller than the canvas are not cut"):
    evaluated(workdir, asked)


def test_memory_smaller_than_its_neighbours_is_refused():
  with pytest.raises(ValueError, match="cannot give k=30"):
    DenseRetrieval(memory=10)


# ---------------------------------------------------------------- several layers


@pytest.mark.parametrize("scan", [True, False])
def test_last4_are_the_last_four_blocks_in_a_row_each_through_the_final_norm(scan):
  """Against the blocks' outputs themselves, looked at one by one."""
  cfg = ViTConfig(
    image_size=16, patch_size=4, width=16, depth=5, num_heads=2, cls_token=True, num_registers=2, scan=scan
  )
  images = np.random.default_rng(0).standard_normal((2, 16, 24, 3)).astype(np.float32)
  module, alone = cfg.make(3), dataclasses.replace(cfg, scan=False)
  rng = np.random.default_rng(1)
  noisy = lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32)
  params = jax.tree.map(noisy, module.init(jax.random.key(0), images)["params"])
  flat = flatten(params)
  blocks, _ = our_layers(alone, unflatten(unstack(flat) if scan else flat), images)
  norm = lambda x: standardise(jnp.asarray(x)) * params["norm"]["scale"] + params["norm"]["bias"]
  wanted = np.concatenate([norm(x[0])[:, 3:] for x in blocks[1:5]], axis=-1)
  own = types.SimpleNamespace(
    objective=types.SimpleNamespace(encoder=module),
    apply_fn=lambda: module.apply,
    settings=types.SimpleNamespace(dense=DenseSettings(layers="last4")),
  )
  found = tokens_fn(own)({"params": params}, images)
  assert found.shape == (2, 24, 64)
  np.testing.assert_allclose(found, wanted, atol=2e-5)
  own.settings.dense = DenseSettings()
  np.testing.assert_allclose(tokens_fn(own)({"params": params}, images), found[..., 48:], atol=1e-5)


def test_last4_in_a_table_and_where_there_are_fewer(root, tmp_path):
  asked = OVERRIDES | {"data.root": str(root), "evals.dense.layers": "last4"}
  for depth in (4, 2):
    encoder = VIT | {"patch_size": 4, "pos_embed": "sincos", "init": "fan_in", "depth": depth}
    run = tiny_experiment(encoder=encoder)
    workdir = save(tmp_path / f"{depth}", run, run.init())
    if depth == 2:
      with pytest.raises(ValueError, match="joins the last 4 blocks of a ViT, and this encoder has 2"):
        evaluate(workdir, overrides=asked, names=("segmentation",), show=False)
    else:
      found = evaluate(workdir, overrides=asked, names=("segmentation",), baselines=False, show=False)
      assert found.row["mIoU"] > 60
