"""The attentive probe: a head that attends to all tokens of a frozen encoder (V-JEPA 2404.08471, IWM 2403.00504).

Legend: B images, N tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jepa_jax.evals.tuning import Task, Tunable, Tuned, TuningData, TuningSettings, tune
from jepa_jax.models import AttentiveHead, make_attentive_head

Tree = Any


def attentive_probe(
  encode_fn: Callable[[Tree, jax.Array], Any],
  variables: Tree,
  data: TuningData,
  settings: TuningSettings,
  mesh: Mesh | None = None,
) -> Tuned:
  """Returns the accuracy of an attentive head on the last layer's tokens, encode_fn(variables, images).tokens_BxNxD.

  ValueError where the encoder has no tokens.
  """
  heads, params = make_heads(token_width(encode_fn, variables, data), data.tasks, settings.seed)

  def forward(trained, frozen, images, task):
    tokens_BxNxD = encode_fn(frozen["encoder"], images).tokens_BxNxD
    return heads[task].apply({"params": trained["heads"][task]}, tokens_BxNxD)

  return tune(Tunable(forward, {"heads": params}, {"encoder": variables}, {"heads": 1.0}), data, settings, mesh)


def token_width(encode_fn: Callable[[Tree, jax.Array], Any], variables: Tree, data: TuningData) -> int:
  """Returns D; ValueError where the encoder has no tokens. Nothing is compiled."""
  encode = lambda variables, batch: encode_fn(variables, data.view_fn(batch)).tokens_BxNxD
  tokens = jax.eval_shape(encode, variables, data.train.empty_rows(1))
  if tokens is None:
    raise ValueError(
      "the attentive probe attends to an encoder's tokens, and this one has none (an MLP): leave out the evaluation "
      '"attentive", or take an encoder of kind vit, convnet or resnet'
    )
  return tokens.shape[-1]


def make_heads(width: int, tasks: Sequence[Task], seed: int) -> tuple[list[AttentiveHead], list[Tree]]:
  """Returns one head for each task and their parameters: those of a task are the same in every protocol."""
  heads = [make_attentive_head(width, task.num_classes) for task in tasks]
  keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(heads))]
  return heads, [jax.jit(head.init)(key, jnp.zeros((1, 1, width)))["params"] for head, key in zip(heads, keys)]
