"""Losses of the methods around the JEPA family: VICReg, Barlow Twins, SimCLR, BYOL, MoCo v3, DINO, MAE.

Each returns (loss, terms), float32 scalars, and is a plain expression of the global batch: exact under any sharding.
Legend: B images of all devices, V views, G views of a teacher, D width, P prototypes, N patches, C numbers of a patch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jepa_jax.losses.regularisers import covariance_term, deviation
from jepa_jax.losses.unit import unit

Terms = dict[str, jax.Array]
_BATCH_NORM_EPSILON = 1e-5  # torch's


def vicreg(
  z_BxVxD: jax.Array, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> tuple[jax.Array, Terms]:
  """Returns VICReg's loss (arXiv 2105.04906) and {"inv", "var", "cov"}, before their weights.

  inv: the mean square between two views, the mean over pairs; var: max(0, 1 - deviation), the mean over views and
  dimensions; cov: squares off the diagonal of the covariance over D, twice the mean over views (their sum where V = 2).
  Deviations and covariances with N - 1.
  """
  z_VxBxD = _views(z_BxVxD, least=2)
  num_views = len(z_VxBxD)
  square = jnp.mean((z_VxBxD[:, None] - z_VxBxD[None]) ** 2, axis=(2, 3))  # of all pairs, both ways, and of none
  terms = {
    "inv": jnp.sum(square) / (num_views * (num_views - 1)),
    "var": jnp.mean(jax.nn.relu(1 - deviation(z_VxBxD))),
    "cov": 2 * covariance_term(z_VxBxD),
  }
  return invariance * terms["inv"] + variance * terms["var"] + covariance * terms["cov"], terms


def barlow_twins(z_BxVxD: jax.Array, lam: float = 0.0051) -> tuple[jax.Array, Terms]:
  """Returns the loss of Barlow Twins (arXiv 2103.03230) of two views, and {"on_diagonal", "off_diagonal"}.

  sum_i (1 - c_ii)^2 + lam sum_{i != j} c_ij^2 with c the cross-correlation of the two, each normalised over the global
  batch as BatchNorm does (biased variance + 1e-5), so that a constant dimension correlates with nothing.
  """
  first_BxD, second_BxD = _views(z_BxVxD, exactly=2)
  c_DxD = jnp.einsum("bi,bj->ij", _standard(first_BxD), _standard(second_BxD), precision="highest") / len(first_BxD)
  diagonal_D = jnp.diagonal(c_DxD)
  on = jnp.sum((1 - diagonal_D) ** 2)
  off = jnp.sum(c_DxD**2) - jnp.sum(diagonal_D**2)
  return on + lam * off, {"on_diagonal": on, "off_diagonal": off}


def nt_xent(z_BxVxD: jax.Array, temperature: float = 0.5) -> tuple[jax.Array, Terms]:
  """Returns SimCLR's loss (arXiv 2002.05709) of two views, and {"accuracy"}: how often the other view is nearest, %.

  The mean over the 2B rows of the cross-entropy of cosine / temperature with the other view against all other rows.
  """
  _check_temperature(temperature)
  first_BxD, second_BxD = _views(z_BxVxD, exactly=2)
  unit_RxD = _directions(jnp.concatenate([first_BxD, second_BxD]))
  num = len(first_BxD)
  logits_RxR = _products(unit_RxD, unit_RxD) / temperature
  logits_RxR = jnp.where(jnp.eye(2 * num, dtype=bool), -jnp.inf, logits_RxR)
  return _cross_entropy(logits_RxR, jnp.roll(jnp.arange(2 * num), num))


def byol(prediction_BxVxD: jax.Array, target_BxVxD: jax.Array) -> tuple[jax.Array, Terms]:
  """Returns 2 - 2 cosine of a view's prediction with every other view's target, the mean, and {"cosine"}.

  BYOL (arXiv 2006.07733), and SimSiam's up to scale and a constant where targets are the online projections. No
  gradient goes to the targets.
  """
  prediction, target = _views(prediction_BxVxD, least=2), jax.lax.stop_gradient(_views(target_BxVxD, least=2))
  cosine_VxW = jnp.mean(
    jnp.einsum("vbd,wbd->vwb", _directions(prediction), _directions(target), precision="highest"), axis=-1
  )
  num_views = len(cosine_VxW)
  cosine = (jnp.sum(cosine_VxW) - jnp.trace(cosine_VxW)) / (num_views * (num_views - 1))
  return 2 - 2 * cosine, {"cosine": cosine}


def moco_v3(query_BxVxD: jax.Array, key_BxVxD: jax.Array, temperature: float = 0.2) -> tuple[jax.Array, Terms]:
  """Returns MoCo v3's loss (arXiv 2104.02057) of two views, and {"accuracy"} of the queries in %.

  2 T times the sum over both directions of the cross-entropy of a query of one view with the key of the same image in
  the other view, against the keys of the global batch. No gradient goes to the keys.
  """
  _check_temperature(temperature)
  queries, keys = _views(query_BxVxD, exactly=2), jax.lax.stop_gradient(_views(key_BxVxD, exactly=2))
  rows_B = jnp.arange(len(queries[0]))
  both = [
    _cross_entropy(_products(_directions(queries[i]), _directions(keys[1 - i])) / temperature, rows_B) for i in (0, 1)
  ]
  loss = 2 * temperature * (both[0][0] + both[1][0])
  return loss, {"accuracy": (both[0][1]["accuracy"] + both[1][1]["accuracy"]) / 2}


def dino(
  student_BxVxP: jax.Array,
  teacher_BxGxP: jax.Array,
  centre_P: jax.Array,
  student_temperature: float = 0.1,
  teacher_temperature: float | jax.Array = 0.04,
) -> tuple[jax.Array, Terms]:
  """Returns DINO's loss (arXiv 2104.14294), and {"teacher_entropy"}, at most log P.

  The mean over pairs of a teacher's view and another view of the student of the cross-entropy of softmax((t - centre)
  / T_t) with softmax(s / T_s). The teacher's G views are the first ones of the student. No gradient goes to the
  teacher. The centre moves afterwards: `dino_centre`.
  """
  _check_temperature(student_temperature)
  student, teacher = _views(student_BxVxP, least=2), jax.lax.stop_gradient(_views(teacher_BxGxP, least=1))
  if len(teacher) > len(student):
    raise ValueError(f"the teacher has {len(teacher)} views and the student {len(student)}: the teacher's come first")
  target_GxBxP = jax.nn.softmax((teacher - centre_P) / teacher_temperature)
  log_VxBxP = jax.nn.log_softmax(student / student_temperature)
  entropy_GxV = -jnp.einsum("gbp,vbp->gv", target_GxBxP, log_VxBxP, precision="highest") / student.shape[1]
  same = jnp.trace(entropy_GxV)
  pairs = len(teacher) * (len(student) - 1)
  teacher_entropy = jnp.mean(jnp.sum(jax.scipy.special.entr(target_GxBxP), axis=-1))
  return (jnp.sum(entropy_GxV) - same) / pairs, {"teacher_entropy": teacher_entropy}


def dino_centre(centre_P: jax.Array, teacher_BxGxP: jax.Array, momentum: float = 0.9) -> jax.Array:
  """Returns DINO's centre after a batch: a moving average of the teacher's mean output, of all views and devices."""
  return momentum * centre_P + (1 - momentum) * jnp.mean(teacher_BxGxP.astype(jnp.float32), axis=(0, 1))


def mae(prediction_BxNxC: jax.Array, target_BxNxC: jax.Array, masked_BxN: jax.Array) -> tuple[jax.Array, Terms]:
  """Returns the mean square error of the removed patches (MAE, arXiv 2111.06377), and {"masked"}: their share.

  `masked` is 1 or True where a patch was removed. Targets are pixels, or `patch_targets` of them.
  """
  if prediction_BxNxC.shape != target_BxNxC.shape or masked_BxN.shape != target_BxNxC.shape[:2]:
    shapes = prediction_BxNxC.shape, target_BxNxC.shape, masked_BxN.shape
    raise ValueError(f"prediction and target must be (B, N, C) and masked (B, N), got {shapes}")
  masked_BxN = masked_BxN.astype(jnp.float32)
  error_BxN = jnp.mean((prediction_BxNxC.astype(jnp.float32) - target_BxNxC) ** 2, axis=-1)
  return jnp.sum(error_BxN * masked_BxN) / jnp.sum(masked_BxN), {"masked": jnp.mean(masked_BxN)}


def patch_targets(patches_BxNxC: jax.Array) -> jax.Array:
  """Returns every patch less its mean, divided by sqrt(unbiased variance + 1e-6): MAE's `norm_pix_loss`, as
  torch.var."""
  patches_BxNxC = patches_BxNxC.astype(jnp.float32)
  variance_BxNx1 = jnp.var(patches_BxNxC, axis=-1, ddof=1, keepdims=True)
  return (patches_BxNxC - jnp.mean(patches_BxNxC, axis=-1, keepdims=True)) / jnp.sqrt(variance_BxNx1 + 1e-6)


def _views(z_BxVxD: jax.Array, least: int = 1, exactly: int = 0) -> jax.Array:
  """Returns z as (V, B, D), float32."""
  if z_BxVxD.ndim != 3:
    raise ValueError(f"z must be (B images, V views, D), got shape {z_BxVxD.shape}")
  num_images, num_views = z_BxVxD.shape[:2]
  if num_views < least or (exactly and num_views != exactly):
    wanted = f"exactly {exactly}" if exactly else f"at least {least}"
    raise ValueError(f"this loss takes {wanted} views of each image, got {num_views}: shape {z_BxVxD.shape}")
  if num_images < 2:
    raise ValueError(f"this loss compares images, and there is {num_images}: give a batch of 2 or more")
  return z_BxVxD.astype(jnp.float32).swapaxes(0, 1)


def _check_temperature(temperature: float) -> None:
  if isinstance(temperature, int | float) and not temperature > 0:
    raise ValueError(f"temperature={temperature} must be above 0, such as .1 to .5")


def _directions(x: jax.Array) -> jax.Array:
  return unit(x)[0]


def _standard(x_BxD: jax.Array) -> jax.Array:
  return (x_BxD - jnp.mean(x_BxD, axis=0)) * jax.lax.rsqrt(jnp.var(x_BxD, axis=0) + _BATCH_NORM_EPSILON)


def _products(a_RxD: jax.Array, b_SxD: jax.Array) -> jax.Array:
  return jnp.matmul(a_RxD, b_SxD.T, precision="highest")


def _cross_entropy(logits_RxS: jax.Array, right_R: jax.Array) -> tuple[jax.Array, Terms]:
  own_R = jnp.take_along_axis(logits_RxS, right_R[:, None], axis=1)[:, 0]
  loss = jnp.mean(jax.nn.logsumexp(logits_RxS, axis=1) - own_R)
  return loss, {"accuracy": 100 * jnp.mean(jnp.argmax(logits_RxS, axis=1) == right_R)}
