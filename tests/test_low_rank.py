"""LoRA: the same numbers as if the factors were the parameters, whatever the mesh and however blocks are kept."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jepa_jax.low_rank import Factors, is_factors, low_rank
from jepa_jax.runs import open_run
from jepa_jax.sharding import MeshConfig
from jepa_jax.train import Start, train
from tests.tiny import VIT, run_steps, start_of, tiny_batch, tiny_config, tiny_experiment

RANK, ALPHA = 2, 6.0
LORA = {"optim__lora_rank": RANK, "optim__lora_alpha": ALPHA}
# qkv's kernel is (D, 3, H, K), that of attention's last layer (H, K, D).
INPUTS = {"attn/qkv": 1, "attn/proj": 2, "mlp/fc1": 1, "mlp/fc2": 1}


def as_matrix(w, inputs: int):
  return np.asarray(w).reshape(int(np.prod(w.shape[:inputs])), -1)


def matrices(encoder):
  """Yields (name, matrix) of each block, stacked or not."""
  depth = encoder["blocks"]["norm1"]["scale"].shape[0] if "blocks" in encoder else 2
  for i in range(depth):
    block = jax.tree.map(lambda x, i=i: x[i], encoder["blocks"]) if "blocks" in encoder else encoder[f"blocks_{i}"]
    for name, inputs in INPUTS.items():
      part, layer = name.split("/")
      yield f"{i}/{name}", as_matrix(block[part][layer]["kernel"], inputs)


@pytest.mark.parametrize("inner", ["adamw", "sgd"])
def test_it_is_the_optimiser_of_the_factors(inner):
  """Oracle: W_start + alpha / R A B as a function of A and B, differentiated and moved by optax itself."""
  rng = np.random.default_rng(0)
  start, target = (rng.normal(size=(6, 4, 5)).astype(np.float32) for _ in range(2))  # (H, K) read, 5 made
  tx = {
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)),
    "sgd": optax.sgd(1e-2, momentum=0.9),
  }[inner]
  loss = lambda w: jnp.square(w - target).sum()
  params = {"encoder": {"blocks_0": {"attn": {"proj": {"kernel": jnp.array(start)}}}}}
  ours = low_rank(tx, RANK, ALPHA, jax.random.key(0))
  state = ours.init(params)
  factors = state.factors["encoder"]["blocks_0"]["attn"]["proj"]["kernel"]
  assert factors.a.shape == (24, RANK) and factors.b.shape == (RANK, 5) and not factors.b.any()
  theirs, their_state = factors, tx.init(factors)
  of_factors = lambda f: loss(start + ALPHA / RANK * (f.a @ f.b).reshape(start.shape))
  for _ in range(20):
    grads = jax.grad(lambda p: loss(p["encoder"]["blocks_0"]["attn"]["proj"]["kernel"]))(params)
    updates, state = ours.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    moves, their_state = tx.update(jax.grad(of_factors)(theirs), their_state, theirs)
    theirs = optax.apply_updates(theirs, moves)
  wanted = start + ALPHA / RANK * (theirs.a @ theirs.b).reshape(start.shape)
  assert np.abs(wanted - start).max() > 0.05
  np.testing.assert_allclose(params["encoder"]["blocks_0"]["attn"]["proj"]["kernel"], wanted, atol=2e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_matrices_of_blocks_move_by_their_rank_and_nothing_else_in_the_encoder_moves(scan):
  run = tiny_experiment(encoder=VIT | {"scan": scan}, **LORA)
  before = jax.device_get(start_of(run).params)
  state, history = run_steps(run, 4)
  after = jax.device_get(state.params)
  assert all(np.isfinite(metrics["loss"]) for metrics in history)
  for (name, old), (_, new) in zip(matrices(before["encoder"]), matrices(after["encoder"]), strict=True):
    sizes = np.linalg.svd(new - old, compute_uv=False)
    assert sizes[RANK - 1] > 1e-5, name
    assert sizes[RANK:].max() < 1e-3 * sizes[0], name  # what rounding leaves
  still = [name for name in after["encoder"] if not name.startswith("blocks")]
  assert still
  for name in still:
    jax.tree.map(np.testing.assert_array_equal, before["encoder"][name], after["encoder"][name])
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before["projector"], after["projector"])
  assert all(jax.tree.leaves(moved))


def test_only_factors_have_moments():
  run = tiny_experiment(**LORA)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  state, plain = run.abstract_state, tiny_experiment().abstract_state
  projector, factors = count(state.params["projector"]), count(state.opt_state.factors)
  assert factors == 2 * RANK * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))  # two blocks of width 16
  assert count(state.opt_state.inner) - 2 * (projector + factors) <= 2  # AdamW's, and how many steps there were
  assert count(state.opt_state) < count(plain.opt_state) / 1.3
  assert jax.tree.structure(state.params) == jax.tree.structure(plain.params)


def test_stacked_blocks_begin_with_the_factors_of_single_ones():
  stacked, single = (tiny_experiment(encoder=VIT | {"scan": scan}, **LORA).init() for scan in (True, False))
  of = lambda state: state.opt_state.factors["encoder"]
  for i in range(2):
    for one, other in zip(
      jax.tree.leaves(of(stacked)["blocks"], is_leaf=is_factors),
      jax.tree.leaves(of(single)[f"blocks_{i}"], is_leaf=is_factors),
      strict=True,
    ):
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[i], b), one, other)  # noqa: B023
  a = of(stacked)["blocks"]["mlp"]["fc2"]["kernel"].a
  assert (a[0] != a[1]).any()
  np.testing.assert_allclose(np.std(a), 64**-0.5, rtol=0.2)


def test_it_goes_with_a_teacher_and_with_shares_of_layers():
  masked = {"name": "ijepa", "predictor": {"depth": 1, "width": 16, "num_heads": 2}, "ema": (0.5, 0.5)}
  masked |= {"views": {"global_crops": {"num": 1, "size_px": 32, "scale": (0.3, 1.0)}}, "masks": {"kind": "uniform"}}
  encoder = VIT | {"image_size": 32, "patch_size": 4}
  common = {"objective": masked, "encoder": encoder, "data__canvas_px": 32}
  run = tiny_experiment(**common, **LORA, optim__frozen_blocks=1)
  before = jax.device_get(start_of(run).params["encoder"])
  state, _ = run_steps(run, 2)
  rank = lambda tree: [
    np.linalg.matrix_rank(new - old, tol=1e-6)
    for (_, old), (_, new) in zip(matrices(before), matrices(jax.device_get(tree)), strict=True)
  ]
  assert rank(state.params["encoder"]) == [0] * len(INPUTS) + [RANK] * len(INPUTS)
  assert max(rank(state.target["encoder"])) in (RANK, 2 * RANK)  # a mean of two steps'


def test_eight_devices_are_one():
  """Plain SGD: AdamW's first steps move what is rounding noise as far as anything."""
  changes = LORA | {"optim__name": "sgd", "optim__lr": 0.1}
  (one, history), (eight, history_8) = (
    run_steps(tiny_experiment(mesh, num_devices=n, **changes), 3)
    for mesh, n in ((None, 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8))
  )
  np.testing.assert_allclose([m["loss"] for m in history], [m["loss"] for m in history_8], rtol=2e-5)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  jax.tree.map(close, one.params, eight.params)
  jax.tree.map(close, one.opt_state.factors, eight.opt_state.factors)
  kernel = eight.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size  # the parameter itself is split as ever


