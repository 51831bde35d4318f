"""Ranks of predictions in a bank of candidates: how IWM (arXiv 2403.00504) tells equivariance from invariance.

Legend: Q predictions, K candidates of the bank, T patches, D width.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

Distance = Literal["l2", "cosine"]
DISTANCES = get_args(Distance)


def distances(prediction_QxTxD, bank_KxTxD, valid_T, distance: str = "l2") -> jax.Array:
  """Returns what orders a bank by its distance from each prediction, (Q, K), float32.

  "l2": squared distance over the valid patch tokens, less the prediction's own square, which changes no order.
  "cosine": minus the cosine of the means of the valid tokens.
  """
  weight_T = valid_T.astype(jnp.float32)
  prediction, bank = prediction_QxTxD.astype(jnp.float32), bank_KxTxD.astype(jnp.float32)
  # In TF32 or bfloat16 products near candidates would change places.
  precision = jax.lax.Precision.HIGHEST
  if distance == "l2":
    bank = bank * weight_T[:, None]
    product_QxK = jnp.einsum("qtd,ktd->qk", prediction, bank, precision=precision)
    return jnp.square(bank).sum((1, 2)) - 2 * product_QxK
  if distance != "cosine":
    raise ValueError(f"distance {distance!r}: choose one of {', '.join(DISTANCES)}")
  pooled = (jnp.einsum("ktd,t->kd", x, weight_T, precision=precision) for x in (prediction, bank))
  prediction_QxD, bank_KxD = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in pooled)
  return -jnp.einsum("qd,kd->qk", prediction_QxD, bank_KxD, precision=precision)


def reciprocal_ranks(distance_QxK, truth_Q) -> jax.Array:
  """Returns 1 / rank (Q,) of each prediction's own candidate, truth_Q, among the bank; equals count half."""
  own_Qx1 = jnp.take_along_axis(distance_QxK, truth_Q[:, None], axis=1)
  nearer_Q, equal_Q = (distance_QxK < own_Qx1).sum(1), (distance_QxK == own_Qx1).sum(1)
  return 1 / (1 + nearer_Q + (equal_Q - 1) / 2)


def blind_mrr(num_bank: int) -> float:
  """Returns the mean reciprocal rank of predictions that do not depend on the action: sum_r 1/r / K (.0239 at 256)."""
  return sum(1 / rank for rank in range(1, num_bank + 1)) / num_bank
