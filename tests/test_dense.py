"""Dense evaluation: windows, pixels that count, floors and the ceiling, one matrix of all images, heads that learn.

The oracles are worked by hand or follow from the definitions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.data import VOID
from jepa_jax.evals import dense_retrieval
from jepa_jax.evals.confusion import confusion, scores
from jepa_jax.evals.dense_fit import apply_head, cross_entropy, init_head, train_head
from jepa_jax.evals.dense_retrieval import neighbours_say, padded, rare_first
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
