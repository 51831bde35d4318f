"""The ViT: its formula, its positions and dropped patches, and the same numbers however it is executed.

Legend: B images, N patches, T tokens, D width, L depth, H heads, K head width, F probe width.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import erf

from jepa_jax.models import sincos_position_embedding
from jepa_jax.models.position import axial_rotation, resize_position_embedding, rotate
from jepa_jax.models.transformer import Block, draw_branch_scales
from tests.networks import TINY, abstract_init, apply, images, mesh_of_eight, normal, random_variables, randomised


def restated_vit(params, x_BxSxSxC, patch, pos_NxD):
  """The same network in numpy, one head and one patch at a time: final-normed tokens of every layer, (L, B, T, D)."""
  p = {k: np.asarray(v, np.float64) for k, v in flatten_dict(params, sep="/").items()}

  def norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias

  def attention(x_BxTxD, layer):
    qkv, bias = p["blocks/attn/qkv/kernel"][layer], p["blocks/attn/qkv/bias"][layer]
    out = p["blocks/attn/proj/bias"][layer]
    for h in range(qkv.shape[2]):
      q, k, v = (x_BxTxD @ qkv[:, i, h] + bias[i, h] for i in range(3))
      logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
      weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
      out = out + weights @ v @ p["blocks/attn/proj/kernel"][layer, h]
    return out

  def mlp(x, layer):
    h = x @ p["blocks/mlp/fc1/kernel"][layer] + p["blocks/mlp/fc1/bias"][layer]
    gelu = h * 0.5 * (1 + erf(h / np.sqrt(2)))
    return gelu @ p["blocks/mlp/fc2/kernel"][layer] + p["blocks/mlp/fc2/bias"][layer]

  images, grid = np.asarray(x_BxSxSxC, np.float64), x_BxSxSxC.shape[1] // patch
  kernel = p["patch_embed/kernel"]
  windows = [images[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] for r, c in np.ndindex(grid, grid)]
  patches = np.stack([np.einsum("bpqc,pqcd->bd", w, kernel) + p["patch_embed/bias"] for w in windows], 1)
  prefix = [np.tile(p[name], (len(images), 1, 1)) for name in ("cls_token", "registers") if name in p]
  x = np.concatenate([*prefix, patches + pos_NxD], 1)
  layers = []
  for i in range(len(p["blocks/norm1/scale"])):
    x = x + attention(norm(x, p["blocks/norm1/scale"][i], p["blocks/norm1/bias"][i]), i)
    x = x + mlp(norm(x, p["blocks/norm2/scale"][i], p["blocks/norm2/bias"][i]), i)
    layers.append(norm(x, p["norm/scale"], p["norm/bias"]))
  return np.stack(layers)


@pytest.mark.parametrize("cls_token, num_registers, pos_embed", [(False, 0, "sincos"), (True, 2, "learned")])
def test_vit_equals_its_restatement(cls_token, num_registers, pos_embed):
  pool = "cls" if cls_token else "mean"
  cfg = dataclasses.replace(TINY, cls_token=cls_token, num_registers=num_registers, pos_embed=pos_embed, pool=pool)
  variables, x = random_variables(cfg), images()
  out = apply(cfg, variables, x)
  if pos_embed == "sincos":
    assert "pos_embed" not in variables["params"]  # a constant must not be decayed
    pos_NxD = sincos_position_embedding((2, 2), 16)
  else:
    pos_NxD = np.asarray(variables["params"]["pos_embed"][0])
  layers_LxBxTxD = restated_vit(variables["params"], x, 4, pos_NxD)
  tokens_BxNxD = layers_LxBxTxD[-1, :, cls_token + num_registers :]  # class and register tokens are dropped
  if cls_token:
    pooled_LxBxD = layers_LxBxTxD[:, :, 0]
  else:
    pooled_LxBxD = layers_LxBxTxD.mean(2)
  np.testing.assert_allclose(out.tokens_BxNxD, tokens_BxNxD, rtol=2e-4, atol=2e-4)
  np.testing.assert_allclose(out.pooled_BxD, pooled_LxBxD[-1], rtol=2e-4, atol=2e-4)
  last_two = np.concatenate([pooled_LxBxD[-2], pooled_LxBxD[-1]], -1)
  np.testing.assert_allclose(out.probe_BxF, last_two, rtol=2e-4, atol=2e-4)


def test_mean_pooling_leaves_class_and_register_tokens_out():
  cfg = dataclasses.replace(TINY, cls_token=True, num_registers=2)
  out = apply(cfg, random_variables(cfg), images())
  np.testing.assert_allclose(out.pooled_BxD, out.tokens_BxNxD.mean(1), atol=1e-6)


def test_bfloat16_compute_stays_near_float32():
  cfg = dataclasses.replace(TINY, depth=2)
  variables = random_variables(cfg)
  exact = apply(cfg, variables, images())
  rounded = apply(dataclasses.replace(cfg, compute_dtype="bfloat16"), variables, images())
  np.testing.assert_allclose(rounded.pooled_BxD, exact.pooled_BxD, atol=0.1)
  assert not np.array_equal(exact.pooled_BxD, rounded.pooled_BxD)


# Position embeddings


def test_sincos_is_i_jepas_formula():
  pos = sincos_position_embedding((3, 5), 16).reshape(3, 5, 16)
  for y, x in np.ndindex(3, 5):
    for i in range(4):
      omega = 10000.0 ** (-i / 4)
      expected = [np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]
      np.testing.assert_allclose(pos[y, x, [i, 4 + i, 8 + i, 12 + i]], expected, atol=1e-6)


def test_sincos_at_three_times_the_resolution_meets_the_native_one_at_the_shared_centres():
  native = sincos_position_embedding((4, 4), 16).reshape(4, 4, 16)
  fine = sincos_position_embedding((12, 12), 16, native_hw=(4, 4)).reshape(12, 12, 16)
  np.testing.assert_allclose(fine[1::3, 1::3], native, atol=1e-6)


def test_learned_embedding_is_untouched_at_native_size_and_keeps_constants_elsewhere():
  pos = normal(0, 1, 16, 8)
  assert resize_position_embedding(pos, (4, 4), (4, 4)) is pos
  constant = jnp.broadcast_to(pos[:, :1], pos.shape)
  resized = resize_position_embedding(constant, (4, 4), (2, 3))
  np.testing.assert_allclose(resized, jnp.broadcast_to(pos[:, :1], (1, 6, 8)), rtol=1e-5)


@pytest.mark.parametrize("grid_hw", [(2, 3), (4, 4), (7, 5), (12, 16)])
def test_filters_of_positions_are_jaxs_and_pytorchs(grid_hw):
  pos = normal(0, 1, 35, 8)
  found = {name: resize_position_embedding(pos, (5, 7), grid_hw, name) for name in ("cubic", "torch", "antialiased")}
  grid = np.asarray(pos).reshape(1, 5, 7, 8)
  jaxs = jax.image.resize(grid, (1, *grid_hw, 8), "bicubic", antialias=False)
  np.testing.assert_allclose(found["cubic"], jaxs.reshape(1, -1, 8), atol=1e-5)
  torch = pytest.importorskip("torch")
  for name, antialias in {"torch": False, "antialiased": True}.items():
    wanted = torch.nn.functional.interpolate(
      torch.from_numpy(grid.transpose(0, 3, 1, 2)), size=grid_hw, mode="bicubic", antialias=antialias
    )
    np.testing.assert_allclose(found[name], wanted.numpy().transpose(0, 2, 3, 1).reshape(1, -1, 8), atol=1e-5)


def test_rotary_positions_tell_distances_alone():
  """Turned, a query and a key see by how much they are apart, and not where; the first pair turns once per side."""
  cos, sin = axial_rotation((5, 6), 16)
  assert cos.shape == sin.shape == (30, 16)
  q, k = normal(0, 1, 1, 1, 16), normal(1, 1, 1, 1, 16)
  turned = lambda x: rotate(jnp.broadcast_to(x, (1, 30, 1, 16)), (jnp.asarray(cos), jnp.asarray(sin)))[0, :, 0]
  scores = np.asarray(turned(q) @ turned(k).T).reshape(5, 6, 5, 6)
  np.testing.assert_allclose(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], atol=1e-4)
  assert np.abs(scores[0, 0] - scores[0, 0].mean()).max() > 0.1
  np.testing.assert_allclose(jnp.linalg.norm(turned(q), axis=-1), jnp.linalg.norm(q), rtol=1e-5)
  coarse, fine = axial_rotation((2, 2), 16)[0], axial_rotation((6, 6), 16)[0].reshape(6, 6, 16)
  np.testing.assert_allclose(fine[1::3, 1::3].reshape(4, 16), coarse, atol=1e-5)  # any grid covers the same range


@pytest.mark.parametrize(
  "extra",
  [{"layer_scale": 0.1}, {"activation": "swiglu", "mlp_dim": 24}, {"pos_embed": "rope"}, {"norm_after_pool": True}],
)
@pytest.mark.parametrize("scan", [True, False])
def test_what_families_have_of_their_own_is_the_same_in_parts_of_the_patches(extra, scan):
  """All patches kept in another order are the same image; several sizes go together as one after the other."""
  cfg = dataclasses.replace(TINY, scan=scan, **extra)
  vit, x = cfg.make(3), normal(0, 2, 16, 16, 3)
  variables = randomised(abstract_init(cfg))
  whole = vit.apply(variables, x)
  order = np.random.default_rng(0).permutation(whole.tokens_BxNxD.shape[1])
  kept = vit.apply(variables, x, keep_BxK=jnp.broadcast_to(order, (2, len(order))))
  np.testing.assert_allclose(kept.tokens_BxNxD, whole.tokens_BxNxD[:, order], atol=1e-4)
  np.testing.assert_allclose(kept.pooled_BxD, whole.pooled_BxD, atol=1e-4)
  small = x[:, :8, :8]
  together = vit.apply(variables, (x, small))
  np.testing.assert_allclose(together[1].pooled_BxD, vit.apply(variables, small).pooled_BxD, atol=1e-4)


@pytest.mark.parametrize("pos_embed", ["learned", "sincos", "rope"])
def test_one_vit_reads_other_image_sizes(pos_embed):
  cfg = dataclasses.replace(TINY, image_size=16, pos_embed=pos_embed)
  variables = abstract_init(cfg)
  for height, width in [(8, 8), (16, 16), (24, 12)]:
    x = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    out = jax.eval_shape(cfg.make(3).apply, variables, x)
    assert out.tokens_BxNxD.shape == (2, height * width // 16, 16)


# Dropped patches (I-JEPA's context)


def test_dropped_patches_never_enter_and_kept_ones_keep_their_position():
  cfg = dataclasses.replace(TINY, cls_token=True)
  variables, x = random_variables(cfg), images()
  encode = jax.jit(lambda x, keep: cfg.make(3).apply(variables, x, keep_BxK=keep))
  keep_BxK = jnp.array([[0, 3], [1, 2]])
  out = encode(x, keep_BxK)
  assert out.tokens_BxNxD.shape == (2, 2, 16)
  # Image 0 keeps patches 0 and 3, so a change in patch 1 (the top right) is not seen; image 1 keeps patch 1.
  changed = encode(x.at[:, :4, 4:].add(1.0), keep_BxK)
  np.testing.assert_array_equal(changed.pooled_BxD[0], out.pooled_BxD[0])
  assert not np.allclose(changed.pooled_BxD[1], out.pooled_BxD[1])
  # Order is only that of the output: attention does not see it.
  swapped = encode(x, keep_BxK[:, ::-1])
  np.testing.assert_allclose(swapped.tokens_BxNxD[:, ::-1], out.tokens_BxNxD, atol=1e-5)
  everything, plain = encode(x, jnp.tile(jnp.arange(4), (2, 1))), apply(cfg, variables, x)
  np.testing.assert_allclose(everything.tokens_BxNxD, plain.tokens_BxNxD, atol=1e-5)


# Same numbers however executed


def unstack(params, depth):
  layers = {f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(depth)}
  return {**{k: v for k, v in params.items() if k != "blocks"}, **layers}


@pytest.mark.slow
def test_scanned_unrolled_and_rematerialised_stacks_agree_in_value_and_gradient():
  cfg = dataclasses.replace(TINY, depth=2, drop_path=0.5, num_registers=1)
  params, x, key = random_variables(cfg)["params"], images(4), jax.random.key(7)

  def value_and_grad(cfg, params):
    def loss(params):
      out = cfg.make(3).apply({"params": params}, x, train=True, keys_B=jax.random.split(key, len(x)))
      return jnp.square(out.pooled_BxD).sum() + jnp.sin(out.probe_BxF).sum()

    return jax.jit(jax.value_and_grad(loss))(params)

  value, grad = value_and_grad(cfg, params)
  again = [value_and_grad(dataclasses.replace(cfg, remat=kind), params) for kind in ("matmuls", "block")]
  unrolled_value, unrolled_grad = value_and_grad(dataclasses.replace(cfg, scan=False), unstack(params, 2))
  for other_value, other_grad, expected in [
    *((*pair, grad) for pair in again),
    (unrolled_value, unrolled_grad, unstack(grad, 2)),
  ]:
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), other_grad, expected)


def test_vit_is_the_same_on_one_device_and_on_eight():
  cfg = dataclasses.replace(TINY, depth=2, drop_path=0.3)
  variables, x = random_variables(cfg), images(8)
  keys_B = jax.random.split(jax.random.key(0), 8)
  encode = lambda v, x: cfg.make(3).apply(v, x, train=True, keys_B=keys_B[: len(x)]).pooled_BxD
  expected = jax.jit(encode)(variables, x)
  with jax.set_mesh(mesh := mesh_of_eight(2, 2, 2)):
    sharded = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    compiled = jax.jit(encode).lower(variables, sharded).compile()
    np.testing.assert_allclose(compiled(variables, sharded), expected, rtol=1e-4, atol=1e-5)
  # Activations stay where they are: tensor parallelism only adds up the two branches of a block.
  moved = re.findall(r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce)\(", compiled.as_text())
  assert {op for _, op in moved} == {"all-reduce"}, moved


# Drop path


def test_drop_path_rates_rise_linearly_and_keep_the_mean():
  scale_Lx2xB = np.asarray(draw_branch_scales(jax.random.split(jax.random.key(0), 20_000), 0.4, 5))
  np.testing.assert_allclose((scale_Lx2xB == 0).mean((1, 2)), [0, 0.1, 0.2, 0.3, 0.4], atol=0.01)
  np.testing.assert_allclose(scale_Lx2xB.mean((1, 2)), 1.0, atol=0.02)
  assert abs(np.corrcoef(scale_Lx2xB[4])[0, 1]) < 0.03  # the two branches are dropped independently


def test_a_dropped_branch_is_the_identity_for_that_example_only():
  block = Block(num_heads=2, mlp_dim=32, dtype=jnp.float32)
  x = normal(0, 3, 4, 16)
  variables = randomised(jax.eval_shape(block.init, jax.random.key(1), (x,), (None,), (None,), (None,)))
  run = jax.jit(lambda scale: block.apply(variables, (x,), (scale,), (None,), (None,))[0][0])
  kept, mixed = run(None), run(jnp.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]))
  np.testing.assert_array_equal(mixed[1], x[1])
  np.testing.assert_allclose(mixed[jnp.array([0, 2])], kept[jnp.array([0, 2])], atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_several_sizes_in_one_call_are_as_one_after_the_other(scan):
  """Values, gradients and what is dropped; the gradients of a weight meet in one scan."""
  cfg = dataclasses.replace(TINY, drop_path=0.5, cls_token=True, num_registers=1, scan=scan)
  encoder, variables = cfg.make(3), random_variables(cfg)
  sizes = images(), images()[:1, : 2 * cfg.patch_size, : 2 * cfg.patch_size]
  keys = tuple(jax.random.split(jax.random.key(i), len(x)) for i, x in enumerate(sizes))

  def total(variables, together):
    run = lambda x, k: encoder.apply(variables, x, train=True, keys_B=k)
    out = run(sizes, keys) if together else tuple(map(run, sizes, keys))
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves(out)), out

  grad = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
  (_, one), of_one = grad(variables, True)
  (_, other), of_other = grad(variables, False)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (one, of_one), (other, of_other))


def test_drop_path_is_off_in_evaluation_and_follows_its_key_in_training():
  cfg = dataclasses.replace(TINY, drop_path=0.5)
  variables, x = random_variables(cfg), images()
  encode = jax.jit(lambda key: cfg.make(3).apply(variables, x, train=True, keys_B=jax.random.split(key, len(x))))
  train = lambda seed: encode(jax.random.key(seed))
  plain = apply(TINY, variables, x).pooled_BxD
  np.testing.assert_array_equal(apply(cfg, variables, x).pooled_BxD, plain)
  np.testing.assert_array_equal(train(0).pooled_BxD, train(0).pooled_BxD)
  assert not np.allclose(train(0).pooled_BxD, train(1).pooled_BxD)
  assert not np.allclose(train(0).pooled_BxD, plain)
