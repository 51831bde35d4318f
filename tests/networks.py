"""Tiny networks with random weights, for the tests of the models."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jepa_jax.models import ViTConfig

TINY = ViTConfig(image_size=8, patch_size=4, width=16, depth=3, num_heads=2)  # a 2 x 2 grid


def normal(seed, *shape):
  """Gaussian numbers from numpy: nothing to compile."""
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def images(batch=2, size_px=8, channels=3, seed=0):
  return normal(seed, batch, size_px, size_px, channels)


def abstract_init(cfg, size_px=None, channels=3):
  """The variables' shapes; no array is made."""
  size_px = size_px or cfg.image_size
  shape = jax.ShapeDtypeStruct((2, size_px, size_px, channels), jnp.float32)
  return jax.eval_shape(cfg.make(channels).init, jax.random.key(0), shape)


def random_variables(cfg, seed=1, channels=3):
  """Variables drawn so that no bias is 0 and no scale is 1: a swapped or forgotten one shows."""
  return randomised(abstract_init(cfg, channels=channels), seed)


def randomised(abstract_variables, seed=1):
  leaves, treedef = jax.tree.flatten(abstract_variables)
  return treedef.unflatten([0.1 + 0.3 * normal(seed + i, *x.shape) for i, x in enumerate(leaves)])


def apply(cfg, variables, x, **kwargs):
  return jax.jit(lambda v, x: cfg.make(x.shape[-1]).apply(v, x, **kwargs))(variables, x)


def mesh_of_eight(data, fsdp, tensor):
  return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
