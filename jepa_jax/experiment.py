"""Config + mesh -> everything that can be known without data: objective, optimiser, shardings, the jitted step."""

from __future__ import annotations

import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jepa_jax.config import Config, encoders
from jepa_jax.data import Column, abstract_batch, row_columns, zero_batch
from jepa_jax.evals import online_monitor
from jepa_jax.flops import matrix_flops
from jepa_jax.low_rank import check_rank, is_factors
from jepa_jax.objectives import FROZEN_FEATURES, Objective, Pulled, make_objective
from jepa_jax.optim import learning_rate, make_optimiser, schedule_steps
from jepa_jax.sharding import Rules, batch_sharding, check_batch, check_rules, replicated, tree_shardings
from jepa_jax.step import TrainState, init_state, make_step, step_keys
from jepa_jax.streams import stream
from jepa_jax.views import Pixels, example_keys

_INIT_ROWS = 2  # of the batch that networks are made with: one program whatever the batch of a run


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """One experiment on one mesh. `step_fn(state, batch, key) -> (state, metrics)` is jitted and donates the state."""

  cfg: Config
  mesh: Mesh
  objective: Objective
  references: Mapping[str, float]  # metric -> the value it should be read against
  lr: Callable  # step -> learning rate
  total_steps: int
  steps_per_epoch: float
  key: jax.Array
  abstract_batch: Any
  abstract_state: TrainState  # ShapeDtypeStructs that carry this mesh's shardings
  init_fn: Callable  # key -> state
  step_fn: Any

  @property
  def shardings(self) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, self.abstract_state)

  def init(self) -> TrainState:
    """Returns the state at step 0, born sharded."""
    with jax.set_mesh(self.mesh):
      return jax.jit(self.init_fn, out_shardings=self.shardings)(self.key)

  def begun(self, state: TrainState) -> TrainState:
    """Returns the state at step 0 of a run that begins with these networks: what is kept of the start is theirs."""
    if not isinstance(self.objective, Pulled):
      return state
    return dataclasses.replace(state, model_state=self.objective.started(state.params, state.model_state))

  def init_batch(self) -> Any:
    """Returns the few rows of zeros that networks are made with; call it inside jit."""
    return _init_batch(self.abstract_batch)

  def compile(self):
    """Returns the compiled step. Ahead of time, so a second compilation is impossible: other shapes are an error."""
    with jax.set_mesh(self.mesh):
      return self.step_fn.lower(self.abstract_state, self.abstract_batch, self.key).compile()

  def matrix_flops(self) -> int:
    """Returns the matrix FLOPs of one step over all devices, recomputation included; nothing is compiled."""
    with jax.set_mesh(self.mesh):
      return matrix_flops(self.step_fn, self.abstract_state, self.abstract_batch, self.key)

  def views_keys(self, step: int, row_B: jax.Array) -> jax.Array:
    """Returns the keys from which the step after `step` finished ones draws the views of these rows of its batch."""
    return example_keys(step_keys(self.key, step).views, row_B)


def _init_batch(abstract_batch: Any) -> Any:
  return zero_batch(jax.tree.map(lambda x: jax.ShapeDtypeStruct((_INIT_ROWS, *x.shape[1:]), x.dtype), abstract_batch))


def timed_step_s(experiment: Experiment, compiled: Any, num_steps: int) -> tuple[float, Any]:
  """Returns the median time in s of a step on a `random_batch`, after two to warm up, and the metrics of the last."""
  state, batch, times_s, metrics = experiment.init(), random_batch(experiment), [], None
  for i in range(num_steps + 2):
    start_s = time.perf_counter()
    state, metrics = compiled(state, batch, experiment.key)
    jax.block_until_ready(metrics)
    if i >= 2:
      times_s.append(time.perf_counter() - start_s)
  return statistics.median(times_s), metrics


