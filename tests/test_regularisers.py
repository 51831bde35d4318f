"""What may stand in SIGReg's place: values by hand, exactness on eight devices, and what pushes at a collapse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_jax import losses
from jepa_jax.losses import REGULARISERS
from jepa_jax.sharding import MeshConfig, make_mesh
from tests.tiny import run_steps, tiny_config, tiny_experiment

RNG = np.random.default_rng(0)
Z_VxNxD = (0.7 * RNG.standard_normal((2, 64, 6)) + 0.2).astype(np.float32)
DIRECTIONS_DxM = losses.slice_directions(jax.random.key(0), 6, 16)


def test_sliced_wasserstein_is_the_distance_of_sorted_samples_to_normal_quantiles():
  quantiles_N = scipy.stats.norm.ppf((np.arange(8) + 0.5) / 8)
  shuffled_N = RNG.permutation(quantiles_N)
  exact = losses.sliced_wasserstein(shuffled_N[:, None])
  np.testing.assert_allclose(exact, 0, atol=1e-12)
  np.testing.assert_allclose(losses.sliced_wasserstein(shuffled_N[:, None] + 1), 1, rtol=1e-5)
  np.testing.assert_allclose(losses.sliced_wasserstein(3 * shuffled_N[:, None]), 4 * (quantiles_N**2).mean(), rtol=1e-5)


def test_vicreg_terms_are_the_official_loss_with_the_weights_that_the_docstring_names():
  def official(z_VxNxD):
    mse = np.mean((z_VxNxD[0] - z_VxNxD[1]) ** 2)
    std = [np.mean(np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + 1e-4))) for z in z_VxNxD]
    cov = [np.sum(np.cov(z.T) ** 2) - np.sum(np.diag(np.cov(z.T)) ** 2) for z in z_VxNxD]
    return 25 * mse + 25 * sum(std) / 2 + sum(cov) / z_VxNxD.shape[-1]

  z_VxNxD = Z_VxNxD.astype(np.float64)
  loss, _ = losses.lejepa(Z_VxNxD, DIRECTIONS_DxM, num_global=2, lam=0.2, regulariser=losses.vicreg_terms)
  assert float(loss) == pytest.approx(0.008 * official(z_VxNxD), rel=1e-5)


def test_visreg_sees_scale_centre_and_shape_one_at_a_time():
  white_NxD = scipy.stats.norm.ppf((RNG.permuted(np.tile(np.arange(512), (6, 1)), axis=1).T + 0.5) / 512)
  white_NxD = (white_NxD / white_NxD.std(0)).astype(np.float32)
  value = lambda z_NxD: float(losses.visreg(z_NxD[None], DIRECTIONS_DxM))
  assert value(white_NxD) < 0.02
  assert value(3 * white_NxD) - value(white_NxD) == pytest.approx(4, rel=1e-3)
  assert value(white_NxD + 2) - value(white_NxD) == pytest.approx(4, rel=1e-3)
  two_valued_NxD = np.sign(white_NxD).astype(np.float32)
  assert value(two_valued_NxD) > 2 * value(white_NxD)


@pytest.mark.parametrize("name", REGULARISERS)
def test_eight_devices_equal_one(name):
  """Also those that sort: a sharded batch is gathered, never sorted in parts."""
  loss = jax.jit(jax.value_and_grad(lambda z: REGULARISERS[name](z, DIRECTIONS_DxM)))
  mesh = make_mesh(MeshConfig(data=8), jax.devices()[:8])
  sharded = jax.device_put(Z_VxNxD, NamedSharding(mesh, P(None, "data")))
  (value, gradient), (sharded_value, sharded_gradient) = loss(Z_VxNxD), loss(sharded)
  assert float(sharded_value) == pytest.approx(float(value), rel=1e-5)
  np.testing.assert_allclose(sharded_gradient, gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("name", REGULARISERS)
def test_every_regulariser_is_lower_for_a_gaussian_than_for_what_is_half_as_wide(name):
  z_VxNxD = RNG.standard_normal((2, 256, 6)).astype(np.float32)
  assert REGULARISERS[name](z_VxNxD, DIRECTIONS_DxM) < REGULARISERS[name](0.5 * z_VxNxD, DIRECTIONS_DxM)


def push(name: str, scale: float) -> float:
  z_VxNxD = scale * RNG.standard_normal((1, 256, 6)).astype(np.float32)
  return float(jnp.linalg.norm(jax.grad(REGULARISERS[name])(z_VxNxD, DIRECTIONS_DxM)))


def test_near_a_collapse_sigreg_hardly_pushes_and_visreg_and_vicreg_do():
  """SIGReg's gradient is linear in the embeddings there; a deviation's is as long at any scale."""
  ratio = {name: push(name, 0.05) / push(name, 0.5) for name in ("epps_pulley", "visreg", "vicreg")}
  assert ratio["epps_pulley"] < 0.3 and min(ratio["visreg"], ratio["vicreg"]) > 0.7


@pytest.mark.parametrize("name", ["visreg", "vicreg"])
def test_one_sample_has_no_deviation(name):
  with pytest.raises(ValueError, match="N of at least 2"):
    REGULARISERS[name](Z_VxNxD[:, :1], DIRECTIONS_DxM)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"objective__regulariser": "epps_puley"}, "did you mean 'epps_pulley'"),
    ({"objective__regulariser": "watson", "objective__t_max": 4.0}, "t_max.*Epps-Pulley.*leave it out"),
  ],
)
def test_settings_that_nobody_reads_or_knows_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny_config(**changes)


def test_a_run_reports_its_regulariser_by_its_name_and_only_sigreg_beside_its_reference():
  run = tiny_experiment(objective__regulariser="sliced_wasserstein")
  assert run.references == {} and tiny_experiment().references.keys() == {"sigreg"}
  _, (metrics, *_) = run_steps(run, 1)
  assert "sigreg" not in metrics and np.isfinite(metrics["sliced_wasserstein"])
  lam = run.cfg.objective.lam
  expected = (1 - lam) * metrics["inv"] + lam * metrics["sliced_wasserstein"]
  assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


FEATURES_BxVxF = np.random.default_rng(1).standard_normal((8, 4, 16)).astype(np.float32)


def test_fixed_directions_are_the_same_in_every_step_and_redrawn_ones_are_not():
  def sigreg(redraw: bool, key: int) -> float:
    run = tiny_experiment(objective__redraw=redraw)
    objective, (params, state) = run.objective, run.objective.init(jax.random.key(0), run.init_batch())
    encoded = FEATURES_BxVxF, FEATURES_BxVxF[:, :2]
    _, (aux, _) = objective.loss(params, state, None, encoded, jax.random.key(key), 0.0)
    return float(aux.metrics["sigreg"])

  assert sigreg(False, 1) == sigreg(False, 2)
  assert sigreg(True, 1) != sigreg(True, 2)


def test_a_centre_behind_a_stop_gradient_has_the_value_and_not_the_gradient_of_one_that_moves():
  of = lambda stop: jax.value_and_grad(lambda z: losses.invariance(z, 1, stop))(Z_VxNxD)
  (value, gradient), (fixed_value, fixed) = of(False), of(True)
  assert float(value) == float(fixed_value)
  np.testing.assert_allclose(fixed[1], gradient[1], rtol=1e-6)
  np.testing.assert_allclose(gradient[0], -gradient[1], rtol=1e-5, atol=1e-9)
  assert np.abs(fixed[0]).max() == 0
