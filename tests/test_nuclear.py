"""Nuclear norm: value and polar factor against float64, at collapse and at no rank, sharded, in any dtype."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import jepa_jax.bench.nuclear as bench
from jepa_jax.losses import nuclear_norm, nuclear_norm_bound
from jepa_jax.plan.hlo import collectives
from jepa_jax.sharding import MeshConfig, batch_sharding, make_mesh, replicated

METHODS = ("svd", "newton_schulz", "qdwh")


def with_condition(num_rows: int, dim: int, condition: float) -> np.ndarray:
  """A float32 matrix with singular values spread evenly from 1 to 1 / condition."""
  rng, rank = np.random.default_rng(0), min(num_rows, dim)
  u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (num_rows, dim))
  return ((u * np.linspace(1, 1 / condition, rank)) @ v.T).astype(np.float32)


def unit_rows(num_rows: int, dim: int, spread: float = np.inf) -> np.ndarray:
  """Unit rows, uniform on the sphere or a common direction plus noise of length `spread`: near-collapsed centroids."""
  noise_PxD = np.random.default_rng(0).standard_normal((num_rows, dim))
  m_PxD = noise_PxD if spread == np.inf else np.eye(1, dim) + spread / np.sqrt(dim) * noise_PxD
  return (m_PxD / np.linalg.norm(m_PxD, axis=1, keepdims=True)).astype(np.float32)


def oracle(m_PxD: np.ndarray) -> tuple[float, np.ndarray, float]:
  """Value, polar factor and condition number, from float64."""
  u, values, vt = np.linalg.svd(np.asarray(m_PxD, np.float64), full_matrices=False)
  return values.sum(), u @ vt, values[0] / values[-1]


@functools.partial(jax.jit, static_argnums=1)
def value_and_polar(m, method):
  return jax.value_and_grad(functools.partial(nuclear_norm, method=method))(m)


# --- against float64 ---

CASES = {
  "cond 3": (with_condition(192, 64, 3), (2.9, 3.1), 3e-6),
  "cond 3, wide": (with_condition(64, 192, 3), (2.9, 3.1), 3e-6),
  "uniform": (unit_rows(256, 64), (2, 4), 3e-6),
  "near-collapsed, cond 450": (unit_rows(256, 64, 0.037), (350, 550), 1e-5),
  "near-collapsed and square, cond 6e4": (unit_rows(128, 128, 0.14), (4e4, 8e4), 2e-5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_the_singular_values_sum_and_the_polar_factor(case, method):
  m_PxD, (low, high), tolerance = CASES[case]
  expected, polar_PxD, condition = oracle(m_PxD)
  assert low < condition < high
  value, gradient_PxD = value_and_polar(m_PxD, method)
  assert float(value) == pytest.approx(expected, rel=1e-6)
  assert float(nuclear_norm(m_PxD, method)) == pytest.approx(expected, rel=1e-6)  # value alone takes another path
  assert np.linalg.norm(gradient_PxD - polar_PxD) < tolerance * np.linalg.norm(polar_PxD)


def test_gram_eigenvalues_fail_at_collapse_which_is_why_they_are_not_a_method():
  m_PxD = CASES["near-collapsed and square, cond 6e4"][0]
  values, v = jnp.linalg.eigh(jnp.matmul(m_PxD.T, m_PxD, precision="highest"))
  gradient_PxD = m_PxD @ (v / jnp.sqrt(jnp.maximum(values, 1e-12))) @ v.T
  polar_PxD = oracle(m_PxD)[1]
  assert np.linalg.norm(gradient_PxD - polar_PxD) > 0.1 * np.linalg.norm(polar_PxD)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_the_slope_of_the_value(method):
  m_PxD, direction_PxD = unit_rows(24, 10), np.random.default_rng(1).standard_normal((24, 10))
  slope = np.sum(np.asarray(value_and_polar(m_PxD, method)[1]) * direction_PxD)
  ends = [oracle(m_PxD + step * direction_PxD)[0] for step in (1e-5, -1e-5)]
  assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


# --- where decompositions break ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16, 8), (8, 8), (8, 16)])
def test_zero_matrix_has_value_and_gradient_zero(shape, method):
  value, gradient = value_and_polar(np.zeros(shape, np.float32), method)
  assert float(value) == 0 and not np.any(gradient)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-35, 1e-6, 1.0, 1e36])
def test_repeated_singular_values_and_any_scale(scale, method):
  for m in (np.eye(8), np.eye(12, 8), np.eye(8, 12)):
    value, gradient = value_and_polar(np.float32(scale * m), method)
    assert float(value) == pytest.approx(8 * scale, rel=1e-5)
    np.testing.assert_allclose(gradient, m, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_missing_rank_gives_a_finite_subgradient(method):
  rng = np.random.default_rng(0)
  collapsed = np.tile(rng.standard_normal(16), (64, 1))
  rank_4 = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 16))
  for m_PxD in (np.ones((8, 8)), collapsed, rank_4, rank_4.T):
    value, gradient_PxD = value_and_polar(np.float32(m_PxD), method)
    assert float(value) == pytest.approx(np.linalg.norm(m_PxD, "nuc"), rel=1e-5)
    # G is a subgradient where <M, G> = |M|_* and no singular value of G is above 1
    assert np.sum(m_PxD * np.asarray(gradient_PxD)) == pytest.approx(float(value), rel=1e-5)
    assert np.linalg.norm(gradient_PxD, 2) < 1 + 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(bad, method):
  m_PxD = unit_rows(8, 4)
  m_PxD[3, 2] = bad
  value, gradient = value_and_polar(m_PxD, method)
  assert np.isnan(value) and np.all(np.isnan(gradient)) and np.isnan(nuclear_norm(m_PxD, method))


# --- precision, batches, platforms ---


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_computed_in_float32_and_gets_a_bfloat16_gradient(method):
  m_PxD = jnp.asarray(unit_rows(64, 16), jnp.bfloat16)
  value, gradient = value_and_polar(m_PxD, method)
  value_32, gradient_32 = value_and_polar(m_PxD.astype(jnp.float32), method)
  assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
  assert float(value) == float(value_32)
  np.testing.assert_array_equal(gradient, gradient_32.astype(jnp.bfloat16))


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_every_product_is_at_highest_precision_whatever_the_default(method):
  """The CPU always multiplies in float32, so the program is read: TPUs would take bfloat16."""
  m_PxD = jnp.asarray(unit_rows(16, 8), jnp.bfloat16)
  with jax.default_matmul_precision("bfloat16"):
    text = jax.jit(jax.grad(lambda m: nuclear_norm(m, method))).lower(m_PxD).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line and "stablehlo" in line]
  assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize("method", METHODS)
def test_leading_axes_and_vmap_are_one_matrix_after_another(method):
  m = np.stack([unit_rows(12, 5), 3 * unit_rows(12, 5, 0.1), np.zeros((12, 5), np.float32)])
  one = [value_and_polar(m_PxD, method) for m_PxD in m]
  for form in (
    functools.partial(nuclear_norm, method=method),
    jax.vmap(functools.partial(nuclear_norm, method=method)),
  ):
    value, gradient = form(m), jax.grad(lambda x, form=form: jnp.sum(form(x)))(jnp.asarray(m))
    np.testing.assert_allclose(value, [v for v, _ in one], rtol=1e-6)
    np.testing.assert_allclose(gradient, np.stack([g for _, g in one]), atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_auto_has_only_products_on_accelerators(platform):
  traced = jax.jit(jax.grad(nuclear_norm)).trace(jax.ShapeDtypeStruct((1024, 512), jnp.float32))
  program = traced.lower(lowering_platforms=(platform,)).as_text()
  assert "dot_general" in program and "while" not in program and "gesdd" not in program


# --- sharded ---


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(MeshConfig(data=4, fsdp=2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (60, 16)], ids=["rows", "wide", "indivisible"])
def test_eight_devices_give_what_one_gives(mesh, shape, method):
  m_PxD = unit_rows(*shape)
  value, gradient_PxD = value_and_polar(m_PxD, method)
  placed = jax.device_put(m_PxD, replicated(mesh) if shape[0] % 8 else batch_sharding(mesh))
  with jax.set_mesh(mesh):
    value_8, gradient_8 = value_and_polar(placed, method)
  assert float(value_8) == pytest.approx(float(value), rel=1e-6)
  np.testing.assert_allclose(gradient_8, gradient_PxD, atol=3e-6)


def test_newton_schulz_sums_small_products_and_moves_no_rows(mesh):
  m_PxD = jax.ShapeDtypeStruct((256, 16), jnp.float32, sharding=batch_sharding(mesh))
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.value_and_grad(lambda m: nuclear_norm(m, "newton_schulz"))).lower(m_PxD).compile()
  found = collectives(compiled.as_text(), mesh.size)
  assert {c.kind for c in found} == {"all-reduce"} and len(found) <= 14
  assert max(c.largest_bytes for c in found) == 16 * 16 * 4
  assert isinstance(compiled.output_shardings[1], NamedSharding)
  assert compiled.output_shardings[1].is_equivalent_to(batch_sharding(mesh), 2)


# --- errors, bound, bench ---


def test_errors_say_the_fix():
  with pytest.raises(ValueError, match="'svd', 'newton_schulz', 'qdwh', got 'gram'"):
    nuclear_norm(np.zeros((4, 2)), "gram")
  for shape in ((4,), (0, 4), (3, 4, 0)):
    with pytest.raises(ValueError, match="P rows, D columns"):
      nuclear_norm(np.zeros(shape))
  with pytest.raises(ValueError, match="at least 1"):
    nuclear_norm_bound(0, 4)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_bound_is_reached_by_tight_frames_and_by_nothing_of_unit_rows_exceeded(shape):
  bound = nuclear_norm_bound(*shape)
  assert oracle(unit_rows(*shape))[0] < bound
  frame_PxD = np.linalg.qr(np.random.default_rng(0).standard_normal((max(shape), min(shape))))[0]
  frame_PxD = (frame_PxD if shape[0] >= shape[1] else frame_PxD.T) * np.sqrt(shape[0] / min(shape))
  assert np.sum(frame_PxD**2) == pytest.approx(shape[0])  # as P unit rows have
  assert float(nuclear_norm(frame_PxD)) == pytest.approx(bound, rel=1e-5)


def test_bench_gives_times_ratios_and_errors_of_every_method(capsys):
  result = bench.run(sizes=["24x8", "8x8"], repeats=1)
  assert json.loads(json.dumps(result)) == result
  assert [(row["rows"], row["dim"], row["method"]) for row in result["rows"]] == [
    (rows, 8, name) for rows in (24, 8) for name in bench.FORMS
  ]
  assert all(row["ms"] > 0 and row["speedup"] > 0 and row["gradient_error"] < 1e-5 for row in result["rows"])
  assert "| 24 | 8 | newton_schulz |" in capsys.readouterr().err
  for options, message in (({"sizes": ["8by8"]}, "PxD"), ({"methods": ["gram"]}, "choose from"), ({"repeats": 0}, "1")):
    with pytest.raises(ValueError, match=message):
      bench.run(**options)
