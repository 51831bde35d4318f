"""What every network promises: sizes, names, shapes, how it starts, and errors that name the fix.

Legend: B images, N patches, D width, L depth, F probe width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jepa_jax.models import ConvNetConfig, Encoder, MLPConfig, ProjectorConfig, ResNetConfig, ViTConfig, count_params
from tests.networks import TINY, abstract_init, images
from tests.tiny import tiny_config

ENCODERS = (ViTConfig, ResNetConfig, ConvNetConfig, MLPConfig)

# Sizes and names


@pytest.mark.parametrize(
  "variant, patch_size, millions",
  [("small", 16, 21.6), ("base", 16, 85.7), ("large", 16, 303.1), ("huge", 14, 630.4), ("giant", 16, 1011)],
)
def test_vit_has_the_published_number_of_parameters(variant, patch_size, millions):
  cfg = ViTConfig(variant=variant, patch_size=patch_size, pos_embed="sincos")
  d, depth, m = cfg.size.width, cfg.size.depth, cfg.size.mlp_dim
  block = (d * 3 * d + 3 * d) + (d * d + d) + (d * m + m) + (m * d + d) + 2 * 2 * d
  exact = depth * block + (patch_size**2 * 3 * d + d) + 2 * d
  assert count_params(abstract_init(cfg)) == exact
  assert exact / 1e6 == pytest.approx(millions, abs=0.5 if millions > 1000 else 0.06)


@pytest.mark.parametrize("variant, count, dim", [("18", 11_176_512, 512), ("50", 23_508_032, 2048)])
def test_resnet_has_torchvisions_number_of_parameters_without_the_classifier(variant, count, dim):
  cfg = ResNetConfig(variant=variant)
  assert count_params(abstract_init(cfg)["params"]) == count
  assert cfg.output_dim == dim


def test_vit_parameter_names_are_stable():
  cfg = dataclasses.replace(TINY, cls_token=True, num_registers=2)
  shapes = {name: x.shape for name, x in flatten_dict(abstract_init(cfg)["params"], sep="/").items()}
  assert shapes == {
    "patch_embed/kernel": (4, 4, 3, 16),
    "patch_embed/bias": (16,),
    "pos_embed": (1, 4, 16),
    "cls_token": (1, 1, 16),
    "registers": (1, 2, 16),
    "blocks/norm1/scale": (3, 16),
    "blocks/norm1/bias": (3, 16),
    "blocks/attn/qkv/kernel": (3, 16, 3, 2, 8),
    "blocks/attn/qkv/bias": (3, 3, 2, 8),
    "blocks/attn/proj/kernel": (3, 2, 8, 16),
    "blocks/attn/proj/bias": (3, 16),
    "blocks/norm2/scale": (3, 16),
    "blocks/norm2/bias": (3, 16),
    "blocks/mlp/fc1/kernel": (3, 16, 64),
    "blocks/mlp/fc1/bias": (3, 64),
    "blocks/mlp/fc2/kernel": (3, 64, 16),
    "blocks/mlp/fc2/bias": (3, 16),
    "norm/scale": (16,),
    "norm/bias": (16,),
  }


def test_vit_starts_from_normal_002_kernels_zero_biases_and_unit_scales():
  cfg = ViTConfig(image_size=32, width=96, depth=2, num_heads=3)
  params = jax.jit(cfg.make(3).init)(jax.random.key(0), images(1, 32))["params"]
  params = {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}
  for name, x in params.items():
    if name.endswith("bias"):
      assert (x == 0).all(), name
    elif name.endswith("scale"):
      assert (x == 1).all(), name
    elif x.size > 1000:
      assert float(x.std()) == pytest.approx(0.02, rel=0.05), name
  kernel_LxDxM = params["blocks/mlp/fc1/kernel"]
  assert not np.allclose(kernel_LxDxM[0], kernel_LxDxM[1])  # each layer has its own draw


def test_fan_in_starts_every_matrix_with_the_variance_of_its_inputs():
  """And nothing else: tokens and position embeddings keep .02."""
  cfg = ViTConfig(image_size=16, patch_size=8, width=64, depth=2, num_heads=4, init="fan_in", num_registers=4)
  params = cfg.make(3).init(jax.random.key(0), images(1, 16))["params"]
  flat = flatten_dict(params, sep="/")
  inputs = {"patch_embed": 8 * 8 * 3, "attn/qkv": 64, "attn/proj": 64, "mlp/fc1": 64, "mlp/fc2": 256}
  for name, count in inputs.items():
    kernel = next(v for k, v in flat.items() if k.endswith(f"{name}/kernel"))
    np.testing.assert_allclose(kernel.std(), count**-0.5, rtol=0.05)
  np.testing.assert_allclose([flat["registers"].std(), flat["pos_embed"].std()], 0.02, rtol=0.25)


@pytest.mark.parametrize(
  "cfg, channels, num_tokens",
  [
    (dataclasses.replace(TINY, cls_token=True, num_registers=3, probe_layers=3), 3, 4),
    (ResNetConfig(variant="18", stem="cifar", width=8, image_size=32), 3, 16),
    (ResNetConfig(variant="50", width=8, image_size=64), 3, 4),
    (ConvNetConfig(image_size=28), 1, 4),
    (MLPConfig(image_size=28, widths=(32, 24)), 1, 0),
  ],
  ids=lambda value: value.name + getattr(value, "variant", "") if isinstance(value, Encoder) else None,
)
def test_every_encoder_returns_float32_of_the_declared_widths(cfg, channels, num_tokens):
  encoder = dataclasses.replace(cfg, compute_dtype="bfloat16").make(channels)
  x = jax.ShapeDtypeStruct((2, cfg.image_size, cfg.image_size, channels), jnp.float32)
  variables = jax.eval_shape(encoder.init, jax.random.key(0), x)
  out = jax.eval_shape(encoder.apply, variables, x)
  assert out.pooled_BxD.shape == (2, cfg.output_dim)
  assert out.probe_BxF.shape == (2, cfg.probe_dim)
  if num_tokens:
    assert out.tokens_BxNxD.shape == (2, num_tokens, cfg.output_dim)
  else:
    assert out.tokens_BxNxD is None
  assert {x.dtype for x in jax.tree.leaves((out, variables))} == {jnp.dtype("float32")}


# Errors name the fix


@pytest.mark.parametrize(
  "cls, settings, message",
  [
    (ViTConfig, {"variant": "bse"}, "variant is 'bse'.*one of tiny, small, base, .*did you mean 'base'"),
    (ResNetConfig, {"variant": "33"}, "variant is '33'.*one of 18, 34, 50, 101"),
    (ViTConfig, {"image_size": 100}, "image_size=100 is not divisible by patch_size=16; the nearest.*: 96 or 112"),
    (ViTConfig, {"width": 100, "num_heads": 3}, r"width=100 is not divisible by num_heads=3.*\[1, 2, 4\]"),
    (ViTConfig, {"width": 6, "num_heads": 1, "pos_embed": "sincos"}, "divisible by 4"),
    (ViTConfig, {"pool": "cls"}, "needs cls_token=True"),
    (ViTConfig, {"width": 36, "num_heads": 6, "pos_embed": "rope"}, "heads whose width is divisible by 4, got 6"),
    (ViTConfig, {"norm_after_pool": True, "cls_token": True}, "pool='mean' and cls_token=False"),
    (ViTConfig, {"layer_scale": -1.0}, "layer_scale=-1.0 is where it starts"),
    (ViTConfig, {"drop_path": 1.0}, "drop_path must be in"),
    (ViTConfig, {"depth": 1}, "probe_layers must be between 1 and the depth 1"),
    (MLPConfig, {"widths": (8, 0)}, r"widths is \(8, 0\).*all positive"),
    (ConvNetConfig, {"widths": ()}, r"widths is \(\): give the width of at least one"),
    (ResNetConfig, {"width": 0}, "width must be at least 1, got 0"),
    *((cls, {"compute_dtype": "bf16"}, "one of auto, float32, bfloat16") for cls in ENCODERS),
    *((cls, {"image_size": 0}, "image_size must be at least 1, got 0") for cls in ENCODERS),
  ],
)
def test_wrong_encoder_settings_name_the_fix(cls, settings, message):
  with pytest.raises(ValueError, match=message):
    cls(**settings)


@pytest.mark.parametrize(
  "encoder, message",
  [
    ({"name": "vti"}, "config.encoder.name is 'vti'.*one of convnet, mixer, mlp, resnet, vit; did you mean 'vit'"),
    ({"image_size": 16}, "config.encoder.name is missing.*convnet, mixer, mlp, resnet, vit"),
    ({"name": "convnet", "patch_size": 4}, "config.encoder.patch_size is not a setting.*config.encoder has: .*widths"),
    ({"name": "vit", "channels": 3}, "config.encoder.channels is not a setting; did you mean config.data.channels"),
  ],
)
def test_an_encoder_of_a_config_has_the_settings_of_its_name_and_no_others(encoder, message):
  with pytest.raises(ValueError, match=message):
    tiny_config(encoder=encoder)


def test_wrong_projector_settings_name_the_fix():
  with pytest.raises(ValueError, match="norm is 'batchnorm'.*one of batch, layer, none; did you mean 'batch'"):
    ProjectorConfig(norm="batchnorm")
  with pytest.raises(ValueError, match="hidden widths must be positive"):
    ProjectorConfig(hidden=(0,))


@pytest.mark.parametrize(
  "cfg, shape, message",
  [
    (TINY, (1, 8, 10, 3), "image width=10 is not divisible by patch_size=4; the nearest that are: 8 or 12"),
    (TINY, (1, 8, 8, 1), "images have 1 channels.*made for 3; set data.channels"),
    (MLPConfig(image_size=8), (1, 6, 6, 3), "reads one image size, 8 px"),
  ],
)
def test_wrong_images_name_the_fix(cfg, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(cfg.make(3).init, jax.random.key(0), jnp.zeros(shape))
