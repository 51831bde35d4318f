"""MMCR: the loss against float64, its invariances and bounds, the theory's value table, sharding, bad embeddings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.losses import check_embeddings, mmcr
from jepa_jax.plan.hlo import collectives
from jepa_jax.sharding import MeshConfig, batch_sharding, make_mesh, replicated

TERMS = {"nuclear_norm", "bound", "percent_error", "alignment", "flatness", "zero_rows"}


def embeddings(num_images: int, num_views: int, dim: int, seed: int = 0, agree: float = 0.5) -> np.ndarray:
  """Embeddings (B, K, D) whose views share a part of their direction; lengths vary by a factor of 100."""
  rng = np.random.default_rng(seed)
  shape = (num_images, num_views, dim)
  z_BxKxD = agree * rng.standard_normal((num_images, 1, dim)) + (1 - agree) * rng.standard_normal(shape)
  return (z_BxKxD * 10 ** rng.uniform(-1, 1, (num_images, num_views, 1))).astype(np.float32)


def unit(z: np.ndarray) -> np.ndarray:
  return np.asarray(z, np.float64) / np.linalg.norm(np.asarray(z, np.float64), axis=-1, keepdims=True)


def nuclear(m: np.ndarray) -> float:
  return np.linalg.svd(m, compute_uv=False).sum()


def mmcr_float64(z_BxKxD, z_momentum=None, lam=0.0) -> float:
  """The formula of the specification, word for word, in float64."""
  centroids_BxD = unit(z_BxKxD).mean(1)
  if z_momentum is not None:
    centroids_BxD = (centroids_BxD + unit(z_momentum).mean(1)) / 2
  return float(lam * np.mean([nuclear(view_KxD) for view_KxD in unit(z_BxKxD)]) - nuclear(centroids_BxD))


jitted = jax.jit(mmcr, static_argnames=("lam", "reduction", "method"))


@functools.partial(jax.jit, static_argnames=("lam", "reduction", "method"))
def gradient_of(z, **options) -> jax.Array:
  return jax.grad(lambda x: mmcr(x, **options)[0])(z)


def loss_of(z, **options) -> float:
  return float(jitted(z, **options)[0])


# --- the loss ---


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize("shape", [(12, 2, 6), (6, 3, 12), (8, 8, 4), (32, 1, 8)])
def test_loss_is_the_specifications_formula(shape, method):
  z_BxKxD = embeddings(*shape)
  for lam in (0.0, 0.7) if shape[1] > 1 else (0.0,):
    assert loss_of(z_BxKxD, lam=lam, method=method) == pytest.approx(mmcr_float64(z_BxKxD, lam=lam), rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("shape", [(12, 2, 6), (6, 3, 12), (5, 6, 4)])
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_gradient_is_the_slope_of_float64(shape, lam):
  z_BxKxD, direction = embeddings(*shape), np.random.default_rng(7).standard_normal(shape)
  slope = np.sum(gradient_of(z_BxKxD, lam=lam) * direction)
  ends = [mmcr_float64(z_BxKxD + step * direction, lam=lam) for step in (1e-6, -1e-6)]
  assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_gradient_at_unit_views_is_the_tangent_part_of_the_polar_factor():
  z_BxKxD = unit(embeddings(12, 2, 6)).astype(np.float32)
  u, _, vt = np.linalg.svd(z_BxKxD.astype(np.float64).mean(1), full_matrices=False)
  expected = np.repeat(-(u @ vt)[:, None] / 2, 2, axis=1)  # dL/dz^ = -(U V^T)_b / K
  expected -= np.sum(expected * z_BxKxD, axis=-1, keepdims=True) * z_BxKxD
  np.testing.assert_allclose(gradient_of(z_BxKxD), expected, atol=2e-6)


@pytest.mark.parametrize("num_views", [2, 3])
def test_invariant_to_scale_and_to_the_order_of_views_and_images(num_views):
  z_BxKxD = embeddings(10, num_views, 6)
  loss = loss_of(z_BxKxD, lam=0.3)
  for factor in (1e-30, 1e-3, 50.0, 1e30):
    assert loss_of(np.float32(factor) * z_BxKxD, lam=0.3) == pytest.approx(loss, rel=1e-6)
  lengths = np.random.default_rng(1).uniform(0.1, 10, (10, num_views, 1)).astype(np.float32)
  assert loss_of(lengths * z_BxKxD, lam=0.3) == pytest.approx(loss, rel=1e-6)
  assert loss_of(z_BxKxD[:, ::-1], lam=0.3) == pytest.approx(loss, rel=1e-6)
  assert loss_of(z_BxKxD[::-1], lam=0.3) == pytest.approx(loss, rel=1e-6)
  # so the gradient has no part along z: following it does not make embeddings longer
  along = np.sum(gradient_of(z_BxKxD, lam=0.3) * z_BxKxD, axis=-1)
  np.testing.assert_allclose(along, 0, atol=1e-5)


@pytest.mark.parametrize(("num_images", "dim"), [(16, 6), (6, 16), (8, 8)])
def test_loss_is_never_below_minus_the_bound_even_for_huge_embeddings(num_images, dim):
  """A published re-implementation forgets the normalisation: its loss runs to -1e27."""
  bound = np.sqrt(num_images * min(num_images, dim))
  for scale in (1.0, 1e20):
    z_BxKxD = np.float32(scale) * embeddings(num_images, 2, dim, agree=1.0)
    assert -bound < loss_of(z_BxKxD) < 0
  # and descent goes to the bound, not past it
  z_BxKxD = jnp.asarray(embeddings(num_images, 2, dim))
  step = jax.jit(
    lambda z: z - 0.5 * jnp.linalg.norm(z, axis=-1, keepdims=True) ** 2 * jax.grad(lambda x: mmcr(x)[0])(z)
  )
  for _ in range(200):
    z_BxKxD = step(z_BxKxD)
  assert -bound - 1e-4 < loss_of(z_BxKxD) < -0.99 * bound


@pytest.mark.parametrize("num_views", [2, 4])
def test_identical_views_are_one_view(num_views):
  z_BxKxD = embeddings(9, 1, 5)
  repeated = np.repeat(z_BxKxD, num_views, axis=1)
  assert loss_of(repeated) == pytest.approx(loss_of(z_BxKxD), rel=1e-6)
  np.testing.assert_allclose(gradient_of(repeated).sum(1), gradient_of(z_BxKxD)[:, 0], rtol=1e-4, atol=1e-6)
  # |Z_b|_* of identical views is that of one direction, sqrt(K)
  loss, terms = jitted(repeated, lam=2.0)
  assert float(terms["local"]) == pytest.approx(np.sqrt(num_views), rel=1e-4)
  assert np.all(np.isfinite(gradient_of(repeated, lam=2.0))) and np.isfinite(loss)


@pytest.mark.parametrize("sign", [1, -1])
def test_views_that_differ_by_less_than_can_be_squared_are_one_view(sign):
  """Not zero, but its square is: |a - b| (of opposite views |a + b|) counts as nothing, not as one."""
  near = np.zeros((4, 2, 3), np.float32)
  near[:, 0], near[:, 1] = (1, 1e-25, 0), (sign, sign * 2e-25, 0)
  assert np.any(near[:, 0] != sign * near[:, 1])
  _, terms = jitted(near, lam=2.0)
  assert float(terms["local"]) == pytest.approx(np.sqrt(2), rel=1e-6)
  assert np.all(np.isfinite(gradient_of(near, lam=2.0)))


@pytest.mark.parametrize("cosine", [1.0, 1 - 1e-6, 0.3, 0.0, -1.0])
def test_local_term_of_two_views_is_the_closed_form_in_their_cosine(cosine):
  b = [cosine, np.sqrt(max(0, 1 - cosine**2))]
  z_BxKxD = np.tile(np.float32([[3, 0], b]), (4, 1, 1))
  exact = np.sqrt(1 + float(np.float32(cosine))) + np.sqrt(1 - float(np.float32(cosine)))
  assert float(jitted(z_BxKxD, lam=1.0)[1]["local"]) == pytest.approx(exact, rel=1e-4)
  assert np.all(np.isfinite(gradient_of(z_BxKxD, lam=1.0)))


# --- momentum ---


def test_momentum_views_that_equal_the_online_views_give_the_plain_loss_and_half_its_gradient():
  z_BxKxD = embeddings(10, 2, 6)
  for lam in (0.0, 0.4):
    assert loss_of(z_BxKxD, z_momentum=z_BxKxD, lam=lam) == pytest.approx(loss_of(z_BxKxD, lam=lam), rel=1e-6)
  half = gradient_of(z_BxKxD, z_momentum=z_BxKxD)
  np.testing.assert_allclose(half, gradient_of(z_BxKxD) / 2, rtol=1e-4, atol=1e-6)


def test_momentum_views_move_the_centroids_get_no_gradient_and_leave_the_local_term():
  z_BxKxD, ema = embeddings(10, 2, 6), jnp.asarray(embeddings(10, 3, 6, seed=1))
  loss, terms = jitted(z_BxKxD, ema, lam=0.4)
  assert float(loss) == pytest.approx(mmcr_float64(z_BxKxD, ema, lam=0.4), rel=1e-6)
  assert float(terms["local"]) == pytest.approx(float(jitted(z_BxKxD, lam=0.4)[1]["local"]))
  assert not np.any(jax.grad(lambda m: mmcr(z_BxKxD, m, lam=0.4)[0])(ema))


# --- terms and reductions ---


@pytest.mark.parametrize(("num_images", "dim"), [(16, 6), (6, 16)])
def test_terms_say_why_the_loss_falls_short_of_its_bound(num_images, dim):
  z_BxKxD = embeddings(num_images, 2, dim)
  loss, terms = jitted(z_BxKxD)
  assert set(terms) == TERMS and all(t.shape == () and t.dtype == jnp.float32 for t in terms.values())
  centroids_BxD = unit(z_BxKxD).mean(1)
  assert float(terms["nuclear_norm"]) == pytest.approx(-float(loss)) and float(terms["zero_rows"]) == 0
  assert float(terms["bound"]) == pytest.approx(np.sqrt(num_images * min(num_images, dim)))
  assert float(terms["alignment"]) == pytest.approx(np.linalg.norm(centroids_BxD) / np.sqrt(num_images), rel=1e-5)
  assert 1 - float(terms["percent_error"]) == pytest.approx(float(terms["alignment"] * terms["flatness"]), rel=1e-5)
  assert 1 - float(terms["percent_error"]) == pytest.approx(float(terms["nuclear_norm"] / terms["bound"]), rel=1e-5)


@pytest.mark.parametrize(
  ("num_images", "dim", "percent_error"),
  [
    (512, 512, 0.1512),
    (512, 256, 0.0672),
    (256, 512, 0.0672),
    (1024, 256, 0.0323),
    (1024, 128, 0.0159),
    (2048, 128, 0.0079),
  ],
)
def test_uniform_embeddings_have_the_double_descent_of_the_theory(num_images, dim, percent_error):
  """The peak at P = D and the ratio's table, with views that agree perfectly."""
  z_BxKxD = np.random.default_rng(0).standard_normal((num_images, 1, dim)).astype(np.float32)
  assert float(jitted(z_BxKxD)[1]["percent_error"]) == pytest.approx(percent_error, abs=0.002)


