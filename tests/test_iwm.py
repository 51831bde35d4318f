"""IWM: what the predictor hears of the action and where, MRR of an oracle and of the blind; no mesh changes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import losses
from jepa_jax.data.config import IMAGENET_MEAN, IMAGENET_STD
from jepa_jax.evals import mrr
from jepa_jax.models import predictor
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.views import NUM_ACTIONS, PAPER_JITTER, apply_color, example_keys, no_color, paired
from tests.test_ijepa import ENCODER
from tests.tiny import run_steps, start_of, tiny_batch, tiny_experiment

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8, "order": "fixed"}
IWM = {
  "name": "iwm",
  "views": {"global_crops": {"num": 1, "size_px": 16, "scale": (0.3, 1.0)}, "color": JITTER},
  "source": JITTER | {"grayscale_p": 0.2, "blur_p": (0.2,), "solarize_p": (0.1,)},
  "masks": {"kind": "uniform", "context_scale": (1.0, 1.0)},
  "predictor": {"width": 8, "depth": 1, "conditioning": "feature"},
}
SETTINGS = {"encoder": ENCODER, "data__channels": 3, "data__mean": IMAGENET_MEAN, "data__std": IMAGENET_STD}


def iwm_experiment(mesh=None, num_devices=1, objective=None, **changes):
  return tiny_experiment(mesh, num_devices, **(SETTINGS | {"objective": IWM | (objective or {})} | changes))


def conditioned(kind):
  return {"predictor": IWM["predictor"] | {"conditioning": kind}}


@pytest.fixture(scope="module")
def run():
  return iwm_experiment()


@pytest.fixture(scope="module")
def state(run):
  """The state at the start; online networks are made different from the target's."""
  state = start_of(run)
  noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), state.params)
  return dataclasses.replace(state, params=noisy)


@pytest.fixture(scope="module")
def views(run):
  return jax.jit(run.objective.views)(example_keys(jax.random.key(3), jnp.arange(16)), tiny_batch(run))


# ------------------------------------------------------------------------------------------------------ conditioning
def into_blocks(run, params, context, masks, action):
  """Returns the sequences that go into the predictor's blocks, (B, tokens, P), and the number of context tokens."""
  inputs = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(predictor, "apply_blocks", lambda x, *args, **kwargs: (inputs.extend(x) or x, None))
    run.objective.predict(params, context, masks, action)
  return np.asarray(inputs[0]), context.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), [("none", 0), ("feature", 0), ("sequence", NUM_ACTIONS)])
def test_action_enters_only_where_the_conditioning_says(kind, more, views):
  run = iwm_experiment(objective=conditioned(kind))
  params, masks = start_of(run).params, views.masks
  context = jax.random.normal(jax.random.key(0), (16, masks.context_BxK.shape[1], 16))
  quiet, num_context = into_blocks(run, params, context, masks, jnp.zeros((16, NUM_ACTIONS)))
  loud, _ = into_blocks(run, params, context, masks, jnp.ones((16, NUM_ACTIONS)))
  assert quiet.shape[1] == num_context + more + masks.targets_BxMxT.shape[2]
  changed = np.abs(quiet - loud).max(axis=(0, 2)) > 1e-6
  first, last = {"none": (0, 0), "feature": (num_context, None), "sequence": (num_context, num_context + more)}[kind]
  expected = np.zeros_like(changed)
  expected[first:last] = True
  np.testing.assert_array_equal(changed, expected)
  prediction = lambda action: run.objective.predict(params, context, masks, action)
  moved = float(jnp.abs(prediction(jnp.zeros((16, 7))) - prediction(jnp.ones((16, 7)))).max())
  assert moved == 0 if kind == "none" else moved > 0  # weights start from .02: little comes through


