"""Protocols on feature sets that need not fit the memory: the same numbers as in one piece, whatever the memory."""

import dataclasses
import functools
import tracemalloc

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from jepa_jax.bench import probes
from jepa_jax.evals import blocks
from jepa_jax.evals.blocks import check_features, mean_and_deviation, ranges
from jepa_jax.evals.fewshot import FewShot, few_shot
from jepa_jax.evals.knn import Knn, knn_accuracy, knn_predictions
from jepa_jax.evals.linear import Linear, linear_probe, selection_split, steps_of
from jepa_jax.sharding import MeshConfig, make_mesh

C = 10
TINY_GB = 1e-3  # three groups of rates, a window for every step, 24 training images a block of kNN
QUICK = {"learning_rates": (3e-3, 1e-2), "min_steps": 60, "epochs": 1}


@pytest.fixture(scope="module")
def digits():
  """Pixels of the 8x8 digits: (train_x (1297, 64), train_y, test_x (500, 64), test_y, 10)."""
  pixels, labels = load_digits(return_X_y=True)
  split = train_test_split(pixels.astype(np.float32) / 16, labels, test_size=500, stratify=labels, random_state=0)
  train_x, test_x, train_y, test_y = split
  return train_x, train_y, test_x, test_y, C


def convnet_features(pixels_NxF):
  """Two random convolutions with ReLU, averaged to 2 x 2 places: (N, 256), as far from float16's grid as real ones."""
  images = pixels_NxF.reshape(-1, 1, 8, 8)
  for key, shape, stride in ((0, (32, 1, 3, 3), 1), (1, (64, 32, 3, 3), 2)):
    kernel = jax.random.normal(jax.random.key(key), shape) * (2 / np.prod(shape[1:])) ** 0.5
    images = jax.nn.relu(jax.lax.conv(images, kernel, (stride, stride), "SAME"))
  return np.asarray(images.reshape(-1, 64, 2, 2, 2, 2).mean((3, 5)).reshape(len(images), -1))


# ---------------------------------------------------------------- what small sets gave before

# Written by the code that held a whole set in float32 on one device, for the arrays of `digits`.
BEFORE = {"layernorm": (96.6, 99.69), "batchnorm": (95.8, 99.85), "standardize": (95.8, 99.85), "none": (97.0, 99.77)}
KNN_BEFORE = {1: 98.2, 5: 98.4, 20: 97.8}


@pytest.mark.parametrize("input_norm", BEFORE)
def test_the_probe_of_a_small_set_is_what_it_was(digits, input_norm):
  found = linear_probe(*digits, input_norm=input_norm)
  assert (round(found.accuracy, 2), round(found.train_accuracy, 2)) == BEFORE[input_norm]
  assert found.selected.learning_rate == (0.03 if input_norm == "none" else 0.01)


def test_knn_and_few_labels_of_a_small_set_are_what_they_were(digits):
  assert knn_accuracy(*digits, k=(1, 5, 20)) == KNN_BEFORE
  means = {n: (round(mean, 2), round(deviation, 2)) for n, (mean, deviation) in few_shot(*digits).items()}
  assert means == {1: (66.04, 4.02), 5: (85.02, 2.45), 10: (90.0, 1.04)}


# ---------------------------------------------------------------- any memory, any devices


def test_a_probe_in_windows_is_the_probe_in_one_piece(digits):
  whole, cut = (linear_probe(*digits, memory_gb=memory_gb, **QUICK) for memory_gb in (4.0, TINY_GB))
  assert (whole.accuracy, whole.train_accuracy) == (cut.accuracy, cut.train_accuracy)
  for one, other in zip(whole.sweep, cut.sweep):
    assert one.accuracy == other.accuracy and one.loss == pytest.approx(other.loss, rel=1e-5)


def test_a_probe_of_few_settings_at_a_time_is_the_probe_of_all(digits):
  """Nine rates do not fit this memory together."""
  whole, cut = (linear_probe(*digits, memory_gb=memory_gb, min_steps=60, epochs=1) for memory_gb in (4.0, TINY_GB))
  np.testing.assert_allclose([s.loss for s in whole.sweep], [s.loss for s in cut.sweep], rtol=1e-4)