def test_bound_reduction_is_in_minus_one_to_lam_and_does_not_depend_on_the_batch():
  z_BxKxD = embeddings(64, 4, 4, agree=0.9)
  loss, terms = jitted(z_BxKxD, lam=0.5, reduction="bound")
  assert float(loss) == pytest.approx(
    0.5 * float(terms["local"]) / np.sqrt(4 * 4) - float(terms["nuclear_norm"]) / np.sqrt(64 * 4), rel=1e-6
  )
  assert -1 <= float(loss) <= 0.5
  twice = loss_of(np.concatenate([z_BxKxD, z_BxKxD]), lam=0.5, reduction="bound")
  assert twice == pytest.approx(float(loss), rel=1e-5)
  lam = 0.5 * np.sqrt(64 * 4) / np.sqrt(4 * 4)  # the lam of "sum" with the same balance
  assert loss_of(z_BxKxD, lam=lam) / np.sqrt(64 * 4) == pytest.approx(float(loss), rel=1e-5)


# --- precision, devices ---


def test_bfloat16_embeddings_are_taken_in_float32():
  z = jnp.asarray(embeddings(16, 2, 8), jnp.bfloat16)
  loss, terms = jitted(z, lam=0.5)
  assert loss.dtype == jnp.float32 and {t.dtype for t in terms.values()} == {jnp.dtype("float32")}
  assert float(loss) == float(jitted(z.astype(jnp.float32), lam=0.5)[0])
  assert gradient_of(z, lam=0.5).dtype == jnp.bfloat16


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize(("shape", "lam"), [((32, 2, 12), 0.5), ((16, 3, 40), 0.5), ((20, 2, 12), 0.0)])
def test_eight_devices_give_the_value_and_gradient_of_one(shape, lam, method):
  z_BxKxD = embeddings(*shape)
  mesh = make_mesh(MeshConfig(data=4, fsdp=2))
  loss_fn = jax.value_and_grad(functools.partial(mmcr, lam=lam, method=method), has_aux=True)
  (loss, terms), gradient = jax.jit(loss_fn)(z_BxKxD)
  placed = jax.device_put(z_BxKxD, replicated(mesh) if shape[0] % 8 else batch_sharding(mesh))
  with jax.set_mesh(mesh):
    (loss_8, terms_8), gradient_8 = jax.jit(loss_fn)(placed)
  assert float(loss_8) == pytest.approx(float(loss), rel=2e-6)
  for name, value in terms.items():
    np.testing.assert_allclose(terms_8[name], value, rtol=2e-5, err_msg=name)
  np.testing.assert_allclose(gradient_8, gradient, atol=1e-5 * np.abs(gradient).max())