@pytest.mark.slow
def test_context_is_of_the_source_and_targets_are_of_the_target(run, state, views):
  encode = lambda v: jax.jit(run.objective.encode)(state.params, {}, state.target, v, None)[0]["pair_Bx2xD"]
  before = encode(views)
  source = encode(dataclasses.replace(views, source_BxHxWxC=views.source_BxHxWxC + 1))
  target = encode(dataclasses.replace(views, images_BxHxWxC=views.images_BxHxWxC[::-1]))
  np.testing.assert_allclose(source[:, 1], before[:, 1], atol=1e-6)
  np.testing.assert_allclose(target[:, 0], before[:, 0], atol=1e-6)
  assert np.abs(source[:, 0] - before[:, 0]).max() > 1e-3 and np.abs(target[:, 1] - before[:, 1]).max() > 1e-3


def test_union_of_the_rectangles_is_one_sequence_and_never_in_the_context(run, views):
  masks = views.masks
  assert masks.targets_BxMxT.shape[1] == 1
  rows = (masks.context_BxK, masks.targets_BxMxT[:, 0], masks.valid_BxMxT[:, 0])
  for context_K, targets_T, valid_T in zip(*map(np.asarray, rows)):
    assert not set(context_K) & set(targets_T[valid_T]) and len(set(targets_T[valid_T])) == valid_T.sum()


def test_predict_all_asks_for_every_patch_of_the_same_view(views):
  every = iwm_experiment(objective={"predict": "all"})
  masks = jax.jit(every.objective.masks)(example_keys(jax.random.key(3), jnp.arange(16)))
  np.testing.assert_array_equal(masks.context_BxK, views.masks.context_BxK)
  np.testing.assert_array_equal(masks.targets_BxMxT, np.tile(np.arange(every.objective.num_patches), (16, 1, 1)))
  assert np.asarray(masks.valid_BxMxT).all()


# --------------------------------------------------------------------------------------------------------------- ranks
def test_ranks_of_an_oracle_a_blind_and_an_equal_one():
  bank = np.random.default_rng(0).normal(size=(32, 4, 6)).astype(np.float32)
  truth, valid = jnp.arange(32), jnp.ones(4)
  for distance in losses.retrieval.DISTANCES:
    rank = lambda p, distance=distance: losses.reciprocal_ranks(losses.distances(p, bank, valid, distance), truth)
    np.testing.assert_array_equal(rank(bank), 1)
    np.testing.assert_allclose(rank(np.tile(bank[:1] + 0.1, (32, 1, 1))).mean(), losses.blind_mrr(32), rtol=1e-6)
  np.testing.assert_allclose(losses.reciprocal_ranks(jnp.zeros((2, 5)), jnp.arange(2)), 1 / 3)
  assert losses.blind_mrr(256) == pytest.approx(0.0239, abs=1e-4)


