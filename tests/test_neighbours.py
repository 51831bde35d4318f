"""Losses of the neighbours: values and gradients of float64 oracles, collapse, exactness on eight devices, bad
input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_jax import losses
from jepa_jax.sharding import MeshConfig, make_mesh

A = np.random.RandomState(0).randn(8, 16)
B = 0.8 * A + 0.6 * np.random.RandomState(1).randn(8, 16)
PAIR = np.stack([A, B], axis=1).astype(np.float32)
ONES = np.ones((8, 2, 16), np.float32)

# loss of (B, V, D) -> value and the lengths of the gradients of A and of B, computed in float64 outside of this
# project.
ORACLES = {
  "nt_xent .5": (lambda z: losses.nt_xent(z, 0.5)[0], 1.2748711404, 0.0945965513, 0.0894759309),
  "nt_xent .2": (lambda z: losses.nt_xent(z, 0.2)[0], 0.3059452620, 0.1356767510, 0.1273160569),
  "nt_xent .1": (lambda z: losses.nt_xent(z, 0.1)[0], 0.0499955039, 0.1193027543, 0.1053592360),
  "barlow": (lambda z: losses.barlow_twins(z)[0], 0.6407524028, 0.3874111345, 0.4509980874),
  "vicreg": (lambda z: losses.vicreg(z)[0], 16.2070760508, 2.9028477460, 2.8709255007),
}


@pytest.mark.parametrize("name", ORACLES)
def test_values_and_gradients_are_those_of_the_oracles(name):
  loss, value, of_a, of_b = ORACLES[name]
  found, gradient = jax.value_and_grad(loss)(PAIR)
  assert float(found) == pytest.approx(value, rel=2e-5)
  lengths = np.linalg.norm(gradient.swapaxes(0, 1).reshape(2, -1), axis=1)
  np.testing.assert_allclose(lengths, [of_a, of_b], rtol=2e-4)


def test_the_terms_of_vicreg_are_those_of_the_oracle():
  _, terms = losses.vicreg(PAIR)
  expected = {"inv": 0.3197519227, "var": 0.1002446060, "cov": 5.7071628340}
  assert {k: float(v) for k, v in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_byol_is_two_minus_two_cosines_and_targets_have_no_gradient():
  value, _ = losses.byol(PAIR, PAIR)  # both ways are the same cosine here
  assert float(value) == pytest.approx(0.3259113745, rel=1e-5)
  gradient = jax.grad(lambda p: losses.byol(p, PAIR)[0])(PAIR)
  assert np.linalg.norm(gradient[:, 0]) == pytest.approx(0.1048091143 / 2, rel=1e-4)  # the mean of both ways
  assert np.abs(jax.grad(lambda t: losses.byol(PAIR, t)[0])(PAIR)).max() == 0


@pytest.mark.parametrize(
  ("temperature", "one_side", "length"), [(0.2, 0.0754043611, 0.0495725036), (1.0, 2.7283197106, 0.0933302324)]
)
def test_moco_v3_is_the_sum_of_both_sides_with_two_temperatures_before_it(temperature, one_side, length):
  def one(query):  # the other side's keys are its queries, apart: it adds log of the softmax of nothing but itself
    return losses.moco_v3(jnp.stack([query, jnp.asarray(B, jnp.float32)], 1), PAIR, temperature)[0]

  both = float(losses.moco_v3(PAIR, PAIR, temperature)[0])
  swapped = np.linalg.norm(A, axis=1)
  cosines = (B / np.linalg.norm(B, axis=1)[:, None]) @ (A / swapped[:, None]).T / temperature
  other = 2 * temperature * np.mean(np.log(np.exp(cosines).sum(1)) - np.diag(cosines))
  assert both == pytest.approx(one_side + other, rel=1e-4)
  gradient = jax.grad(one)(jnp.asarray(A, jnp.float32))
  assert np.linalg.norm(gradient) == pytest.approx(length, rel=2e-4)
  assert np.abs(jax.grad(lambda k: losses.moco_v3(PAIR, k, temperature)[0])(PAIR)).max() == 0


def test_dino_with_and_without_its_centre():
  student = np.random.RandomState(3).randn(3, 8, 16).swapaxes(0, 1)
  teacher = np.random.RandomState(4).randn(2, 8, 16).swapaxes(0, 1)
  centre = 0.1 * np.random.RandomState(5).randn(16)
  assert float(losses.dino(student, teacher, centre)[0]) == pytest.approx(20.0194570226, rel=1e-5)
  assert float(losses.dino(student, teacher, 0 * centre)[0]) == pytest.approx(20.1472702327, rel=1e-5)
  assert float(losses.dino_centre(centre, teacher)[0]) == pytest.approx(0.0251070989, rel=1e-5)
  uniform = np.zeros((8, 2, 16))
  assert float(losses.dino(uniform, teacher, centre)[0]) == pytest.approx(np.log(16), rel=1e-6)
  assert np.abs(jax.grad(lambda t: losses.dino(student, t, centre)[0])(teacher.astype(np.float32))).max() == 0


def patches(images, size):
  num, height, width, channels = images.shape
  grid = images.reshape(num, height // size, size, width // size, size, channels).swapaxes(2, 3)
  return grid.reshape(num, -1, size * size * channels)


def test_mae_of_removed_patches_raw_and_normalised():
  pixels = patches(np.random.RandomState(6).rand(2, 8, 8, 3), 4)
  prediction = np.random.RandomState(7).randn(2, 4, 48)
  masked = np.array([[1, 0, 1, 1], [0, 1, 1, 1]])
  assert float(losses.mae(prediction, pixels, masked)[0]) == pytest.approx(1.4211731903, rel=1e-5)
  target = losses.patch_targets(pixels)
  np.testing.assert_allclose(target[0, 0, :3], [1.44494292, -0.53885099, 1.19158906], rtol=1e-4)
  loss, terms = losses.mae(prediction, target, masked)
  assert float(loss) == pytest.approx(1.9878865397, rel=1e-5) and float(terms["masked"]) == 0.75
  assert float(losses.mae(0 * prediction, target, masked)[0]) == pytest.approx(47 / 48, rel=1e-4)


def test_coding_rates_of_the_oracle_and_their_bound():
  assert float(losses.coding_rate(A)) == pytest.approx(5.6828309534, rel=1e-5)
  assert float(losses.coding_rate(A, 0.01)) == pytest.approx(19.8377603563, rel=1e-5)
  assert float(losses.coding_rate(A.T)) == pytest.approx(float(losses.coding_rate(A.T * 7)), rel=1e-6)
  loss, terms = losses.mcr2(PAIR)
  weighed, same = losses.mcr2(PAIR, class_weight=20.0)
  assert same == terms and float(weighed) == pytest.approx(
    20 * float(terms["class_rate"]) - float(terms["rate"]), rel=1e-6
  )
  expected = {"rate": 6.2655556478, "class_rate": 2.2839306204}
  assert {k: float(v) for k, v in terms.items()} == pytest.approx(expected, rel=1e-5)
  assert float(loss) == pytest.approx(-3.9816250274, rel=1e-5)
  flat = np.eye(16, dtype=np.float32)
  assert float(losses.coding_rate(flat)) == pytest.approx(16 / 2 * np.log(1 + 1 / 0.5), rel=1e-5)


def test_at_a_full_collapse_each_has_its_known_value_and_a_finite_gradient():
  known = {
    "nt_xent": (lambda z: losses.nt_xent(z)[0], np.log(15)),
    "barlow": (lambda z: losses.barlow_twins(z)[0], 16.0),
    "vicreg": (lambda z: losses.vicreg(z)[0], 25 * 0.99),
    "byol": (lambda z: losses.byol(z, z)[0], 0.0),
    "mcr2": (lambda z: losses.mcr2(z)[0], 0.5 * (np.log(1 + 16 / 0.5) - np.log(1 + 16 / 0.5))),
  }
  for loss, value in known.values():
    found, gradient = jax.value_and_grad(loss)(ONES)
    assert float(found) == pytest.approx(value, rel=1e-4, abs=1e-5) and np.isfinite(gradient).all()
    assert np.isfinite(jax.grad(loss)(0 * ONES)).all()


LOSSES = {
  "vicreg": lambda z: losses.vicreg(z)[0],
  "barlow": lambda z: losses.barlow_twins(z)[0],
  "nt_xent": lambda z: losses.nt_xent(z)[0],
  "byol": lambda z: losses.byol(z, z[:, ::-1] * 0.5 + z)[0],
  "moco_v3": lambda z: losses.moco_v3(z, z + 0.1)[0],
  "dino": lambda z: losses.dino(z, z + 0.1, jnp.zeros(16))[0],
  "mae": lambda z: losses.mae(z, z**2, jnp.arange(2 * len(z)).reshape(-1, 2) % 3)[0],
  "mcr2": lambda z: losses.mcr2(z)[0],
  "coding_rate": lambda z: losses.coding_rate(z[:, 0]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_eight_devices_equal_one(name):
  loss = jax.jit(jax.value_and_grad(LOSSES[name]))
  mesh = make_mesh(MeshConfig(data=8), jax.devices()[:8])
  value, gradient = loss(PAIR)
  other, sharded = loss(jax.device_put(PAIR, NamedSharding(mesh, P("data"))))
  assert float(other) == pytest.approx(float(value), rel=1e-5)
  np.testing.assert_allclose(sharded, gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "mae"])  # which knows images by their masks
def test_the_order_of_images_does_not_matter(name):
  assert float(LOSSES[name](PAIR[::-1])) == pytest.approx(float(LOSSES[name](PAIR)), rel=1e-5)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: losses.vicreg(PAIR[:, :1]), "at least 2 views of each image, got 1"),
    (lambda: losses.barlow_twins(np.ones((8, 3, 4))), "exactly 2 views of each image, got 3"),
    (lambda: losses.nt_xent(PAIR[:1]), "compares images, and there is 1"),
    (lambda: losses.nt_xent(PAIR, 0.0), "temperature=0.0 must be above 0"),
    (lambda: losses.dino(PAIR, np.ones((8, 3, 16)), np.zeros(16)), "the teacher has 3 views and the student 2"),
    (lambda: losses.mae(PAIR, PAIR, np.ones((8, 3))), r"masked \(B, N\)"),
    (lambda: losses.mcr2(PAIR[:, :1]), "V of at least 2"),
    (lambda: losses.coding_rate(PAIR), r"z must be \(N, D\)"),
    (lambda: losses.coding_rate(A, 0), "eps=0 is a precision above 0"),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
