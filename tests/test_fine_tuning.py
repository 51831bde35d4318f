"""Fine-tuning: layers move by their shares, paths and crops are drawn by the image's key, what is tuned learns."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.evals.fine_tuning import FineTuning
from jepa_jax.evals.linear import batch_order
from jepa_jax.evals.tuning import TuningSettings, mixed_share, tune
from jepa_jax.optim import layer_shares
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.views import Pixels
from tests.test_tuning import ENCODER, PX, labelled, linear, same, textures
from tests.tiny import MLP, tiny_experiment

QUICK = TuningSettings(learning_rates=(3e-3,), epochs=6, batch_size=16)
PLAIN = FineTuning(layer_decay=1.0, scale=(1.0, 1.0), flip_p=0.0, drop_path=0.0)


@pytest.fixture(scope="module")
def data():
  return labelled(textures(160), textures(60, seed=1))


def subject(data, **encoder):
  """What a row of the table gives, of an encoder with random weights."""
  encoder = encoder if "name" in encoder else ENCODER | encoder
  run = tiny_experiment(encoder=encoder, objective__views__local_crops__num=0)
  params = run.objective.init(jax.random.key(0), run.init_batch())[0]
  own = types.SimpleNamespace(objective=run.objective, data=types.SimpleNamespace(view_hw=(PX, PX), num_classes=3))
  return own, {"params": params["encoder"], "batch_stats": {}}


def test_shares_fall_towards_the_input_stacked_or_not():
  params = {"patch_embed": {"kernel": np.ones(2)}, "pos_embed": np.ones(3), "norm": {"scale": np.ones(4)}}
  stacked = params | {"blocks": {"kernel": np.ones((3, 2, 2)), "bias": np.ones((3, 2))}}
  found = layer_shares(stacked, 0.5)
  assert found["patch_embed"]["kernel"] == found["pos_embed"] == 0.5**4 and found["norm"]["scale"] == 1
  np.testing.assert_allclose(np.ravel(found["blocks"]["bias"]), [0.125, 0.25, 0.5])
  assert found["blocks"]["kernel"].shape == (3, 1, 1)
  apart = layer_shares(params | {f"blocks_{i}": {"kernel": np.ones(2)} for i in range(3)}, 0.5)
  assert [apart[f"blocks_{i}"]["kernel"] for i in range(3)] == [0.125, 0.25, 0.5]
  assert layer_shares({"conv": np.ones(2)}, 0.5) == {"conv": 1.0}


def test_a_parameter_moves_by_its_share(data):
  once = TuningSettings(learning_rates=(1e-2,), epochs=1, batch_size=96, weight_decay=0.0)
  whole, half = (tune(linear(shares=s), data, once).trained["linear"] for s in (1.0, [{"kernel": 0.5}]))
  np.testing.assert_allclose(half[0]["kernel"], 0.5 * whole[0]["kernel"], rtol=1e-4, atol=1e-9)


def test_a_trained_encoder_fits_what_a_head_on_random_features_cannot(data):
  """Labels that say nothing of the images: to know them is to have learned them by heart."""
  own, variables = subject(data)
  rng, (task,) = np.random.RandomState(0), data.tasks
  data = dataclasses.replace(data, tasks=(dataclasses.replace(task, train_N=rng.permutation(task.train_N)),))
  settings = dataclasses.replace(QUICK, epochs=45)
  networks = PLAIN.networks(own, variables, 0)
  tuned = tune(networks, data, settings)
  still = jax.tree.map(lambda _: 0.0, networks.trained["encoder"])
  head_alone = tune(dataclasses.replace(networks, shares={"encoder": still, "head": 1.0}), data, settings)
  assert same(head_alone.trained["encoder"], networks.trained["encoder"])
  assert tuned.train_accuracy[0] > head_alone.train_accuracy[0] + 15


def test_paths_are_dropped_in_training_alone_by_the_images_key(data):
  own, variables = subject(data)
  networks = dataclasses.replace(PLAIN, drop_path=0.5).networks(own, variables, 0)
  images = jnp.asarray(np.random.RandomState(0).randn(4, PX, PX, 1), jnp.float32)
  keys = jax.random.split(jax.random.key(0), 4)
  run = lambda keys: networks.train_fn(networks.trained, networks.frozen, images, 0, keys)
  plain = networks.forward_fn(networks.trained, networks.frozen, images, 0)
  assert np.abs(run(keys) - plain).max() > 1e-5 and same(run(keys), run(keys))
  swapped = run(keys[::-1])
  assert not np.allclose(swapped, run(keys))
  np.testing.assert_array_equal(networks.forward_fn(networks.trained, networks.frozen, images, 0), plain)


def test_crops_are_drawn_anew_and_eight_devices_see_those_of_one(data):
  own, variables = subject(data)
  pixels = types.SimpleNamespace(interpolation="bilinear", pixels=Pixels((0.5,), (0.5,)))
  crops = FineTuning()._crops(types.SimpleNamespace(objective=pixels, data=own.data))
  batch = data.train.read(np.arange(4))
  one, other = (crops(batch, jax.random.split(jax.random.key(i), 4)) for i in (0, 1))
  assert one.shape == (4, PX, PX, 1) and not np.allclose(one, other)
  cropped = dataclasses.replace(data, train_view_fn=crops)
  networks = FineTuning(drop_path=0.2).networks(own, variables, 0)
  once = dataclasses.replace(QUICK, epochs=1)
  alone = tune(networks, cropped, once)
  many = tune(networks, cropped, once, make_mesh(MeshConfig(data=4), jax.devices()[:4]))
  for a, b in zip(*(jax.tree.leaves(x.trained) for x in (alone, many)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_an_encoder_without_blocks_is_tuned_at_one_rate(data):
  own, variables = subject(data, **MLP)
  networks = FineTuning().networks(own, variables, 0)
  assert set(map(float, jax.tree.leaves(networks.shares["encoder"]))) == {1.0}
  assert np.isfinite(tune(networks, data, dataclasses.replace(QUICK, epochs=1)).accuracy[0])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"layer_decay": 0.0}, r"layer_decay=0.0 lies in \(0, 1\]"),
    ({"drop_path": 1.0}, r"drop_path=1.0 lies in \[0, 1\)"),
    ({"scale": (0.0, 1.0)}, "are shares of the area"),
    ({"flip_p": 2.0}, "flip_p=2.0 lies in"),
  ],
)
def test_settings_that_cannot_be_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    FineTuning(**settings)


def test_mixup_is_the_loss_of_mixed_images_under_both_labels(data):
  """One step of SGD-like AdamW from zero: its direction is the sign of the gradient, here from the definition."""
  mixed = dataclasses.replace(linear(), mixup=0.8)
  one = TuningSettings(learning_rates=(1e-2,), epochs=1, batch_size=160, weight_decay=0.0)
  moved = tune(mixed, data, one).trained["linear"][0]["kernel"] - mixed.trained["linear"][0]["kernel"]
  rows = batch_order(160, 1, 160, data.seed)[0]
  batch = data.train.read(np.arange(160)[rows])
  images, labels = data.view_fn(batch), data.tasks[0].train_N[batch["index"]]
  share = mixed_share(data.seed, 0, 0.8)
  assert 0.01 < share < 0.99

  def loss(trained):
    logits = mixed.forward_fn(trained, mixed.frozen, share * images + (1 - share) * images[::-1], 0)
    given = share * jax.nn.one_hot(labels, 3) + (1 - share) * jax.nn.one_hot(labels[::-1], 3)
    return -(given * jax.nn.log_softmax(logits)).sum(-1).mean()

  gradient = jax.grad(loss)(mixed.trained)["linear"][0]["kernel"]
  clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
  assert clear.mean() > 0.5
  np.testing.assert_array_equal(np.sign(moved)[clear], -np.sign(gradient)[clear])


def test_mixup_draws_anew_in_every_step_and_zero_is_none(data):
  shares = [float(mixed_share(0, step, 0.8)) for step in range(400)]
  assert len(set(shares)) > 390 and abs(np.mean(shares) - 0.5) < 0.05
  np.testing.assert_allclose(np.var(shares), 1 / (4 * (2 * 0.8 + 1)), rtol=0.15)  # of Beta(a, a)
  with pytest.raises(ValueError, match="mixup=-1.0 is the alpha"):
    FineTuning(mixup=-1.0)
  assert same(tune(linear(), data, QUICK).trained, tune(dataclasses.replace(linear(), mixup=0.0), data, QUICK).trained)
