"""Schedules in closed form, decay by name, and the update rules that each optimiser is expected to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.duration import Duration
from jepa_jax.optim import OptimConfig, decay_mask, learning_rate, make_optimiser
from jepa_jax.sharding import Rule
from tests.tiny import MLP, VIT, tiny_batch, tiny_experiment

PARAMS = {"encoder": {"fc": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}}
RULES = {
  "encoder": (Rule(r"kernel$", ("embed", "mlp"), decays=True), Rule(r"(^|/)(bias|scale)$")),
  "tokens": (Rule(r"^pos_embed$"), Rule(r"^mask_token$", decays=True)),
}


def test_warmup_then_cosine_from_the_first_step_to_the_last():
  cfg = OptimConfig(lr=1.0, final_lr=0.01, warmup=Duration(10, "steps"))
  lr = learning_rate(cfg, 256, total_steps=110, steps_per_epoch=10)
  np.testing.assert_allclose([lr(0), lr(4), lr(9)], [0.1, 0.5, 1.0], rtol=1e-6)
  np.testing.assert_allclose(lr(59), 0.5 * (1 + 0.01), rtol=1e-5)  # half-way down
  np.testing.assert_allclose(lr(109), 0.01, rtol=1e-5)


def test_rate_scales_with_the_batch_where_the_recipe_says_so():
  cfg = OptimConfig(lr=0.6, lr_batch=256, warmup=Duration(0, "steps"), schedule="constant")
  np.testing.assert_allclose(learning_rate(cfg, 2048, 100, 10)(50), 4.8, rtol=1e-6)


def test_decay_follows_the_rules():
  mask = decay_mask(PARAMS, RULES)
  assert mask == {"encoder": {"fc": {"kernel": True, "bias": False}, "norm": {"scale": False}}}
  tokens = {"tokens": {"pos_embed": jnp.ones(3), "mask_token": jnp.ones(3)}}
  assert decay_mask(tokens, RULES) == {"tokens": {"pos_embed": False, "mask_token": True}}


def test_parameter_that_no_rule_covers_is_an_error():
  with pytest.raises(ValueError, match="no rule says where 'encoder/strange' lives and whether it decays"):
    decay_mask({"encoder": {"strange": jnp.ones(3)}}, RULES)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_with_zero_gradient_only_decayed_parameters_move(name):
  tx = make_optimiser(OptimConfig(name=name, weight_decay=0.1), lambda _: 0.5, 10, RULES)
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
  fc, norm = updates["encoder"]["fc"], updates["encoder"]["norm"]
  assert float(jnp.abs(fc["bias"]).max()) == float(jnp.abs(norm["scale"]).max()) == 0
  assert float(fc["kernel"].max()) < 0
  if name != "lars":
    np.testing.assert_allclose(fc["kernel"], -0.5 * 0.1 * 3.0, rtol=1e-6)


def test_lars_adapts_kernels_and_leaves_one_dimensional_parameters_alone():
  tx = make_optimiser(OptimConfig(name="lars", weight_decay=0.0, momentum=0.0), lambda _: 1.0, 10, RULES)
  grads = jax.tree.map(lambda p: 2.0 * jnp.ones_like(p), PARAMS)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  trust = 0.001 * 6.0 / 4.0  # coefficient |w| / |g|
  np.testing.assert_allclose(updates["encoder"]["fc"]["kernel"], -trust * 2.0, rtol=1e-5)
  np.testing.assert_allclose(updates["encoder"]["fc"]["bias"], -2.0, rtol=1e-6)


def test_clipping_bounds_the_global_norm():
  tx = make_optimiser(OptimConfig(name="sgd", weight_decay=0.0, momentum=0.0, clip_norm=1.0), lambda _: 1.0, 10, RULES)
  grads = jax.tree.map(lambda p: 100.0 * jnp.ones_like(p), PARAMS)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  norm = jnp.sqrt(sum(jnp.sum(u**2) for u in jax.tree.leaves(updates)))
  np.testing.assert_allclose(norm, 1.0, rtol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_blocks_that_have_learned_something_learn_less_or_stay(scan):
  """Two runs from one state: every update of the encoder is its layer's share of what it is without shares."""
  common = {"encoder": VIT | {"depth": 3, "scan": scan}, "optim__warmup": "0steps"}
  plain = tiny_experiment(**common)
  decayed = tiny_experiment(**common, optim__layer_decay=0.5, optim__frozen_blocks=1)
  before = jax.device_get(plain.init().params)
  moved = {}
  for name, run in {"plain": plain, "decayed": decayed}.items():
    state, _ = run.step_fn(run.init(), tiny_batch(run), run.key)
    moved[name] = jax.tree.map(lambda a, b: np.asarray(a) - b, jax.device_get(state.params), before)
  of = lambda name, i: (
    jax.tree.map(lambda x: x[i], moved[name]["encoder"]["blocks"]) if scan else moved[name]["encoder"][f"blocks_{i}"]
  )
  for block, share in enumerate((0, 0.25, 0.5)):
    wanted = jax.tree.map(lambda x, share=share: share * x, of("plain", block))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), of("decayed", block), wanted)
  assert not moved["decayed"]["encoder"]["patch_embed"]["kernel"].any()
  assert moved["plain"]["encoder"]["patch_embed"]["kernel"].any()
  np.testing.assert_allclose(moved["decayed"]["encoder"]["norm"]["scale"], moved["plain"]["encoder"]["norm"]["scale"])
  jax.tree.map(np.testing.assert_array_equal, moved["decayed"]["projector"], moved["plain"]["projector"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"optim__layer_decay": 0.0}, r"layer_decay=0.0 lies in \(0, 1\]"),
    ({"optim__frozen_blocks": 2}, "frozen_blocks=2 leaves none of 2 blocks"),
    (
      {"optim__frozen_blocks": 1, "encoder": MLP},
      "are of a ViT's blocks; encoder 'mlp' has none",
    ),
  ],
)
def test_layers_that_are_not_there_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny_experiment(**changes)


def test_shares_of_layers_can_be_changed_for_a_run_that_is_under_way():
  """The state of the optimiser has the same form with and without them."""
  form = lambda **changes: jax.tree.structure(tiny_experiment(**changes).abstract_state.opt_state)
  for optim in ({"name": "adamw"}, {"name": "sgd"}, {"name": "lars"}):
    changes = {"optim": {"lr": 1e-2, "warmup": "2steps"} | optim}
    assert form(**changes) == form(**changes, optim__layer_decay=0.5, optim__frozen_blocks=1)
