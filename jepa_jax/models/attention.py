"""The one attention call of all networks: which implementation runs is decided here, and nowhere else.

What it costs is counted by `flops.matrix_flops`, also where a kernel hides its products (`flops.KERNELS`).
Legend: B sequences, N queries, M keys, D width, H heads, K head width.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jepa_jax.models.linear import Linear, WeightGrads
from jepa_jax.models.position import rotate
from jepa_jax.models.recompute import KEPT_ATTENTION, KEPT_QKV
from jepa_jax.sharding import constrain

AttentionKind = Literal["auto", "xla", "plain", "cudnn"]

_CUDNN_MULTIPLE = 8  # of the lengths that cuDNN takes, with a length per sequence, and of the head width
_CUDNN_MAX_HEAD_WIDTH = 128
_CUDNN_DTYPES = ("bfloat16", "float16")


def attend(
  q_BxNxHxK: jax.Array,
  k_BxMxHxK: jax.Array,
  v_BxMxHxK: jax.Array,
  num_valid_B: jax.Array | None = None,
  kind: AttentionKind = "auto",
  causal: bool = False,
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(K)) v, (B, N, H, K), softmax in float32.

  Args:
    num_valid_B: how many keys of each sequence are seen, the first ones, at least 1; None: all.
    kind: "xla" keeps q, k, v, the result and one number per query, and makes the weights again for the gradient (as
      FlashAttention does, arXiv 2205.14135, though not in blocks); "plain" keeps the weights, as differentiation
      would; "cudnn" is NVIDIA's fused kernel, which never writes the weights down; "auto" is cudnn on NVIDIA GPUs where
      it takes the shapes, else xla.
    causal: query i sees the keys 0 to i only.

  Only "plain" has derivatives of every kind: "xla" none in forward mode (jax.jvp), "cudnn" no second ones either, and
  under vmap it needs queries that are mapped.

  Raises:
    ValueError: kind="cudnn" where this device or these shapes cannot have it.
  """
  if kind == "plain":
    lengths = {"key_value_seq_lengths": num_valid_B, "implementation": "xla", "is_causal": causal}
    return jax.nn.dot_product_attention(q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, **lengths)
  refusal = cudnn_refusal(q_BxNxHxK)
  if kind == "cudnn" and refusal:
    raise ValueError(f"attention='cudnn' cannot run here: {refusal}; attention='auto', 'xla' and 'plain' can")
  if kind == "xla" or refusal:
    return _attend_xla(causal, q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, num_valid_B)
  return _attend_cudnn(q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, num_valid_B, causal)


def cudnn_refusal(q_BxNxHxK: jax.Array) -> str | None:
  """Returns why cuDNN's kernel cannot run here with these queries, or None: it can."""
  num_queries, head_width, dtype = q_BxNxHxK.shape[1], q_BxNxHxK.shape[3], q_BxNxHxK.dtype.name
  if not on_nvidia():
    return f"this is no NVIDIA GPU of compute capability 8 or above ({jax.default_backend()})"
  if dtype not in _CUDNN_DTYPES:
    return f"products are in {dtype}, and it has {' and '.join(_CUDNN_DTYPES)} only"
  if head_width > _CUDNN_MAX_HEAD_WIDTH or head_width % _CUDNN_MULTIPLE:
    return f"heads are {head_width} wide, and it takes multiples of {_CUDNN_MULTIPLE} up to {_CUDNN_MAX_HEAD_WIDTH}"
  if num_queries == 1:  # padding would do eight times the work
    return "there is one query"
  return None


_compiled_for: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("compiled_for", default=None)


@contextlib.contextmanager
def compiled_for(capability: tuple[int, int]) -> Iterator[None]:
  """Within, programs are for NVIDIA GPUs of this compute capability, whatever this machine has."""
  token = _compiled_for.set(capability)
  try:
    yield
  finally:
    _compiled_for.reset(token)


