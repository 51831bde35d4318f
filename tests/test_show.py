"""`show predictions`: retrieval against brute force and an oracle, the ranks' conventions, the picture, the errors."""

import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import abstract_batch, image_columns
from jepa_jax.show import predictions
from jepa_jax.train import train
from tests.tiny import tiny_config, tiny_experiment

NUM, GRID, WIDTH, SIDE = 3, (4, 4), 8, 2
IJEPA = {
  "name": "ijepa",
  "views": {"global_crops": {"num": 1, "size_px": 16, "scale": (0.3, 1.0)}},
  "masks": {"kind": "uniform", "num_targets": 2},
  "predictor": {"width": 16, "depth": 1},
}
SETTINGS = {
  "total": "2steps",
  "encoder": {"name": "vit", "image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2}
  | {"pos_embed": "sincos", "probe_layers": 1},
  "objective": IJEPA,
}


def world(num_gallery=5, seed=0):
  """Returns features and pixels of images whose masks are two blocks, one padded, and a gallery in two parts."""
  rng = np.random.default_rng(seed)
  features = lambda n: rng.standard_normal((n, 16, WIDTH), np.float32)
  pixels = lambda n: rng.uniform(size=(n, 16, SIDE, SIDE, 3)).astype(np.float32)
  seen = {
    "pixels_BxNxSxSxC": pixels(NUM),
    "context_BxK": np.tile([0, 3, 15], (NUM, 1)),
    "targets_BxMxT": np.tile([[5, 6, 9], [10, 11, 11]], (NUM, 1, 1)),
    "valid_BxMxT": np.tile([[True, True, True], [True, True, False]], (NUM, 1, 1)),
    "target_BxNxD": features(NUM),
    "prediction_BxMxTxD": rng.standard_normal((NUM, 2, 3, WIDTH), np.float32),
  }
  whole = {"target_BxNxD": features(num_gallery), "pixels_BxNxSxSxC": pixels(num_gallery), "real_B": np.ones(5, bool)}
  whole["real_B"][3] = False  # a row that is no image
  return seen, whole


def in_parts(whole):
  return [{name: x[part] for name, x in whole.items()} for part in (slice(0, 2), slice(2, 4), slice(4, 5))]


def true_targets(seen):
  return np.stack([x[places] for x, places in zip(seen["target_BxNxD"], seen["targets_BxMxT"])])


def test_retrieval_is_that_of_brute_force_whatever_the_parts():
  seen, whole = world()
  found = predictions.retrieve(seen, in_parts(whole))
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  query, truth = unit(seen["prediction_BxMxTxD"][seen["valid_BxMxT"]]), unit(true_targets(seen)[seen["valid_BxMxT"]])
  real = whole["real_B"]
  gallery = unit(whole["target_BxNxD"][real].reshape(-1, WIDTH))
  pixels = whole["pixels_BxNxSxSxC"][real].reshape(-1, SIDE, SIDE, 3)
  place = np.tile(np.arange(16), real.sum())
  own = (query * truth).sum(-1)
  above = query @ gallery.T > own[:, None]
  np.testing.assert_array_equal(found["place_Q"], np.tile([5, 6, 9, 10, 11], NUM))
  np.testing.assert_allclose(found["own_Q"], own, atol=1e-6)
  np.testing.assert_allclose(found["mean_Q"], (query @ gallery.T).mean(1), atol=1e-6)
  np.testing.assert_array_equal(found["rank_Q"], 1 + above.sum(1))
  np.testing.assert_array_equal(found["rank_here_Q"], 1 + (above & (place == found["place_Q"][:, None])).sum(1))
  np.testing.assert_array_equal(found["pixels_QxSxSxC"], pixels[(query @ gallery.T).argmax(1)])
  np.testing.assert_array_equal(found["true_pixels_QxSxSxC"], pixels[(truth @ gallery.T).argmax(1)])


def test_a_perfect_predictor_has_the_true_patch_first():
  seen, whole = world()
  found = predictions.retrieve(seen | {"prediction_BxMxTxD": 3 * true_targets(seen)}, in_parts(whole))
  assert (found["rank_Q"] == 1).all() and (found["rank_here_Q"] == 1).all()
  np.testing.assert_allclose(found["own_Q"], 1, rtol=1e-6)
  np.testing.assert_array_equal(found["pixels_QxSxSxC"], found["true_pixels_QxSxSxC"])
  numbers = predictions.rank_numbers(found["rank_Q"], 4 * 16 + 1)
  assert numbers["median_rank"] == 1 and numbers["top1"] == numbers["top10"] == 100


def test_collapsed_features_rank_as_by_chance():
  """All features are equal, so every gallery patch ties with the true one: half of them count as nearer."""
  seen, whole = world()
  ones = {name: np.ones_like(seen[name]) for name in ("target_BxNxD", "prediction_BxMxTxD")}
  found = predictions.retrieve(seen | ones, in_parts(whole | {"target_BxNxD": np.ones_like(whole["target_BxNxD"])}))
  numbers = predictions.rank_numbers(found["rank_Q"], 4 * 16 + 1)
  assert numbers["median_rank"] == numbers["median_rank_chance"] == 33
  assert numbers["top1"] == numbers["top10"] == 0


def test_chance_of_ranks():
  numbers = predictions.rank_numbers(np.arange(1, 101), 100)
  for name in ("median_rank", "top1", "top10"):
    assert numbers[name] == pytest.approx(numbers[f"{name}_chance"])
  assert predictions.rank_numbers(np.ones(1), 3)["top10_chance"] == 100


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_cut_as_the_encoder_cuts_them_and_put_together_again(channels):
  images = np.random.default_rng(0).uniform(size=(2, 6, 9, channels))
  patches = predictions.to_patches(images, 3)
  assert patches.shape == (2, 6, 3, 3, channels)
  np.testing.assert_array_equal(patches[1, 4], images[1, 3:6, 3:6])  # second row, second column
  np.testing.assert_array_equal(predictions.from_patches(patches[1], (2, 3)), np.broadcast_to(images[1], (6, 9, 3)))


def test_colors_are_the_first_components():
  """Features with three directions of falling variance: red follows the first, from dark to bright or back."""
  z = np.random.default_rng(0).standard_normal((500, 3)) * (9, 3, 1)
  colors = predictions.fit_colors(z @ np.linalg.qr(np.random.default_rng(1).standard_normal((8, 3)))[0].T)
  x = colors(z @ np.linalg.qr(np.random.default_rng(1).standard_normal((8, 3)))[0].T)
  assert x.min() == 0 and x.max() == 1
  for i in range(3):
    assert abs(np.corrcoef(x[:, i], z[:, i])[0, 1]) > 0.95


def test_measured_images_and_gallery_are_disjoint():
  seen, gallery = predictions.choose(num_test=100, images=4, gallery=512, seed=0)
  assert len(seen) == 50 and len(gallery) == 50 and set(seen) | set(gallery) == set(range(100))
  seen, gallery = predictions.choose(num_test=1000, images=4, gallery=512, seed=1)
  assert len(seen) == 64 and len(gallery) == 512 and not set(seen) & set(gallery)
  for images, size, message in ((100, 5, "leave none"), (0, 5, "at least 1"), (4, 0, "at least 1")):
    with pytest.raises(ValueError, match=message):
      predictions.choose(num_test=100, images=images, gallery=size, seed=0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ijepa")
  train(tiny_config(**SETTINGS), folder)
  return folder


@pytest.mark.slow
def test_a_trained_run_is_drawn_a_row_per_image(workdir, tmp_path):
  result = predictions.run(workdir, images=2, gallery=20, out=tmp_path / "new" / "picture.png")
  assert result["step"] == 2 and result["images"] == 64 and result["gallery_images"] == 20
  assert result["all_places"]["median_rank_chance"] == (20 * 16 + 2) / 2 and -1 <= result["cosine"] <= 1
  assert result["same_place"]["median_rank_chance"] == 11
  json.dumps(result)
  height = round(predictions.DPI * (2 * predictions.CELL_IN + predictions.TITLE_IN))
  with Image.open(tmp_path / "new" / "picture.png") as picture:
    assert picture.size == (round(predictions.DPI * 6 * predictions.CELL_IN), height)


def test_cells_show_context_retrieved_patches_and_grey():
  seen, whole = world()
  found = predictions.retrieve(seen, in_parts(whole))
  rows = predictions._rows(seen, found, GRID)
  assert len(rows) == NUM and all(len(cells) == len(predictions.COLUMNS) for cells in rows)
  image, context, nearest, _, _, color = rows[1]
  patch = lambda picture, n: picture[n // 4 * SIDE : n // 4 * SIDE + SIDE, n % 4 * SIDE : n % 4 * SIDE + SIDE]
  np.testing.assert_array_equal(patch(image, 7), seen["pixels_BxNxSxSxC"][1, 7])
  np.testing.assert_array_equal(patch(context, 3), patch(image, 3))
  assert (patch(context, 5) == predictions.GREY).all()
  np.testing.assert_array_equal(patch(nearest, 6), found["pixels_QxSxSxC"][5 + 1])  # image 1, its second patch
  assert (color[0, 0] == predictions.GREY).all() and (color[1, 1] != predictions.GREY).any()


def test_no_predictor_and_unread_overrides_are_said_before_anything_is_drawn(tmp_path, monkeypatch):
  experiment = types.SimpleNamespace(objective=object(), cfg=tiny_config())
  run = types.SimpleNamespace(workdir=tmp_path, step=1, experiment=lambda: experiment)
  monkeypatch.setattr(predictions, "open_run", lambda where, step: run)
  with pytest.raises(ValueError, match="'lejepa', which predicts no patches"):
    predictions.run(tmp_path)
  with pytest.raises(ValueError, match=r"only data\.\* and evals\.\*"):
    predictions.run(tmp_path, overrides={"optim.lr": "1"})


@pytest.mark.parametrize("changes", [{"one_pass": True}, {"target": "online", "target_norm": False}], ids=str)
def test_one_pass_and_an_online_target_are_described_alike(changes):
  """Shapes only: nothing is compiled."""
  run = tiny_experiment(**SETTINGS | {"objective": IJEPA | changes})
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
  describe_fn, batch = (
    predictions.make_describe_fn(run.objective, run.cfg),
    abstract_batch(image_columns(run.cfg.data), 8),
  )
  described = jax.eval_shape(describe_fn, run.abstract_state.networks, batch, keys)
  batch, num_blocks, num_slots, width = described["prediction_BxMxTxD"].shape
  assert (batch, width) == (8, 16) and described["target_BxNxD"].shape == (8, 16, 16)
  assert described["valid_BxMxT"].shape == (8, num_blocks, num_slots) and (num_blocks == 1) == ("one_pass" in changes)
