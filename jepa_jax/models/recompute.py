"""Which activations wait for the backward pass, and which are computed again there (rematerialisation), by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax

from jepa_jax.flops import KERNELS

Remat = Literal["none", "matmuls", "block"]

# Names that networks give to what `matmuls` keeps: results of products that the backward pass reads.
KEPT_QKV, KEPT_ATTENTION, KEPT_MIDDLE, KEPT_HIDDEN = KEPT = ("qkv", "attention", "middle", "hidden")
_KEPT_PRIMITIVES = ("conv_general_dilated", *KERNELS)  # a fused kernel keeps its row sums, too: two results


def remat(block: type[nn.Module], kind: Remat, in_scan: bool = False) -> type[nn.Module]:
  """Returns the block with a backward pass that computes again what `kind` does not keep; values do not change.

  kind: "none" keeps what differentiation asks for; "matmuls" keeps the results of products, convolutions and
  attention, and computes norms, activations and sums again, which costs no product; "block" keeps a block's input only
  and runs all of it twice.
  """
  if kind == "none":
    return block
  policy = None if kind == "block" else jax.checkpoint_policies.save_from_both_policies(*_policies())
  # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier against it is not needed.
  return nn.remat(block, prevent_cse=not in_scan, policy=policy)


def _policies() -> tuple[Callable[..., Any], Callable[..., bool]]:
  kept = lambda primitive, *_, **__: primitive.name in _KEPT_PRIMITIVES
  return jax.checkpoint_policies.save_only_these_names(*KEPT), kept
