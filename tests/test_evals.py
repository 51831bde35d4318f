"""Protocols on frozen features: they agree with scikit-learn and with theory, and never look at the test labels."""

import dataclasses
from typing import get_args, get_type_hints

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from jepa_jax.evals.fewshot import centred_directions, few_shot, few_shot_accuracies, labelled_draws
from jepa_jax.evals.knn import knn_accuracy, knn_predictions
from jepa_jax.evals.linear import Linear, ProbeSetting, linear_probe, select, stratified_split
from jepa_jax.evals.table import format_table, markdown_table, print_table, shots_columns

C = 10
PROTOCOLS = [knn_accuracy, linear_probe, few_shot]


@pytest.fixture(scope="module")
def digits():
  """Pixels of the 8x8 digits: (train_x (1297, 64), train_y, test_x (500, 64), test_y, 10)."""
  pixels, labels = load_digits(return_X_y=True)
  split = train_test_split(pixels.astype(np.float32) / 16, labels, test_size=500, stratify=labels, random_state=0)
  train_x, test_x, train_y, test_y = split
  return train_x, train_y, test_x, test_y, C


@pytest.fixture(scope="module")
def probe(digits):
  return linear_probe(*digits)


def blobs(num_images, distance, width=8, seed=0):
  """Two unit Gaussians `distance` apart in `width` dimensions; the best possible accuracy is Phi(distance / 2)."""
  rng = np.random.default_rng(seed)
  y = rng.integers(0, 2, num_images)
  x = rng.standard_normal((num_images, width))
  x[:, 0] += distance * (y - 0.5)
  return x.astype(np.float32), y


# ---------------------------------------------------------------- kNN


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.07), (200, 1.0)])
def test_knn_predicts_what_scikit_learn_predicts_with_the_same_weights(digits, k, temperature):
  train_x, train_y, test_x, test_y, _ = digits
  reference = KNeighborsClassifier(
    k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
  ).fit(train_x, train_y)
  assert (knn_predictions(train_x, train_y, test_x, C, k, temperature)[k] == reference.predict(test_x)).all()
  accuracy = knn_accuracy(*digits, k=k, temperature=temperature)
  assert accuracy == pytest.approx(100 * reference.score(test_x, test_y))


def test_several_k_in_one_pass_are_what_each_gives_alone(digits):
  together = knn_accuracy(*digits, k=(1, 5, 20))
  assert together == {k: knn_accuracy(*digits, k=k) for k in (1, 5, 20)}


def test_chunks_of_queries_do_not_change_the_predictions(digits, monkeypatch):
  train_x, train_y, test_x, _, _ = digits
  whole = knn_predictions(train_x, train_y, test_x, C)[20]
  monkeypatch.setattr("jepa_jax.evals.knn._MAX_BLOCK", 150 * len(train_x))  # 500 = 3 x 150 + 50
  assert (knn_predictions(train_x, train_y, test_x, C)[20] == whole).all()


def test_knn_looks_at_directions_only(digits):
  train_x, train_y, test_x, test_y, _ = digits
  lengths = np.random.default_rng(0).uniform(0.1, 10, (len(test_x), 1))
  assert knn_accuracy(train_x, train_y, test_x * lengths, test_y, C) == knn_accuracy(*digits)


def test_near_neighbours_outvote_a_far_majority_unless_the_temperature_is_high():
  train_x, train_y = np.array([[1, 0], [0, 1], [0, 1]]), np.array([0, 1, 1])
  query = np.array([[1.0, 0.3]])
  assert knn_predictions(train_x, train_y, query, 2, k=3, temperature=0.07)[3] == [0]
  assert knn_predictions(train_x, train_y, query, 2, k=3, temperature=100.0)[3] == [1]
  assert knn_predictions(train_x, train_y, query, 2, k=3, temperature=1e-4)[3] == [0]  # and nothing overflows


def test_k_above_the_training_set_means_all_of_it():
  (train_x, train_y), (test_x, test_y) = blobs(30, 3), blobs(100, 3, seed=1)
  assert knn_accuracy(train_x, train_y, test_x, test_y, 2, k=500) == knn_accuracy(
    train_x, train_y, test_x, test_y, 2, k=30
  )


# ---------------------------------------------------------------- linear probe


