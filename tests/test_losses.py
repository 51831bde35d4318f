"""SIGReg and LeJEPA: official values, closed forms, expectations, gradients, sharding, memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_jax import losses
from jepa_jax.bench import sigreg as bench
from jepa_jax.losses import ecf, epps_pulley, epps_pulley_direct


def normal_quantiles(num_samples: int) -> np.ndarray:
  return scipy.stats.norm.ppf((np.arange(num_samples) + 0.5) / num_samples)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def statistic_float64(x_N: np.ndarray, t_max: float = 3.0, num_knots: int = 17) -> float:
  """The formula of the specification, word for word, in float64."""
  knots_T = np.linspace(0, t_max, num_knots)
  target_T = np.exp(-(knots_T**2) / 2)
  weights_T = np.full(num_knots, 2 * knots_T[1])
  weights_T[[0, -1]] = knots_T[1]
  cos_T, sin_T = np.cos(np.outer(knots_T, x_N)).mean(1), np.sin(np.outer(knots_T, x_N)).mean(1)
  return len(x_N) * np.sum(weights_T * target_T * ((cos_T - target_T) ** 2 + sin_T**2))


def exact_statistic(x_N: np.ndarray) -> float:
  """Epps-Pulley integrated over the whole real line."""
  num_samples = len(x_N)
  pairs = np.exp(-((x_N[:, None] - x_N) ** 2) / 2).sum() / num_samples**2
  singles = np.sqrt(2) / num_samples * np.exp(-(x_N**2) / 4).sum()
  return num_samples * np.sqrt(2 * np.pi) * (pairs - singles + 1 / np.sqrt(3))


def exact_sliced(z_NxD: np.ndarray) -> float:
  """The mean of `exact_statistic` over infinitely many slices."""
  num_samples, dim = z_NxD.shape
  square_distance = ((z_NxD[:, None] - z_NxD[None]) ** 2).sum(-1)
  pairs = scipy.special.hyp1f1(0.5, dim / 2, -square_distance / 2).sum() / num_samples**2
  singles = np.sqrt(2) / num_samples * scipy.special.hyp1f1(0.5, dim / 2, -(z_NxD**2).sum(1) / 4).sum()
  return num_samples * np.sqrt(2 * np.pi) * (pairs - singles + 1 / np.sqrt(3))


# --- values ---


@pytest.mark.parametrize(
  ("samples", "value"),
  [
    (normal_quantiles(8), 0.0108521),
    (normal_quantiles(64), 0.00083424),
    (np.zeros(64), 25.7310449),
    (normal_quantiles(64) + 1, 28.4118164),
    (0.5 * normal_quantiles(64), 9.7562299),
    (np.random.RandomState(0).randn(256), 0.26570653),
  ],
  ids=["quantiles8", "quantiles64", "zeros", "shifted", "shrunk", "random"],
)
@pytest.mark.parametrize("statistic", [epps_pulley, epps_pulley_direct])
def test_values_of_the_official_code(statistic, samples, value):
  # The float32 statistic of nearly perfect samples is a difference of nearly equal numbers: 1e-6 absolute.
  assert float(statistic(samples[:, None])[0]) == pytest.approx(value, rel=2e-5, abs=1e-6)


def test_a_gaussian_scores_1_05_whatever_the_number_of_samples():
  """Log SIGReg against this line. 8192 draws; the standard error of their mean is 0.01, the test allows 4 of them."""
  assert losses.expected_under_gaussian() == pytest.approx(losses.EXPECTED_GAUSSIAN, abs=5e-6)
  scores_M = epps_pulley(gaussian(64, 8192))
  assert float(scores_M.mean()) == pytest.approx(losses.EXPECTED_GAUSSIAN, abs=0.04)
  assert float(scores_M.std()) == pytest.approx(0.95, abs=0.06)
  assert np.quantile(scores_M, [0.05, 0.5, 0.95]) == pytest.approx([0.14, 0.77, 2.95], rel=0.07)
  assert float(epps_pulley(gaussian(3, 8192)).mean()) == pytest.approx(losses.EXPECTED_GAUSSIAN, abs=0.04)


@pytest.mark.parametrize("num_samples", [1, 7, 64])
def test_full_collapse_scores_0_402_per_sample(num_samples):
  assert losses.collapse_per_sample() == pytest.approx(losses.COLLAPSE_PER_SAMPLE, abs=1e-8)
  assert float(epps_pulley(np.zeros((num_samples, 1)))[0]) == pytest.approx(0.40204758 * num_samples, rel=1e-6)


@pytest.mark.parametrize("samples", [gaussian(40), 0.3 * gaussian(40) + 1, np.zeros(9)], ids=["normal", "off", "zeros"])
def test_a_wide_and_fine_grid_is_the_exact_integral(samples):
  assert float(epps_pulley(samples[:, None], 8.0, 129)[0]) == pytest.approx(exact_statistic(samples), rel=1e-4)
  # The default grid stops at 3 and is up to 2 % below; both numbers of the specification:
  assert losses.expected_under_gaussian(10.0, 1001) == pytest.approx(1.05943, abs=1e-5)
  assert losses.collapse_per_sample(10.0, 1001) == pytest.approx(0.40892308, abs=1e-7)


def test_many_slices_come_to_the_closed_form_of_infinitely_many():
  z_NxD = gaussian(32, 5) * np.array([1.5, 1, 1, 0.5, 0.1], np.float32)
  statistic = functools.partial(epps_pulley, t_max=8.0, num_knots=65)
  for kind, relative in (("gaussian", 0.03), ("sobol", 0.005)):
    directions_DxM = losses.slice_directions(jax.random.key(0), 5, 4096, kind)
    assert float(losses.sliced(z_NxD, directions_DxM, statistic)) == pytest.approx(exact_sliced(z_NxD), rel=relative)


# --- the fast form ---


@pytest.mark.parametrize("shape", [(64, 5), (2, 3, 64, 4), (37, 3), (1, 2)], ids=str)
def test_fast_equals_direct_in_value_and_gradient(shape):
  x, weights_M = 1.3 * gaussian(*shape) + 0.2, gaussian(*shape[:-2], shape[-1], seed=1)
  fast, direct = (
    jax.value_and_grad(lambda x, f=f: jnp.sum(weights_M * f(x)))(x) for f in (epps_pulley, epps_pulley_direct)
  )
  np.testing.assert_allclose(epps_pulley(x), epps_pulley_direct(x), rtol=2e-5)
  np.testing.assert_allclose(fast[0], direct[0], rtol=2e-5)
  np.testing.assert_allclose(fast[1], direct[1], rtol=2e-5, atol=2e-6 * np.abs(direct[1]).max())


@pytest.mark.parametrize("shape", [(64, 6), (2, 37, 6)], ids=str)
def test_sigreg_is_the_plain_formula_in_value_and_gradient(shape):
  z, key = 1.3 * gaussian(*shape) + 0.2, jax.random.key(3)
  directions_DxM = losses.slice_directions(key, 6, 32)
  fast = jax.value_and_grad(lambda z: losses.sigreg(z, key, 32))(z)
  plain = jax.value_and_grad(lambda z: losses.sigreg_plain(z, directions_DxM))(z)
  assert float(fast[0]) == pytest.approx(float(plain[0]), rel=2e-5)
  np.testing.assert_allclose(fast[1], plain[1], rtol=2e-5, atol=2e-6 * np.abs(plain[1]).max())


def test_far_samples_stay_accurate():
  """Far from zero the angle itself loses digits (t x eps): the powers lose no more than sines of every knot do."""
  x_NxM = np.concatenate([gaussian(60, 4), 100 * gaussian(4, 4)])
  exact_M = [statistic_float64(column) for column in x_NxM.T.astype(np.float64)]
  np.testing.assert_allclose(epps_pulley(x_NxM), exact_M, rtol=2e-5)


@pytest.mark.parametrize(("t_max", "num_knots"), [(3.0, 3), (3.0, 17), (5.0, 41)])
def test_any_odd_grid(t_max, num_knots):
  x_N = 0.8 * gaussian(48)
  value = statistic_float64(x_N.astype(np.float64), t_max, num_knots)
  assert float(epps_pulley(x_N[:, None], t_max, num_knots)[0]) == pytest.approx(value, rel=2e-5)


def test_gradient_is_the_formula_of_the_specification_and_the_slope_of_the_value():
  x_N = 0.9 * gaussian(32).astype(np.float64) + 0.3
  knots_T = np.arange(17) * 3 / 16
  target_T = np.exp(-(knots_T**2) / 2)
  weights_T = target_T * np.where(np.isin(np.arange(17), [0, 16]), 1, 2) * 3 / 16
  cos_TxN, sin_TxN = np.cos(np.outer(knots_T, x_N)), np.sin(np.outer(knots_T, x_N))
  error_T = cos_TxN.mean(1) - target_T
  formula_N = 2 * (weights_T * knots_T) @ (sin_TxN.mean(1)[:, None] * cos_TxN - error_T[:, None] * sin_TxN)
  gradient_N = jax.grad(lambda x_N: epps_pulley(x_N[:, None])[0])(x_N.astype(np.float32))
  np.testing.assert_allclose(gradient_N, formula_N, rtol=2e-5, atol=1e-6)
  for j in (0, 17):
    nudge_N = 1e-5 * (np.arange(32) == j)
    slope = (statistic_float64(x_N + nudge_N) - statistic_float64(x_N - nudge_N)) / 2e-5
    assert float(gradient_N[j]) == pytest.approx(slope, rel=1e-4)


def test_both_ways_to_sum_agree():
  """CPUs and accelerators sum differently; each must be right wherever it runs."""
  grid = ecf.half_line_grid()
  for shape in ((64, 3), (2, 128, 2)):
    x = gaussian(*shape)
    np.testing.assert_allclose(ecf._sums_fused(grid, x), ecf._sums_scanned(grid, x), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
  x_NxM = jnp.asarray(gaussian(64, 3), jnp.bfloat16)
  np.testing.assert_array_equal(epps_pulley(x_NxM), epps_pulley(x_NxM.astype(jnp.float32)))
  assert epps_pulley(x_NxM).dtype == jnp.float32
  gradient = jax.grad(lambda x: epps_pulley(x).sum())(x_NxM)
  exact = jax.grad(lambda x: epps_pulley(x).sum())(x_NxM.astype(jnp.float32))
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient, exact.astype(jnp.bfloat16))


def test_vmap_and_integers():
  x_VxNxM = gaussian(3, 64, 2)
  np.testing.assert_allclose(jax.vmap(epps_pulley)(x_VxNxM), epps_pulley(x_VxNxM), rtol=1e-6)
  of_view = jax.grad(lambda x: epps_pulley(x).sum())
  np.testing.assert_allclose(jax.vmap(of_view)(x_VxNxM), of_view(x_VxNxM), rtol=1e-5, atol=1e-7)
  assert float(epps_pulley(np.zeros((4, 1), np.int32))[0]) == pytest.approx(4 * 0.40204758, rel=1e-6)


@pytest.mark.parametrize("sums", ["_sums_fused", "_sums_scanned"])
def test_eight_devices_equal_one_with_a_single_all_reduce(sums, monkeypatch):
  """The characteristic function is averaged over all devices before it is squared, and nothing of x's size travels."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  monkeypatch.setattr(ecf, "_sums_fused", getattr(ecf, sums))
  x_VxNxM = gaussian(2, 64, 8)
  sharded = jax.device_put(x_VxNxM, NamedSharding(mesh, P(None, "data")))
  loss = jax.jit(jax.value_and_grad(lambda x: jnp.mean(epps_pulley(x))))
  value, gradient = loss(x_VxNxM)
  compiled = loss.lower(sharded).compile()
  sharded_value, sharded_gradient = compiled(sharded)
  assert float(sharded_value) == pytest.approx(float(value), rel=1e-5)
  np.testing.assert_allclose(sharded_gradient, gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())
  assert sharded_gradient.sharding.is_equivalent_to(sharded.sharding, 3)
  text = compiled.as_text()
  assert sum(f" {op}(" in line for line in text.splitlines() for op in ("all-reduce", "all-reduce-start")) == 1
  assert not any(f" {op}" in text for op in ("all-gather(", "all-to-all(", "collective-permute("))


