"""The train state and the one train step: pure in (state, batch, key), jitted over a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jepa_jax.objectives.base import Aux, Objective
from jepa_jax.sharding import constrain, merge_rows, split_rows
from jepa_jax.streams import stream
from jepa_jax.theory import embedding_metrics, feature_std, information_terms, rankme
from jepa_jax.views import example_keys

Tree = Any
_UNMEASURED = -(2.0**127)  # a number of float32 that no metric has, see `numbers`
_GUARD_STEPS = 20  # length of the guard's moving average
_MOST_ROWS = 2048  # of a batch from which the embeddings' geometry is measured


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """The online linear probe (AdamW at a constant rate), and how often the spectrum of the features is measured."""

  lr: float = 1e-3
  weight_decay: float = 1e-6
  spectrum_every: int = 50  # steps; an eigendecomposition, so not every step. 0: never, and nothing of it is compiled

  def __post_init__(self):
    if self.spectrum_every < 0 or self.lr <= 0:
      raise ValueError(f"spectrum_every={self.spectrum_every} must be 0 (never) or more, and lr={self.lr} positive")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """Which steps are skipped: the state stays what it was, the batch is lost, `skipped` counts it. Off by default.

  `skip_nonfinite`: steps whose loss, gradient or new parameters are not finite. `skip_spikes` > 0: those, too, whose
  gradient norm is above this many times its moving average (of the loss it could not be: some are negative). The run
  stops after `max_in_row` skipped steps without a good one between them.
  """

  skip_nonfinite: bool = False
  skip_spikes: float = 0.0
  max_in_row: int = 10

  def __post_init__(self):
    if self.skip_spikes and (self.skip_spikes <= 1 or not self.skip_nonfinite):
      raise ValueError(
        f"skip_spikes={self.skip_spikes} is a multiple above 1 of the mean gradient norm, and needs skip_nonfinite=True"
      )
    if self.max_in_row < 1:
      raise ValueError(f"max_in_row={self.max_in_row} must be at least 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that training changes. Randomness is no state: each step folds its number into the run's key."""

  step: jax.Array
  params: Tree  # {network: parameters}
  target: Tree  # moving average of the parameters of the networks that have one, or None
  model_state: Tree  # what a method carries besides: running averages of BatchNorm, a centre, a queue
  opt_state: Tree
  probe: Tree  # {"params": ..., "opt_state": ...}
  guard: Tree  # {"grad_norm": its moving average, "good": steps in it, "skipped", "in_row": skipped steps}

  @property
  def networks(self) -> dict[str, Tree]:
    """What evaluation may need."""
    return {"params": self.params, "target": self.target, "state": self.model_state}

  @property
  def training(self) -> dict[str, Tree]:
    """What only training needs."""
    return {name: getattr(self, name) for name in ("step", "opt_state", "probe", "guard")}


def join_state(networks: Mapping[str, Tree], training: Mapping[str, Tree]) -> TrainState:
  """Returns the state of which these are the `networks` and the `training` part."""
  return TrainState(params=networks["params"], target=networks["target"], model_state=networks["state"], **training)


def probe_optimiser(cfg: ProbeConfig) -> optax.GradientTransformation:
  """Returns AdamW for the probe."""
  return optax.adamw(cfg.lr, weight_decay=cfg.weight_decay)


def init_state(
  key: jax.Array,
  batch: Tree,
  objective: Objective,
  optimiser: optax.GradientTransformation,
  probe: ProbeConfig,
  num_classes: int,
) -> TrainState:
  """Returns the state at step 0; call it through `jax.eval_shape` and `jit(out_shardings=...)`: born sharded."""
  params, model_state = objective.init(key, batch)
  target = {name: jax.tree.map(jnp.copy, params[name]) for name in objective.averaged} or None
  probe_params = {
    "kernel": jnp.zeros((_probe_dim(objective, params, model_state, target, batch, key), num_classes)),
    "bias": jnp.zeros((num_classes,)),
  }
  return TrainState(
    step=jnp.int32(0),
    params=params,
    target=target,
    model_state=model_state,
    opt_state=optimiser.init(params),
    probe={"params": probe_params, "opt_state": probe_optimiser(probe).init(probe_params)},
    guard={"grad_norm": jnp.float32(0)} | {name: jnp.int32(0) for name in ("good", "skipped", "in_row")},
  )


def _probe_dim(objective, params, state, target, batch, key) -> int:
  def features(params, state, target, batch):
    keys_B = example_keys(key, jnp.arange(len(batch["label"])))
    encoded, state = objective.encode(params, state, target, objective.views(keys_B, batch), keys_B)
    return objective.loss(params, state, target, encoded, key, jnp.float32(0))[1][0].probe_BxVxF

  return jax.eval_shape(features, params, state, target, batch).shape[-1]


