"""Attentive probe and predictor tuning: what is frozen stays, what is compared is alike, test labels score only."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.data import DataConfig, ImageSet
from jepa_jax.data.sources import ArraySource
from jepa_jax.evals import predictor_tuning as protocol
from jepa_jax.evals.attentive import attentive_probe, make_heads
from jepa_jax.evals.predictor_tuning import grouped
from jepa_jax.evals.tuning import HELD_OUT, Task, Tunable, TuningData, TuningSettings, every, tune
from jepa_jax.models import make_attentive_head
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.views import NUM_ACTIONS, Pixels, center_view
from tests.tiny import VIT, start_of, tiny_experiment

PX, CHANCE = 16, 100 / 3
JITTER = {"brightness": 0.4, "contrast": 0.4, "p": 0.8}
VIEWS = {"global_crops": {"num": 1, "size_px": PX, "scale": (0.3, 1.0)}}
MASKED = {"masks": {"kind": "uniform"}, "predictor": {"width": 8, "depth": 1}}
IJEPA = {"name": "ijepa", "views": VIEWS} | MASKED
IWM = {"name": "iwm", "views": VIEWS | {"color": JITTER}, "source": JITTER, "masks": {"kind": "uniform"}}
IWM["predictor"] = MASKED["predictor"] | {"conditioning": "feature"}
ENCODER = VIT | {"patch_size": 4, "pos_embed": "sincos", "init": "fan_in"}
QUICK = TuningSettings(learning_rates=(1e-2,), epochs=2, batch_size=16)


def textures(num_images, seed=0):
  """Images of three classes that no mean tells apart, stripes along either axis and squares, in noise."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:PX, :PX] // 2 % 2
  patterns = np.stack([x, y, x ^ y])
  labels = rng.integers(0, 3, num_images)
  pixels = 128 + 80 * (patterns[labels] - 0.5) + 20 * rng.standard_normal((num_images, PX, PX))
  source = ArraySource(pixels.clip(0, 255).astype(np.uint8), labels, ("a", "b", "c"), "textures")
  return ImageSet(source, DataConfig(source="synthetic", canvas_px=PX, channels=1, mean=(0.5,), std=(0.5,)))


class Recorded:
  """Images that note which rows were read; of `broken` ones the next stands in."""

  def __init__(self, images, broken=()):
    self.images, self.broken, self.rows = images, broken, []

  def __len__(self):
    return len(self.images)

  def read(self, rows):
    self.rows.append(np.array(rows))
    return self.images.read(np.array([row + (row in self.broken) for row in rows]))


def labelled(train, test, *more, view_fn=lambda batch: center_view(batch, PX, Pixels((0.5,), (0.5,)))):
  images = lambda x: x.images if isinstance(x, Recorded) else x
  return TuningData(train, test, view_fn, (Task(images(train).labels(), images(test).labels(), 3), *more))