def test_sharded_lejepa_equals_single_device():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  z_VxNxD, directions_DxM = gaussian(3, 32, 6), losses.slice_directions(jax.random.key(0), 6, 16)
  sharded = jax.device_put(z_VxNxD, NamedSharding(mesh, P(None, "data")))
  loss = jax.jit(jax.value_and_grad(lambda z: losses.lejepa(z, directions_DxM, 2, 0.05)[0]))
  (value, gradient), (sharded_value, sharded_gradient) = loss(z_VxNxD), loss(sharded)
  assert float(sharded_value) == pytest.approx(float(value), rel=1e-5)
  np.testing.assert_allclose(sharded_gradient, gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())


def test_memory_is_a_few_arrays_of_the_input_size():
  """Measured at N = M = 512: 0.75 N M for the fast form (value and gradient), 48 N M for the direct one."""
  x = jax.ShapeDtypeStruct((512, 512), jnp.float32)

  def temporaries(statistic) -> float:
    loss = jax.jit(jax.value_and_grad(lambda x: jnp.mean(statistic(x))))
    return loss.lower(x).compile().memory_analysis().temp_size_in_bytes / (4 * 512 * 512)

  assert temporaries(epps_pulley) < 2
  assert temporaries(epps_pulley_direct) > 17


# --- other conventions ---