def test_newton_schulz_gathers_no_embeddings():
  mesh = make_mesh(MeshConfig(data=4, fsdp=2))
  z = jax.ShapeDtypeStruct((64, 2, 8), jnp.float32, sharding=batch_sharding(mesh))
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(lambda z: mmcr(z, lam=0.5, method="newton_schulz")[0])).lower(z).compile()
  found = collectives(compiled.as_text(), mesh.size)
  assert {c.kind for c in found} == {"all-reduce"} and max(c.largest_bytes for c in found) == 8 * 8 * 4


# --- bad input ---


def test_a_zero_view_counts_as_zero_has_no_gradient_and_is_counted():
  z_BxKxD = embeddings(8, 3, 5)
  z_BxKxD[2, 1] = 0
  z_BxKxD[5] = 0
  loss, terms = jitted(z_BxKxD, lam=0.2)
  assert float(terms["zero_rows"]) == 4
  views = np.nan_to_num(z_BxKxD / np.linalg.norm(z_BxKxD, axis=-1, keepdims=True).clip(1e-30))
  assert float(loss) == pytest.approx(0.2 * np.mean([nuclear(v) for v in views]) - nuclear(views.mean(1)), rel=1e-5)
  gradient = gradient_of(z_BxKxD, lam=0.2)
  assert np.all(np.isfinite(gradient)) and not np.any(gradient[5]) and not np.any(gradient[2, 1])
  assert np.any(gradient[2, 0])
  two = z_BxKxD[:, :2]  # the closed form for two views knows zero views, too
  assert float(jitted(two, lam=1.0)[1]["local"]) == pytest.approx(np.mean([nuclear(v) for v in views[:, :2]]), rel=1e-5)
  assert float(jitted(z_BxKxD, z_BxKxD)[1]["zero_rows"]) == 8


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_element_that_is_not_finite_makes_the_loss_nan(bad):
  z_BxKxD = embeddings(8, 3, 5)
  z_BxKxD[2, 1, 3] = bad
  assert np.isnan(loss_of(z_BxKxD)) and np.isnan(loss_of(z_BxKxD, lam=0.5))
  assert np.isnan(loss_of(embeddings(8, 3, 5), z_momentum=z_BxKxD))