def test_linear_probe_reaches_the_bayes_accuracy_of_two_gaussians():
  (train_x, train_y), (test_x, test_y) = blobs(3000, 2.0), blobs(5000, 2.0, seed=1)
  bayes = 100 * norm.cdf(1.0)  # 84.1 %; a test set of 5000 has a standard error of .5
  result = linear_probe(train_x, train_y, test_x, test_y, 2, input_norm="standardize", min_steps=200)
  assert result.accuracy == pytest.approx(bayes, abs=1.5)


@pytest.mark.slow
def test_linear_probe_on_digits_is_within_a_point_of_logistic_regression(digits, probe):
  train_x, train_y, test_x, test_y, _ = digits
  references = [LogisticRegression(C=c, max_iter=3000).fit(train_x, train_y).score(test_x, test_y) for c in (1, 10)]
  assert probe.accuracy > 100 * max(references) - 1.0


@pytest.mark.parametrize("input_norm", get_args(get_type_hints(Linear)["input_norm"]))
def test_every_input_norm_learns_the_digits(digits, input_norm):
  few_rates = linear_probe(*digits, input_norm=input_norm, learning_rates=(1e-2, 3e-2), min_steps=300)
  assert few_rates.accuracy > 94


@pytest.mark.parametrize("input_norm", ["standardize", "batchnorm"])
def test_standardised_probes_do_not_depend_on_the_scale_and_offset_of_features(input_norm):
  (train_x, train_y), (test_x, test_y) = blobs(400, 3), blobs(400, 3, seed=1)
  options = {"input_norm": input_norm, "learning_rates": (1e-2,), "min_steps": 100, "batch_size": 64}
  plain = linear_probe(train_x, train_y, test_x, test_y, 2, **options)
  moved = linear_probe(train_x * 64 + 32, train_y, test_x * 64 + 32, test_y, 2, **options)
  assert moved.accuracy == pytest.approx(plain.accuracy, abs=0.5)


def test_the_sweep_in_one_program_is_every_setting_alone():
  (train_x, train_y), (test_x, test_y) = blobs(300, 1.0), blobs(300, 1.0, seed=1)
  options = {"input_norm": "none", "epochs": 3, "min_steps": 1, "batch_size": 32}
  rates, decays = (1e-3, 1e-1), (1e-6, 1.0)
  sweep = linear_probe(train_x, train_y, test_x, test_y, 2, learning_rates=rates, weight_decays=decays, **options).sweep
  assert [(s.learning_rate, s.weight_decay) for s in sweep] == [(r, d) for r in rates for d in decays]
  for setting in sweep:
    one = ([setting.learning_rate], [setting.weight_decay])
    alone = linear_probe(train_x, train_y, test_x, test_y, 2, learning_rates=one[0], weight_decays=one[1], **options)
    np.testing.assert_allclose(alone.selected.loss, setting.loss, rtol=1e-5)


def test_selection_never_sees_the_test_set(digits, probe):
  train_x, train_y, test_x, test_y, _ = digits
  rng = np.random.default_rng(0)
  blind = linear_probe(train_x, train_y, rng.permutation(test_x), rng.permutation(test_y), C)
  assert blind.accuracy < 30  # the labels are indeed wrong
  assert dataclasses.replace(blind, accuracy=probe.accuracy) == probe  # and nothing else has changed


def test_the_result_shows_how_the_setting_was_selected(probe):
  by_rate = probe.validation_by_lr
  assert len(by_rate) == len(probe.sweep) == 9 and probe.num_validation == pytest.approx(0.2 * 1297, abs=C)
  assert by_rate[probe.selected.learning_rate] == max(by_rate.values()) == probe.selected.accuracy
  assert not probe.at_edge


def test_ties_go_to_the_lower_loss_and_diverged_settings_never_win():
  settings = [
    ProbeSetting(1e-3, 0.0, 90.0, 0.5),
    ProbeSetting(1e-2, 0.0, 90.0, 0.4),
    ProbeSetting(1.0, 0.0, 99.0, np.nan),
  ]
  assert select(settings).learning_rate == 1e-2
  with pytest.raises(ValueError, match="all 1 settings diverged: lower learning_rates"):
    select(settings[2:])