def test_paper_convention_is_a_trapezoid_over_the_whole_line():
  x_NxM = gaussian(50, 2)
  knots_T = np.linspace(-5, 5, 17)
  error_TxM = np.exp(1j * knots_T[:, None, None] * x_NxM).mean(1) - np.exp(-(knots_T**2) / 2)[:, None]
  value_M = 50 * np.trapezoid(np.exp(-(knots_T**2) / 2)[:, None] * np.abs(error_TxM) ** 2, knots_T, axis=0)
  np.testing.assert_allclose(losses.epps_pulley_paper(x_NxM), value_M, rtol=2e-5)
  np.testing.assert_allclose(losses.epps_pulley_paper(x_NxM), epps_pulley(x_NxM, 5.0, 9), rtol=1e-6)


def test_eb_jepa_convention_is_ten_knots_and_not_times_n():
  x_NxM = 1.2 * gaussian(50, 2)
  knots_T = np.linspace(-3, 3, 10)
  error_TxM = np.exp(1j * knots_T[:, None, None] * x_NxM).mean(1) - np.exp(-(knots_T**2) / 2)[:, None]
  value_M = np.trapezoid(np.exp(-(knots_T**2) / 2)[:, None] * np.abs(error_TxM) ** 2, knots_T, axis=0)
  np.testing.assert_allclose(losses.epps_pulley_mean(x_NxM), value_M, rtol=2e-5)
  gradient = jax.grad(lambda x: losses.epps_pulley_mean(x).sum())(x_NxM)
  nudged = x_NxM.copy()
  nudged[7, 1] += 1e-2
  difference = float(losses.epps_pulley_mean(nudged).sum() - losses.epps_pulley_mean(x_NxM).sum()) / 1e-2
  assert float(gradient[7, 1]) == pytest.approx(difference, rel=0.03)