@pytest.mark.parametrize("distance", losses.retrieval.DISTANCES)
def test_distances_order_as_brute_force_and_padding_counts_for_nothing(distance):
  rng = np.random.default_rng(1)
  prediction, bank = rng.normal(size=(5, 6, 3)).astype(np.float32), rng.normal(size=(7, 6, 3)).astype(np.float32)
  valid = np.array([1, 1, 0, 1, 0, 1], bool)
  if distance == "l2":
    expected = ((prediction[:, None, valid] - bank[None][:, :, valid]) ** 2).sum((2, 3))
  else:
    a, b = prediction[:, valid].mean(1), bank[:, valid].mean(1)
    expected = -(a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
  found = losses.distances(prediction, bank, valid, distance)
  np.testing.assert_array_equal(np.argsort(found, axis=1), np.argsort(expected, axis=1))


def test_order_of_the_bank_does_not_matter():
  rng = np.random.default_rng(2)
  prediction, bank = (rng.normal(size=(16, 4, 3)).astype(np.float32) for _ in range(2))
  order = rng.permutation(16)
  rank = lambda bank, truth: losses.reciprocal_ranks(losses.distances(prediction, bank, jnp.ones(4)), truth)
  np.testing.assert_allclose(rank(bank, jnp.arange(16)), rank(bank[order], jnp.asarray(np.argsort(order))), rtol=1e-6)


def ranks_of(run, state, num_images=4, num_bank=16, chunk=16):
  pixels = jnp.asarray(np.random.default_rng(5).uniform(size=(num_images, 3, 16, 16)), jnp.float32)
  keys = example_keys(jax.random.key(1), jnp.arange(num_images))
  sources = jax.vmap(mrr.sample_sources)(keys)
  sizes = dict(num_bank=num_bank, chunk=chunk)
  fn = jax.jit(lambda p, t: mrr.reciprocal_ranks(run.objective, p, t, pixels, keys, sources, **sizes))
  return np.asarray(fn(state.params, state.target))


@pytest.mark.slow
def test_mrr_of_a_perfect_world_model_is_one_and_of_one_without_conditioning_that_of_the_blind(run, state, monkeypatch):
  """The oracle decodes the colours from the action, and encodes the picture that they make."""
  pixels = jnp.asarray(np.random.default_rng(5).uniform(0.2, 0.6, size=(1, 3, 16, 16)), jnp.float32)
  keys = example_keys(jax.random.key(1), jnp.arange(1))
  clean, sizes = no_color((1, 1)), dict(num_bank=16, chunk=8)
  jitter = dataclasses.replace(PAPER_JITTER, p=1.0, order="fixed")

  def oracle(params, context_NxD, actions_KxA):
    numbers = actions_KxA / paired.ACTION_SCALE
    factors = {n: jnp.exp(numbers[:, i]) for i, n in enumerate(("brightness", "contrast", "saturation"))}
    colors = dataclasses.replace(no_color((len(numbers),)), **factors, hue=numbers[:, 3])
    pictures = jax.vmap(lambda c: apply_color(pixels[0], c, jitter))(colors)
    return run.objective.targets(run.objective.encode_pixels(state.target["encoder"], pictures))

  networks = run.objective, state.params, state.target
  ranks = lambda: mrr.reciprocal_ranks(*networks, pixels, keys, clean, jitter=jitter, **sizes)
  assert ranks().mean() < 0.9
  monkeypatch.setattr(run.objective, "imagine", oracle)
  np.testing.assert_array_equal(ranks(), 1)
  blind = iwm_experiment(objective=conditioned("none"))
  np.testing.assert_allclose(ranks_of(blind, start_of(blind)).mean(axis=2), losses.blind_mrr(16), rtol=1e-5)


@pytest.mark.slow
def test_chunks_change_nothing(run, state):
  one = ranks_of(run, state)
  for chunk in (4, 64):
    np.testing.assert_allclose(ranks_of(run, state, chunk=chunk), one, rtol=1e-6)
  ranks, one = 1 / ranks_of(run, state, chunk=5), 1 / one  # the last of a bank of 16 is alone: another product
  assert np.abs(ranks - one).max() <= 1 and (ranks != one).mean() < 0.02  # two may be as near as float32 can tell


def test_sources_are_what_their_names_say():
  sources = jax.vmap(mrr.sample_sources)(jax.random.split(jax.random.key(0), 512))
  names = list(mrr.OPERATIONS)
  flags = {"blur": sources.blur_sigma > 0, "grayscale": sources.grayscale, "solarize": sources.solarize}
  rate = {flag: dict(zip(names, np.asarray(x).mean(0))) for flag, x in flags.items()}
  for operation, by_name in rate.items():
    for name in names:
      assert by_name[name] == pytest.approx({operation: 1, "all": 0.5}.get(name, 0), abs=0.08)
  for name in ("brightness", "contrast", "saturation"):
    np.testing.assert_array_equal(getattr(sources, name), 1)


class Images(list):
  """Random images with `read`, as an ImageSet has it."""

  def read(self, rows):
    size = np.full(len(rows), 16, np.int32)
    return {"canvas": np.stack([self[r] for r in rows]), "height": size, "width": size, "index": np.asarray(rows)}


IMAGES = Images(np.random.default_rng(4).integers(0, 256, (12, 16, 16, 3), np.uint8))


@pytest.mark.slow
def test_mrr_on_eight_devices_and_in_other_batches_is_that_of_one(run, state):
  measure = lambda **more: mrr.mean_reciprocal_ranks(
    run.objective, state.params, state.target, IMAGES, num_images=10, num_bank=8, chunk=4, **more
  )
  one = measure()
  assert list(one) == [*mrr.OPERATIONS, "overall"]
  assert one["overall"] == pytest.approx(np.mean([one[name] for name in mrr.OPERATIONS]))
  many = measure(mesh=make_mesh(MeshConfig(data=4, fsdp=2), jax.devices()), batch_size=3)
  assert many == pytest.approx(one, rel=1e-5)


def test_a_bank_that_does_not_fit_says_what_does(run, monkeypatch):
  monkeypatch.setattr(mrr, "_memory", lambda device: 2**20)
  with pytest.raises(ValueError, match=r"evals.mrr.bank to at most 64"):
    mrr.check_memory(run.objective, 1024, 64, 8, None)
  with pytest.raises(ValueError, match="evals.mrr.chunk=2 fits"):
    mrr.check_memory(run.objective, 32, 32, 8, None)
  mrr.check_memory(run.objective, 32, 2, 8, None)
  with pytest.raises(ValueError, match="chunk=0: both must be at least 1"):
    mrr.check_memory(run.objective, 256, 0, 8, None)


def test_a_method_without_actions_has_no_mrr():
  objective = tiny_experiment().objective
  with pytest.raises(ValueError, match="'lejepa' has no predictor that is told actions"):
    mrr.mean_reciprocal_ranks(objective, {}, None, IMAGES)


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.slow
def test_eight_devices_and_microbatches_give_the_parameters_of_one():
  sgd = {"optim": {"name": "sgd", "lr": 0.1, "warmup": "0steps"}, "probe": {"spectrum_every": 2}}
  one, rows = run_steps(iwm_experiment(**sgd), 2)
  mesh = MeshConfig(data=2, fsdp=4)
  many, others = run_steps(iwm_experiment(mesh, 8, microbatch=2, **sgd), 2)
  of = lambda state: (state.params, state.target)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), of(one), of(many))
  assert np.isnan(rows[0]["mrr"]) and rows[1]["mrr"] == pytest.approx(others[1]["mrr"], abs=1e-4)


