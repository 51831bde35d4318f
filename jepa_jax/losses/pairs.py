"""Losses of pairs of an image and its text, over all pairs of the global batch: CLIP (arXiv 2103.00020), SigLIP
(arXiv 2303.15343).

Legend: B images of the global batch, C captions of an image, D width of an embedding, R rows of a block.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jepa_jax.losses.unit import unit
from jepa_jax.sharding import constrain


def clip(
  image_BxD: jax.Array, text_BxD: jax.Array, log_scale: jax.Array | float, chunk: int = 0
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns CLIP's loss and its terms, float32 scalars: each image should find its text among all texts, and back.

  loss = -(mean_i log softmax_j(l_ij) at j = i + mean_j log softmax_i(l_ij) at i = j) / 2, l_ij = exp(log_scale) cos_ij.
  At a collapse it is ln B. B is the global batch and may be sharded: value and gradient are those of one device.

  Args:
    image_BxD: embeddings of any length and real dtype.
    text_BxD: the same of the texts; or (B, C, D), C of each image: an image's loss is the mean over its own C, each
      against all B C texts; a text's is over the B images.
    log_scale: logarithm of the inverse temperature; ln(1 / .07) to begin with in the paper.
    chunk: > 0 makes the logits of so many images at a time, and again in the backward pass: memory grows with
      chunk B instead of B B, the value is the same. It divides B, or is larger: then all are made at once.

  Returns:
    The loss, and {"image_to_text", "text_to_image": the two halves, "scale"} with those of `pair_recalls` and
    `pair_geometry`.

  Raises:
    ValueError: shapes that do not fit, B < 2, a chunk that does not divide B, a log_scale that is not finite (of one
    that is learned only its start can be seen).
  """
  image, text = _checked(image_BxD, text_BxD, chunk, log_scale=log_scale)
  scale, size = jnp.exp(jnp.asarray(log_scale, jnp.float32)), image.shape[0]
  columns = text.reshape(-1, text.shape[-1])  # B C texts
  num_captions = text.shape[1]

  def block(carry, rows):
    """Of R images: the log-sums of their rows, what they add to those of the columns, and which of both find theirs."""
    image_RxD, row_R = rows
    logits_RxT = scale * _products(image_RxD, columns)
    own_RxC = _own(logits_RxT, row_R, num_captions)
    column_T, best_T = carry
    column_T = jnp.logaddexp(column_T, jax.nn.logsumexp(logits_RxT, axis=0))
    best_T, hit_R = _found(best_T, logits_RxT, own_RxC, row_R)
    return (column_T, best_T), (jax.nn.logsumexp(logits_RxT, axis=1), own_RxC, hit_R)

  start = jnp.full(len(columns), -jnp.inf), jnp.full(len(columns), -jnp.inf)
  (column_T, best_T), (row_B, own_BxC, hit_B) = _in_blocks(block, start, (image, jnp.arange(size)), chunk)
  own_T = own_BxC.reshape(-1)
  to_text, to_image = (row_B - own_BxC.mean(1)).mean(), (column_T - own_T).mean()
  terms = {"image_to_text": to_text, "text_to_image": to_image, "scale": scale}
  return (to_text + to_image) / 2, terms | _recalls(hit_B, own_T, best_T) | pair_geometry(image, text)