class StepKeys(NamedTuple):
  """The keys of one step: for its views, its networks and its loss."""

  views: jax.Array
  networks: jax.Array
  loss: jax.Array


def step_keys(key: jax.Array, step: int | jax.Array) -> StepKeys:
  """Returns the keys of the step after `step` finished ones; key is that of the run."""
  key = jax.random.fold_in(stream(key, "step"), step)
  return StepKeys(*(stream(key, name) for name in StepKeys._fields))


def encode_batch(objective: Objective, params: Tree, state: TrainState, batch: Tree, keys: StepKeys, microbatch: int):
  """Returns (encoded, model state) of the whole batch, made from `microbatch` parts one after the other.

  Each part is recomputed in the backward pass, so only its encoded form is kept: with a loss that is taken once over
  all of them this is the exact gradient of the whole batch (Gao et al. 2021, arXiv 2101.06983), for one more forward
  pass. A part takes rows of every device, so nothing moves between devices.
  """

  def encode(model_state: Tree, rows: tuple[jax.Array, Tree]):
    row_B, part = rows
    views = objective.views(example_keys(keys.views, row_B), part)
    encoded, model_state = objective.encode(
      params, model_state, state.target, views, example_keys(keys.networks, row_B)
    )
    return model_state, encoded

  rows = jnp.arange(len(batch["label"])), batch
  if microbatch == 1:
    model_state, encoded = encode(state.model_state, rows)
  else:
    # No barrier against merging the recomputation with the forward pass: inside a scan XLA cannot.
    encode = jax.checkpoint(encode, prevent_cse=False)
    model_state, parts = jax.lax.scan(encode, state.model_state, split_rows(rows, microbatch))
    encoded = merge_rows(parts)
  return encoded, model_state