def test_the_held_out_part_is_stratified_seeded_and_leaves_one_of_each_class():
  y = np.array([0] * 100 + [1] * 10 + [2] * 2 + [3])
  kept, held_out = stratified_split(y, 0.2, seed=0)
  assert np.bincount(y[held_out], minlength=4).tolist() == [20, 2, 1, 0]
  assert sorted([*kept, *held_out]) == list(range(len(y)))
  assert (stratified_split(y, 0.2, seed=0)[1] == held_out).all()
  assert (stratified_split(y, 0.2, seed=1)[1] != held_out).any()


# ---------------------------------------------------------------- few labels


def test_pixels_of_the_digits_are_a_strong_baseline_with_few_labels(digits):
  result = few_shot(*digits)
  (one, _), (five, _), (ten, _) = result[1], result[5], result[10]
  assert one > 64 and five > 84 and ten > 89  # per-feature standardisation gives about 60, 83.5, 90


def test_draws_depend_on_labels_and_seed_only_so_that_all_features_get_the_same(digits):
  train_x, train_y, test_x, test_y, _ = digits
  draws = labelled_draws(train_y, C, (1, 5), num_draws=3, seed=0)
  assert draws[5].shape == (3, 5 * C)
  for index in draws[5]:
    assert len(set(index)) == 5 * C and np.bincount(train_y[index]).tolist() == [5] * C
  assert all(set(one) < set(five) for one, five in zip(draws[1], draws[5]))  # nested
  assert (labelled_draws(train_y, C, (5, 9), num_draws=7, seed=0)[5][:3] == draws[5]).all()
  assert (labelled_draws(train_y, C, (5,), num_draws=3, seed=1)[5] != draws[5]).any()
  # A rotation changes every feature and no inner product: same draws, hence the same accuracies.
  rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0]
  plain, turned = (few_shot_accuracies(a, train_y, b, test_y, C, (5,), 3) for a, b in
                   ((train_x, test_x), (train_x @ rotation, test_x @ rotation)))  # fmt: skip
  np.testing.assert_allclose(plain[5], turned[5], atol=0.5)


def test_labels_outside_the_draw_are_never_used(digits):
  train_x, train_y, test_x, test_y, _ = digits
  expected = few_shot_accuracies(*digits, shots=(5,), num_draws=1)[5]
  (index,) = labelled_draws(train_y, C, (5,), num_draws=1, seed=0)[5]
  normalise = centred_directions(train_x)
  train_x, test_x = normalise(train_x), normalise(test_x)
  classifier = LogisticRegression(C=10.0, max_iter=1000).fit(train_x[index], train_y[index])
  assert expected[0] == pytest.approx(100 * classifier.score(test_x, test_y))


def test_the_mean_and_deviation_are_those_of_the_draws(digits):
  accuracies = few_shot_accuracies(*digits, shots=(1,), num_draws=4)[1]
  assert few_shot(*digits, shots=(1,), num_draws=4) == {1: (accuracies.mean(), accuracies.std(ddof=1))}
  assert few_shot(*digits, shots=(1,), num_draws=1)[1] == (accuracies[0], 0.0)


def test_features_are_scaled_by_unlabelled_training_images_to_total_variance_one(digits):
  train_x, _, test_x, _, _ = digits
  normalise = centred_directions(train_x * 50)
  scaled, scaled_test = normalise(train_x), normalise(test_x * 3)  # lengths do not matter
  assert np.sum(scaled.var(axis=0)) == pytest.approx(1.0, rel=1e-3)
  np.testing.assert_allclose(scaled_test[:7], centred_directions(train_x)(test_x[:7]), atol=1e-5)


def test_collapsed_features_give_chance(digits):
  train_x, train_y, test_x, test_y, _ = digits
  collapsed = (np.full_like(train_x, 0.3), train_y, np.full_like(test_x, 0.3), test_y, C)
  assert few_shot(*collapsed, shots=(5,), num_draws=2)[5][0] < 15
  assert linear_probe(*collapsed, learning_rates=(1e-3,), min_steps=50).accuracy < 15
  assert knn_accuracy(*collapsed) < 15