def test_pooled_views_are_one_set_of_samples():
  """stable-pretraining's convention: on the same distribution of views, about V times the per-view statistic."""
  z_VxNxD, directions_DxM = 2 * gaussian(4, 64, 8), losses.slice_directions(jax.random.key(1), 8, 64)
  pooled = losses.pooled_views(z_VxNxD)
  assert pooled.shape == (256, 8)
  np.testing.assert_array_equal(pooled[:4], z_VxNxD[:, 0])
  ratio = losses.sliced(pooled, directions_DxM) / losses.sliced(z_VxNxD, directions_DxM)
  assert float(ratio) == pytest.approx(4, rel=0.15)


def test_lam_converters():
  z_VxNxD, directions_DxM = gaussian(2, 256, 4), losses.slice_directions(jax.random.key(2), 4, 32)
  _, terms = losses.lejepa(z_VxNxD, directions_DxM, 2, 0.5)
  loss = lambda lam: float((1 - lam) * terms["inv"] + lam * terms["sigreg"])
  additive = float(terms["inv"] + 0.25 * terms["sigreg"])
  assert loss(losses.lam_from_additive(0.25)) == pytest.approx(additive / 1.25, rel=1e-6)
  assert losses.additive_from_lam(losses.lam_from_additive(0.25)) == pytest.approx(0.25)
  # eb_jepa: mean square between the two views + 10 BCS; their grid is within 2 % of the official one.
  bcs = float(losses.sliced(z_VxNxD, directions_DxM, losses.epps_pulley_mean))
  theirs = float(np.mean((z_VxNxD[0] - z_VxNxD[1]) ** 2)) + 10 * bcs
  lam = losses.lam_from_bcs(10, 256)
  assert lam == pytest.approx(0.0097, abs=1e-4)
  assert loss(lam) / (1 - lam) == pytest.approx(theirs / 4, rel=1e-3)


