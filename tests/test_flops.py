"""Matrix FLOPs against closed forms: 2 FLOPs per multiply-add, loops times their length, recomputation counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jepa_jax.experiment import make_experiment
from jepa_jax.flops import matrix_flops
from jepa_jax.models import ViTConfig
from jepa_jax.sharding import MeshConfig, make_mesh
from tests.tiny import VIT, tiny_config, tiny_experiment


def shape(*dims):
  return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_product_of_two_matrices():
  assert matrix_flops(lambda a, b: a @ b, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7


def test_batched_product_and_several_contracted_axes():
  assert matrix_flops(lambda a, b: jnp.einsum("bhnk,bhmk->bhnm", a, b), shape(2, 3, 5, 7), shape(2, 3, 11, 7)) == (
    2 * (2 * 3) * 5 * 11 * 7
  )
  assert matrix_flops(lambda a, b: jnp.einsum("nhk,hkd->nd", a, b), shape(5, 3, 7), shape(3, 7, 11)) == 2 * 5 * 21 * 11


def test_elementwise_work_is_not_counted():
  assert matrix_flops(lambda a: jnp.exp(a).sum() * 2, shape(100, 100)) == 0


def conv(stride=1, padding="VALID", groups=1):
  def fn(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (stride,) * 2, padding, dimension_numbers=numbers, feature_group_count=groups
    )

  return fn


def test_convolution_counts_every_tap_that_meets_an_input():
  assert matrix_flops(conv(), shape(2, 9, 9, 3), shape(3, 3, 3, 8)) == 2 * (2 * 7 * 7 * 8) * (3 * 3 * 3)
  assert matrix_flops(conv(stride=4), shape(2, 8, 8, 3), shape(4, 4, 3, 8)) == 2 * (2 * 2 * 2 * 8) * (4 * 4 * 3)
  assert matrix_flops(conv(groups=4), shape(2, 9, 9, 8), shape(3, 3, 2, 8)) == 2 * (2 * 7 * 7 * 8) * (3 * 3 * 2)
  same = (3 * 9 - 2) ** 2  # pairs of (output, tap) inside the image, per channel: two fall off along each axis
  assert matrix_flops(conv(padding="SAME"), shape(2, 9, 9, 3), shape(3, 3, 3, 8)) == 2 * 2 * 8 * 3 * same


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": "SAME"}, {"groups": 4}, {"stride": 3}], ids=str)
def test_both_gradients_of_a_convolution_cost_what_it_costs(settings):
  x, kernel = shape(2, 11, 11, 8), shape(3, 3, 8 // settings.get("groups", 1), 12)
  loss = lambda x, kernel: (conv(**settings)(x, kernel) ** 2).sum()
  forward = matrix_flops(loss, x, kernel)
  assert matrix_flops(jax.grad(loss, argnums=0), x, kernel) == 2 * forward
  assert matrix_flops(jax.grad(loss, argnums=(0, 1)), x, kernel) == 3 * forward


def test_gradient_of_a_product_costs_two_more():
  loss = lambda a, b: ((a @ b) ** 2).sum()
  assert matrix_flops(jax.grad(loss, argnums=(0, 1)), shape(3, 5), shape(5, 7)) == 3 * 2 * 3 * 5 * 7


def test_scan_counts_its_length_both_ways():
  def loss(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

  once = 2 * 4 * 8 * 8
  assert matrix_flops(loss, shape(4, 8), shape(6, 8, 8)) == 6 * once
  assert matrix_flops(jax.grad(loss, argnums=(0, 1)), shape(4, 8), shape(6, 8, 8)) == 3 * 6 * once


def test_recomputation_of_remat_is_counted():
  def loss(x, weights):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, weights)[0].sum()

  assert matrix_flops(jax.grad(loss, argnums=(0, 1)), shape(4, 8), shape(6, 8, 8)) == 4 * 6 * 2 * 4 * 8 * 8


def test_cond_counts_its_most_expensive_branch():
  fn = lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
  assert matrix_flops(fn, shape(4, 4)) == 2 * 2 * 4**3


def test_calls_inside_calls_and_custom_gradients_are_followed():
  @jax.custom_vjp
  def product(a, b):
    return a @ b

  product.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
  fn = lambda a, b: jax.jit(product)(a, b).sum()
  assert matrix_flops(fn, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
  both = jax.value_and_grad(fn, argnums=(0, 1))
  assert matrix_flops(both, shape(3, 5), shape(5, 7)) == 3 * 2 * 3 * 5 * 7


def test_what_nobody_reads_is_not_counted():
  """A rule for derivatives writes the gradient for every input, XLA drops that of one that needs none."""
  product = jax.custom_vjp(lambda a, b: a @ b)
  product.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
  fn = lambda a, b: jax.jit(product)(a, b).sum()
  assert matrix_flops(jax.value_and_grad(fn, argnums=1), shape(3, 5), shape(5, 7)) == 2 * 2 * 3 * 5 * 7


def test_shard_map_counts_all_its_shards():
  mesh = make_mesh(MeshConfig(data=8))
  fn = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
  assert matrix_flops(fn, shape(16, 5), shape(5, 7)) == 2 * 16 * 5 * 7


def test_loop_of_unknown_length_is_refused_only_where_it_holds_products():
  assert matrix_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), shape(4, 4)) == 0
  with pytest.raises(ValueError, match="while_loop"):
    matrix_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), shape(4, 4))


@pytest.mark.parametrize("scan", [True, False])
def test_vit_forward_is_the_textbook_formula(scan):
  """Per token 24 D^2 in the linear layers (MLP 4 D wide) and 4 N D in attention, per block; the patches on top."""
  width, depth, images, patch, side = 32, 3, 4, 8, 32
  cfg = ViTConfig(
    variant="tiny", image_size=side, patch_size=patch, width=width, depth=depth, num_heads=4, cls_token=True, scan=scan
  )
  encoder, x = cfg.make(3), shape(images, side, side, 3)
  variables = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros(x.shape)))
  patches = (side // patch) ** 2
  tokens = patches + 1
  blocks = depth * tokens * (24 * width**2 + 4 * tokens * width)
  embedding = patches * 2 * (patch * patch * 3) * width
  assert matrix_flops(lambda v, x: encoder.apply(v, x), variables, x) == images * (blocks + embedding)


@pytest.mark.slow
def test_step_counts_every_block_and_a_mesh_changes_nothing():
  def flops(mesh=None, num_devices=1, **changes):
    run = tiny_experiment(mesh, num_devices, **changes)
    with jax.set_mesh(run.mesh):
      return matrix_flops(run.step_fn, run.abstract_state, run.abstract_batch, run.key)

  by_depth = [flops(encoder=VIT | {"depth": depth}) for depth in (2, 4, 6)]
  assert by_depth[2] - by_depth[1] == by_depth[1] - by_depth[0] > 0
  assert flops() == flops(encoder=VIT | {"scan": False}) == flops(MeshConfig(data=2, fsdp=2, tensor=2), 8)
  assert flops(encoder=VIT | {"remat": "block"}) > flops(encoder=VIT | {"remat": "matmuls"}) == flops()


def test_step_agrees_with_the_compilers_count_where_nothing_is_scanned():
  """XLA also counts elementwise work, so its number is somewhat larger; a product missed here would show as a hole."""
  cfg = tiny_config(encoder=VIT | {"scan": False, "width": 64})
  run = make_experiment(cfg, make_mesh(cfg.mesh, jax.devices()[:1]), 64, 10)
  with jax.set_mesh(run.mesh):
    args = (run.abstract_state, run.abstract_batch, run.key)
    ours, xla = matrix_flops(run.step_fn, *args), run.step_fn.lower(*args).cost_analysis()["flops"]
  np.testing.assert_array_less(0.8 * xla, ours)
  np.testing.assert_array_less(ours, xla)


def test_a_fused_attention_kernel_counts_as_much_as_the_plain_form(monkeypatch):
  """cuDNN's kernel is opaque in the jaxpr; traced only, on a machine without the GPU that it is for."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
  q = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
  attend = lambda form: lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation=form).sum()
  for wrap in (lambda f: f, lambda f: jax.value_and_grad(f, argnums=(0, 1, 2))):
    plain, kernel = (matrix_flops(wrap(attend(form)), q, q, q) for form in ("xla", "cudnn"))
    assert plain == kernel > 0