def test_check_embeddings_names_the_rows():
  z_BxKxD = embeddings(6, 2, 4)
  check_embeddings(z_BxKxD)
  z_BxKxD[2, 1] = 0
  z_BxKxD[4, 0, 3] = np.nan
  z_BxKxD[5, 1, 0] = np.inf
  with pytest.raises(ValueError, match=r"6 x 2: 2 not finite: \(4, 0\), \(5, 1\); 1 zero, without direction: \(2, 1\)"):
    check_embeddings(jnp.asarray(z_BxKxD))
  with pytest.raises(ValueError, match=r"12 zero, without direction: \(0, 0\), \.\.\."):
    check_embeddings(np.zeros((6, 2, 4)), most=1)
  with pytest.raises(ValueError, match="B images, K views, D"):
    check_embeddings(np.zeros((6, 4)))


@pytest.mark.parametrize(
  ("shape", "options", "message"),
  [
    ((8, 4), {}, "B images, K views, D"),
    ((8, 0, 4), {}, "B images, K views, D"),
    ((1, 2, 4), {}, "B >= 2"),
    ((8, 1, 4), {"lam": 0.1}, "K >= 2"),
    ((8, 2, 4), {"lam": -0.1}, "negative"),
    ((8, 2, 4), {"lam": float("nan")}, "negative"),
    ((8, 2, 4), {"reduction": "mean"}, "'sum' or 'bound', got 'mean'"),
    ((8, 2, 4), {"method": "gram"}, "'svd', 'newton_schulz'"),
    ((8, 2, 4), {"z_momentum": np.zeros((8, 2, 5))}, r"z_momentum must be \(8, views, 4\)"),
    ((8, 2, 4), {"z_momentum": np.zeros((4, 2, 4))}, r"z_momentum must be \(8, views, 4\)"),
  ],
)
def test_errors_say_the_fix_before_anything_compiles(shape, options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(mmcr, **options), jax.ShapeDtypeStruct(shape, jnp.float32))
