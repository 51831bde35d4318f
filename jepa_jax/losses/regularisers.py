"""What keeps embeddings from collapsing, as choices of one interface: SIGReg with any univariate test, VISReg, VICReg.

Each is (z_VxNxD, directions_DxM) -> a float32 scalar, the mean over the V views; N samples of all devices, D width, M
slices. All are plain expressions of the global batch, so they are exact on any mesh; those that sort gather the samples
of a slice on one device first. Their scales differ: a `lam` carries over from one to another only where it says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # its parts are loaded when they are used

from jepa_jax.losses import univariate
from jepa_jax.losses.ecf import epps_pulley, epps_pulley_mean, epps_pulley_paper
from jepa_jax.losses.sigreg import Statistic, sliced

Regulariser = Callable[[jax.Array, jax.Array], jax.Array]
_LEAST_VARIANCE = 1e-4  # VICReg's, under the root: at a collapse the gradient of a deviation would be infinite
_LEAST_DEVIATION = 1e-6  # VISReg's


def visreg(z_VxNxD: jax.Array, directions_DxM: jax.Array) -> jax.Array:
  """Returns VISReg's scale + centre + shape (arXiv 2606.02572), with weights of 1: 0 where embeddings are N(0, I).

  Scale is the mean over dimensions of (1 - deviation)^2, the deviation with N and at least 1e-6; centre that of the
  squared means; shape the mean over directions of the mean square between sorted samples, less their mean and divided
  by their deviation, which this term takes as given, and the normal quantiles of i / (N + 1). The gradient of the scale
  term does not vanish with the scale of the embeddings.
  """
  z_VxNxD = _at_least_two(z_VxNxD)
  mean_Vx1xD = jnp.mean(z_VxNxD, axis=1, keepdims=True)
  variance_Vx1xD = jnp.var(z_VxNxD, axis=1, keepdims=True)
  is_some = variance_Vx1xD > _LEAST_DEVIATION**2
  std_Vx1xD = jnp.where(is_some, jnp.sqrt(jnp.where(is_some, variance_Vx1xD, 1)), _LEAST_DEVIATION)
  white_VxNxD = (z_VxNxD - mean_Vx1xD) / jax.lax.stop_gradient(std_Vx1xD)
  x_VxNxM = jnp.sort(jnp.matmul(white_VxNxD, directions_DxM.astype(jnp.float32), precision="highest"), axis=1)
  num = z_VxNxD.shape[1]
  quantiles_Nx1 = scipy.special.ndtri(np.arange(1, num + 1) / (num + 1)).astype(np.float32)[:, None]
  shape = jnp.mean((x_VxNxM - quantiles_Nx1) ** 2)
  return jnp.mean((1 - std_Vx1xD) ** 2) + jnp.mean(mean_Vx1xD**2) + shape


def vicreg_terms(z_VxNxD: jax.Array, directions_DxM: jax.Array | None = None) -> jax.Array:
  """Returns VICReg's variance + .08 covariance (arXiv 2105.04906); directions are not used.

  Variance is the mean over dimensions of max(0, 1 - deviation), covariance the sum of squares off the diagonal of the
  covariance matrix over D, both with N - 1. With lam = .2 and two views `lejepa` is .008 times the official loss, whose
  weights are 25, 25 and 1: its mean square between two views is four times our invariance.
  """
  del directions_DxM
  z_VxNxD = _at_least_two(z_VxNxD)
  return jnp.mean(jax.nn.relu(1 - deviation(z_VxNxD))) + 0.08 * covariance_term(z_VxNxD)


def covariance_term(z_VxNxD: jax.Array) -> jax.Array:
  """Returns the sum of squares off the diagonal of the covariance matrix (N - 1), over D; the mean over views."""
  num_samples, width = z_VxNxD.shape[1:]
  centred_VxNxD = z_VxNxD - jnp.mean(z_VxNxD, axis=1, keepdims=True)
  covariance_VxDxD = jnp.einsum("vnd,vne->vde", centred_VxNxD, centred_VxNxD, precision="highest") / (num_samples - 1)
  others_VxDxD = covariance_VxDxD * (1 - jnp.eye(width))
  return jnp.mean(jnp.sum(others_VxDxD**2, axis=(1, 2))) / width


def deviation(z_VxNxD: jax.Array) -> jax.Array:
  """Returns sqrt(variance + 1e-4) of every view and dimension (V, 1, D), the variance with N - 1."""
  return jnp.sqrt(jnp.var(z_VxNxD, axis=1, ddof=1, keepdims=True) + _LEAST_VARIANCE)


def _at_least_two(z_VxNxD: jax.Array) -> jax.Array:
  if z_VxNxD.ndim != 3 or z_VxNxD.shape[1] < 2:
    raise ValueError(f"z must be (V views, N samples, D) with N of at least 2, got shape {z_VxNxD.shape}")
  return z_VxNxD.astype(jnp.float32)


def _sliced(statistic: Statistic) -> Regulariser:
  return functools.partial(sliced, statistic=statistic)


# Univariate tests, along random directions. Not among them: Shapiro-Wilk's, which is blind to scale, and Vasicek's
# entropy, which takes more samples than networks are made with.
STATISTICS: dict[str, Statistic] = {
  "epps_pulley": epps_pulley,
  "epps_pulley_paper": epps_pulley_paper,
  "epps_pulley_mean": epps_pulley_mean,
  "cramer_von_mises": univariate.cramer_von_mises,
  "watson": univariate.watson,
  "anderson_darling": univariate.anderson_darling,
  "vcreg": univariate.vcreg,
  "extended_jarque_bera": univariate.extended_jarque_bera,
  "moments": univariate.moments,
  "sliced_wasserstein": univariate.sliced_wasserstein,
}
REGULARISERS: dict[str, Regulariser] = {name: _sliced(of) for name, of in STATISTICS.items()}
REGULARISERS |= {"visreg": visreg, "vicreg": vicreg_terms}
