"""Dense evaluation: windows, pixels that count, floors and the ceiling, one matrix of all images, heads that learn.

The oracles are worked by hand or follow from the definitions.
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import VOID, DataConfig, LabelMapConfig, open_images
from jepa_jax.evals import dense, dense_retrieval
from jepa_jax.evals.confusion import confusion, scores
from jepa_jax.evals.dense import DenseSettings
from jepa_jax.evals.dense_fit import DenseModel, apply_head, cross_entropy, fit_dense, init_head, train_head
from jepa_jax.evals.dense_retrieval import DenseRetrieval, neighbours_say, padded, rare_first
from jepa_jax.evaluate import evaluate
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.views import (
  CropSettings,
  Pixels,
  Windows,
  crop_with_labels,
  enlarged,
  image_windows,
  label_windows,
  on_pixels,
  sample_crop,
)
from jepa_jax.views.windows import between, window_boxes
from tests.test_evaluate_networks import save
from tests.test_tuning import IJEPA
from tests.tiny import MLP, VIT, tiny_experiment

PLAIN = Pixels((0.0,), (1.0,))
LABEL = np.array([[0, 0, 1, 1], [2, 2, 1, VOID], [2, VOID, 0, 0]], np.uint8)
GUESS = np.array([[0, 1, 1, 1], [2, 2, 0, 3], [2, 2, 0, 0]])


# ---------------------------------------------------------------- what is counted


def test_one_matrix_then_the_mean_over_classes_that_are_anywhere():
  matrix = np.asarray(confusion(jnp.asarray(LABEL), jnp.asarray(GUESS), 4))
  assert matrix.tolist() == [[3, 1, 0, 0], [1, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]
  found = scores(matrix)
  np.testing.assert_allclose(found["iou"], [60, 50, 100, np.nan])
  assert found["miou"] == pytest.approx(70) and found["pixel_accuracy"] == pytest.approx(80)
  assert found["class_accuracy"] == pytest.approx(80.55556)


def test_a_class_that_was_said_and_is_nowhere_counts_zero():
  matrix = np.array([[2, 0, 1], [0, 3, 0], [0, 0, 0]])
  np.testing.assert_allclose(scores(matrix)["iou"], [200 / 3, 100, 0])


def test_renaming_classes_permutes_their_iou():
  rng = np.random.default_rng(0)
  label, guess, order = rng.integers(0, 5, 400), rng.integers(0, 5, 400), rng.permutation(5)
  one, other = (scores(confusion(a, b, 5)) for a, b in ((label, guess), (order[label], order[guess])))
  np.testing.assert_allclose(other["iou"][order], one["iou"])
  assert other["miou"] == pytest.approx(one["miou"])


def test_void_alone_is_refused():
  with pytest.raises(ValueError, match="all are void"):
    scores(confusion(jnp.full(9, VOID), jnp.zeros(9, int), 3))


# ---------------------------------------------------------------- windows


def boxes(height, width, **settings):
  of = Windows(**{"short_px": 8, "size_hw": (4, 4), "stride": 3, "aspect": 2.0} | settings)
  found = window_boxes(jnp.asarray(height), jnp.asarray(width), of)
  return [np.asarray(x)[np.asarray(found.valid)].tolist() for x in found[:4]], of


def test_windows_end_flush_with_the_image():
  """y = min(i * stride, H - crop), as is usual: 8 px by 4 with a stride of 3 are 0, 3, 4."""
  (top, left, height, width), of = boxes(8, 10)
  assert sorted(set(top)) == [0, 3, 4] and sorted(set(left)) == [0, 3, 6] and of.num == 15
  assert len(top) == 9 and set(height) == set(width) == {4}
  (top, left, *_), _ = boxes(10, 8)  # standing
  assert sorted(set(top)) == [0, 3, 6] and sorted(set(left)) == [0, 3, 4]
  (top, _, height, _), _ = boxes(4, 4)  # smaller than it is looked at: windows of two pixels
  assert set(height) == {2} and max(top) == 2


def test_a_window_of_the_whole_image_is_one():
  (top, left, height, width), of = boxes(240, 320, short_px=240, size_hw=(240, 320), stride=160, aspect=4 / 3)
  assert of.num == 1 and (top, left, height, width) == ([0], [0], [240], [320])


def canvas(height, width, side=16, seed=0):
  rng = np.random.default_rng(seed)
  image, label = np.zeros((side, side, 1), np.uint8), np.full((side, side), VOID, np.uint8)
  image[:height, :width] = rng.integers(0, 256, (height, width, 1))
  label[:height, :width] = rng.integers(0, 5, (height, width))
  sizes = {"height": np.array([height], np.int32), "width": np.array([width], np.int32)}
  return {"canvas": image[None], "label_map": label[None]} | sizes


def test_windows_show_the_image_and_its_classes_as_they_are_where_nothing_is_scaled():
  batch, of = canvas(8, 12), Windows(8, (4, 4), 4, 2.0)
  images, labels = image_windows(batch, of, PLAIN), np.asarray(label_windows(batch, of))
  found = window_boxes(batch["height"][0], batch["width"][0], of)
  for v in range(of.num):
    y, x = int(found.top[v]), int(found.left[v])
    np.testing.assert_allclose(images[0, v] * 255, batch["canvas"][0, y : y + 4, x : x + 4], atol=0.26)
    expected = batch["label_map"][0, y : y + 4, x : x + 4]
    np.testing.assert_array_equal(labels[0, v], expected if found.valid[v] else np.full((4, 4), VOID))
  assert not found.valid.all()  # 12 px are three windows, and there is room for four


def test_between_is_bilinear_with_half_pixel_centres():
  weights, inside = between(jnp.arange(7) + 0.5, 0.0, 7.0, 3)
  np.testing.assert_allclose(weights @ jnp.array([0.0, 1, 4]), [0, 1 / 7, 4 / 7, 1, 16 / 7, 25 / 7, 4], rtol=1e-5)
  assert inside.all()


def test_windows_go_back_to_pixels_and_agree_where_they_overlap():
  """What each window says is a line over the image: so says their mean, on every pixel, and nothing is left out."""
  of, side = Windows(8, (4, 4), 2, 2.0), 16
  found = window_boxes(jnp.asarray(8), jnp.asarray(14), of)
  ramp = lambda start: start[:, None] + jnp.arange(4) + 0.5
  y_VxG, x_VxH = ramp(found.top), ramp(found.left)
  grid = jnp.stack(jnp.broadcast_arrays(y_VxG[:, :, None], x_VxH[:, None, :]), -1)
  said, count = on_pixels(grid, jnp.asarray(8), jnp.asarray(14), of, side)
  y, x = np.mgrid[:8, :14] + 0.5
  np.testing.assert_allclose(said[:8, :14], np.stack([y, x], -1), atol=1e-4)
  assert (count[:8, :14] > 0).all() and not count[8:].any() and not count[:, 14:].any()


def test_an_image_that_is_scaled_twofold_keeps_its_classes():
  batch = canvas(8, 8, side=8)
  labels = np.asarray(label_windows(batch, Windows(16, (16, 16), 16, 1.0)))[0, 0]
  np.testing.assert_array_equal(labels, batch["label_map"][0].repeat(2, 0).repeat(2, 1))


def test_crops_move_an_image_and_its_classes_alike():
  """An image whose colours are its classes: cropped, flipped and scaled they still are, but where colours mix."""
  y, x = np.mgrid[:32, :32] // 8
  label = (y + x).astype(np.uint8) % 5
  batch = {"canvas": (50 * label)[None, ..., None].repeat(64, 0), "label_map": label[None].repeat(64, 0)}
  crop = CropSettings(1, 16, (0.25, 1.0))
  keys = jax.random.split(jax.random.key(0), 64)
  params = jax.vmap(lambda key: sample_crop(key, crop, 32, 32))(keys)
  images, classes = crop_with_labels(batch, params, 16, PLAIN, "bilinear")
  agree = np.abs(images[..., 0] * 255 - 50.0 * classes) < 25
  assert params.flip.any() and not params.flip.all() and agree.mean() > 0.8 and (classes != VOID).all()
  assert agree.mean((1, 2)).min() > 0.6, "one of the crops shows other classes"


# ---------------------------------------------------------------- heads


def test_void_has_no_gradient_and_the_mean_is_over_the_whole_batch():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.standard_normal((4, 1, 2, 2, 3)), jnp.float32)
  label = rng.integers(0, 3, (4, 1, 4, 4)).astype(np.uint8)
  label[0] = VOID
  label[1, 0, :2] = VOID
  gradient = jax.grad(cross_entropy)(logits, label, 1)
  assert not gradient[0].any() and gradient[2].any()
  known = label != VOID
  log_p = jax.nn.log_softmax(enlarged(logits, (4, 4)))
  picked = np.take_along_axis(np.asarray(log_p), np.where(known, label, 0)[..., None].astype(int), -1)[..., 0]
  assert cross_entropy(logits, label, 1) == pytest.approx(-picked[known].mean(), rel=1e-5)
  assert cross_entropy(logits, label, 4) == pytest.approx(float(cross_entropy(logits, label, 2)), rel=1e-6)
  assert cross_entropy(logits, np.full_like(label, VOID), 1) == 0


def test_statistics_of_a_head_are_of_all_patches_that_are_seen():
  rng = np.random.default_rng(0)
  grid = jnp.asarray(3 + 2 * rng.standard_normal((5, 2, 3, 3, 4)), jnp.float32)
  params, averages = init_head(jax.random.key(0), 4, 3)
  seen = np.ones((5, 2), bool)
  seen[1:, 1] = False
  _, moved = train_head(params, averages, grid, seen, jax.random.split(jax.random.key(1), 5), 0.0)
  values = np.concatenate([np.asarray(grid[:, 0]).reshape(-1, 4), np.asarray(grid[0, 1]).reshape(-1, 4)])
  np.testing.assert_allclose(moved["mean"], 0.1 * values.mean(0), rtol=1e-4)
  np.testing.assert_allclose(moved["var"], 0.9 + 0.1 * values.var(0), rtol=1e-4)


def test_a_channel_is_dropped_in_all_patches_of_an_image():
  grid = jnp.ones((6, 2, 3, 3, 8)) * jnp.arange(1, 7)[:, None, None, None, None]
  params, averages = init_head(jax.random.key(0), 8, 8)
  params |= {"kernel": jnp.eye(8)}
  out, _ = train_head(params, averages, grid, np.ones((6, 2), bool), jax.random.split(jax.random.key(1), 6), 0.5)
  assert (out == out[:, :1, :1, :1]).all() and len(np.unique(np.sign(np.asarray(out[:, 0, 0, 0])), axis=0)) > 1


def test_a_head_of_zeros_says_the_first_class_everywhere():
  params, averages = init_head(jax.random.key(0), 4, 3)
  params |= {"kernel": jnp.zeros((4, 3))}
  assert (apply_head(params, averages, jnp.ones((2, 4))).argmax(-1) == 0).all()


# ---------------------------------------------------------------- neighbours


def plainly(query, keys, shares, k, temperature):
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  similar = unit(query) @ unit(keys).T
  out = []
  for row in similar:
    best = np.argsort(-row)[:k]
    weight = np.exp(row[best] / temperature)
    out.append((weight / weight.sum()) @ shares[best])
  return np.array(out)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_neighbours_say_what_plain_search_says_whatever_the_chunks(chunk, monkeypatch):
  rng = np.random.default_rng(0)
  keys, shares, query = rng.standard_normal((50, 8)), rng.dirichlet(np.ones(4), 50), rng.standard_normal((3, 2, 8))
  keys /= np.linalg.norm(keys, axis=1, keepdims=True)
  monkeypatch.setattr(dense_retrieval, "_CHUNK", chunk)
  said = neighbours_say(query, *padded(keys.astype(np.float32), shares), k=5, temperature=0.1)
  np.testing.assert_allclose(said.reshape(-1, 4), plainly(query.reshape(-1, 8), keys, shares, 5, 0.1), rtol=1e-4)


def test_patches_of_rare_classes_are_remembered_first():
  shares = np.zeros((100, 2))
  shares[:, 0] = 1
  shares[[3, 50]] = [0, 1]
  first = [set(rare_first(shares, np.random.default_rng(seed))[:12]) for seed in range(20)]
  assert sum({3, 50} <= kept for kept in first) > 15
  assert len({tuple(sorted(kept)) for kept in first}) == 20, "chance has its part"


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
  names = ("segmentation", "dense_retrieval", "dense_predictor")
  return evaluate(workdir, overrides=OVERRIDES | {"data.root": str(root)}, names=names, show=False)


def test_frozen_patches_tell_classes_apart_and_floors_do_not(table):
  rows, this = table.rows, table.this
  floors = [rows[name]["mIoU"] for name in (dense.ONE_CLASS, dense.POSITIONS)]
  ceiling = rows["true labels per patch of 4 x 4 px"]["mIoU"]
  assert 5 < floors[0] < 25 and floors[0] <= floors[1] < 45 and ceiling > 99
  for column in ("mIoU", "retrieval mIoU"):
    assert floors[1] + 10 < rows[this][column] <= 100, column
    assert rows[this][f"{column}, odd"] != rows[this][column]
  assert set(rows[this]) >= {f"mIoU, {name}" for name in ("tuned encoder", "random predictor", "predictor")}
  assert rows["random encoder"]["mIoU"] > floors[1] and "mIoU, predictor" not in rows["random encoder"]
  assert "raw pixels" not in rows


def test_what_was_found_is_said_by_class(table):
  detail = table.details[table.this]["mIoU"]
  assert set(detail["iou"]) == {"dark", "grey", "bright"} and detail["learning_rate"] in (1e-2, 3e-2)
  assert len(detail["held_out"]) == 2 and detail["pixel_accuracy"] >= detail["class_accuracy"] - 20


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
  data = types.SimpleNamespace(train=train, test=test, canvas_px=16, encoder_px=16, view_px=16)
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


def test_memory_smaller_than_its_neighbours_is_refused():
  with pytest.raises(ValueError, match="cannot give k=30"):
    DenseRetrieval(memory=10)
