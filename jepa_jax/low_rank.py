"""LoRA (Hu et al. 2021, arXiv 2106.09685) as a matter of the optimiser: matrices move by products of low rank.

A matrix is W = W_start + (alpha / rank) A B. Only A and B have moments and decay, and their gradients follow from that
of W by the chain rule; the parameters of the network stay W itself. So every method and every moving average is the
same with it, and a checkpoint is evaluated and exported as any other. What it saves is the memory of moments; gradients
are made of whole matrices.

Legend: L blocks, I numbers in, O numbers out, R rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jepa_jax.sharding import path_name
from jepa_jax.streams import stream

Tree = Any
# Matrices of a block, and how many of their axes are read: attention's last one reads heads and their width.
_INPUTS = {"attn/qkv": 1, "attn/proj": 2, "mlp/fc1": 1, "mlp/gate": 1, "mlp/fc2": 1}


class Factors(NamedTuple):
  """A (I, R) and B (R, O) of a matrix, or what an optimiser keeps of each; (L, ...) where blocks are stacked."""

  a: Any
  b: Any


class LowRankState(NamedTuple):
  """The factors of the encoder's matrices, and the state of the optimiser that moves them and the other networks."""

  factors: Tree
  inner: Tree


def is_factors(node: Any) -> bool:
  """Returns whether this stands for a matrix of low rank."""
  return isinstance(node, Factors)


def low_rank(
  inner: optax.GradientTransformation, rank: int, alpha: float, key: jax.Array
) -> optax.GradientTransformation:
  """Returns an optimiser that moves the matrices in the blocks of "encoder" by A B, and leaves its other arrays.

  inner: sees `Factors` in the place of those matrices, `optax.MaskedNode` in that of the encoder's other arrays, and
  all of other networks. A begins normal, of deviation 1 / sqrt(I), drawn below `key`, that of the run; B at 0.
  """
  scale = alpha / rank

  def init(params: Any) -> LowRankState:
    if not isinstance(params, Mapping):  # optax asks with a stand-in, to tell moments from the rest of the state
      return LowRankState(params, inner.init(params))
    factors: dict[str, Any] = {name: optax.MaskedNode() for name in params}
    if _has_encoder(params):
      factors["encoder"] = _by_matrix(lambda place, w: _start(key, place, w, rank), params["encoder"])
      params = {**params, "encoder": factors["encoder"]}
    return LowRankState(factors, inner.init(params))

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, LowRankState]:
    if not _has_encoder(grads):
      updates, new = inner.update(grads, state.inner, params)
      return updates, LowRankState(state.factors, new)
    before = state.factors["encoder"]
    low = _by_matrix(lambda place, g, f: _factor_grads(g.reshape(place.shape(g)), f, scale), grads["encoder"], before)
    at = {**(params or {}), "encoder": before}
    moves: Any
    moves, new = inner.update({**grads, "encoder": low}, state.inner, at)
    after = jax.tree.map(lambda x, move: x + move.astype(x.dtype), before, moves["encoder"])
    change = lambda place, w, one, other: (scale * _difference(one, other)).reshape(w.shape)
    zeros = lambda w, moved: jnp.zeros_like(w) if isinstance(moved, optax.MaskedNode) else moved
    own = jax.tree.map(zeros, grads["encoder"], _by_matrix(change, grads["encoder"], before, after))
    return {**moves, "encoder": own}, LowRankState({**state.factors, "encoder": after}, new)

  return optax.GradientTransformation(init, update)


def check_rank(encoder: Tree, rank: int) -> None:
  """Raises a ValueError where a rank is not below that of every matrix of these (abstract) parameters of an encoder."""
  sides: list[int] = []
  _by_matrix(lambda place, w: sides.append(min(place.shape(w)[-2:])), encoder)
  if not sides:
    raise ValueError("optim.lora_rank: the encoder has no transformer blocks, whose matrices would have a low rank")
  if rank >= min(sides):
    raise ValueError(f"optim.lora_rank={rank} is to lie below {min(sides)}, a side of the encoder's smallest matrix")


class _Place(NamedTuple):
  """Where a kernel stands: its name within a block, the block's number, or None where all of them are stacked."""

  name: str
  block: int | None

  def shape(self, w: Any) -> tuple[int, ...]:
    """Returns the shape of the kernel as a matrix, (I, O), or as those of all blocks, (L, I, O)."""
    stacked = int(self.block is None)
    cut = stacked + _INPUTS[self.name]
    return *w.shape[:stacked], math.prod(w.shape[stacked:cut]), math.prod(w.shape[cut:])


def _has_encoder(params: Tree) -> bool:
  return isinstance(params.get("encoder"), Mapping)


def _by_matrix(make: Callable[..., Any], encoder: Tree, *more: Tree) -> Tree:
  """Returns an encoder's tree with make(place, array, ...) for every matrix of a block, `MaskedNode` elsewhere."""

  def one(path: Any, x: Any, *others: Any) -> Any:
    block, _, below = path_name(path).partition("/")
    name, _, kind = below.rpartition("/")
    if not block.startswith("blocks") or kind != "kernel" or name not in _INPUTS:
      return optax.MaskedNode()
    number = block.removeprefix("blocks").removeprefix("_")
    return make(_Place(name, int(number) if number else None), x, *others)

  return jax.tree_util.tree_map_with_path(one, encoder, *more)


def _start(key: jax.Array, place: _Place, w: jax.Array, rank: int) -> Factors:
  """Returns the factors of a matrix that has not moved; those of a block are the same, stacked or not."""
  *stacked, num_in, num_out = place.shape(w)
  own = stream(stream(key, "lora"), place.name)
  draw = lambda block: jax.random.normal(jax.random.fold_in(own, block), (num_in, rank)) * num_in**-0.5
  a = jax.vmap(draw)(jnp.arange(stacked[0])) if stacked else draw(place.block)
  return Factors(a, jnp.zeros((*stacked, rank, num_out)))


def _factor_grads(grad: jax.Array, f: Factors, scale: float) -> Factors:
  return Factors(scale * _matmul(grad, f.b.swapaxes(-1, -2)), scale * _matmul(f.a.swapaxes(-1, -2), grad))


def _difference(before: Factors, after: Factors) -> jax.Array:
  """Returns A' B' - A B, from the small differences: what W moves by is summed over all steps, without A B itself."""
  return _matmul(after.a - before.a, after.b) + _matmul(before.a, after.b - before.b)


# Accelerators round what is multiplied to 16 bits or 19 unless they are told not to.
_matmul = functools.partial(jnp.matmul, precision="highest")