def patches(_, images_BxHxWxC):
  """An encoder without parameters: its tokens are the pixels of 4 x 4 patches."""
  x = images_BxHxWxC.reshape(-1, PX // 4, 4, PX // 4, 4).transpose(0, 1, 3, 2, 4)
  return types.SimpleNamespace(tokens_BxNxD=x.reshape(len(x), -1, 16))


def linear(num_tasks=1, shares=1.0):
  """A linear classifier of pixels for each task: compiled in no time."""
  forward = lambda trained, frozen, images, task: images.reshape(len(images), -1) @ trained["linear"][task]["kernel"]
  kernels = [{"kernel": jnp.zeros((PX * PX, 3))} for _ in range(num_tasks)]
  return Tunable(forward, {"linear": kernels}, {}, {"linear": shares})


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def data():
  return labelled(textures(96), textures(60, seed=1))


@pytest.fixture(scope="module")
def world():
  """An IWM as training leaves it: (objective, params, target), where the target is not the params."""
  run = tiny_experiment(encoder=ENCODER, objective=IWM)
  state = start_of(run)
  target = {"encoder": jax.tree.map(lambda x: 1.1 * x + 0.01, state.params["encoder"])}
  return types.SimpleNamespace(run=run, state=dataclasses.replace(state, target=target),
                               networks=(run.objective, state.params, target))  # fmt: skip


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("width, num_heads", [(8, 1), (100, 1), (192, 3), (384, 6), (1408, 22), (130, 2)])
def test_heads_are_about_64_wide_and_divide_the_width(width, num_heads):
  head = make_attentive_head(width, 10, compute_dtype="bfloat16")
  assert head.num_heads == num_heads
  tokens = jax.ShapeDtypeStruct((2, 5, width), jnp.float32)
  logits, _ = jax.eval_shape(head.init_with_output, jax.random.key(0), tokens)
  assert logits.shape == (2, 10) and logits.dtype == jnp.float32


def test_head_says_what_it_cannot_take():
  with pytest.raises(ValueError, match=r"attentive head's width=100 is not divisible by num_heads=3.*\[1, 2, 4\]"):
    make_attentive_head(100, 10, num_heads=3)
  with pytest.raises(ValueError, match="needs the tokens of an encoder, and this one has none"):
    make_attentive_head(16, 10).init(jax.random.key(0), None)


def test_attentive_probe_learns_what_is_in_the_tokens_and_needs_some(data):
  result = attentive_probe(patches, {}, data, dataclasses.replace(QUICK, epochs=10))
  assert result.accuracy[0] > 95 and result.train_accuracy[0] > 95
  assert result.summary()["accuracy"] == list(result.accuracy) and result.held_out == {}
  json.dumps(result.summary())
  with pytest.raises(ValueError, match="this one has none"):
    attentive_probe(lambda _, images: types.SimpleNamespace(tokens_BxNxD=None), {}, data, QUICK)


# ---------------------------------------------------------------- what is compared


@pytest.mark.slow
def test_variants_differ_in_what_they_train_and_where_it_starts_only(world, data):
  objective, params, target = world.networks
  nets = protocol.variants(*world.networks, data.tasks, seed=0)
  trained = {name: set(each.trained) for name, each in nets.items()}
  assert trained == {
    "tuned encoder": {"heads", "encoder"},
    "random predictor": {"heads", "predictor"},
    "predictor": {"heads", "predictor"},
    "end to end": {"heads", "encoder", "predictor"},
  }
  for name, each in nets.items():
    assert set(each.frozen) == ({"encoder"} if "encoder" not in each.trained else set())
    assert same((each.frozen | each.trained)["encoder"], target["encoder"])  # the moving average
    assert same(each.trained["heads"], make_heads(objective.encoder.width, data.tasks, 0)[1])  # the probe's
    shares = {"heads": 1.0} | {group: 1.0 if name == "random predictor" else 0.1 for group in ("encoder", "predictor")}
    assert each.shares == {group: shares[group] for group in each.trained}
  assert same(nets["predictor"].trained["predictor"], params["predictor"])
  assert same(nets["end to end"].trained["predictor"], params["predictor"])
  other, shape = nets["random predictor"].trained["predictor"], lambda tree: jax.tree.map(jnp.shape, tree)
  assert shape(other) == shape(params["predictor"]) and not same(other, params["predictor"])
  assert not same(
    other, protocol.variants(*world.networks, data.tasks, seed=1)["random predictor"].trained["predictor"]
  )


@pytest.mark.slow
def test_frozen_encoder_is_bit_identical_and_the_predictor_is_tuned(world, data):
  before = jax.device_get(world.networks[1:])
  results = protocol.tune_predictor(*world.networks, data, QUICK, only=("random predictor", "predictor"))
  assert list(results) == ["random predictor", "predictor"]
  assert same(before, world.networks[1:])
  for result in results.values():
    assert "encoder" not in result.trained and not same(result.trained["predictor"], before[0]["predictor"])
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), results["predictor"].trained["predictor"], before[0]["predictor"]
  )
  # Adam moves a number by about the rate at most in a step; twelve steps of a mean of half the peak, a tenth of 1e-2.
  assert 0 < max(jax.tree.leaves(moved)) < 12 * 0.1 * 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("settings", [IJEPA, IWM], ids=["ijepa", "iwm"])