def on_nvidia() -> bool:
  """Returns whether programs are for NVIDIA GPUs that cuDNN has a fused attention for."""
  if (given := _compiled_for.get()) is not None:
    return given >= (8, 0)
  capability = getattr(jax.devices()[0], "compute_capability", "") if jax.default_backend() == "gpu" else ""
  return str(capability).partition(".")[0].isdecimal() and float(capability) >= 8  # of AMD it is "gfx90a"


def _attend_cudnn(q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, num_valid_B, causal):
  """Gradients are refused at odd lengths, and a mask of keys at all: lengths are padded, and given per sequence."""
  num_queries, num_keys = q_BxNxHxK.shape[1], k_BxMxHxK.shape[1]
  q, k, v = _padded(q_BxNxHxK), _padded(k_BxMxHxK), _padded(v_BxMxHxK)
  lengths = {}
  if num_valid_B is not None or k.shape[1] > num_keys:
    # Made from q: under vmap JAX's rule for the kernel needs lengths that are mapped as q is.
    zero_B = q[:, 0, 0, 0].astype(jnp.int32) & 0
    lengths["query_seq_lengths"] = zero_B + q.shape[1]
    lengths["key_value_seq_lengths"] = zero_B + (num_keys if num_valid_B is None else num_valid_B)
  out = jax.nn.dot_product_attention(q, k, v, **lengths, is_causal=causal, implementation="cudnn")
  return out[:, :num_queries]


