"""Optimisers and schedules from optax, with weight decay decided by parameter name."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jepa_jax.duration import Duration
from jepa_jax.low_rank import is_factors, low_rank
from jepa_jax.sharding import Rules, find_rule, path_name

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """`lr` is the peak; `start_lr` and `final_lr` are fractions of it, before warm-up and at the end.

  `lr_batch` > 0 scales lr by batch_size / lr_batch (LARS recipes). `final_weight_decay` is a multiple of
  `weight_decay`, reached along a cosine over all steps. `ipe_scale` > 1 makes the schedules, the target's
  momentum included, those of a run so many times longer, of which the end is never reached. `clip_norm` bounds the
  length of the whole gradient, `clip_each` that of every parameter, stacked blocks one by one. For a ViT that has
  learned something already: `layer_decay` is what a block's rate is of the next one's, and the first `frozen_blocks`,
  with what comes before them, stay as they are (which saves no time: their gradients are computed all the same).
  `lora_rank` > 0 is LoRA: the matrices of its blocks move by products of that rank, times `lora_alpha` / `lora_rank`,
  and all else in the encoder stays (`jepa_jax.low_rank`).
  """

  name: Literal["adamw", "sgd", "lars"] = "adamw"
  lr: float = 5e-4
  lr_batch: int = 0
  start_lr: float = 0.0
  final_lr: float = 1e-3
  warmup: Duration = Duration(10, "%")
  schedule: Literal["cosine", "constant"] = "cosine"
  weight_decay: float = 5e-2
  final_weight_decay: float = 1.0
  ipe_scale: float = 1.0
  b1: float = 0.9
  b2: float = 0.999
  momentum: float = 0.9
  clip_norm: float = 0.0
  clip_each: float = 0.0
  layer_decay: float = 1.0
  frozen_blocks: int = 0
  lora_rank: int = 0
  lora_alpha: float = 16.0

  def __post_init__(self):
    if self.lr <= 0:
      raise ValueError(f"lr={self.lr} must be positive")
    for name in ("weight_decay", "clip_norm", "clip_each", "lr_batch"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)} must be 0 (off) or more")
    if self.ipe_scale < 1 or self.final_weight_decay < 0:
      raise ValueError(
        f"ipe_scale={self.ipe_scale} stretches the schedules: 1 or more; "
        f"final_weight_decay={self.final_weight_decay} is a multiple of weight_decay: 0 or more"
      )
    for name in ("start_lr", "final_lr", "b1", "b2", "momentum"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
    if not 0 < self.layer_decay <= 1 or self.frozen_blocks < 0:
      raise ValueError(
        f"layer_decay={self.layer_decay} lies in (0, 1], 1 trains all blocks alike; frozen_blocks={self.frozen_blocks} "
        "is a number of blocks, 0 or more"
      )
    if self.lora_rank < 0 or self.lora_alpha <= 0:
      raise ValueError(
        f"lora_rank={self.lora_rank} is 0 (off) or more, lora_alpha={self.lora_alpha} positive: A B counts alpha / rank"
      )
    if self.lora_rank and self.name == "lars":
      raise ValueError(
        "lora_rank with name='lars': its rates follow the length of what moves, and B of LoRA begins at 0; use adamw"
      )
    if not self.lora_rank and self.lora_alpha != OptimConfig.lora_alpha:
      raise ValueError(f"lora_alpha={self.lora_alpha} is of LoRA: set lora_rank, or leave it out")
    unread = ("momentum",) if self.name == "adamw" else ("b1", "b2")
    unread += ("final_lr",) if self.schedule == "constant" else ()
    unread += ("final_weight_decay",) if self.name != "adamw" else ()
    for field in dataclasses.fields(self):  # a setting that nobody reads is a wrong experiment
      if field.name in unread and getattr(self, field.name) != field.default:
        raise ValueError(f"{self.name} with a {self.schedule} schedule does not read {field.name}; leave it out")


def decay_mask(params: Any, rules: Rules) -> Any:
  """Returns a tree of bools, True where weight decay applies; a parameter that no rule covers is a ValueError."""
  decays = lambda path, _: find_rule(path_name(path), rules).decays
  return jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_factors)


def learning_rate(cfg: OptimConfig, batch_size: int, total_steps: int, steps_per_epoch: float) -> Callable:
  """Returns step -> learning rate: linear warm-up, then cosine to lr * final_lr.

  Steps are finished ones, so the first is 0; its rate is that of step 1 of the schedule, as in the official code.
  """
  peak = cfg.lr * (batch_size / cfg.lr_batch if cfg.lr_batch else 1.0)
  warmup = cfg.warmup.steps(steps_per_epoch, total_steps)
  if warmup >= total_steps:
    log.warning("optim.warmup=%s is longer than the run: it is cut to its %d steps", cfg.warmup, total_steps)
  warmup = min(warmup, total_steps - 1)
  if cfg.schedule == "constant":
    ramp = optax.linear_schedule(
      peak * cfg.start_lr, peak, warmup
    )  # of zero steps it stays at 0 (optax 0.2), hence the join
    base = optax.join_schedules([ramp, optax.constant_schedule(peak)], [warmup])
  else:
    stretched = max(schedule_steps(cfg, total_steps), warmup + 1)
    base = optax.warmup_cosine_decay_schedule(peak * cfg.start_lr, peak, warmup, stretched, peak * cfg.final_lr)
  return lambda step: base(step + 1)


def schedule_steps(cfg: OptimConfig, total_steps: int) -> int:
  """Returns over how many steps schedules reach their end."""
  return int(cfg.ipe_scale * total_steps)


def weight_decay(cfg: OptimConfig, total_steps: int) -> float | Callable:
  """Returns the weight decay, or where it changes, step -> weight decay: a cosine from the first value to the last."""
  if cfg.final_weight_decay == 1:
    return cfg.weight_decay
  cosine = optax.cosine_decay_schedule(1.0, schedule_steps(cfg, total_steps))
  first, last = cfg.weight_decay, cfg.weight_decay * cfg.final_weight_decay
  return lambda step: last + (first - last) * cosine(step + 1)


def make_optimiser(
  cfg: OptimConfig,
  lr: Callable,
  total_steps: int,
  rules: Rules,
  lr_scales: Mapping[str, float] | None = None,
  still: Mapping[str, float] | None = None,
  key: jax.Array | None = None,
) -> optax.GradientTransformation:
  """Returns the optax chain: clipping if asked for, then AdamW, SGD or LARS; `rules` say what decays.

  lr_scales: networks whose updates are this multiple; one at 0 is frozen: no decay, no state. still: networks that
  begin to be trained, moments and decay, too, only after this share of the schedule. key: that of the run,
  from which LoRA draws.
  """
  scales = lr_scales or {}
  begins = {name: math.ceil(share * schedule_steps(cfg, total_steps)) for name, share in (still or {}).items()}
  later = {name: steps for name, steps in begins.items() if steps > 0 and scales.get(name, 1) != 0}
  frozen = {name for name, scale in scales.items() if scale == 0}
  if not frozen and not later:
    return _chain(cfg, lr, total_steps, rules, scales, key)
  groups: dict[str, optax.GradientTransformation] = {"trained": _chain(cfg, lr, total_steps, rules, scales, key)}
  if frozen:
    groups["frozen"] = optax.set_to_zero()
  for name, steps in later.items():
    own = _chain(cfg, lambda step, steps=steps: lr(step + steps), total_steps, rules, scales, key, steps)
    groups[name] = optax.conditionally_mask(own, lambda step, steps=steps: step >= steps)

  def labels(params: Any) -> Any:  # optax asks with a stand-in, too, to tell moments from the rest of the state
    if not isinstance(params, Mapping):
      return "trained"
    return {name: "frozen" if name in frozen else name if name in later else "trained" for name in params}

  return optax.partition(groups, labels)


def _chain(
  cfg: OptimConfig,
  lr: Callable,
  total_steps: int,
  rules: Rules,
  scales: Mapping[str, float],
  key: jax.Array | None,
  began: int = 0,
) -> optax.GradientTransformation:
  """Returns the chain of networks that are trained from step `began` on; lr counts from there."""
  decays = functools.partial(decay_mask, rules=rules)
  decay = weight_decay(cfg, total_steps)
  decay = (lambda step, of=decay: of(step + began)) if callable(decay) else decay
  # The first place is always taken, so that clipping can be turned on for a run that is under way.
  chain = [optax.stateless(lambda grads, _: _clipped(cfg, grads))]
  if cfg.name == "adamw":
    chain.append(_by_layer(optax.adamw(lr, b1=cfg.b1, b2=cfg.b2, weight_decay=decay, mask=decays), cfg))
  elif cfg.name == "sgd":
    chain += [optax.add_decayed_weights(cfg.weight_decay, decays), _by_layer(optax.sgd(lr, momentum=cfg.momentum), cfg)]
  else:
    # What does not decay is not adapted either (You et al. 2017, as in every SSL recipe)
    masks = dict(weight_decay_mask=decays, trust_ratio_mask=decays)
    lars = optax.lars(lr, cfg.weight_decay, trust_coefficient=0.001, momentum=cfg.momentum, **masks)
    chain.append(_by_layer(lars, cfg))
  if any(scale not in (0, 1) for scale in scales.values()):
    chain.append(optax.stateless(lambda updates, _: _scaled(updates, scales)))
  whole = optax.chain(*chain)
  if not cfg.lora_rank:
    return whole
  return low_rank(whole, cfg.lora_rank, cfg.lora_alpha, jax.random.key(0) if key is None else key)


def _clipped(cfg: OptimConfig, grads: Any) -> Any:
  if cfg.clip_norm > 0:
    grads, _ = optax.clip_by_global_norm(cfg.clip_norm).update(grads, optax.EmptyState())
  return clipped_each(grads, cfg.clip_each) if cfg.clip_each > 0 else grads


def clipped_each(grads: Any, most: float) -> Any:
  """Returns gradients of which no parameter's own is longer than this; blocks that a scan has stacked are cut apart."""

  def clipped(path, grad):
    axes = tuple(range(int("blocks" in path_name(path).split("/")), grad.ndim))
    norm = jnp.sqrt(jnp.sum(jnp.square(grad), axis=axes, keepdims=True))
    return grad * jnp.minimum(1, most / jnp.maximum(norm, 1e-12))

  return jax.tree_util.tree_map_with_path(clipped, grads)