# --- slices ---


@pytest.mark.parametrize("kind", ["gaussian", "sobol"])
def test_directions_are_unit_new_per_key_and_isotropic(kind):
  make = jax.jit(functools.partial(losses.slice_directions, dim=6, num_slices=1000, kind=kind))
  directions_DxM = make(jax.random.key(0))
  assert directions_DxM.shape == (6, 1000) and directions_DxM.dtype == jnp.float32
  np.testing.assert_allclose(np.linalg.norm(directions_DxM, axis=0), 1, rtol=1e-6)
  np.testing.assert_array_equal(directions_DxM, make(jax.random.key(0)))
  assert np.abs(directions_DxM - make(jax.random.key(1))).mean() > 0.1
  error = np.abs(directions_DxM @ directions_DxM.T / 1000 - np.eye(6) / 6).max()
  assert error < {"gaussian": 0.03, "sobol": 0.005}[kind]


# --- the loss ---


def test_lejepa_is_the_formula():
  z_VxNxD, directions_DxM = gaussian(4, 24, 6), np.asarray(losses.slice_directions(jax.random.key(0), 6, 12))
  loss, terms = losses.lejepa(z_VxNxD, directions_DxM, 2, 0.05)
  inv = np.mean((z_VxNxD[:2].mean(0) - z_VxNxD) ** 2)
  sig = np.mean([statistic_float64(column) for z_NxD in z_VxNxD for column in (z_NxD @ directions_DxM).T])
  assert float(terms["inv"]) == pytest.approx(inv, rel=1e-6)
  assert float(terms["sigreg"]) == pytest.approx(sig, rel=1e-5)
  assert float(loss) == pytest.approx(0.95 * inv + 0.05 * sig, rel=1e-5)


def test_lejepa_does_not_care_for_the_order_of_views_of_a_kind():
  z_VxNxD, directions_DxM = gaussian(5, 16, 4), losses.slice_directions(jax.random.key(0), 4, 8)
  loss = lambda order: float(losses.lejepa(z_VxNxD[np.array(order)], directions_DxM, 2, 0.1)[0])
  assert loss([0, 1, 2, 3, 4]) == pytest.approx(loss([1, 0, 4, 2, 3]), rel=1e-6)
  assert loss([0, 1, 2, 3, 4]) != pytest.approx(loss([2, 1, 0, 3, 4]), rel=1e-3)