def _padded(x_BxNxHxK: jax.Array) -> jax.Array:
  more = -x_BxNxHxK.shape[1] % _CUDNN_MULTIPLE
  return jnp.pad(x_BxNxHxK, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x_BxNxHxK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_xla(causal, q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, num_valid_B):
  return _forward(causal, q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, num_valid_B)[0]


_LOWEST = np.finfo(np.float32).min
# Heads come before positions within: on a CPU XLA transposes scores, which are larger, where they do not.
_by_head = lambda x_BxNxHxK: x_BxNxHxK.transpose(0, 2, 1, 3)
_f32_einsum = lambda form, *args: jnp.einsum(form, *args, preferred_element_type=jnp.float32)


def _scores(causal, q_BxHxNxK, k_BxHxMxK, num_valid_B):
  """Returns q k^T / sqrt(K), float32; of keys that are not seen the lowest number."""
  scores_BxHxNxM = _f32_einsum("bhnk,bhmk->bhnm", q_BxHxNxK, k_BxHxMxK) * q_BxHxNxK.shape[-1] ** -0.5
  seen_BxHxNxM = None
  if num_valid_B is not None:
    seen_BxHxNxM = (jnp.arange(scores_BxHxNxM.shape[-1]) < num_valid_B[:, None])[:, None, None]
  if causal:
    before_NxM = jnp.tri(*scores_BxHxNxM.shape[-2:], dtype=bool)
    seen_BxHxNxM = before_NxM if seen_BxHxNxM is None else seen_BxHxNxM & before_NxM
  return scores_BxHxNxM if seen_BxHxNxM is None else jnp.where(seen_BxHxNxM, scores_BxHxNxM, _LOWEST)


def _forward(causal, q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, num_valid_B):
  q, k, v = map(_by_head, (q_BxNxHxK, k_BxMxHxK, v_BxMxHxK))
  scores_BxHxNxM = _scores(causal, q, k, num_valid_B)
  highest_BxHxNx1 = scores_BxHxNxM.max(-1, keepdims=True)
  weights_BxHxNxM = jnp.exp(scores_BxHxNxM - highest_BxHxNx1)
  sums_BxHxNx1 = weights_BxHxNxM.sum(-1, keepdims=True)
  out_BxHxNxK = _f32_einsum("bhnm,bhmk->bhnk", weights_BxHxNxM.astype(v.dtype), v) / sums_BxHxNx1
  out_BxNxHxK = checkpoint_name(_by_head(out_BxHxNxK).astype(q.dtype), KEPT_ATTENTION)
  log_sums_BxHxNx1 = checkpoint_name(highest_BxHxNx1 + jnp.log(sums_BxHxNx1), KEPT_ATTENTION)
  return out_BxNxHxK, (q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, num_valid_B, out_BxNxHxK, log_sums_BxHxNx1)


def _backward(causal, kept, grad_BxNxHxK):
  *qkv, num_valid_B, out_BxNxHxK, log_sums_BxHxNx1 = kept
  q, k, v, out, grad = map(_by_head, (*qkv, out_BxNxHxK, grad_BxNxHxK))
  weights_BxHxNxM = jnp.exp(_scores(causal, q, k, num_valid_B) - log_sums_BxHxNx1)
  inner_BxHxNx1 = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
  grad_weights_BxHxNxM = _f32_einsum("bhnk,bhmk->bhnm", grad, v)
  grad_scores = (weights_BxHxNxM * (grad_weights_BxHxNxM - inner_BxHxNx1) * q.shape[-1] ** -0.5).astype(q.dtype)
  grads = (
    _f32_einsum("bhnm,bhmk->bhnk", grad_scores, k),
    _f32_einsum("bhnm,bhnk->bhmk", grad_scores, q),
    _f32_einsum("bhnm,bhnk->bhmk", weights_BxHxNxM.astype(v.dtype), grad),
  )
  return *(_by_head(x).astype(like.dtype) for x, like in zip(grads, qkv, strict=True)), None


_attend_xla.defvjp(_forward, _backward)


class Attention(nn.Module):
  """Multi-head self-attention; one linear layer for q, k, v (kernel (D, 3, H, K)). num_valid_B: as of `attend`.

  rotation: what queries and keys are turned by (`position.axial_rotation`), or None.
  """

  num_heads: int
  dtype: Any
  kernel_init: Any
  kind: AttentionKind = "auto"
  weight_grads: WeightGrads = "float32"
  causal: bool = False

  @nn.compact
  def __call__(
    self,
    x_BxNxD: jax.Array,
    num_valid_B: jax.Array | None = None,
    rotation: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    width = x_BxNxD.shape[-1]
    # A kernel with an axis of its own for the heads can be split over them; a (D, 3D) one would be cut through q, k, v.
    linear = dict(dtype=self.dtype, kernel_init=self.kernel_init, weight_grads=self.weight_grads)
    qkv = Linear((3, self.num_heads, width // self.num_heads), name="qkv", **linear)(x_BxNxD)
    qkv_BxNx3xHxK = checkpoint_name(constrain(qkv, "batch", None, None, "heads", None), KEPT_QKV)
    q, k, v = (qkv_BxNx3xHxK[:, :, i] for i in range(3))
    if rotation is not None:
      q, k = rotate(q, rotation), rotate(k, rotation)
    out_BxNxHxK = attend(q, k, v, num_valid_B, self.kind, self.causal)
    return Linear(width, num_in=2, name="proj", **linear)(out_BxNxHxK)


class CrossAttention(nn.Module):
  """One query (D,) over tokens (B, M, D) -> (B, D)."""

  num_heads: int
  dtype: Any
  kernel_init: Any

  @nn.compact
  def __call__(self, query_D: jax.Array, x_BxMxD: jax.Array) -> jax.Array:
    batch, _, width = x_BxMxD.shape
    linear = dict(dtype=self.dtype, kernel_init=self.kernel_init)
    heads = (self.num_heads, width // self.num_heads)
    q_HxK = Linear(heads, name="q", **linear)(query_D)
    kv_BxMx2xHxK = Linear((2, *heads), name="kv", **linear)(x_BxMxD)
    q_Bx1xHxK = jnp.broadcast_to(q_HxK, (batch, 1, *heads))
    out_Bx1xHxK = attend(q_Bx1xHxK, kv_BxMx2xHxK[:, :, 0], kv_BxMx2xHxK[:, :, 1])
    return Linear(width, num_in=2, name="proj", **linear)(out_Bx1xHxK[:, 0])
