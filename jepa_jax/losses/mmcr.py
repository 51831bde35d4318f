"""Maximum manifold capacity representations: the centroids of the views fill the sphere.

Legend: B images of the global batch, K views of an image, D width of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.losses.gathered import AxisName, check_axes, gathered, of_all
from jepa_jax.losses.nuclear import check_method, nuclear_norm, nuclear_norm_bound
from jepa_jax.losses.unit import TINY, length, unit

REDUCTIONS = ("sum", "bound")


def mmcr(
  z_BxKxD: jax.Array,
  z_momentum: jax.Array | None = None,
  lam: float | jax.Array = 0.0,
  reduction: str = "sum",
  method: str = "auto",
  weights: Sequence[float] | None = None,
  axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the MMCR loss (arXiv 2303.03307), lam (1/B) sum_b |Z_b|_* - |M|_*, and its terms; float32 scalars.

  Z_b (K, D) holds image b's views, each divided by its length; row b of M (B, D) is their mean, not normalised again;
  |.|_* is the nuclear norm. B is the global batch and may be sharded: value and gradient are those of one device.

  A view that is exactly zero has no direction: it stays zero, has gradient zero, and `terms["zero_rows"]` counts it.
  NaN or infinity anywhere in z makes the loss NaN. `check_embeddings` names the rows, outside of jit.

  Args:
    z_BxKxD: embeddings, any real dtype and length.
    z_momentum: (B, K', D) embeddings of an averaged network: M is then half the mean of the online views plus half the
      mean of these, which get no gradient. The local term stays that of the online views.
    lam: weight of the local term; 0, as in every official script, leaves it out (K = 1 is then allowed).
    reduction: "sum", the official scale, which grows with the batch; or "bound": |M|_* is divided by
      sqrt(B min(B, D)) and each |Z_b|_* by sqrt(K min(K, D)), their largest possible values, so that the loss is in
      [-1, lam] and one lam means the same at every B, D and K. It equals "sum" with
      lam sqrt(B min(B, D) / (K min(K, D))), up to the factor sqrt(B min(B, D)).
    method: how the nuclear norm of M is computed, see `nuclear_norm`.
    weights: of the K views in the centroid, with a sum of 1; default: equal ones.
    axis_name: of the devices that share the B images, inside of `jax.shard_map` and `jax.pmap`: all images are
      gathered, so the loss is that of the global batch. Under `jit` an array is global, and None is right.

  Returns:
    The loss, and {"nuclear_norm": |M|_*, "bound": its largest value, "percent_error", "alignment", "flatness": see
    `centroid_metrics`, "zero_rows": number of zero views}, with "local": mean |Z_b|_* where lam is not 0.

  Raises:
    ValueError: shapes that do not fit or are swapped, B < 2, K < 2 with a local term, a negative lam, unknown reduction
      or method.
  """
  z_BxKxD = gathered(z_BxKxD, 0, axis_name)
  z_momentum = z_BxKxD[:, :0] if z_momentum is None else gathered(z_momentum, 0, axis_name)
  _check(z_BxKxD, z_momentum, lam, reduction, method)
  if weights is not None and (len(weights) != z_BxKxD.shape[1] or abs(sum(weights) - 1) > 1e-6):
    raise ValueError(f"weights={tuple(weights)} are one for each of {z_BxKxD.shape[1]} views, with a sum of 1")
  batch_size, num_views, dim = z_BxKxD.shape
  unit_BxKxD, zero_BxK = unit(z_BxKxD)
  momentum_BxKxD, momentum_zero_BxK = unit(jax.lax.stop_gradient(z_momentum))
  centroids_BxD = _weighted(unit_BxKxD, weights)
  if momentum_BxKxD.shape[1]:
    centroids_BxD = (centroids_BxD + jnp.mean(momentum_BxKxD, axis=1)) / 2

  norm = nuclear_norm(centroids_BxD, method)
  bound = nuclear_norm_bound(batch_size, dim)
  terms = {"nuclear_norm": norm, "bound": jnp.float32(bound)} | centroid_metrics(centroids_BxD, norm)
  terms["zero_rows"] = jnp.float32(jnp.sum(zero_BxK) + jnp.sum(momentum_zero_BxK))
  loss = -norm / (bound if reduction == "bound" else 1)
  if not _is_zero(lam):
    terms["local"] = jnp.mean(_local(unit_BxKxD, zero_BxK))
    loss += lam * terms["local"] / (nuclear_norm_bound(num_views, dim) if reduction == "bound" else 1)
  return of_all(loss, axis_name), {name: of_all(value, axis_name) for name, value in terms.items()}


def centroid_metrics(centroids_BxD: jax.Array, norm: jax.Array) -> dict[str, jax.Array]:
  """Returns how the nuclear norm |M|_* falls short of its bound, three float32 scalars in [0, 1] (arXiv 2406.09366).

  "percent_error" is 1 - |M|_* / sqrt(B min(B, D)), comparable over B, D and K, and exactly 1 - alignment flatness:
  "alignment" |M|_F / sqrt(B) is 1 where the views of an image coincide; "flatness" |M|_* / (|M|_F sqrt(min(B, D))) is 1
  where all singular values are equal, and 0 for M = 0.

  Args:
    centroids_BxD: M, the means over each image's unit views.
    norm: its nuclear norm.
  """
  batch_size, dim = centroids_BxD.shape
  frobenius = jnp.linalg.norm(centroids_BxD.astype(jnp.float32))
  return {
    "percent_error": 1 - norm / nuclear_norm_bound(batch_size, dim),
    "alignment": frobenius / math.sqrt(batch_size),
    "flatness": norm / jnp.where(frobenius == 0, 1, frobenius) / math.sqrt(min(batch_size, dim)),
  }


