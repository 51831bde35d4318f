"""Small checkpoints in other people's layouts, for the tests of weights/; numpy only."""

import numpy as np

from jepa_jax.models import ViTConfig, sincos_position_embedding

ENCODER = ViTConfig(image_size=16, patch_size=4, width=32, depth=3, num_heads=4, pos_embed="sincos", scan=False)
PREDICTOR = {"width": 16, "depth": 2}


def random_array(rng, name, shape):
  """Kernels of variance 1 / fan in, no bias 0 and no scale 1: nothing can be swapped or forgotten unseen."""
  noise = rng.standard_normal(shape).astype(np.float32)
  if "norm" in name and name.endswith("weight"):
    return 1 + np.float32(0.2) * noise
  fan_in = noise[0].size if noise.ndim in (2, 4) else 25
  return noise / np.float32(fan_in**0.5)


def random_tensors(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {name: random_array(rng, name, shape) for name, shape in shapes.items()}


def block_shapes(prefix, depth, width, mlp_dim):
  one = {
    "norm1.weight": (width,),
    "norm1.bias": (width,),
    "attn.qkv.weight": (3 * width, width),
    "attn.qkv.bias": (3 * width,),
    "attn.proj.weight": (width, width),
    "attn.proj.bias": (width,),
    "norm2.weight": (width,),
    "norm2.bias": (width,),
    "mlp.fc1.weight": (mlp_dim, width),
    "mlp.fc1.bias": (mlp_dim,),
    "mlp.fc2.weight": (width, mlp_dim),
    "mlp.fc2.bias": (width,),
  }
  return {f"{prefix}.{i}.{name}": shape for i in range(depth) for name, shape in one.items()}


def meta_encoder(cfg=ENCODER, seed=0, **more_shapes):
  """An encoder as Meta's and timm's files have it, less the prefix `module.`; more_shapes adds or replaces arrays."""
  size, grid = cfg.size, cfg.image_size // cfg.patch_size
  shapes = {
    "patch_embed.proj.weight": (size.width, 3, cfg.patch_size, cfg.patch_size),
    "patch_embed.proj.bias": (size.width,),
    **block_shapes("blocks", size.depth, size.width, size.mlp_dim),
    "norm.weight": (size.width,),
    "norm.bias": (size.width,),
  }
  constant = {"pos_embed": sincos_position_embedding((grid, grid), size.width)[None]}
  return constant | random_tensors(shapes | more_shapes, seed)


def meta_predictor(cfg=ENCODER, width=PREDICTOR["width"], depth=PREDICTOR["depth"], seed=9):
  encoder_width, grid = cfg.size.width, cfg.image_size // cfg.patch_size
  shapes = {
    "mask_token": (1, 1, width),
    "predictor_embed.weight": (width, encoder_width),
    "predictor_embed.bias": (width,),
    **block_shapes("predictor_blocks", depth, width, 4 * width),
    "predictor_norm.weight": (width,),
    "predictor_norm.bias": (width,),
    "predictor_proj.weight": (encoder_width, width),
    "predictor_proj.bias": (encoder_width,),
  }
  return {"predictor_pos_embed": sincos_position_embedding((grid, grid), width)[None]} | random_tensors(shapes, seed)
