"""Attention: one formula, whichever implementation; and what a backward pass keeps of a block."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.config import changed_everywhere, without_recomputation
from jepa_jax.flops import matrix_flops
from jepa_jax.models import attention
from jepa_jax.models.attention import attend, cudnn_refusal
from jepa_jax.models.interface import gelu
from jepa_jax.models.predictor import PredictorConfig
from jepa_jax.models.vit import ViTConfig
from tests.networks import TINY, images, normal, random_variables
from tests.tiny import tiny_config

BATCH, HEADS, HEAD_WIDTH = 3, 2, 8


def qkv(num_queries, num_keys, dtype=jnp.float32, scale=1.0):
  shapes = [(BATCH, n, HEADS, HEAD_WIDTH) for n in (num_queries, num_keys, num_keys)]
  return [(scale * normal(i, *shape)).astype(dtype) for i, shape in enumerate(shapes)]


def value_and_gradients(kind, arrays, num_valid_B=None):
  weight = jnp.cos(jnp.arange(arrays[0].size).reshape(arrays[0].shape))
  loss = lambda *args: (attend(*args, num_valid_B, kind).astype(jnp.float32) * weight).sum()
  with jax.default_matmul_precision("highest"):
    return attend(*arrays, num_valid_B, kind), *jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)


def restated(q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, num_valid_B):
  out = np.zeros(q_BxNxHxK.shape)
  for b, n in enumerate(num_valid_B):
    for h in range(q_BxNxHxK.shape[2]):
      scores_NxM = np.matmul(q_BxNxHxK[b, :, h], k_BxMxHxK[b, :n, h].T, dtype=np.float64) / np.sqrt(q_BxNxHxK.shape[-1])
      weights_NxM = np.exp(scores_NxM - scores_NxM.max(-1, keepdims=True))
      out[b, :, h] = np.matmul(weights_NxM / weights_NxM.sum(-1, keepdims=True), v_BxMxHxK[b, :n, h])
  return out


@pytest.mark.parametrize("kind", ["auto", "xla", "plain"])
def test_it_is_the_papers_formula_over_the_keys_that_are_seen(kind):
  arrays, num_valid_B = qkv(5, 7), [7, 4, 1]
  out = attend(*arrays, jnp.array(num_valid_B), kind)
  np.testing.assert_allclose(out, restated(*map(np.asarray, arrays), num_valid_B), atol=1e-5)


@pytest.mark.parametrize("lengths", [(6, 6), (5, 7), (1, 9)])
@pytest.mark.parametrize("num_valid", [None, [1, 3, 5]])
def test_values_and_gradients_are_those_of_differentiating_the_formula(lengths, num_valid):
  num_valid_B = None if num_valid is None else jnp.array(num_valid)
  plain, ours = (value_and_gradients(kind, qkv(*lengths), num_valid_B) for kind in ("plain", "xla"))
  for a, b in zip(ours, plain, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_form():
  exact = value_and_gradients("plain", qkv(16, 16))
  errors = {}
  for kind in ("plain", "xla"):
    found = value_and_gradients(kind, qkv(16, 16, jnp.bfloat16))
    assert all(x.dtype == jnp.bfloat16 for x in found)
    errors[kind] = [float(jnp.abs(x.astype(jnp.float32) - y).max()) for x, y in zip(found, exact, strict=True)]
  assert all(a <= 1.5 * b for a, b in zip(errors["xla"], errors["plain"], strict=True)), errors


def test_what_is_not_seen_has_no_influence_and_no_gradient():
  q, k, v = qkv(4, 6)
  num_valid_B = jnp.array([2, 6, 3])
  changed = [x.at[0, 2:].set(1e4).at[2, 3:].set(-1e4) for x in (k, v)]
  for kind in ("xla", "plain"):
    before, after = (value_and_gradients(kind, arrays, num_valid_B) for arrays in ((q, k, v), (q, *changed)))
    for a, b in zip(before, after, strict=True):
      np.testing.assert_array_equal(a, b)
    assert not np.any(before[2][0, 2:]) and not np.any(before[3][0, 2:]) and np.any(before[3][0, :2])


def test_scores_that_overflow_an_exponential_are_finite():
  for x in value_and_gradients("xla", qkv(6, 6, scale=100.0)):
    assert np.isfinite(x).all()


def test_gelu_is_the_exact_one():
  x = jnp.linspace(-12, 12, 4001)
  np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
  slope, expected = (jax.vmap(jax.grad(lambda x, f=f: f(x)))(x) for f in (gelu, lambda x: jax.nn.gelu(x, False)))
  np.testing.assert_allclose(slope, expected, atol=1e-6)
  assert gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


# ---------------------------------------------------------------- cuDNN's kernel, which is not here


@pytest.fixture
def nvidia(monkeypatch):
  """Programs are made as for an NVIDIA GPU: they can be traced and lowered here, not compiled."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
  monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda wanted: wanted == "9.0")
  monkeypatch.setattr(attention, "on_nvidia", lambda: True)