# ---------------------------------------------------------------- what a user can get wrong


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bad_features_and_labels_are_refused_with_what_and_where(digits, protocol):
  train_x, train_y, test_x, test_y, _ = digits
  broken = train_x.copy()
  broken[[3, 8], 5] = np.nan, np.inf
  with pytest.raises(ValueError, match="2 of 1297 train features have a NaN or infinite value, the first at index 3"):
    protocol(broken, train_y, test_x, test_y, C)
  with pytest.raises(ValueError, match=r"test labels are outside \[0, 10\), the first is -1 at index 0"):
    protocol(train_x, train_y, test_x, np.full_like(test_y, -1), C)
  with pytest.raises(ValueError, match=r"train labels are outside \[0, 5\)"):
    protocol(train_x, train_y, test_x, test_y, 5)
  with pytest.raises(ValueError, match="labels are float64: expected integers"):
    protocol(train_x, train_y.astype(float), test_x, test_y, C)
  with pytest.raises(ValueError, match=r"test labels have shape \(4,\): expected \(500,\)"):
    protocol(train_x, train_y, test_x, test_y[:4], C)
  with pytest.raises(ValueError, match=r"use x.reshape\(len\(x\), -1\)"):
    protocol(train_x.reshape(-1, 8, 8), train_y, test_x, test_y, C)
  with pytest.raises(ValueError, match="width 64, test features 63"):
    protocol(train_x, train_y, test_x[:, 1:], test_y, C)


@pytest.mark.parametrize(
  "protocol, options, message",
  [
    (knn_accuracy, {"k": 0}, "every k must be 1 or more"),
    (knn_accuracy, {"k": (5, -1)}, "every k must be 1 or more"),
    (knn_accuracy, {"temperature": 0.0}, "temperature = 0.0: must be above 0"),
    (linear_probe, {"input_norm": "layer"}, "must be one of layernorm, batchnorm, standardize, none"),
    (linear_probe, {"learning_rates": ()}, "give at least one, all above 0"),
    (linear_probe, {"weight_decays": (-1.0,)}, "none below 0"),
    (linear_probe, {"batch_size": 0}, "batch_size = 0: must be 1 or more"),
    (linear_probe, {"validation_fraction": 1.0}, "must lie between 0 and 1"),
    (few_shot, {"shots": (1, 500)}, r"class 0 has 1\d\d training images, fewer than the 500 labels per class"),
    (few_shot, {"shots": (0,)}, "all 1 or more"),
    (few_shot, {"num_draws": 0}, "num_draws = 0: must be 1 or more"),
  ],
)
def test_bad_settings_are_refused_with_the_fix(digits, protocol, options, message):
  with pytest.raises(ValueError, match=message):
    protocol(*digits, **options)


def test_one_feature_is_too_few_for_layernorm(digits):
  train_x, train_y, test_x, test_y, _ = digits
  with pytest.raises(ValueError, match="use input_norm='standardize'"):
    linear_probe(train_x[:, 20:21], train_y, test_x[:, 20:21], test_y, C)


# ---------------------------------------------------------------- table

ROWS = {
  "pixels": {"linear": 90.04, "knn": 86.1} | shots_columns({10: (70.0, 2.0), 1: (41.0, 3.25)}),
  "ours [b|c]": {"linear": 90.0, "knn": float("nan"), "shots_10": (80.26, 1.0), "mrr": 0.5},
}


def test_markdown_has_protocols_in_order_the_best_in_bold_and_a_dash_for_what_is_missing():
  assert markdown_table(ROWS).splitlines() == [
    "| features | kNN | linear | 1 label | 10 labels | mrr |",
    "|---|---:|---:|---:|---:|---:|",
    "| pixels | **86.1** | **90.0** | **41.0 ± 3.2** | 70.0 ± 2.0 | - |",  # equal as printed: both are best
    r"| ours [b\|c] | - | **90.0** | - | **80.3 ± 1.0** | **0.5** |",
  ]


def test_the_terminal_table_holds_the_same_cells(capsys):
  text = format_table(ROWS, title="digits [8 px]")
  print_table(ROWS, title="digits [8 px]")
  for cell in ("digits [8 px]", "ours [b|c]", "10 labels", "41.0 ± 3.2", "86.1"):
    assert cell in text
  assert "\x1b[1m" in text
  assert "ours [b|c]" in capsys.readouterr().out
