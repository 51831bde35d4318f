"""Bounds, percent error, uniformity, Marchenko-Pastur and mutual information: closed forms and invariances."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jepa_jax import theory
from jepa_jax.losses import coding_rate, mmcr
from jepa_jax.sharding import MeshConfig, batch_sharding, make_mesh

RATIOS = {1: 0.1512, 2: 0.0672, 4: 0.0323, 8: 0.0159, 16: 0.0079}


def sphere(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
  z_PxD = np.random.default_rng(seed).standard_normal((num_rows, dim))
  return (z_PxD / np.linalg.norm(z_PxD, axis=1, keepdims=True)).astype(np.float32)


# --- percent error and the double descent ---


@pytest.mark.parametrize(("inverse_ratio", "percent_error"), RATIOS.items())
def test_marchenko_pastur_gives_the_table_whichever_of_p_and_d_is_larger(inverse_ratio, percent_error):
  for scale in (1, 300):
    assert theory.uniform_percent_error(scale, scale * inverse_ratio) == pytest.approx(percent_error, abs=5e-5)
    assert theory.uniform_percent_error(scale * inverse_ratio, scale) == pytest.approx(percent_error, abs=5e-5)


def test_marchenko_pastur_closed_form_at_one_and_expansion_near_zero():
  assert theory.mean_root_eigenvalue(1.0) == pytest.approx(8 / (3 * math.pi), abs=1e-10)
  # E sqrt(1 + x) = 1 - E x^2 / 8 + ..., and the law's variance is r
  assert theory.mean_root_eigenvalue(1e-4) == pytest.approx(1 - 1e-4 / 8, abs=1e-8)


def test_percent_error_of_uniform_rows_peaks_at_p_equal_to_d():
  dims = np.array([64, 128, 256, 512, 1024])
  errors = np.asarray(theory.uniform_percent_error(256, dims))
  assert errors.shape == (5,) and np.argmax(errors) == 2
  np.testing.assert_allclose(errors, errors[::-1], rtol=1e-9)
  grid = theory.uniform_percent_error(dims[:, None], dims)
  np.testing.assert_array_equal(np.argmax(grid, axis=1), np.arange(5))


@pytest.mark.parametrize("shape", [(384, 384), (512, 256), (256, 512), (1024, 256), (1024, 128), (2048, 128)])
def test_finite_uniform_rows_have_the_predicted_percent_error(shape):
  measured = float(theory.pretraining_percent_error(sphere(*shape)))
  assert measured == pytest.approx(theory.uniform_percent_error(*shape), abs=0.002)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_one_minus_percent_error_is_alignment_times_flatness(shape):
  for m_PxD in (sphere(*shape), 0.3 * sphere(*shape), np.eye(*shape, dtype=np.float32)):
    alignment, flatness = theory.alignment_flatness(m_PxD)
    error = theory.pretraining_percent_error(m_PxD)
    assert 0 <= float(error) <= 1 and 1 - float(error) == pytest.approx(float(alignment * flatness), abs=1e-6)
    rank = min(shape)
    values = np.linalg.svd(m_PxD, compute_uv=False)
    assert float(flatness) == pytest.approx(values.sum() / np.linalg.norm(values) / np.sqrt(rank), rel=1e-5)


def test_extremes_of_alignment_and_flatness():
  collapsed = np.tile(sphere(1, 8), (32, 1))  # views agree, one direction of eight
  alignment, flatness = theory.alignment_flatness(collapsed)
  assert float(alignment) == pytest.approx(1) and float(flatness) == pytest.approx(1 / np.sqrt(8), rel=1e-5)
  for value in theory.alignment_flatness(np.zeros((8, 4))):
    assert float(value) == 0
  assert float(theory.pretraining_percent_error(np.zeros((8, 4)))) == 1
  assert float(theory.pretraining_percent_error(np.eye(8))) == pytest.approx(0, abs=1e-6)


# --- uniformity ---


def test_uniformity_is_the_log_mean_over_pairs():
  z_PxD = sphere(20, 5)
  square = np.sum((z_PxD[:, None] - z_PxD) ** 2, axis=-1)[np.triu_indices(20, 1)]
  for t in (2.0, 0.5):
    assert float(theory.uniformity(z_PxD, t)) == pytest.approx(np.log(np.mean(np.exp(-t * square))), rel=1e-5)
  assert float(theory.uniformity(7 * z_PxD)) == pytest.approx(float(theory.uniformity(z_PxD)), rel=1e-5)


def test_uniformity_is_zero_at_collapse_and_its_closed_form_on_the_sphere():
  assert float(theory.uniformity(np.tile(sphere(1, 8), (16, 1)))) == pytest.approx(0, abs=1e-5)
  # E exp(2 t x.y) for uniform x, y in D dimensions is 0F1(D/2, t^2)
  expected = -4 + np.log(scipy.special.hyp0f1(32 / 2, 4))
  assert float(theory.uniformity(sphere(2000, 32))) == pytest.approx(expected, abs=2e-3)


# --- metrics of any method ---


def test_embedding_metrics_are_mmcrs_terms_and_uniformity_under_jit():
  z_BxKxD = np.stack([sphere(48, 12, seed) + 0.5 * sphere(48, 12, 9) for seed in range(3)], axis=1)
  metrics = jax.jit(theory.embedding_metrics)(z_BxKxD)
  assert set(metrics) == {"percent_error", "alignment", "flatness", "uniformity", "coding_rate"}
  terms = mmcr(z_BxKxD)[1]
  for name in ("percent_error", "alignment", "flatness"):
    assert float(metrics[name]) == pytest.approx(float(terms[name]), rel=1e-5)
  assert float(metrics["uniformity"]) == pytest.approx(float(theory.uniformity(z_BxKxD[:, 0])), rel=1e-5)
  assert float(metrics["coding_rate"]) == pytest.approx(float(coding_rate(z_BxKxD[:, 0])), rel=1e-5)
  assert all(m.dtype == jnp.float32 for m in theory.embedding_metrics(jnp.asarray(z_BxKxD, jnp.bfloat16)).values())
  gradient = jax.grad(lambda z: sum(theory.embedding_metrics(z).values()))(jnp.asarray(z_BxKxD))
  assert not np.any(gradient)


def test_embedding_metrics_of_a_sharded_batch_are_those_of_one_device():
  z_BxKxD = np.stack([sphere(32, 8, seed) for seed in range(2)], axis=1)
  mesh = make_mesh(MeshConfig())
  one = jax.jit(theory.embedding_metrics)(z_BxKxD)
  with jax.set_mesh(mesh):
    eight = jax.jit(theory.embedding_metrics)(jax.device_put(z_BxKxD, batch_sharding(mesh)))
  for name, value in one.items():
    np.testing.assert_allclose(eight[name], value, rtol=1e-5, err_msg=name)


# --- mutual information ---


def test_area_of_the_sphere():
  for dim, area in ((2, 2 * math.pi), (3, 4 * math.pi), (4, 2 * math.pi**2)):
    assert theory.log_sphere_area(dim) == pytest.approx(math.log(area))


def test_von_mises_fisher_is_a_density_with_the_known_constants():
  cosine = np.linspace(-1, 1, 4001)
  for dim in (3, 8, 40):
    for kappa in (1e-3, 2.0, 50.0):
      density = np.exp(theory.log_von_mises_fisher(cosine, dim, kappa))
      ring = np.exp(theory.log_sphere_area(dim - 1)) * (1 - cosine**2) ** ((dim - 3) / 2)
      assert np.trapezoid(density * ring, cosine) == pytest.approx(1, abs=1e-4)
  three = 5 * 0.3 + math.log(5 / (4 * math.pi * math.sinh(5)))
  assert float(theory.log_von_mises_fisher(0.3, 3, 5.0)) == pytest.approx(three)
  two = 4 * 0.3 - math.log(2 * math.pi * scipy.special.i0(4.0))
  assert float(theory.log_von_mises_fisher(0.3, 2, 4.0)) == pytest.approx(two)
  # no concentration: uniform, also where Bessel functions underflow
  assert float(theory.log_von_mises_fisher(1.0, 2048, 1e-6)) == pytest.approx(-theory.log_sphere_area(2048))


@pytest.mark.parametrize(("num_samples", "dim"), [(2000, 2), (2000, 3), (1000, 64), (300, 2048)])
@pytest.mark.parametrize("neighbour", [1, 4])
def test_entropy_of_uniform_rows_is_the_log_area_in_any_dimension(num_samples, dim, neighbour):
  estimate = theory.sphere_entropy(sphere(num_samples, dim), neighbour)
  # psi(k) - log of a Gamma(k) sample has standard deviation 1.28 at k = 1; neighbours are correlated
  assert estimate == pytest.approx(theory.log_sphere_area(dim), abs=5 / math.sqrt(num_samples))


def test_entropy_of_a_half_sphere_is_log_2_lower_and_coincident_rows_have_none():
  z_PxD = sphere(4000, 3)
  half = np.concatenate([np.abs(z_PxD[:, :1]), z_PxD[:, 1:]], axis=1)
  assert theory.sphere_entropy(half, 3) == pytest.approx(theory.log_sphere_area(3) - math.log(2), abs=0.06)
  assert theory.sphere_entropy(np.repeat(sphere(20, 4), 2, axis=0)) == -math.inf


def test_mutual_information_bound_rewards_reconstruction_and_uniformity():
  z_PxD = sphere(500, 16)
  noisy = {noise: z_PxD + noise * sphere(500, 16, 1) for noise in (0.0, 0.3, 3.0)}
  bounds = [theory.mutual_information_bound(z_PxD, other, kappa=30.0) for other in noisy.values()]
  assert bounds[0]["bound"] > bounds[1]["bound"] > bounds[2]["bound"]
  assert bounds[0]["reconstruction"] == pytest.approx(float(theory.log_von_mises_fisher(1.0, 16, 30.0)))
  for terms in bounds:
    assert terms["bound"] == terms["reconstruction"] + terms["entropy"]
  narrow = z_PxD + 3 * np.eye(1, 16)
  assert theory.mutual_information_bound(narrow, narrow, 30.0)["entropy"] < bounds[0]["entropy"]


def test_mutual_information_bound_is_below_the_truth():
  """Z2 uniform, Z1 von Mises-Fisher around it on the circle: I = H(uniform) - H(von Mises)."""
  rng, kappa = np.random.default_rng(0), 6.0
  angle = rng.uniform(0, 2 * np.pi, 4000)
  other = angle + rng.vonmises(0, kappa, 4000)
  z2_PxD, z1_PxD = (np.stack([np.cos(a), np.sin(a)], axis=1) for a in (angle, other))
  ratio = scipy.special.i1(kappa) / scipy.special.i0(kappa)
  truth = kappa * ratio - math.log(scipy.special.i0(kappa))
  assert theory.mutual_information_bound(z1_PxD, z2_PxD, kappa)["bound"] == pytest.approx(truth, abs=0.06)
  for wrong in (1.0, 30.0):
    assert theory.mutual_information_bound(z1_PxD, z2_PxD, wrong)["bound"] < truth - 0.1


# --- errors ---


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: theory.mean_root_eigenvalue(1.5), r"\(0, 1\]"),
    (lambda: theory.uniform_percent_error(0, 4), "at least 1"),
    (lambda: theory.pretraining_percent_error(np.zeros(4)), "P rows"),
    (lambda: theory.embedding_metrics(np.zeros((8, 4))), "K views"),
    (lambda: theory.uniformity(np.zeros((5000, 2))), "4096"),
    (lambda: theory.log_von_mises_fisher(0.0, 3, 0.0), "kappa"),
    (lambda: theory.sphere_entropy(np.zeros((4, 3))), r"zero or not finite\), the first: \[0, 1, 2, 3\]"),
    (lambda: theory.sphere_entropy(sphere(4, 3), 4), "1..3"),
    (lambda: theory.mutual_information_bound(sphere(4, 3), sphere(5, 3), 1.0), "pairs"),
  ],
)
def test_errors_say_the_fix(call, message):
  with pytest.raises(ValueError, match=message):
    call()