def test_predictor_is_asked_for_all_positions_after_the_null_action(settings, world, monkeypatch):
  objective = tiny_experiment(encoder=ENCODER, objective=settings).objective
  asked, real = {}, objective.predict

  def predict(params, context, masks, action, extra):
    asked.update(masks=masks, action=action, extra=extra)
    return real(params, context, masks, action, extra)

  monkeypatch.setattr(objective, "predict", predict)
  tokens = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16)), jnp.float32)
  predictor = protocol.init_predictor(objective, jax.random.key(0))
  assert jax.eval_shape(lambda x: protocol.answer(objective, predictor, x), tokens).shape == (2, 16, 16)
  answer = lambda token=None: protocol.answer(objective, predictor, tokens, token)
  plain = answer()
  everywhere = np.tile(np.arange(16), (2, 1))
  assert np.array_equal(asked["masks"].context_BxK, everywhere)
  assert np.array_equal(asked["masks"].targets_BxMxT[:, 0], everywhere) and bool(asked["masks"].valid_BxMxT.all())
  assert np.array_equal(asked["action"], np.zeros((2, NUM_ACTIONS))) and asked["extra"] is None
  token_P = jnp.arange(8.0) - 3.5
  answers = [plain, answer(token_P), answer(-token_P)]
  assert asked["extra"].shape == (2, 1, 8)
  assert all(not np.allclose(a, b, atol=1e-5) for a, b in zip(answers, answers[1:]))  # a task's token is heard


# ---------------------------------------------------------------- the loop


def test_every_network_sees_the_same_images_in_the_same_order_for_the_same_epochs(world, data, monkeypatch):
  calls = []
  monkeypatch.setattr(protocol, "tune", lambda networks, *rest: calls.append(rest))
  protocol.tune_predictor(*world.networks, data, QUICK)
  assert len(calls) == 4 and all(rest == (data, QUICK, None) for rest in calls)
  orders = []
  for num_tasks in (1, 1, 2):
    train = Recorded(textures(40))
    tasks = labelled(train, textures(20, 1)).tasks * num_tasks
    tune(linear(num_tasks), TuningData(train, textures(20, 1), data.view_fn, tasks), QUICK)
    orders.append(np.stack(train.rows[:4]))
  assert all(np.array_equal(orders[0], order) for order in orders)
  first, second = orders[0][:2].ravel(), orders[0][2:].ravel()  # epochs of 2 of 2.5 batches
  assert len(set(first)) == len(set(second)) == 32 and not np.array_equal(first, second)


def test_each_group_of_parameters_has_its_share_of_the_rate(data):
  start = {"kernel": jnp.zeros((PX * PX, 3))}
  sum_of = lambda trained, frozen, images, task: (
    images.reshape(len(images), -1) @ (trained["new"]["kernel"] + trained["old"]["kernel"])
  )
  networks = Tunable(sum_of, {"new": start, "old": start}, {}, {"new": 1.0, "old": 0.1})
  trained = tune(networks, data, dataclasses.replace(QUICK, weight_decay=0.0)).trained
  new, old = trained["new"]["kernel"], trained["old"]["kernel"]
  np.testing.assert_allclose(new, 10 * old, rtol=1e-4, atol=1e-6)
  assert np.abs(new).max() > 1e-3 and not np.abs(start["kernel"]).max()


def test_batches_are_split_evenly_over_the_tasks_each_with_its_own_labels():
  assert every(jnp.arange(6), 2)[:, 1].tolist() == [1, 3, 5]
  train, test = textures(64), textures(64, 1)
  classes = labelled(train, test).tasks[0]
  groups = grouped(classes, (0, 1, 1))
  assert groups.num_classes == 2 and np.array_equal(groups.test_N, test.labels() > 0)
  seen = []

  def forward(trained, frozen, images, task):
    seen.append((task, len(images)))
    return linear().forward_fn({"linear": [trained["linear"][task]]}, frozen, images, 0)

  networks = dataclasses.replace(linear(2), forward_fn=forward)
  both = tune(networks, labelled(train, test, groups), dataclasses.replace(QUICK, epochs=20))
  assert {(0, 8), (1, 8)} <= set(seen) <= {(task, size) for task in (0, 1) for size in (8, 16)}  # 16: to score
  assert min(both.accuracy) > 95 and len(both.train_accuracy) == 2