def test_knn_in_blocks_is_exact_and_of_equals_takes_the_first(digits):
  train_x, train_y, test_x, _, _ = digits
  doubled = np.concatenate([train_x, train_x]), np.concatenate([train_y, (train_y + 1) % C])
  for x, y in ((train_x, train_y), doubled):
    whole, cut = (knn_predictions(x, y, test_x, C, (1, 20, 100), memory_gb=gb) for gb in (4.0, TINY_GB))
    assert all((whole[k] == cut[k]).all() for k in whole)


def test_eight_devices_give_what_one_gives(digits):
  mesh = make_mesh(MeshConfig(fsdp=2))
  assert knn_accuracy(*digits, k=(1, 20), mesh=mesh) == knn_accuracy(*digits, k=(1, 20))
  one, eight = linear_probe(*digits, **QUICK), linear_probe(*digits, mesh=mesh, **QUICK)
  assert (one.accuracy, one.train_accuracy) == (eight.accuracy, eight.train_accuracy)
  np.testing.assert_allclose([s.loss for s in one.sweep], [s.loss for s in eight.sweep], rtol=1e-4)


def test_batches_that_do_not_divide_over_the_devices_stay_whole(digits):
  options = QUICK | {"batch_size": 100, "min_steps": 40}
  one, eight = (linear_probe(*digits, mesh=mesh, **options) for mesh in (None, make_mesh(MeshConfig())))
  np.testing.assert_allclose([s.loss for s in one.sweep], [s.loss for s in eight.sweep], rtol=1e-4)


@pytest.mark.slow
def test_a_memory_mapped_set_is_never_copied(tmp_path):
  """102 MB in float32: numpy's arrays, those that JAX borrows included, stay well below at any time."""
  path, num_images, width = tmp_path / "features", 200_000, 128
  x_NxF, y_N = probes.clusters(path, num_images, width, C, seed=1)
  assert check_features("train", x_NxF).base is x_NxF or check_features("train", x_NxF) is x_NxF
  arrays = (x_NxF, y_N, x_NxF[:300], y_N[:300], C)
  options = {"max_steps": 40, "selection_images": 5000, "learning_rates": (1e-3,), "input_norm": "standardize"}
  for protocol in (knn_accuracy, functools.partial(linear_probe, **options), functools.partial(few_shot, num_draws=1)):
    tracemalloc.start()
    protocol(*arrays, memory_gb=0.1)
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert peak_mb < 75, protocol


# ---------------------------------------------------------------- half precision


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [knn_accuracy, linear_probe, few_shot])
def test_half_precision_moves_no_accuracy(digits, protocol):
  train_x, train_y, test_x, test_y, _ = digits
  train_x, test_x = convnet_features(train_x), convnet_features(test_x)
  found = []
  for dtype in (np.float32, np.float16):
    result = protocol(train_x.astype(dtype), train_y, test_x.astype(dtype), test_y, C)
    result = result.accuracy if protocol is linear_probe else result
    found.append([mean for mean, _ in result.values()] if protocol is few_shot else [result])
  np.testing.assert_allclose(*found, atol=0.1)


def test_what_float16_cannot_hold_is_said(digits):
  train_x, train_y, test_x, test_y, _ = digits
  with np.errstate(over="ignore"):
    large = (train_x * 1e5).astype(np.float16)
  with pytest.raises(ValueError, match="values above 65504 were stored as float16.*store them as float32"):
    knn_accuracy(large, train_y, test_x, test_y, C)


def test_a_file_of_another_type_is_refused_before_it_is_copied(tmp_path):
  stored = np.memmap(tmp_path / "features", np.float64, "w+", shape=(4, 3))
  with pytest.raises(ValueError, match="train features are stored as float64: store them as float16 or float32"):
    check_features("train", stored)


# ---------------------------------------------------------------- parts


