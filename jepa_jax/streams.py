"""Named streams of random numbers: every purpose draws from a key of its own, told apart by its name.

Numbers would collide: with JAX's partitionable threefry `split(key, n)[i]` equals `fold_in(key, i)`, so that what was
split off a key here and numbered off it there could be the same bits. So below one key there are either names
(`stream`) or numbers (steps, rows of a batch, views), never both.

    run key -> "init" -> a name per network
            -> "lora" -> a name per matrix -> number of the block
            -> "step" -> number of the step -> "views", "networks", "loss"
                                               -> row in the global batch -> "crops", "colors", "masks", "bank", ...
"""

from __future__ import annotations

import hashlib

import jax


def stream(key: jax.Array, name: str) -> jax.Array:
  """Returns the key of one purpose below `key`: the first 32 bits of the name's SHA-256, folded in."""
  return jax.random.fold_in(key, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