def centroids(z_BxKxD: jax.Array) -> jax.Array:
  """Returns the mean over each image's views of z / |z|, not normalised again: (B, K, D) -> (B, D) float32.

  Lengths are at most 1, and 1 where all views of an image point the same way. A zero view counts as zero.
  """
  return jnp.mean(unit(z_BxKxD)[0], axis=1)


def check_embeddings(z_BxKxD: jax.Array | np.ndarray, most: int = 8) -> None:
  """Raises a ValueError that names the views which are zero or not finite; on the host, for use outside of jit.

  Args:
    z_BxKxD: embeddings, all of them addressable from this process.
    most: rows named per kind of fault.
  """
  z_BxKxD = np.asarray(z_BxKxD, np.float32)
  if z_BxKxD.ndim != 3:
    raise ValueError(f"z must be (B images, K views, D), got shape {z_BxKxD.shape}")
  size_BxK = np.max(np.abs(z_BxKxD), axis=2)
  problems = []
  for fault, bad_BxK in (("not finite", ~np.isfinite(size_BxK)), ("zero, without direction", size_BxK < TINY)):
    rows = [f"({b}, {k})" for b, k in np.argwhere(bad_BxK)]
    if rows:
      problems.append(f"{len(rows)} {fault}: {', '.join(rows[:most])}{', ...' if len(rows) > most else ''}")
  if problems:
    raise ValueError(f"embeddings (image, view) of {z_BxKxD.shape[0]} x {z_BxKxD.shape[1]}: {'; '.join(problems)}")


def _check(z_BxKxD, z_momentum, lam, reduction, method) -> None:
  if z_BxKxD.ndim != 3 or 0 in z_BxKxD.shape:
    raise ValueError(f"z must be (B images, K views, D), got shape {z_BxKxD.shape}; one view: z[:, None]")
  batch_size, num_views, dim = z_BxKxD.shape
  if batch_size < 2:
    raise ValueError(f"MMCR spreads the centroids of a batch: it needs B >= 2 images, got {batch_size}")
  check_axes(num_views, batch_size, wanted="(B images, K views, D)")
  if z_momentum.ndim != 3 or (z_momentum.shape[0], z_momentum.shape[2]) != (batch_size, dim):
    raise ValueError(f"z_momentum must be ({batch_size}, views, {dim}), as z {z_BxKxD.shape}, got {z_momentum.shape}")
  if isinstance(lam, int | float) and not lam >= 0:
    raise ValueError(f"lam must not be negative, got {lam}: the local term is to be small")
  if num_views < 2 and not _is_zero(lam):
    raise ValueError(f"the local term compares an image's views: K >= 2, got {num_views}; set lam=0 or add views")
  if reduction not in REDUCTIONS:
    raise ValueError(f"reduction must be 'sum' or 'bound', got {reduction!r}")
  check_method(method)


def _weighted(unit_BxKxD: jax.Array, weights: Sequence[float] | None) -> jax.Array:
  if weights is None:
    return jnp.mean(unit_BxKxD, axis=1)
  return jnp.einsum("bkd,k->bd", unit_BxKxD, jnp.asarray(weights, jnp.float32), precision="highest")


def _is_zero(lam: float | jax.Array) -> bool:
  """Whether lam is the number 0, known when tracing."""
  return isinstance(lam, int | float) and lam == 0


def _local(unit_BxKxD: jax.Array, zero_BxK: jax.Array) -> jax.Array:
  """Returns |Z_b|_* of every image's unit views, (B,).

  K = 2: sqrt(1 + s) + sqrt(1 - s), s the cosine, written as (|a + b| + |a - b|) / sqrt 2, which does not cancel at
  s = 1. Otherwise by the eigenvalues of the K x K Gram matrix: singular values below 3e-4 of the largest count as zero,
  which is harmless here, where the views are to coincide. Zero singular values have gradient zero.
  """
  num_views, dim = unit_BxKxD.shape[1:]
  if num_views == 2:
    a_BxD, b_BxD = unit_BxKxD[:, 0], unit_BxKxD[:, 1]
    lengths = [length(x, at_zero=0) for x in (a_BxD + b_BxD, a_BxD - b_BxD)]
    return (lengths[0] + lengths[1]) / jnp.where(jnp.any(zero_BxK, axis=1), 2, math.sqrt(2))
  gram = jnp.einsum("bkd,bjd->bkj", unit_BxKxD, unit_BxKxD, precision="highest")
  values_BxK = jnp.linalg.eigvalsh(gram)
  real_BxK = values_BxK > np.finfo(np.float32).eps * num_views * values_BxK[:, -1:]
  return jnp.sum(jnp.where(real_BxK, jnp.sqrt(jnp.where(real_BxK, values_BxK, 1)), 0), axis=-1)
