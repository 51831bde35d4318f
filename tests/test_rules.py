"""Rules: each network says where its arrays live and which decay; moments live where their parameter does."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jepa_jax.experiment import state_shardings
from jepa_jax.models import MLPConfig, ViTConfig
from jepa_jax.objectives.lejepa import LeJEPA
from jepa_jax.optim import OptimConfig, decay_mask, make_optimiser
from jepa_jax.sharding import MeshConfig, Rule, check_rules, find_rule, make_mesh, path_name, tree_shardings
from jepa_jax.step import TrainState, init_state
from tests.tiny import MLP, tiny_batch, tiny_experiment

RULES = {"net": (Rule(r"kernel$", ("embed", "mlp"), decays=True), Rule(r"(^|/)bias$"))}


def arrays(**shapes):
  """{name: shape} -> {name: an array's shape and dtype}, "/" in a name being a group."""
  tree = {}
  for name, dims in shapes.items():
    node = tree
    *parents, leaf = name.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = jax.ShapeDtypeStruct(dims, jnp.float32)
  return tree


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def specs(tree):
  return {path_name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --------------------------------------------------------------------------------------------------------- completeness
def test_an_array_that_no_rule_matches_names_its_network_and_where_to_write_one(mesh):
  """Of what other networks have a rule for, nothing is taken over."""
  rules = RULES | {"other": (Rule(r"strange$"),)}
  message = (
    r"no rule says where 'net/inner/strange' lives and whether it decays: add a Rule for 'inner/strange' to the rules "
    r"of 'net', beside the network that makes it or in the objective's `rules` \(there are: kernel\$, \(\^\|/\)bias\$\)"
  )
  tree = {"net": arrays(**{"inner/strange": (2, 3), "fc/kernel": (2, 3)})}
  for check in (
    lambda: tree_shardings(tree, rules, mesh),
    lambda: decay_mask(tree, rules),
    lambda: check_rules([tree], rules),
  ):
    with pytest.raises(ValueError, match=message):
      check()
  with pytest.raises(ValueError, match=r"'logit_scale' lives.* to the rules of 'logit_scale'.*\(there are: none\)"):
    find_rule("logit_scale", rules)


def test_a_rule_that_matches_nothing_is_refused_unless_it_is_optional():
  tree = {"net": arrays(**{"fc/kernel": (2, 3), "fc/bias": (3,)})}
  check_rules([tree], RULES)
  check_rules([tree], {"net": (*RULES["net"], Rule(r"^cls_token$", optional=True))})
  with pytest.raises(ValueError, match=r"match no array: net: \^cls_token\$; correct or remove .*optional=True"):
    check_rules([tree], {"net": (*RULES["net"], Rule(r"^cls_token$"))})
  with pytest.raises(ValueError, match=r"match no array: head: kernel\$"):  # same pattern, but no such network
    check_rules([tree], RULES | {"head": (Rule(r"kernel$"),)})
  with pytest.raises(ValueError, match=r"match no array: net: fc/bias"):  # an earlier one takes all that it would match
    check_rules([tree], {"net": (*RULES["net"], Rule(r"fc/bias"))})


def test_the_state_of_a_network_counts_as_its_own():
  """Running averages stand in `state` under the network's name, and follow its rules."""
  params, state = {"net": arrays(**{"fc/kernel": (2, 3), "fc/bias": (3,)})}, {"net": arrays(mean=(3,))}
  rules = {"net": (*RULES["net"], Rule(r"^mean$"))}
  check_rules([params, state], rules)
  with pytest.raises(ValueError, match=r"net: \^mean\$"):
    check_rules([params, {}], rules)
  with pytest.raises(ValueError, match="no rule says where 'net/mean' lives"):
    check_rules([params, state], RULES)


# --------------------------------------------------------------------------------------------------------------- towers
def test_towers_of_different_kinds_have_rules_of_their_own(mesh):
  """The same name in both, "patch_embed/kernel": one is a convolution's, the other a plain layer's."""
  image = ViTConfig(image_size=16, patch_size=8, width=16, depth=2, num_heads=2).make(3)
  text = MLPConfig(image_size=8, widths=(32, 16)).make(1)
  shape = lambda net, side, channels: jax.eval_shape(
    net.init, jax.random.key(0), jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
  )
  params = {"image": shape(image, 16, 3)["params"], "text": shape(text, 8, 1)["params"]}
  params["text"] |= arrays(**{"patch_embed/kernel": (8, 8, 4, 16), "blocks/attn/qkv/kernel": (2, 16, 3, 2, 8)})
  rules = {"image": image.rules, "text": text.rules}
  check_rules([params], rules)
  found = specs(tree_shardings(params, rules, mesh))
  assert found["image/patch_embed/kernel"] == P(None, None, None, "fsdp")
  assert found["text/patch_embed/kernel"] == P(None, None, "fsdp", "tensor")
  assert found["image/blocks/attn/qkv/kernel"] == P(None, "fsdp", None, "tensor", None)
  assert found["text/blocks/attn/qkv/kernel"] == P(None, None, None, "fsdp", "tensor")
  assert found["text/layers_0/kernel"] == P("fsdp", "tensor")
  decays = {path_name(k): v for k, v in jax.tree_util.tree_leaves_with_path(decay_mask(params, rules))}
  assert not decays["image/pos_embed"] and decays["text/layers_0/kernel"]
  with pytest.raises(ValueError, match="'text/pos_embed'"):  # the ViT's rule for it is the ViT's
    find_rule("text/pos_embed", rules)


class Scaled(LeJEPA):
  """LeJEPA with a parameter of the objective's own and a centre that training carries along."""

  def __init__(self, *args):
    super().__init__(*args)
    self.rules = {**self.rules, "logit_scale": (Rule(r"^$"),), "centre": (Rule(r"^$", ("embed",)),)}

  def init(self, key, batch):
    params, state = super().init(key, batch)
    return params | {"logit_scale": jnp.float32(1.0)}, state | {"centre": jnp.zeros(16)}


def test_a_parameter_and_a_state_of_the_objectives_own_have_rules_of_the_objectives(mesh):
  run = tiny_experiment(encoder=MLP, objective__views__local_crops__num=0)
  objective = Scaled(run.cfg.objective, run.objective.encoder, run.objective.pixels)
  optimiser = make_optimiser(run.cfg.optim, run.lr, run.total_steps, objective.rules)
  make = lambda key: init_state(key, tiny_batch(run), objective, optimiser, run.cfg.probe, 10)
  abstract = jax.eval_shape(make, run.key)
  shardings = state_shardings(abstract, objective.rules, optimiser, mesh)
  assert shardings.params["logit_scale"].spec == P() and shardings.model_state["centre"].spec == P("fsdp")
  assert not decay_mask(abstract.params, objective.rules)["logit_scale"]
  state = jax.jit(make, out_shardings=shardings)(run.key)
  assert state.model_state["centre"].addressable_shards[0].data.shape == (8,)
  with pytest.raises(ValueError, match="rules of 'logit_scale', .* in the objective's `rules`"):
    without = {name: rules for name, rules in objective.rules.items() if name != "logit_scale"}
    state_shardings(abstract, without, optimiser, mesh)
  with pytest.raises(ValueError, match="rules of 'centre'"):
    without = {name: rules for name, rules in objective.rules.items() if name != "centre"}
    state_shardings(abstract, without, optimiser, mesh)


# -------------------------------------------------------------------------------------------------------------- moments
PARAMS = {
  "net": arrays(**{"fc/kernel": (8, 16), "fc/bias": (16,), "mean": (4, 16), "count": (8, 4)}),
  "logit_scale": jax.ShapeDtypeStruct((), jnp.float32),
}
# Names that look like something else: running averages, and the counter of an optimiser's steps.
OWN = {"net": (*RULES["net"], Rule(r"^(mean|count)$", ("embed", "mlp"), decays=True)), "logit_scale": (Rule(r"^$"),)}


@pytest.mark.parametrize("name, num_moments", [("adamw", 2), ("sgd", 1), ("lars", 1)])
def test_moments_live_where_their_parameter_does(name, num_moments, mesh):
  optimiser = make_optimiser(OptimConfig(name=name, clip_norm=1.0), lambda step: 0.1, 10, OWN)
  opt_state = jax.eval_shape(optimiser.init, PARAMS)
  whole = jax.ShapeDtypeStruct((), jnp.int32)
  abstract = TrainState(whole, PARAMS, None, {}, opt_state, {"kernel": whole}, {"good": whole})
  shardings = state_shardings(abstract, OWN, optimiser, mesh)
  places = specs(shardings.params)
  assert places == {
    "net/fc/kernel": P("fsdp", "tensor"),
    "net/fc/bias": P(None),
    "net/mean": P("fsdp", "tensor"),
    "net/count": P("fsdp", "tensor"),
    "logit_scale": P(),
  }
  zeros = jax.tree.map(lambda x, s: jax.device_put(jnp.zeros(x.shape), s), PARAMS, shardings.params)
  state = jax.jit(optimiser.init, out_shardings=shardings.opt_state)(zeros)
  leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
  for parameter, spec in places.items():
    moments = [leaf for path, leaf in leaves.items() if path.endswith(f"/{parameter}")]
    assert len(moments) == num_moments, parameter
    assert all(leaf.sharding.spec == spec for leaf in moments), parameter
  others = [leaf for path, leaf in leaves.items() if not any(path.endswith(f"/{parameter}") for parameter in places)]
  assert all(leaf.shape == () and leaf.sharding.is_fully_replicated for leaf in others)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_moments_and_averages_of_a_run_live_where_their_parameter_does(name):
  changes = {"optim": {"name": name, "lr": 0.01}, "objective__weight_average": 0.9}
  run = tiny_experiment(MeshConfig(data=2, fsdp=2, tensor=2), 8, **changes)
  places = specs(run.shardings.params)
  assert sum(any(spec) for spec in places.values()) >= 6
  assert specs(run.shardings.target) == {k: v for k, v in places.items() if k.startswith("encoder/")}
  moments = [
    (path_name(path), leaf.spec) for path, leaf in jax.tree_util.tree_leaves_with_path(run.shardings.opt_state)
  ]
  for parameter, spec in places.items():
    found = [place for path, place in moments if path.endswith(f"/{parameter}")]
    assert found and all(place == spec for place in found), parameter