def test_the_centre_is_not_detached():
  """With two views and both global, each is pulled to the middle: gradients are opposite and of equal size."""
  z_VxNxD = gaussian(2, 8, 3)
  gradient = jax.grad(lambda z: losses.invariance(z, 2))(z_VxNxD)
  np.testing.assert_allclose(gradient[0], -gradient[1], rtol=1e-5, atol=1e-8)
  np.testing.assert_allclose(gradient[0], (z_VxNxD[0] - z_VxNxD[1]) / (2 * z_VxNxD[0].size), rtol=1e-5, atol=1e-8)


def test_another_statistic_can_be_put_in():
  z_VxNxD, directions_DxM = gaussian(2, 32, 4), losses.slice_directions(jax.random.key(0), 4, 8)
  _, terms = losses.lejepa(z_VxNxD, directions_DxM, 2, 0.1, statistic=losses.vcreg)
  np.testing.assert_allclose(terms["sigreg"], losses.vcreg(z_VxNxD @ directions_DxM).mean(), rtol=1e-4)


def test_sigreg_is_sliced_along_fresh_directions():
  z_NxD, key = gaussian(64, 8), jax.random.key(3)
  directions_DxM = losses.slice_directions(key, 8, 32, "sobol")
  value = losses.sigreg(z_NxD, key, 32, directions="sobol")
  assert float(value) == pytest.approx(float(losses.sliced(z_NxD, directions_DxM)), rel=1e-6)


# --- what a user gets wrong ---


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: epps_pulley(np.zeros((4, 1)), num_knots=16), "must be odd"),
    (lambda: epps_pulley_direct(np.zeros((4, 1)), num_knots=16), "must be odd"),
    (lambda: epps_pulley(np.zeros((4, 1)), num_knots=1), "at least 3"),
    (lambda: epps_pulley(np.zeros((4, 1)), t_max=0.0), "t_max must be positive"),
    (lambda: epps_pulley(np.zeros((0, 1))), "N >= 1"),
    (lambda: epps_pulley(np.zeros(4)), "add an axis"),
    (lambda: losses.slice_directions(jax.random.key(0), 4, 8, "halton"), "'gaussian' or 'sobol'"),
    (lambda: losses.slice_directions(jax.random.key(0), 4, 0), "at least 1"),
    (lambda: losses.sliced(np.zeros((4, 3)), np.zeros((5, 2))), r"\(4, 3\) and \(5, 2\)"),
    (lambda: losses.invariance(np.zeros((3, 4, 2)), 4), r"1\.\.3"),
    (lambda: losses.invariance(np.zeros((3, 4, 2)), 0), r"1\.\.3"),
    (lambda: losses.invariance(np.zeros((4, 2)), 1), "V views"),
    (lambda: losses.lejepa(np.zeros((2, 4, 2)), np.zeros((2, 3)), 2, 10.0), "lam_from_additive"),
    (lambda: losses.additive_from_lam(1.0), r"\[0, 1\)"),
    (lambda: losses.lam_from_bcs(10, 0), "at least 1"),
  ],
)
def test_errors_say_the_fix(call, message):
  with pytest.raises(ValueError, match=message):
    call()


# --- the benchmark ---


def test_benchmark_runs_small_and_names_its_surroundings():
  result = bench.run(num_samples=64, num_slices=32, dim=4, repeats=1)
  assert result["platform"] == "cpu" and result["jax_version"] == jax.__version__
  for part in ("sigreg", "statistic"):
    assert result[part]["fast_ms"] > 0 and result[part]["speedup"] > 0
    assert result[part]["fast_temp_bytes"] < result[part]["direct_temp_bytes"]