def test_a_first_step_moves_b_alone():
  """B begins at 0, so that A has no gradient: what a network does is what it did."""
  run = tiny_experiment(**LORA, optim__weight_decay=0.0)
  before = jax.device_get(run.init().opt_state.factors["encoder"])
  state, _ = run.step_fn(run.init(), tiny_batch(run), run.key)
  after = jax.device_get(state.opt_state.factors["encoder"])
  for one, other in zip(*(jax.tree.leaves(x, is_leaf=is_factors) for x in (before, after)), strict=True):
    assert isinstance(one, Factors)
    np.testing.assert_array_equal(one.a, other.a)
    assert (other.b != 0).any()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"optim__lora_rank": -1}, "lora_rank=-1 is 0 .off. or more"),
    ({"optim__lora_rank": 16}, "lora_rank=16 is to lie below 16, a side of the encoder's smallest matrix"),
    ({"optim__lora_alpha": 8.0}, "lora_alpha=8.0 is of LoRA: set lora_rank"),
    ({"optim__lora_rank": 2, "optim__name": "lars"}, "B of LoRA begins at 0; use adamw"),
    (
      {"optim__lora_rank": 2, "encoder": {"name": "mlp", "image_size": 16, "widths": (32, 16)}},
      "are of a ViT's blocks; encoder 'mlp' has none",
    ),
  ],
)
def test_what_has_no_such_matrices_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny_experiment(**changes)


def test_a_run_resumes_exactly_and_with_its_rank_only(tmp_path):
  train(tiny_config(**LORA), tmp_path / "whole")
  train(tiny_config(**LORA), tmp_path / "again")
  shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
  (tmp_path / "again" / "complete.json").unlink(missing_ok=True)
  train(tiny_config(**LORA), tmp_path / "again")
  networks = {"params": tiny_experiment().abstract_state.params}  # of a run without LoRA: they are the same arrays
  a, b = (open_run(tmp_path / name, 6).read(networks) for name in ("whole", "again"))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  with pytest.raises(ValueError, match="optim.lora_rank=0, and it was 2 up to step 6 .* other arrays"):
    train(tiny_config(total="8steps"), tmp_path / "again", Start(accept_change=True))