def random_batch(experiment: Experiment) -> dict[str, jax.Array]:
  """Returns a batch of canvases of noise, all of which is seen, of ten classes."""
  rng = np.random.default_rng(0)
  shapes = experiment.abstract_batch
  side = shapes["canvas"].shape[1]
  batch = {name: np.full(s.shape, side, s.dtype) for name, s in shapes.items() if name != "canvas"}
  batch["canvas"] = rng.integers(0, 256, shapes["canvas"].shape, np.uint8)
  if "caption" in batch:
    batch["caption"] = rng.integers(0, 256, shapes["caption"].shape, np.int32)
  batch["label"] = rng.integers(0, 10, shapes["label"].shape).astype(np.int32)
  return jax.device_put(batch, shapes["canvas"].sharding)


def state_shardings(abstract: TrainState, rules: Rules, optimiser: optax.GradientTransformation, mesh: Mesh):
  """Returns a TrainState of NamedShardings: networks by their rules, moments beside their parameter, the rest whole.

  ValueError for an array of a network that no rule matches, and for a rule that matches nothing.
  """
  check_rules((abstract.params, abstract.model_state), rules)
  whole = replicated(mesh)
  params = tree_shardings(abstract.params, rules, mesh)
  # What stands for a network or an array without moments, and for a matrix of low rank, whose factors are small.
  apart = lambda node: isinstance(node, optax.MaskedNode) or is_factors(node)
  opt_state = optax.tree.map_params(
    optimiser,
    lambda moment, sharding: jax.tree.map(lambda _: whole, moment) if apart(moment) else sharding,
    abstract.opt_state,
    params,
    transform_non_params=lambda _: whole,
    is_leaf=apart,
  )
  return TrainState(
    step=whole,
    params=params,
    target=None if abstract.target is None else tree_shardings(abstract.target, rules, mesh),
    model_state=tree_shardings(abstract.model_state, rules, mesh),
    opt_state=opt_state,
    probe=jax.tree.map(lambda _: whole, abstract.probe),
    guard=jax.tree.map(lambda _: whole, abstract.guard),
  )


def _columns(cfg: Config, objective: Objective) -> dict[str, Column]:
  """Returns the columns of a batch of training: those of the images, and features of a frozen encoder."""
  if not getattr(objective, "reads_frozen_features", False):
    return row_columns(cfg.data)
  widths = {"pooled": cfg.encoder.output_dim, "probe": cfg.encoder.probe_dim}
  return row_columns(cfg.data) | {
    name: Column((widths[output],), np.float32) for name, output in FROZEN_FEATURES.items()
  }


def check_microbatch(cfg: Config) -> None:
  """Raises a ValueError where microbatches would not give the gradient of the whole batch."""
  if cfg.microbatch == 1 or cfg.change_objective_to_batch_norm_per_microbatch:
    return
  for path, encoder in encoders(cfg):
    if encoder.uses_batch_statistics:
      raise ValueError(
        f"microbatch={cfg.microbatch} with {path}.name={encoder.name!r}: its BatchNorm would normalise with the "
        "statistics of each microbatch, not of the batch, which is another objective. Set microbatch=1, choose an "
        "encoder without BatchNorm, or accept it with change_objective_to_batch_norm_per_microbatch=True"
      )


def check_layers(cfg: Config) -> None:
  """Raises a ValueError where blocks are to learn in a way of their own, and the encoder has none."""
  if cfg.optim.layer_decay == 1 and not cfg.optim.frozen_blocks and not cfg.optim.lora_rank:
    return
  depth = getattr(getattr(cfg.encoder, "size", None), "depth", 0)
  if not depth:
    raise ValueError(
      f"optim.layer_decay, frozen_blocks and lora_rank are of a ViT's blocks; encoder {cfg.encoder.name!r} has none"
    )
  if cfg.optim.frozen_blocks >= depth:
    raise ValueError(f"optim.frozen_blocks={cfg.optim.frozen_blocks} leaves none of {depth} blocks to be trained")


def check_classes(cfg: Config, num_classes: int) -> None:
  """Raises a ValueError where a method that learns from labels has other classes than the data."""
  wanted = getattr(cfg.objective, "num_classes", num_classes)
  if wanted and not num_classes:
    raise ValueError(f"{cfg.objective.name} learns from labels, and the training images have none; choose other images")
  if wanted != num_classes:
    raise ValueError(
      f"config.objective.projector.out={wanted} is the number of classes of {cfg.objective.name}, and the images have "
      f"{num_classes}: set it to that (in a plan, say the number of classes: --num-classes={wanted})"
    )


