"""Effective rank and spread of features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_jax.theory import feature_std, rankme

METHODS = ("svd", "gram")


def features(num_samples: int, dim: int, decay: float = 0.0) -> np.ndarray:
  """Gaussian features whose k-th direction is k^-decay strong."""
  z_NxD = np.random.default_rng(0).standard_normal((num_samples, dim))
  return (z_NxD * np.arange(1, dim + 1) ** -decay).astype(np.float32)


def definition(z_NxD: np.ndarray) -> float:
  """exp of the entropy of the normalised singular values, in float64."""
  values = np.linalg.svd(z_NxD.astype(np.float64), compute_uv=False)
  share = values[values > 0] / values.sum()
  return float(np.exp(-np.sum(share * np.log(share))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("num_samples", "decay"), [(96, 0.0), (96, 1.0), (96, 3.0), (8, 1.0)])
def test_rankme_is_the_entropy_of_singular_values(method, num_samples, decay):
  z_NxD = features(num_samples, 24, decay)
  assert float(rankme(z_NxD, method)) == pytest.approx(definition(z_NxD), rel={"svd": 1e-4, "gram": 0.01}[method])


@pytest.mark.parametrize(("method", "relative"), [("svd", 1e-3), ("gram", 0.1)])
def test_rankme_counts_equal_directions_and_sees_collapse(method, relative):
  orthogonal_NxD = np.linalg.qr(features(64, 16))[0]
  assert float(rankme(orthogonal_NxD, method)) == pytest.approx(16, rel=1e-4)
  one_NxD = np.outer(features(64, 1), features(1, 16))
  assert float(rankme(one_NxD, method)) == pytest.approx(1, rel=relative)


@pytest.mark.parametrize("method", ["svd", "gram"])
def test_rankme_of_nothing_is_zero_and_of_a_nan_is_one(method):
  """At total collapse the curve goes on, where it matters most."""
  assert float(rankme(jnp.zeros((8, 4)), method)) == 0
  assert np.isnan(float(rankme(jnp.zeros((8, 4)).at[2, 1].set(jnp.nan), method)))


@pytest.mark.parametrize("method", METHODS)
def test_rankme_ignores_scale_and_accepts_bfloat16(method):
  z_NxD = jnp.asarray(features(32, 8), jnp.bfloat16)
  value = rankme(z_NxD, method)
  assert value.dtype == jnp.float32
  assert float(rankme(8 * z_NxD, method)) == pytest.approx(float(value), rel=1e-4)


def test_feature_std_is_one_for_the_target_and_zero_at_collapse():
  z_NxD = features(32, 8)
  assert float(feature_std(z_NxD)) == pytest.approx(z_NxD.std(0).mean(), rel=1e-5)
  assert float(feature_std(np.ones((32, 8)))) == 0
  assert feature_std(jnp.ones((4, 2), jnp.bfloat16)).dtype == jnp.float32


def test_sharded_samples_give_the_same_numbers_and_gram_moves_no_samples():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  z_NxD = features(64, 8)
  sharded = jax.device_put(z_NxD, NamedSharding(mesh, P("data")))
  metrics = jax.jit(lambda z: (rankme(z, "gram"), feature_std(z)))
  np.testing.assert_allclose(metrics(sharded), metrics(z_NxD), rtol=1e-4)
  assert "all-gather(" not in metrics.lower(sharded).compile().as_text()


def test_errors_say_the_fix():
  with pytest.raises(ValueError, match="'svd' or 'gram'"):
    rankme(np.zeros((4, 2)), "qr")
  with pytest.raises(ValueError, match=r"\(2, 4, 2\)"):
    rankme(np.zeros((2, 4, 2)))
