"""CLIP's and SigLIP's losses: values and gradients of oracles, chunks, captions, collapse, any mesh, bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_jax import losses
from jepa_jax.evals.retrieval import recalls
from jepa_jax.sharding import MeshConfig, make_mesh

IMAGE, T = (np.random.RandomState(seed).randn(8, 16) for seed in (0, 1))
A = 0.8 * IMAGE + 0.6 * T
TAU, TEN = np.log(1 / 0.07), np.log(10.0)

clip = lambda i, t, tau=TAU, chunk=0: losses.clip(i, t, tau, chunk)[0]
siglip = lambda i, t, tau=TEN, bias=-10.0, chunk=0: losses.siglip(i, t, tau, bias, chunk)[0]
mmcr = lambda i, t: losses.mmcr(jnp.stack([i, t], 1))[0]

# loss, texts -> value, |dI|, |dT|, dI[0, 0], computed in float64 outside of this project (specification, section 7)
ORACLES = {
  "clip, I and T": (clip, T, 4.3105925859, 1.2986569690, 1.7685580583, -0.1250917581),
  "clip, I and A": (clip, A, 0.0147392367, 0.0811226555, 0.0599359548, -0.0001276010),
  "siglip, I and T": (siglip, T, 9.0831731228, 0.8679996795, 1.0918021037, -0.0857115860),
  "siglip, I and A": (siglip, A, 1.8900657690, 0.4714507612, 0.4618314301, -0.0473797091),
  "mmcr, I and T": (mmcr, T, -5.5656952886, 0.2557136559, 0.3201246783, -0.0157679462),
  "mmcr, I and A": (mmcr, A, -7.1774547155, 0.1739992756, 0.1575546047, -0.0062769432),
}


def f32(*arrays):
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


@pytest.mark.parametrize("name", ORACLES)
def test_values_and_gradients_are_those_of_the_oracles(name):
  loss, text, value, of_i, of_t, first = ORACLES[name]
  found, (di, dt) = jax.value_and_grad(loss, (0, 1))(*f32(IMAGE, text))
  assert float(found) == pytest.approx(value, rel=1e-5)
  np.testing.assert_allclose([np.linalg.norm(di), np.linalg.norm(dt)], [of_i, of_t], rtol=2e-5)
  assert float(di[0, 0]) == pytest.approx(first, abs=1e-6)


def test_gradients_of_temperature_and_bias_are_those_of_the_oracles():
  image, text = f32(IMAGE, A)
  assert float(jax.grad(clip, 2)(image, text, TAU)) == pytest.approx(-0.0251939203, rel=1e-4)
  of_scale, of_bias = jax.grad(siglip, (2, 3))(image, text, TEN, -10.0)
  np.testing.assert_allclose([of_scale, of_bias], [-6.3949780799, -0.7803639056], rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("loss", [clip, siglip])
def test_chunks_give_the_value_and_every_gradient_of_the_whole(loss, chunk):
  scalars = (TAU,) if loss is clip else (TEN, -10.0)
  number = 2 + len(scalars)
  run = lambda chunk: jax.value_and_grad(lambda *args: loss(*args, chunk=chunk), tuple(range(number)))(
    *f32(IMAGE, T), *map(jnp.float32, scalars)
  )
  for one, other in zip(*(jax.tree.leaves(run(c)) for c in (0, chunk)), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [losses.clip, lambda i, t, s, chunk: losses.siglip(i, t, s, -10.0, chunk)])
def test_a_chunk_of_several_captions_gives_the_terms_of_the_whole(loss):
  text = jnp.asarray(np.random.RandomState(2).randn(8, 3, 16), jnp.float32)
  (image,) = f32(IMAGE)
  whole, parts = (loss(image, text, TEN, chunk) for chunk in (0, 4))
  assert {k: float(v) for k, v in whole[1].items()} == pytest.approx(
    {k: float(v) for k, v in parts[1].items()}, abs=1e-4
  )


def test_swapping_the_towers_swaps_the_gradients_and_an_order_of_the_batch_means_nothing():
  image, text = f32(IMAGE, T)
  order = np.random.RandomState(3).permutation(8)
  for loss in (clip, siglip, mmcr):
    di, dt = jax.grad(loss, (0, 1))(image, text)
    swapped = jax.grad(loss, (0, 1))(text, image)
    np.testing.assert_allclose([di, dt], swapped[::-1], atol=1e-5)
    assert float(loss(image[order], text[order])) == pytest.approx(float(loss(image, text)), rel=1e-5)


def test_collapse_is_ln_b_b_ln_2_and_minus_root_b():
  ones = jnp.ones((8, 16))
  assert float(clip(ones, ones)) == pytest.approx(np.log(8), rel=1e-6)
  assert float(siglip(ones, ones)) == pytest.approx(8 * np.log(2), rel=1e-6)  # scale and bias cancel
  assert float(mmcr(ones, ones)) == pytest.approx(-np.sqrt(8), rel=1e-6)
  for loss in (clip, siglip, mmcr):
    assert all(np.isfinite(x).all() for x in jax.grad(loss, (0, 1))(ones, jnp.zeros((8, 16))))


def test_siglip_begins_near_ten_for_orthogonal_embeddings():
  near = jnp.eye(64, 128)
  far = jnp.roll(near, 64, axis=1)
  assert float(siglip(near, far)) == pytest.approx(10.0, abs=0.01)


def test_several_captions_of_an_image_are_each_against_all_texts():
  """Written out: rows are the mean over an image's own captions, columns each text's own image."""
  text = np.random.RandomState(2).randn(8, 3, 16)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  logits = unit(IMAGE) @ unit(text).reshape(24, 16).T / 0.07
  own = logits[np.repeat(np.arange(8), 3), np.arange(24)].reshape(8, 3)
  rows = np.log(np.exp(logits).sum(1)) - own.mean(1)
  columns = np.log(np.exp(logits).sum(0)) - own.reshape(-1)
  value, terms = losses.clip(*f32(IMAGE, text), TAU)
  assert float(value) == pytest.approx((rows.mean() + columns.mean()) / 2, rel=1e-5)
  hits = logits.argmax(1) // 3 == np.arange(8)
  assert float(terms["r1_image_to_text"]) == pytest.approx(100 * hits.mean())
  sign = np.where(np.repeat(np.arange(8), 3) == np.arange(8)[:, None], 1, -1)
  logits = 10 * logits * 0.07 - 10
  value, _ = losses.siglip(*f32(IMAGE, text), TEN, -10.0)
  assert float(value) == pytest.approx(np.log1p(np.exp(-sign * logits)).sum() / 24, rel=1e-5)
  same = f32(IMAGE, np.repeat(T[:, None], 1, 1))
  assert float(clip(*same)) == float(clip(*f32(IMAGE, T)))


def test_a_centroid_may_weigh_the_towers_or_the_views():
  text = np.random.RandomState(2).randn(8, 3, 16)
  views = jnp.asarray(np.concatenate([IMAGE[:, None], text], 1), jnp.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  for weights, centroid in (
    ((0.5, 1 / 6, 1 / 6, 1 / 6), (unit(IMAGE) + unit(text).mean(1)) / 2),
    (None, unit(np.concatenate([IMAGE[:, None], text], 1)).mean(1)),
  ):
    expected = -np.linalg.svd(centroid, compute_uv=False).sum()
    assert float(losses.mmcr(views, weights=weights)[0]) == pytest.approx(expected, rel=1e-5)
  with pytest.raises(ValueError, match="one for each of 4 views"):
    losses.mmcr(views, weights=(0.5, 0.5))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
@pytest.mark.parametrize("chunk", [0, 8])
def test_eight_devices_give_the_value_and_gradients_of_one(shape, chunk):
  """The batch lies on 8 devices: the mesh of 2 x 4 is where public exchange loops went wrong."""
  image, text = (np.random.RandomState(s).randn(32, 16).astype(np.float32) for s in (0, 1))
  mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1]))
  place = lambda x: jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
  for loss in (lambda i, t, s: clip(i, t, s, chunk), lambda i, t, s: siglip(i, t, s, -10.0, chunk)):
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    one = run(image, text, TEN)
    with jax.set_mesh(mesh):
      many = run(place(image), place(text), TEN)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_logits_are_float32_whatever_the_embeddings_are():
  image, text = f32(IMAGE, T)
  half = clip(image.astype(jnp.bfloat16), text.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  rounded = clip(image.astype(jnp.bfloat16).astype(jnp.float32), text.astype(jnp.bfloat16).astype(jnp.float32))
  assert float(half) == float(rounded)


@pytest.mark.parametrize("chunk", [0, 4])
def test_at_a_collapse_no_image_finds_its_text_and_where_all_are_told_apart_each_does(chunk):
  same, apart = jnp.ones((8, 16)), jnp.eye(8, 16)
  for z, found in ((same, 0), (apart, 100)):
    text = z[:, None]
    by_clip, by_siglip = losses.clip(z, text, 1.0, chunk)[1], losses.siglip(z, text, 1.0, -1.0, chunk)[1]
    for terms in (by_clip, by_siglip, losses.pair_recalls(z, text)):
      assert float(terms["r1_image_to_text"]) == float(terms["r1_text_to_image"]) == found


def test_recalls_within_the_batch_are_those_of_the_evaluation():
  rng = np.random.RandomState(3)
  image, text = rng.randn(12, 6), rng.randn(12, 3, 6)
  text += image[:, None]
  expected, found = recalls(image, text, (1,)), losses.pair_recalls(*f32(image, text))
  assert float(found["r1_image_to_text"]) == pytest.approx(expected["i2t_r1"])
  assert float(found["r1_text_to_image"]) == pytest.approx(expected["t2i_r1"])
  assert 0 < expected["t2i_r1"] < 100


def test_numbers_that_are_none_are_refused():
  for number in (float("nan"), float("inf")):
    with pytest.raises(ValueError, match="log_scale=.* must be a finite number"):
      losses.clip(jnp.eye(4), jnp.eye(4), number)
    with pytest.raises(ValueError, match="bias=.* must be a finite number"):
      losses.siglip(jnp.eye(4), jnp.eye(4), 1.0, number)


@pytest.mark.parametrize(
  ("image", "text", "chunk", "message"),
  [
    ((8, 16), (8, 8), 0, "images are"),
    ((8, 16), (4, 16), 0, "images are"),
    ((8, 2, 16), (8, 16), 0, "images are"),
    ((1, 16), (1, 16), 0, "2 or more"),
    ((8, 16), (8, 16), 3, "chunk=3 must divide the batch of 8"),
  ],
)
def test_what_does_not_fit_is_named(image, text, chunk, message):
  for loss in (clip, siglip):
    with pytest.raises(ValueError, match=message):
      loss(jnp.ones(image), jnp.ones(text), chunk=chunk)
