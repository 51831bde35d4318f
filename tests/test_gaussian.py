"""Distances from N(0, I) in closed form, against slices, samples and quadrature."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.spatial
import scipy.stats

from jepa_jax.losses import COLLAPSE_PER_SAMPLE, epps_pulley
from jepa_jax.theory import energy_distance, lidar, sliced_epps_pulley
from jepa_jax.theory.gaussian import _mean_distance

RNG = np.random.default_rng(0)
WIDE_NxD = 2 * RNG.standard_normal((200, 5)) + 0.3


def test_infinitely_many_slices_are_the_limit_of_many():
  directions_DxM = RNG.standard_normal((5, 4096))
  directions_DxM /= np.linalg.norm(directions_DxM, axis=0)
  many = float(epps_pulley(WIDE_NxD @ directions_DxM, t_max=6.0, num_knots=65).mean())
  assert sliced_epps_pulley(WIDE_NxD) == pytest.approx(many, rel=0.01)


def test_in_one_dimension_the_only_direction_is_exact():
  x_Nx1 = RNG.standard_normal((64, 1))
  assert sliced_epps_pulley(x_Nx1) == pytest.approx(float(epps_pulley(x_Nx1, 8.0, 129)[0]), rel=1e-4)


@pytest.mark.parametrize("width", [2, 64, 512])
def test_a_gaussian_has_the_expected_value_and_a_collapse_the_largest(width):
  values = [sliced_epps_pulley(RNG.standard_normal((200, width))) for _ in range(40)]
  assert np.mean(values) == pytest.approx(1.0594, abs=4 * np.std(values) / np.sqrt(40))
  assert sliced_epps_pulley(np.zeros((50, width))) / 50 == pytest.approx(0.40892308)
  assert pytest.approx(COLLAPSE_PER_SAMPLE, rel=0.02) == 0.40892308  # the official grid ends at 3


@pytest.mark.parametrize("width", [2, 64, 512])
def test_energy_distance_is_zero_on_average_for_a_gaussian_and_positive_for_all_else(width):
  values = [energy_distance(RNG.standard_normal((500, width))) for _ in range(40)]
  assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(40)
  assert energy_distance(0.7 * RNG.standard_normal((500, width))) > 10 * np.std(values)


def test_energy_distance_is_that_of_samples():
  gaussian_MxD = RNG.standard_normal((4000, 5))
  to, own = scipy.spatial.distance.cdist(WIDE_NxD, gaussian_MxD).mean(), scipy.spatial.distance.pdist
  expected = 2 * to - own(WIDE_NxD).mean() - own(gaussian_MxD).mean()
  assert energy_distance(WIDE_NxD) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("width", [2, 3, 64, 128, 512])
@pytest.mark.parametrize("square", [0.0, 1.0, 100.0, 1e4])
def test_the_mean_distance_to_a_gaussian_is_the_mean_of_a_noncentral_chi(width, square):
  """Where SciPy's hyp1f1 is infinite, too (from a width of 128 on)."""
  low, high = 0, (np.sqrt(square) + 12 + np.sqrt(width) * 3) ** 2
  density = scipy.stats.ncx2(width, square).pdf if square else scipy.stats.chi2(width).pdf
  middle = width + square
  mean, _ = scipy.integrate.quad(lambda x: np.sqrt(x) * density(x), low, high, points=[middle], limit=500)
  assert _mean_distance(np.array([square]), width)[0] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(("of", "least"), [(sliced_epps_pulley, 1), (energy_distance, 2)])
def test_too_few_samples_and_other_shapes_are_refused(of, least):
  for shape in ((least - 1, 3), (3,), (2, 2, 2)):
    with pytest.raises(ValueError, match=f"N of at least {least}"):
      of(np.zeros(shape))


def test_lidar_counts_the_directions_in_which_images_differ_more_than_their_views():
  signal_NxR, noise = RNG.standard_normal((4000, 3)), RNG.standard_normal((4000, 4, 8))
  z_NxVxD = 1e-2 * noise
  z_NxVxD[..., :3] += signal_NxR[:, None]
  assert lidar(z_NxVxD) == pytest.approx(3, rel=0.02)
  stretch_DxD = np.linalg.qr(RNG.standard_normal((8, 8)))[0] @ np.diag(np.geomspace(1, 5, 8))
  assert lidar(z_NxVxD @ stretch_DxD, delta=0) == pytest.approx(lidar(z_NxVxD, delta=0), rel=1e-6)
  assert lidar(np.zeros((4, 2, 3))) == 0
  with pytest.raises(ValueError, match="N and V of at least 2"):
    lidar(z_NxVxD[:, :1])
