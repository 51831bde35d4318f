"""The networks without attention: what they compute, and whose statistics they use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import erf

from jepa_jax.models import (
  ConvNetConfig,
  MLPConfig,
  ProjectorConfig,
  ResNetConfig,
  ViTConfig,
  make_projector,
)
from jepa_jax.models.resnet import ResNet
from tests.networks import apply, images, mesh_of_eight, normal, random_variables, randomised

# ResNet, ConvNet, projector


def test_resnet_updates_running_statistics_by_a_tenth_and_says_it_uses_the_batch():
  assert ResNetConfig(variant="18").uses_batch_statistics and ResNet.uses_batch_statistics
  assert not any(cfg.uses_batch_statistics for cfg in (ViTConfig(), ConvNetConfig(), MLPConfig()))
  encoder, x = ResNet(stage_sizes=(1, 1), bottleneck=False, width=8, stem="cifar"), images(4)
  variables = jax.jit(encoder.init)(jax.random.key(0), x)
  out, updates = jax.jit(lambda v, x: encoder.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
  stem = jax.lax.conv_general_dilated(
    x, variables["params"]["stem"]["kernel"], (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  running = updates["batch_stats"]["stem_norm"]
  np.testing.assert_allclose(running["mean"], 0.1 * stem.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(running["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-3)
  assert out.tokens_BxNxD.shape == (4, 16, 16)
  # Zero-initialised last scales: every residual branch is silent at the start.
  block = variables["params"]["stage1_block0"]
  assert (block["norm2"]["scale"] == 0).all() and (block["norm1"]["scale"] == 1).all()


def test_convnet_is_a_strided_convolution_with_groupnorm_and_looks_at_one_image_at_a_time():
  cfg = ConvNetConfig(image_size=7, widths=(16,))
  variables, x = random_variables(cfg, channels=2), images(3, 7, 2)
  params, out = variables["params"], apply(cfg, variables, x)
  kernel = params["stage0_conv"]["kernel"]
  y = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
  y = np.asarray(y + params["stage0_conv"]["bias"]).reshape(3, 16, 8, 2)
  y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-6)
  y = y.reshape(3, 16, 16) * params["stage0_norm"]["scale"] + params["stage0_norm"]["bias"]
  np.testing.assert_allclose(out.tokens_BxNxD, y * 0.5 * (1 + erf(y / np.sqrt(2))), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(apply(cfg, variables, x[:1]).pooled_BxD, out.pooled_BxD[:1], atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_projector_is_linear_norm_relu_then_linear(norm):
  projector = make_projector(ProjectorConfig(hidden=(12,), out=5, norm=norm))
  x = normal(0, 32, 6)
  variables = jax.jit(projector.init)(jax.random.key(1), x)
  params = variables["params"]
  z, updates = jax.jit(lambda v, x: projector.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
  h = x @ params["layers_0"]["kernel"] + params["layers_0"].get("bias", 0.0)
  if norm == "batch":
    mean, var = h.mean(0), h.var(0)
    np.testing.assert_allclose(updates["batch_stats"]["norms_0"]["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["norms_0"]["var"], 0.9 + 0.1 * var, rtol=1e-4)
    h = (h - mean) / jnp.sqrt(var + 1e-5)
  elif norm == "layer":
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
  expected = jax.nn.relu(h) @ params["layers_1"]["kernel"] + params["layers_1"]["bias"]
  np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)
  evaluated = jax.jit(projector.apply)(variables, x)  # with running mean 0 and variance 1
  assert evaluated.shape == (32, 5)
  assert np.allclose(evaluated, z, atol=1e-4) == (norm != "batch")


def test_batchnorm_projector_uses_the_statistics_of_the_global_batch():
  projector = make_projector(ProjectorConfig(hidden=(12, 8), out=5))
  x = normal(0, 16, 2, 6) * np.linspace(0.1, 5, 16)[:, None, None]  # unlike shards
  variables = randomised(jax.eval_shape(projector.init, jax.random.key(1), x))
  weights = normal(2, 16, 2, 5)

  def loss(params, x):
    variables_in = {**variables, "params": params}
    z, updates = projector.apply(variables_in, x, train=True, mutable=["batch_stats"])
    return jnp.sum(weights * jnp.tanh(z)), updates

  run = lambda x: jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)
  expected = run(x)
  for shape in [(8, 1, 1), (2, 2, 2)]:
    with jax.set_mesh(mesh := mesh_of_eight(*shape)):
      sharded = run(jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp")))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), sharded, expected)
