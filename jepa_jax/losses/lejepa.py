"""The LeJEPA loss: views agree with the mean of the global views, and every view's embeddings are Gaussian.

Legend: V views (global ones first), N samples, D width of an embedding, M slices.
Conventions of the mixing weight differ between codebases; the converters below return lam of *this* loss,
(1 - lam) inv + lam sig with the official statistic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jepa_jax.losses.ecf import epps_pulley
from jepa_jax.losses.gathered import AxisName, check_axes, gathered, of_all
from jepa_jax.losses.regularisers import Regulariser
from jepa_jax.losses.sigreg import Statistic, sliced


def invariance(z_VxNxD: jax.Array, num_global: int, stop_gradient: bool = False) -> jax.Array:
  """Returns the mean over V, N, D of (mu - z)^2, mu the mean of the first `num_global` views; a float32 scalar.

  Nothing is detached, the centre moves too, unless `stop_gradient` is asked for. Without local views num_global = V.

  Raises:
    ValueError: z is not (V, N, D), or num_global is not in 1..V.
  """
  if z_VxNxD.ndim != 3:
    raise ValueError(f"z must be (V views, N samples, D), got shape {z_VxNxD.shape}")
  num_views = z_VxNxD.shape[0]
  if not 1 <= num_global <= num_views:
    raise ValueError(f"num_global must be in 1..{num_views}, the number of views, got {num_global}")
  z_VxNxD = z_VxNxD.astype(jnp.float32)
  centre_NxD = jnp.mean(z_VxNxD[:num_global], axis=0)
  if stop_gradient:
    centre_NxD = jax.lax.stop_gradient(centre_NxD)
  return jnp.mean((centre_NxD - z_VxNxD) ** 2)


def lejepa(
  z_VxNxD: jax.Array,
  directions_DxM: jax.Array,
  num_global: int,
  lam: float | jax.Array,
  statistic: Statistic = epps_pulley,
  regulariser: Regulariser | None = None,
  stop_gradient: bool = False,
  axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the LeJEPA loss (arXiv 2511.08544, Alg. 2): (1 - lam) inv + lam sig, and {"inv", "sigreg"}.

  inv is `invariance`; sig is the mean over views of SIGReg over each view's N samples, all of them on all devices, by
  `statistic`; or what `regulariser` (one of `REGULARISERS`) makes of z and the directions, in a scale of its own.
  axis_name: of the devices that share the N samples, inside of `jax.shard_map` and `jax.pmap`, see `sliced`.

  Raises:
    ValueError: num_global is not in 1..V, lam (where it is a number) not in [0, 1], shapes disagree, or views and
      samples are swapped.
  """
  if isinstance(lam, int | float) and not 0 <= lam <= 1:
    raise ValueError(f"lam must be in [0, 1], got {lam}; for 'inv + weight sig' use lam_from_additive(weight)")
  z_VxNxD = gathered(z_VxNxD, 1, axis_name) if z_VxNxD.ndim == 3 else z_VxNxD
  inv = invariance(z_VxNxD, num_global, stop_gradient)
  check_axes(*z_VxNxD.shape[:2], wanted="(V views, N samples, D)")
  sig = regulariser(z_VxNxD, directions_DxM) if regulariser else sliced(z_VxNxD, directions_DxM, statistic)
  inv, sig = of_all(inv, axis_name), of_all(sig, axis_name)
  return (1 - lam) * inv + lam * sig, {"inv": inv, "sigreg": sig}


def lam_from_additive(weight: float) -> float:
  """Returns the lam whose loss is 1 / (1 + weight) of `inv + weight sig`, the mix of stable-pretraining.

  The scale is without effect on Adam. stable-pretraining also pools the views: there, give `lejepa`'s sig about V times
  the weight, or use `pooled_views`.
  """
  if weight < 0:
    raise ValueError(f"weight must not be negative, got {weight}")
  return weight / (1 + weight)


def additive_from_lam(lam: float) -> float:
  """Returns the weight whose `inv + weight sig` is `(1 - lam) inv + lam sig` up to the scale 1 - lam."""
  if not 0 <= lam < 1:
    raise ValueError(f"lam must be in [0, 1), got {lam}")
  return lam / (1 - lam)


def lam_from_bcs(weight: float, num_samples: int) -> float:
  """Returns the lam of eb_jepa's `mse(z_1, z_2) + weight BCS` at a batch of `num_samples`; 0.0097 for 10 at 256.

  Two factors: BCS is not multiplied by N, so a weight of 10 is 10/256 = 0.039 of ours; and the mean square between two
  views is four times `invariance`, whose distances are to their midpoint. The grids differ by less than 2 %.
  """
  if num_samples < 1:
    raise ValueError(f"num_samples must be at least 1, got {num_samples}")
  return lam_from_additive(weight / (4 * num_samples))