def siglip(
  image_BxD: jax.Array, text_BxD: jax.Array, log_scale: jax.Array | float, bias: jax.Array | float, chunk: int = 0
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns SigLIP's loss and its terms, float32 scalars: of every image and text, do they belong together?

  loss = (1/B) sum_ij softplus(-y_ij (exp(log_scale) cos_ij + bias)), y = 1 for an image and its own text, -1 otherwise.
  It begins near 10 with the paper's scale 10 and bias -10, and is B ln 2 at a collapse with scale and bias that
  cancel. B is the global batch and may be sharded: value and gradient are those of one device.

  Args:
    image_BxD, text_BxD, log_scale, chunk: as of `clip`. With (B, C, D) texts the sum is over all B C, divided by B C.
    bias: added to the logits; -10 to begin with in the paper.

  Returns:
    The loss, and {"positives", "negatives": what own pairs and the others add to it, "scale", "bias"} with those of
    `pair_recalls` and `pair_geometry`.

  Raises:
    ValueError: as `clip`.
  """
  image, text = _checked(image_BxD, text_BxD, chunk, log_scale=log_scale, bias=bias)
  scale, bias = jnp.exp(jnp.asarray(log_scale, jnp.float32)), jnp.asarray(bias, jnp.float32)
  size, num_captions = text.shape[:2]
  columns = text.reshape(-1, text.shape[-1])

  def block(carry, rows):
    """Of R images: the sum of the loss over their own texts, and over all others."""
    image_RxD, row_R = rows
    logits_RxT = scale * _products(image_RxD, columns) + bias
    own_RxC = _own(logits_RxT, row_R, num_captions)
    carry, hit_R = _found(carry, logits_RxT, own_RxC, row_R)
    positive = jax.nn.softplus(-own_RxC).sum()
    negative = jax.nn.softplus(logits_RxT).sum() - jax.nn.softplus(own_RxC).sum()
    return carry, (positive, negative, own_RxC, hit_R)

  start = jnp.full(len(columns), -jnp.inf)
  best_T, (positive, negative, own_BxC, hit_B) = _in_blocks(block, start, (image, jnp.arange(size)), chunk)
  positives, negatives = (x.sum() / (size * num_captions) for x in (positive, negative))
  terms = {"positives": positives, "negatives": negatives, "scale": scale, "bias": bias}
  return positives + negatives, terms | _recalls(hit_B, own_BxC.reshape(-1), best_T) | pair_geometry(image, text)


def pair_recalls(image_BxD: jax.Array, text_BxCxD: jax.Array) -> dict[str, jax.Array]:
  """Returns {"r1_image_to_text", "r1_text_to_image"}: percentage of the batch that is nearer to its own (an image to
  any of its C texts) than to all others, by the cosine: none at a collapse. No gradient; embeddings of any length."""
  image, text = (jax.lax.stop_gradient(unit(z)[0]) for z in (image_BxD, text_BxCxD))
  rows_B, similar_BxT = jnp.arange(len(image)), _products(image, text.reshape(-1, text.shape[-1]))
  own_BxC = _own(similar_BxT, rows_B, text.shape[1])
  best_T, hit_B = _found(jnp.full(similar_BxT.shape[1], -jnp.inf), similar_BxT, own_BxC, rows_B)
  return _recalls(hit_B, own_BxC.reshape(-1), best_T)


def _own(logits_RxT: jax.Array, row_R: jax.Array, num_captions: int) -> jax.Array:
  """Returns the logits (R, C) of these images and their own texts."""
  return jnp.take_along_axis(logits_RxT, row_R[:, None] * num_captions + jnp.arange(num_captions), axis=1)


def _found(best_T: jax.Array, logits_RxT: jax.Array, own_RxC: jax.Array, row_R: jax.Array):
  """Returns the best logit of each text with an image that is not its own, so far, and whether R images find theirs."""
  logits_RxT, own_RxC = jax.lax.stop_gradient((logits_RxT, own_RxC))
  is_own_RxT = jnp.arange(logits_RxT.shape[1]) // own_RxC.shape[1] == row_R[:, None]
  others_RxT = jnp.where(is_own_RxT, -jnp.inf, logits_RxT)
  return jnp.maximum(best_T, others_RxT.max(0)), own_RxC.max(1) > others_RxT.max(1)


def _recalls(hit_B: jax.Array, own_T: jax.Array, best_T: jax.Array) -> dict[str, jax.Array]:
  found_T = jax.lax.stop_gradient(own_T) > best_T
  return {"r1_image_to_text": 100 * hit_B.mean(), "r1_text_to_image": 100 * found_T.mean()}


def _checked(image_BxD: jax.Array, text: jax.Array, chunk: int, **numbers) -> tuple[jax.Array, jax.Array]:
  """Returns images (B, D) and texts (B, C, D) as unit rows, float32."""
  for name, number in numbers.items():
    if not isinstance(number, jax.Array) and not math.isfinite(number):
      raise ValueError(f"{name}={number} must be a finite number")
  fits = image_BxD.ndim == 2 and text.ndim in (2, 3) and len(text) == len(image_BxD)
  if not fits or text.shape[-1] != image_BxD.shape[-1]:
    raise ValueError(f"images are (B, D) and texts (B, D) or (B, C, D), not {image_BxD.shape} and {text.shape}")
  if len(image_BxD) < 2:
    raise ValueError(f"a batch of {len(image_BxD)} has nothing to tell a pair from: give 2 or more")
  if chunk < 0 or (0 < chunk < len(image_BxD) and len(image_BxD) % chunk):
    raise ValueError(f"chunk={chunk} must divide the batch of {len(image_BxD)}, or be 0 for all at once")
  text = text[:, None] if text.ndim == 2 else text
  return unit(image_BxD)[0], unit(text)[0]


def _products(a_RxD: jax.Array, b_TxD: jax.Array) -> jax.Array:
  # In bfloat16, which TPUs use for float32 unless told otherwise, near candidates change places at a scale of 100.
  return jnp.matmul(a_RxD, b_TxD.T, precision="highest")


def _in_blocks(block, start, rows, chunk: int):
  """Returns (carry, outputs) of block(carry, rows) over blocks of `chunk` rows, outputs in the rows' order.

  A block takes rows of every device (the k-th of each stretch), so that the work stays spread. What is inside is made
  again in the backward pass.
  """
  size = len(rows[1])
  if not chunk or chunk >= size:
    return block(start, rows)
  num = size // chunk
  cut = lambda x: constrain(x.reshape(chunk, num, *x.shape[1:]).swapaxes(0, 1), None, "batch", *(None,) * (x.ndim - 1))
  carry, out = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), start, jax.tree.map(cut, rows))
  joined = lambda x: x.swapaxes(0, 1).reshape(size, *x.shape[2:]) if x.ndim > 1 else x
  return carry, jax.tree.map(joined, out)


def pair_geometry(image_BxD: jax.Array, text_BxCxD: jax.Array) -> dict[str, jax.Array]:
  """Returns {"modality_gap": distance of the means of both sides' unit vectors, "pair_cosine": its mean over the
  pairs}, without a gradient; embeddings of any length."""
  image, text = (jax.lax.stop_gradient(unit(z)[0]) for z in (image_BxD, text_BxCxD))
  gap = jnp.linalg.norm(image.mean(0) - text.mean((0, 1)))
  return {"modality_gap": gap, "pair_cosine": jnp.einsum("bd,bcd->bc", image, text).mean()}