def make_step(
  objective: Objective,
  optimiser: optax.GradientTransformation,
  probe: ProbeConfig,
  lr: Callable,
  microbatch: int = 1,
  guard: GuardConfig = GuardConfig(),
  schedule_steps: int = 1,
  monitor: Callable[[Tree, Tree, Tree, jax.Array], dict[str, jax.Array]] | None = None,
):
  """Returns step(state, batch, key) -> (state, metrics): pure, no I/O; batch is global, key that of the run.

  lr gives the learning rate of a step; progress, which the loss and the target's momentum go by, reaches 1 after
  schedule_steps. `monitor(params, target, batch, keys_B) -> {metric: number}` is asked as often as RankMe is measured.
  """
  probe_tx = probe_optimiser(probe)

  def step(state: TrainState, batch: Tree, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    keys, progress = step_keys(key, state.step), state.step / schedule_steps

    def loss_fn(params):
      encoded, model_state = encode_batch(objective, params, state, batch, keys, microbatch)
      return objective.loss(params, model_state, state.target, encoded, keys.loss, progress)

    (loss, (aux, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    params: Tree = optax.apply_updates(state.params, updates)
    target, averaging = state.target, {}
    if objective.ema_schedule:  # after the optimiser's step
      momentum = objective.ema_schedule(progress)
      online = {name: params[name] for name in objective.averaged}
      target = jax.tree.map(lambda t, p: momentum * t + (1 - momentum) * p, target, online)
      averaging = {"momentum": momentum}
    probe_state, probe_metrics = _probe_step(probe_tx, state.probe, aux.probe_BxVxF, batch["label"])
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "param_norm": optax.tree.norm(params),  # of what a save would hold: a finite loss is of the state before
      "learning_rate": lr(state.step),
      **averaging,
      **aux.metrics,
      **probe_metrics,
    }
    metrics = _spectrum(aux, state.step, probe.spectrum_every) | metrics
    if monitor:
      keys_B = example_keys(keys.views, jnp.arange(len(batch["label"])))
      watch = lambda params, monitor=monitor: monitor(params, state.target, batch, keys_B)
      metrics |= _now_and_then(watch, state.step, probe.spectrum_every, state.params)
    new = TrainState(state.step + 1, params, target, model_state, opt_state, probe_state, state.guard)
    return (new, metrics) if not guard.skip_nonfinite else _guarded(guard, state, new, metrics)

  return step


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Returns a step's metrics as plain numbers, NaN where one was not measured.

  Inside the step that is a finite number which no metric has, so that JAX_DEBUG_NANS finds what is really not finite.
  """
  values = {name: float(value) for name, value in metrics.items()}
  return {name: math.nan if value == _UNMEASURED else value for name, value in values.items()}


def _guarded(cfg: GuardConfig, old: TrainState, new: TrainState, metrics: dict[str, jax.Array]):
  """Returns the new state, or the old one where the step must not count; its number goes on, as the data does."""
  norm, mean, good = metrics["grad_norm"], old.guard["grad_norm"], old.guard["good"]
  ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & jnp.isfinite(metrics["param_norm"])
  if cfg.skip_spikes:  # the average means something only after some steps
    ok &= (good < _GUARD_STEPS) | (norm <= cfg.skip_spikes * mean)
  weight = 1 / jnp.minimum(good + 1, _GUARD_STEPS)  # an average of all steps first, then an exponential one
  kept = {
    "grad_norm": jnp.where(ok, mean + weight * (norm - mean), mean),
    "good": good + ok,
    "skipped": old.guard["skipped"] + ~ok,
    "in_row": jnp.where(ok, 0, old.guard["in_row"] + 1),
  }
  state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
  state = dataclasses.replace(state, step=new.step, guard=kept)
  return state, metrics | {"skipped": kept["skipped"], "skipped_in_row": kept["in_row"]}


def _probe_step(tx, probe: Tree, features_BxVxF: jax.Array, label_B: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
  """One step of the linear probe, with a gradient of its own behind a stop-gradient: the encoder never hears of it."""
  x = jax.lax.stop_gradient(features_BxVxF).astype(jnp.float32)
  x = jax.nn.standardize(x, axis=-1, epsilon=1e-6)  # LayerNorm without affine: the linear layer holds one already
  x = constrain(x, "batch", None, None)
  known_B = (label_B >= 0) & (label_B < probe["params"]["bias"].shape[0])
  weight_B = known_B / jnp.maximum(known_B.sum(), 1)

  def loss_fn(params):
    logits_BxVxC = x @ params["kernel"] + params["bias"]
    nll_BxV = optax.softmax_cross_entropy_with_integer_labels(
      logits_BxVxC, jnp.maximum(label_B, 0)[:, None].repeat(x.shape[1], 1)
    )
    hit_B = (logits_BxVxC.argmax(-1) == label_B[:, None]).mean(1)
    return (nll_BxV.mean(1) * weight_B).sum(), (hit_B * weight_B).sum()

  (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(probe["params"])
  updates, opt_state = tx.update(grads, probe["opt_state"], probe["params"])
  probe = {"params": optax.apply_updates(probe["params"], updates), "opt_state": opt_state}
  measured = lambda value: jnp.where(known_B.any(), value, _UNMEASURED)
  return probe, {"probe_loss": measured(loss), "probe_accuracy": measured(100 * accuracy)}


def _spectrum(aux: Aux, step: jax.Array, every: int) -> dict[str, jax.Array]:
  """Feature std always; on the steps (from 1) that are multiples of `every` RankMe of the features and the geometry of
  the embeddings (percent error and its factors, uniformity, ...), "not measured" on others."""
  features_NxF = jax.lax.stop_gradient(aux.features_NxF).astype(jnp.float32)
  views_BxKxD = None if aux.views_BxKxD is None else jax.lax.stop_gradient(aux.views_BxKxD[:_MOST_ROWS])

  others = jax.lax.stop_gradient({name: x.astype(jnp.float32) for name, x in aux.others_NxF.items()})

  def measure(features_NxF, views_BxKxD, others):
    measured = {"rankme": rankme(features_NxF, method="gram")}
    measured |= {f"rankme_{name}": rankme(x, method="gram") for name, x in others.items()}
    if views_BxKxD is not None:
      measured |= embedding_metrics(views_BxKxD)
    if views_BxKxD is not None and views_BxKxD.shape[1] > 1 and views_BxKxD.shape[2] > 1:
      measured |= information_terms(views_BxKxD[:, 0], views_BxKxD[:, 1])
    return measured

  measured = _now_and_then(measure, step, every, features_NxF, views_BxKxD, others)
  return measured | {"feature_std": feature_std(features_NxF)}


def _now_and_then(measure: Callable, step: jax.Array, every: int, *args) -> dict[str, jax.Array]:
  """Returns measure(*args) on the steps (from 1) that are multiples of `every`, "not measured" on others; 0: {}."""
  if not every:
    return {}
  shapes = jax.eval_shape(measure, *args)
  skip = lambda *_: jax.tree.map(lambda x: jnp.full(x.shape, _UNMEASURED, x.dtype), shapes)
  return jax.lax.cond((step + 1) % every == 0, measure, skip, *args)
