"""Config + mesh -> everything that can be known without data: objective, optimiser, shardings, the jitted step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jepa_jax.config import Config
from jepa_jax.data import DataConfig
from jepa_jax.flops import matrix_flops
from jepa_jax.objectives import Objective, make_objective
from jepa_jax.optim import learning_rate, make_optimiser, schedule_steps
from jepa_jax.sharding import batch_sharding, check_batch, replicated, state_shardings
from jepa_jax.step import TrainState, init_state, make_step, step_keys
from jepa_jax.views import example_keys


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One experiment on one mesh. `step_fn(state, batch, key) -> (state, metrics)` is jitted and donates the state."""

  cfg: Config
  mesh: Mesh
  objective: Objective
  optimiser: optax.GradientTransformation
  lr: Callable  # step -> learning rate
  total_steps: int
  steps_per_epoch: float
  key: jax.Array
  abstract_batch: Any
  abstract_state: TrainState  # ShapeDtypeStructs that carry this mesh's shardings
  init_fn: Callable  # (key, batch) -> state
  step_fn: Any

  @property
  def shardings(self) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, self.abstract_state)

  def init(self) -> TrainState:
    """Returns the state at step 0, born sharded."""
    with jax.set_mesh(self.mesh):
      init = jax.jit(lambda key: self.init_fn(key, zero_batch(self.abstract_batch)), out_shardings=self.shardings)
      return init(self.key)

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
    return example_keys(step_keys(self.key, step)[0], row_B)


def abstract_batch(data: DataConfig, batch_size: int, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a global batch: canvas uint8 (B, S, S, C); height, width, label, index int32 (B,)."""
  size = data.canvas_px
  batch = {"canvas": jax.ShapeDtypeStruct((batch_size, size, size, data.channels), jnp.uint8, sharding=sharding)}
  row = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding)
  return batch | {name: row for name in ("height", "width", "label", "index")}


def zero_batch(abstract: Any) -> Any:
  """Returns black images of these shapes: what networks are initialised with, inside jit."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)


def check_microbatch(cfg: Config) -> None:
  """Raises a ValueError where microbatches would not give the gradient of the whole batch."""
  if cfg.microbatch > 1 and cfg.encoder.uses_batch_statistics and not cfg.change_objective_to_batch_norm_per_microbatch:
    raise ValueError(
      f"microbatch={cfg.microbatch} with encoder kind={cfg.encoder.kind!r}: its BatchNorm would normalise with the "
      "statistics of each microbatch, not of the batch, which is another objective. Set microbatch=1, choose an "
      "encoder without BatchNorm, or accept it with change_objective_to_batch_norm_per_microbatch=True"
    )


def make_experiment(cfg: Config, mesh: Mesh, num_train: int, num_classes: int) -> Experiment:
  """Returns the Experiment of cfg on mesh, for a training set of num_train images; nothing is computed yet.

  ValueError where batch, mesh, data and networks do not fit together.
  """
  check_batch(cfg.batch_size, mesh, cfg.microbatch)
  check_microbatch(cfg)
  if num_train < cfg.batch_size:
    raise ValueError(f"{num_train} training images are fewer than one batch of {cfg.batch_size}; lower batch_size")
  if cfg.data.channels != cfg.encoder.channels:
    raise ValueError(f"data.channels={cfg.data.channels} but encoder.channels={cfg.encoder.channels}; set both alike")
  steps_per_epoch = num_train / cfg.batch_size
  total_steps = cfg.total.steps(steps_per_epoch)
  if total_steps < 1:
    raise ValueError(f'total="{cfg.total}" is less than one step')
  objective = make_objective(cfg.objective, cfg.encoder)
  lr = learning_rate(cfg.optim, cfg.batch_size, total_steps, steps_per_epoch)
  optimiser = make_optimiser(cfg.optim, lr, total_steps)
  batch = abstract_batch(cfg.data, cfg.batch_size, batch_sharding(mesh))
  key = jax.random.key(cfg.seed)
  init_fn = lambda key, batch: init_state(key, batch, objective, optimiser, cfg.probe, max(num_classes, 1))
  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(init_fn, key, batch)
    shardings = state_shardings(abstract, mesh, cfg.encoder.kind)
    step_fn = jax.jit(
      make_step(objective, optimiser, cfg.probe, lr, cfg.microbatch, cfg.guard, schedule_steps(cfg.optim, total_steps)),
      out_shardings=(shardings, replicated(mesh)),
      donate_argnums=0,
    )
  abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
  return Experiment(
    cfg, mesh, objective, optimiser, lr, total_steps, steps_per_epoch, key, batch, abstract, init_fn, step_fn
  )