def make_experiment(cfg: Config, mesh: Mesh, num_train: int, num_classes: int) -> Experiment:
  """Returns the Experiment of cfg on mesh, for a training set of num_train images; nothing is computed yet.

  The same arguments have the same Experiment, whose programs are traced and compiled once in a process: a study, a
  resumed run and the checkpoints of --follow ask for it many times.

  ValueError where batch, mesh, data and networks do not fit together.
  """
  try:
    hash(cfg)
  except TypeError:  # a setting of somebody's own method that is a list or a dict
    return _make_experiment.__wrapped__(cfg, mesh, num_train, num_classes)
  return _make_experiment(cfg, mesh, num_train, num_classes)


_LARS = "optim.name='lars': %s on a ViT is known to collapse with it; AdamW is what works"


@functools.lru_cache(maxsize=8)
def _make_experiment(cfg: Config, mesh: Mesh, num_train: int, num_classes: int) -> Experiment:
  check_batch(cfg.batch_size, mesh, cfg.microbatch)
  check_microbatch(cfg)
  check_layers(cfg)
  if num_train < cfg.batch_size:
    raise ValueError(f"{num_train} training images are fewer than one batch of {cfg.batch_size}; lower batch_size")
  steps_per_epoch = num_train / cfg.batch_size
  total_steps = cfg.total.steps(steps_per_epoch)
  if total_steps < 1:
    raise ValueError(f'total="{cfg.total}" is less than one step')
  check_classes(cfg, num_classes)
  if cfg.batch_size < 2 and getattr(cfg.objective, "compares_images", False):
    raise ValueError(f"config.batch_size={cfg.batch_size}: {cfg.objective.name} compares images, so give 2 or more")
  if (
    cfg.optim.name == "lars"
    and getattr(cfg.objective, "lars_collapses", False)
    and hasattr(cfg.encoder, "drops_patches")
  ):
    logging.getLogger(__name__).warning(_LARS, cfg.objective.name)
  objective = make_objective(cfg.objective, cfg.encoder, Pixels(cfg.data.mean, cfg.data.std), cfg.data.captions)
  if cfg.pull_to_start:
    objective = Pulled(objective, cfg.pull_to_start, cfg.encoder.image_size)
  lr = learning_rate(cfg.optim, cfg.batch_size, total_steps, steps_per_epoch)
  later = getattr(objective, "still", {})
  key = jax.random.key(cfg.seed)
  optimiser = make_optimiser(cfg.optim, lr, total_steps, objective.rules, objective.lr_scales, later, key)
  monitor = online_monitor(objective)
  batch = abstract_batch(_columns(cfg, objective), cfg.batch_size, batch_sharding(mesh))

  @jax.jit  # traced once: for the shapes here, and again when the state is made with their shardings
  def init_fn(key):
    return init_state(stream(key, "init"), _init_batch(batch), objective, optimiser, cfg.probe, max(num_classes, 1))

  watch, schedule = monitor.watch if monitor else None, schedule_steps(cfg.optim, total_steps)
  step = make_step(objective, optimiser, cfg.probe, lr, cfg.microbatch, cfg.guard, schedule, watch)
  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(init_fn, key)
  if cfg.optim.lora_rank:
    if objective.lr_scales.get("encoder", 1) == 0:
      raise ValueError(
        "optim.lora_rank is set, and the encoder is frozen (its learning rate is 0): leave out one of them"
      )
    check_rank(abstract.params.get("encoder", {}), cfg.optim.lora_rank)
  # Outside of the mesh: optax makes small arrays to tell moments from the rest, and chips of a plan cannot hold any.
  shardings = state_shardings(abstract, objective.rules, optimiser, mesh)
  step_fn = jax.jit(step, out_shardings=(shardings, replicated(mesh)), donate_argnums=0)
  abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
  references = {**objective.references, **(monitor.references if monitor else {})}
  return Experiment(
    cfg, mesh, objective, references, lr, total_steps, steps_per_epoch, key, batch, abstract, init_fn, step_fn
  )