def test_streamed_statistics_are_those_of_float64(monkeypatch):
  monkeypatch.setattr(blocks, "_PASS_BYTES", 4 * 6 * 70)
  x_NxF = (1000 + np.random.default_rng(0).standard_normal((999, 6)) * [1e-2, 1, 10, 0, 1, 1]).astype(np.float32)
  rows = np.arange(0, 999, 2)
  mean_F, deviation_F = mean_and_deviation(x_NxF, rows)
  np.testing.assert_allclose(mean_F, x_NxF[rows].mean(axis=0, dtype=np.float64), rtol=1e-7)
  np.testing.assert_allclose(deviation_F, x_NxF[rows].std(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-12)


def test_blocks_cover_every_row_once_and_have_two_sizes_at_most():
  for num_rows, most in ((10, 3), (9, 3), (1, 5), (100, 100), (101, 100), (7, 1)):
    found = list(ranges(num_rows, most))
    assert [i for start, stop in found for i in range(start, stop)] == list(range(num_rows))
    sizes = {stop - start for start, stop in found}
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1


def test_only_large_sets_meet_the_bounds():
  settings = Linear()
  assert settings.selection_images > 50_000  # CIFAR's: nothing changes below
  for num_images, num_steps in ((1037, 1000), (40_000, 50 * 78), (50_000, 50 * 97)):
    assert steps_of(num_images, settings, settings.selection_steps, 0).shape == (num_steps, 512)
  cut, whole = (steps_of(3000, settings, most, 3) for most in (7, 10_000))
  assert (cut == whole[:7]).all()  # an order depends on images, batch and seed
  y_N = np.repeat(np.arange(C), 100)
  kept, held_out = selection_split(y_N, 400, 0.25, seed=0)
  assert len(kept) + len(held_out) == 400 and not set(kept) & set(held_out)
  assert len(held_out) == pytest.approx(100, abs=C)
  assert (selection_split(y_N, 400, 0.25, seed=0)[1] == held_out).all()


def test_a_rate_selected_on_some_images_is_trained_on_all(digits):
  found = linear_probe(*digits, selection_images=500, min_steps=300, epochs=1)
  assert found.num_validation == pytest.approx(100, abs=C) and found.accuracy > 93


def test_progress_says_how_far_and_how_long(digits, monkeypatch):
  monkeypatch.setattr(blocks, "_REPORT_EVERY_S", 0.0)
  lines: list[str] = []
  knn_accuracy(*digits, memory_gb=TINY_GB, report=lines.append)
  linear_probe(*digits, **QUICK | {"min_steps": 2000}, report=lines.append)
  few_shot(*digits, shots=(1,), report=lines.append)
  for start in ("knn: training image ", "linear, selection: step 1,", "linear: step 1,", "fewshot: fit 9/10, "):
    assert any(line.startswith(start) and line.endswith(" s left") for line in lines), start


def test_progress_is_quiet_for_ten_seconds(digits):
  lines: list[str] = []
  linear_probe(*digits, **QUICK, report=lines.append)
  assert not lines


# ---------------------------------------------------------------- what a user can get wrong


@pytest.mark.parametrize(
  "settings, values, message",
  [
    (Knn, {"k": 0}, "k = 0: every k must be 1 or more"),
    (Knn, {"temperature": -1.0}, "must be above 0"),
    (Linear, {"features": "cls"}, "must be one of probe, pooled"),
    (Linear, {"max_steps": 0}, "max_steps = 0: must be 1 or more"),
    (Linear, {"validation_fraction": 0.0}, "must lie between 0 and 1"),
    (FewShot, {"shots": ()}, "give at least one, all 1 or more"),
    (FewShot, {"draws": 0}, "num_draws = 0: must be 1 or more"),
  ],
)
def test_settings_check_themselves(settings, values, message):
  assert dataclasses.is_dataclass(settings())
  with pytest.raises(ValueError, match=message):
    settings(**values)


def test_a_memory_that_takes_nothing_says_how_much_is_needed(digits):
  with pytest.raises(ValueError, match=r"needs 0.0\d+ GB to train one setting.*raise memory_gb, or lower batch_size"):
    linear_probe(*digits, memory_gb=1e-4)
  with pytest.raises(ValueError, match="raise memory_gb, or lower shots"):
    few_shot(*digits, memory_gb=1e-4)
  with pytest.raises(ValueError, match="memory_gb = 0: must be above 0"):
    knn_accuracy(*digits, memory_gb=0)


@pytest.mark.slow
def test_bench_probes_measures_time_and_memory(tmp_path):
  sizes = {"images": 3000, "width": 16, "classes": 5, "queries": 100, "folder": str(tmp_path)}
  result = probes.run(**sizes, protocols=("knn", "linear", "fewshot"))
  assert 20 < result["knn"]["accuracy"] <= 100 and result["linear"]["seconds"] > 0
  assert result["knn"]["peak_resident_gb"] >= result["start"]["peak_resident_gb"] > 0
  assert not list(tmp_path.iterdir())