@pytest.mark.slow
def test_it_learns_what_brightness_does():
  """Brightness is all that differs: only the action tells the targets apart, and MRR leaves that of the blind."""
  only = {"brightness": 0.4, "p": 1.0}
  objective = {"views": IWM["views"] | {"color": only}, "source": only}
  optim = {"lr": 1e-2, "warmup": "5steps", "schedule": "constant"}
  settings = {"total": "250steps", "optim": optim, "probe": {"spectrum_every": 25}}
  run = iwm_experiment(objective=objective, encoder=SETTINGS["encoder"] | {"init": "fan_in"}, **settings)
  _, rows = run_steps(run, 250)
  assert np.mean([r["prediction_loss"] for r in rows[-10:]]) < 0.5 * np.mean([r["prediction_loss"] for r in rows[:5]])
  ranks = [r["mrr"] for r in rows if not np.isnan(r["mrr"])]
  assert np.mean(ranks[-3:]) > 1.3 * losses.blind_mrr(16)


@pytest.mark.parametrize(
  ("objective", "message"),
  [
    ({"source": {}, "predictor": IWM["predictor"]}, "no augmentation makes source and target differ"),
    ({"predictor": {"width": 8, "depth": 0}}, "no world model"),
    ({"predictor": {"width": 8, "depth": 1, "conditioning": "film"}}, "must be one of none, feature, sequence"),
    ({"name": "ijepa", "source": None}, "source is not a setting"),
  ],
)
def test_bad_input_is_told_before_anything_is_compiled(objective, message):
  with pytest.raises(ValueError, match=message):
    iwm_experiment(objective=objective)


def test_ijepa_is_told_no_actions():
  ijepa = {"name": "ijepa", "views": {"global_crops": IWM["views"]["global_crops"]}, "masks": {"kind": "uniform"}}
  with pytest.raises(ValueError, match="needs actions: set name='iwm'"):
    tiny_experiment(**SETTINGS, objective=ijepa | {"predictor": IWM["predictor"]})