def test_one_task_has_no_token_and_several_have_one_each(world, data):
  both = (data.tasks[0], grouped(data.tasks[0], (0, 1, 1)))
  one, two = (protocol.variants(*world.networks, tasks, 0)["predictor"] for tasks in (both[:1], both))
  assert set(one.trained) == {"heads", "predictor"} and two.trained["tokens_TxP"].shape == (2, 8)
  assert two.shares["tokens_TxP"] == 1.0 and same(one.trained["heads"][0], two.trained["heads"][0])
  images = jnp.asarray(np.random.default_rng(0).standard_normal((2, PX, PX, 1)), jnp.float32)

  def total(tokens_TxP, task):
    return jnp.square(two.forward_fn(two.trained | {"tokens_TxP": tokens_TxP}, two.frozen, images, task)).sum()

  slope_TxP = jax.jit(jax.grad(total), static_argnums=1)(two.trained["tokens_TxP"], 1)
  assert not np.abs(slope_TxP[0]).any() and np.abs(slope_TxP[1]).all()  # the second task hears its own token only


def test_learning_rate_is_selected_on_held_out_training_images_never_on_the_test_set():
  settings = dataclasses.replace(QUICK, learning_rates=(1e-7, 1e-2))
  train, test = Recorded(textures(80)), textures(40, 1)
  found = tune(linear(), labelled(train, test), settings)
  assert found.learning_rate == 1e-2  # among equals that of the lower loss
  assert found.held_out[1e-2] >= found.held_out[1e-7] and found.accuracy[0] > 95
  fit, held_out = (np.unique(np.concatenate(train.rows[a:b])) for a, b in ((0, 8), (8, 9)))
  assert not set(fit) & set(held_out) and len(held_out) == pytest.approx(HELD_OUT * 80, abs=2)
  shuffled = dataclasses.replace(labelled(train, test).tasks[0], test_N=np.roll(test.labels(), 7))
  blind = tune(linear(), dataclasses.replace(labelled(train, test), tasks=(shuffled,)), settings)
  assert blind.accuracy[0] < 75  # the labels are indeed wrong
  assert (blind.held_out, blind.learning_rate, blind.train_accuracy) == (
    found.held_out, found.learning_rate, found.train_accuracy)  # fmt: skip
  assert same(blind.trained, found.trained)


def test_a_rate_that_diverges_is_never_selected_and_otherwise_said(caplog):
  train, test = textures(32), textures(20, 1)
  both = tune(linear(), labelled(train, test), dataclasses.replace(QUICK, learning_rates=(1e38, 1e-2)))
  assert both.learning_rate == 1e-2 and np.isnan(both.held_out[1e38]) and both.summary()["held_out"]["1e+38"] is None
  lost = tune(linear(), labelled(train, test), dataclasses.replace(QUICK, learning_rates=(1e38,)))
  assert np.isnan(lost.accuracy[0]) and "lower evals.tuning.learning_rates" in caplog.text


def test_devices_share_the_batch_and_change_nothing():
  sets = labelled(textures(40), textures(30, 1))
  one, eight = (tune(linear(), sets, QUICK, mesh) for mesh in (None, make_mesh(MeshConfig())))
  np.testing.assert_allclose(one.trained["linear"][0]["kernel"], eight.trained["linear"][0]["kernel"], atol=1e-5)
  assert one.accuracy == eight.accuracy
  with pytest.raises(
    ValueError, match="evals.tuning.batch_size=4 of 40 training images does not divide over 8 devices and 1 tasks"
  ):
    tune(linear(), sets, dataclasses.replace(QUICK, batch_size=4), make_mesh(MeshConfig()))


def test_an_image_that_does_not_decode_is_not_scored():
  broken = Recorded(textures(30, 1), broken=(3, 7))
  whole = tune(linear(), labelled(textures(40), textures(30, 1)), QUICK)
  less = tune(linear(), labelled(textures(40), broken), QUICK)
  right = round(whole.accuracy[0] * 30 / 100)
  assert round(less.accuracy[0] * 28 / 100, 6) in (right, right - 1, right - 2)