def _by_layer(inner: optax.GradientTransformation, cfg: OptimConfig) -> optax.GradientTransformation:
  """Returns the optimiser with the updates of the encoder's layers at their shares; its state stays what it is, so that
  shares can be changed for a run that is under way."""
  if cfg.layer_decay == 1 and not cfg.frozen_blocks:
    return inner

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = inner.update(updates, state, params)
    if not isinstance(updates, Mapping) or "encoder" not in updates:
      return updates, state
    shares = layer_shares(updates["encoder"], cfg.layer_decay, cfg.frozen_blocks)
    own = jax.tree.map(lambda x, share: (x * share).astype(x.dtype), updates["encoder"], shares)
    return {**updates, "encoder": own}, state

  return optax.GradientTransformation(inner.init, update)


def _scaled(updates: Any, scales: Mapping[str, float]) -> Any:
  times = lambda own, scale: own if scale == 1 else jax.tree.map(lambda x: scale * x, own)
  return {name: times(own, scales.get(name, 1)) for name, own in updates.items()}


def layer_shares(params: Any, decay: float, num_frozen: int = 0) -> Any:
  """Returns each parameter's share of the learning rate, for an encoder that has learned something already.

  decay^(L + 1 - i) in block i (from 1) of a ViT, decay^(L + 1) before its blocks, 1 after them; 1 without blocks. 0 in
  the first num_frozen blocks and in what comes before them.
  """
  names = [name for name in params if name == "blocks" or name.startswith("blocks_")]
  if not names or (decay == 1 and not num_frozen):
    return jax.tree.map(lambda _: 1.0, params)
  depth = jax.tree.leaves(params["blocks"])[0].shape[0] if names == ["blocks"] else len(names)
  of_block = lambda i: 0.0 if num_frozen and i < num_frozen else decay ** (depth - i)  # from 0 on, -1 before the first

  def share(name: str, own: Any) -> Any:
    if name == "blocks":
      each = jnp.array([of_block(i) for i in range(depth)])
      return jax.tree.map(lambda x: each.reshape(-1, *(1,) * (x.ndim - 1)), own)
    before = name in ("patch_embed", "pos_embed", "cls_token", "registers", "norm_embed")
    number = of_block(int(name.removeprefix("blocks_"))) if name in names else of_block(-1) if before else 1.0
    return jax.tree.map(lambda _: number, own)

  return {name: share(name, own) for name, own in params.items()}