@pytest.mark.parametrize("lengths, valid", [((51, 51), False), ((201, 201), True), ((96, 96), False), ((48, 77), True)])
def test_cudnn_takes_all_lengths_with_their_gradients(nvidia, lengths, valid):
  arrays = [jax.ShapeDtypeStruct((2, n, 4, 64), jnp.bfloat16) for n in (lengths[0], lengths[1], lengths[1])]
  num_valid_B = jnp.array([3, 40]) if valid else None
  loss = lambda *args: attend(*args, num_valid_B).astype(jnp.float32).sum()
  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
  assert [x.shape for x in traced.out_info] == [x.shape for x in arrays]
  program = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmax(" in program or '__cudnn$fmhaSoftmax"' in program
  assert "__cudnn$fmhaSoftmaxBackward" in program


@pytest.mark.parametrize("length", [51, 96])
def test_cudnn_is_mapped_over_as_the_ranks_of_a_world_model_do(nvidia, length):
  x = jax.ShapeDtypeStruct((3, 2, length, 4, 64), jnp.bfloat16)
  fn = jax.vmap(lambda x: attend(x, x, x, jnp.array([3, 40])))
  program = jax.jit(fn).trace(x).lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmax" in program


def test_what_is_padded_for_cudnn_changes_nothing(monkeypatch):
  """In the kernel's place stands the plain form, which sees what the kernel would."""
  asked, plain = [], jax.nn.dot_product_attention

  def kernel(q, k, v, query_seq_lengths=None, key_value_seq_lengths=None, is_causal=False, implementation=None):
    asked.append((q.shape[1], k.shape[1], implementation))
    return plain(q, k, v, key_value_seq_lengths=key_value_seq_lengths, is_causal=is_causal)

  monkeypatch.setattr(attention, "on_nvidia", lambda: True)
  monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
  for lengths, num_valid_B in (((5, 7), None), ((8, 16), None), ((9, 9), jnp.array([9, 2, 1]))):
    arrays = qkv(*lengths, jnp.bfloat16)
    for kind in ("auto", "cudnn"):
      np.testing.assert_allclose(
        attend(*arrays, num_valid_B, kind).astype(jnp.float32),
        attend(*arrays, num_valid_B, "xla").astype(jnp.float32),
        atol=0.02,
      )
  assert {(q % 8, k % 8, kind) for q, k, kind in asked} == {(0, 0, "cudnn")} and len(asked) == 6


@pytest.mark.parametrize(
  "shape, dtype, message",
  [
    ((2, 16, 4, 64), jnp.float32, "products are in float32"),
    ((2, 16, 4, 160), jnp.bfloat16, "heads are 160 wide, and it takes multiples of 8 up to 128"),
    ((2, 16, 4, 20), jnp.bfloat16, "heads are 20 wide"),
    ((2, 1, 4, 64), jnp.bfloat16, "one query"),
  ],
)
def test_what_cudnn_does_not_take_runs_without_it_unless_it_is_asked_for(monkeypatch, shape, dtype, message):
  monkeypatch.setattr(attention, "on_nvidia", lambda: True)
  x = jnp.ones(shape, dtype)
  with pytest.raises(ValueError, match=f"attention='cudnn' cannot run here: .*{message}.*'xla' and 'plain' can"):
    attend(x, x, x, kind="cudnn")
  np.testing.assert_allclose(attend(x, x, x).astype(jnp.float32), 1.0, atol=1e-2)


def test_cudnn_is_refused_on_a_cpu():
  q = jnp.ones((2, 16, 4, 64), jnp.bfloat16)
  assert "no NVIDIA GPU" in (cudnn_refusal(q) or "") and "cpu" in (cudnn_refusal(q) or "")
  with pytest.raises(ValueError, match="no NVIDIA GPU"):
    encoder = dataclasses.replace(TINY, attention="cudnn").make(3)
    jax.eval_shape(lambda: encoder.init(jax.random.key(0), images(1)))


@pytest.mark.parametrize("cfg", [ViTConfig, PredictorConfig])
def test_names_that_are_none_are_refused_with_those_that_are(cfg):
  with pytest.raises(ValueError, match="attention.*auto, xla, plain, cudnn"):
    cfg(attention="flash")
  with pytest.raises(ValueError, match="remat.*none, matmuls, block"):
    cfg(remat="dots")


# ---------------------------------------------------------------- what the backward pass keeps


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_a_backward_pass_keeps_less_by_its_name_and_makes_no_product_twice_for_matmuls(scan):
  cfg = dataclasses.replace(TINY, depth=6, scan=scan, width=32, num_heads=4)
  variables, x = random_variables(cfg), images(32)
  temporaries, flops = {}, {}
  for kind in ("none", "matmuls", "block"):
    encoder = dataclasses.replace(cfg, remat=kind).make(3)
    loss = lambda v, encoder=encoder: jnp.square(encoder.apply(v, x).tokens_BxNxD).sum()
    flops[kind] = matrix_flops(jax.grad(loss), variables)
    if scan:
      memory = jax.jit(jax.grad(loss)).lower(variables).compile().memory_analysis()
      assert memory
      temporaries[kind] = memory.temp_size_in_bytes
  assert flops["none"] == flops["matmuls"] < flops["block"]
  assert not scan or temporaries["block"] < temporaries["matmuls"] < 0.75 * temporaries["none"], temporaries


def test_a_share_of_the_peak_counts_no_weights_made_again():
  cfg = tiny_config(encoder__remat="matmuls")
  plain = without_recomputation(cfg)
  assert (plain.encoder.remat, plain.encoder.attention) == ("none", "plain")
  assert changed_everywhere(cfg, "attention", lambda path, old: "xla").encoder.attention == "xla"
  q = jax.ShapeDtypeStruct((2, 8, 2, 8), jnp.float32)
  count = lambda kind: matrix_flops(jax.value_and_grad(lambda q: attend(q, q, q, kind=kind).sum()), q)
  assert count("plain") == 6 * (one := 2 * 2 * 8 * 8 * 2 * 8) and count("xla") == 7 * one
