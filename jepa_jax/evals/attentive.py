"""The attentive probe: a head that attends to all tokens of a frozen encoder (V-JEPA 2404.08471, IWM 2403.00504).

Legend: B images, N tokens, D width, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.tuning import Task, Tunable, Tuned, TuningData, TuningSettings, tune
from jepa_jax.models import AttentiveHead, make_attentive_head
from jepa_jax.streams import stream

Tree = Any


@dataclasses.dataclass(frozen=True)
class Attentive(Protocol):
  """An attentive head on the tokens of the frozen encoder, trained as `evals.tuning` says."""

  needs: ClassVar[frozenset[str]] = frozenset({"encoder", "labels"})
  shares: ClassVar[tuple[str, ...]] = ("tuning",)

  def check(self, subject: Subject) -> None:
    data = subject.data
    token_width(subject.apply_fn(), subject.abstract["image"], data.view_fn, data.train)

  def run(self, subject: Subject) -> Iterator[Result]:
    data, tuning = TuningData.of(subject), subject.settings.tuning
    found = attentive_probe(subject.apply_fn(), subject.variables("image"), data, tuning, subject.mesh).summary()
    yield Result(subject.row, "attentive", found["accuracy"][0], found)


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
  heads, params = make_heads(token_width(encode_fn, variables, data.view_fn, data.train), data.tasks, data.seed)

  def forward(trained, frozen, images, task):
    tokens_BxNxD = encode_fn(frozen["encoder"], images).tokens_BxNxD
    return heads[task].apply({"params": trained["heads"][task]}, tokens_BxNxD)

  return tune(Tunable(forward, {"heads": params}, {"encoder": variables}, {"heads": 1.0}), data, settings, mesh)


def token_width(encode_fn: Callable[[Tree, jax.Array], Any], variables: Tree, view_fn: Callable, images: Any) -> int:
  """Returns D; ValueError where the encoder has no tokens. Nothing is compiled."""
  encode = lambda variables, batch: encode_fn(variables, view_fn(batch)).tokens_BxNxD
  tokens = jax.eval_shape(encode, variables, images.empty_rows(1))
  if tokens is None:
    raise ValueError(
      "the attentive probe attends to an encoder's tokens, and this one has none (an MLP): leave out the evaluation "
      '"attentive", or take an encoder vit, convnet or resnet'
    )
  return tokens.shape[-1]


def make_heads(width: int, tasks: Sequence[Task], seed: int) -> tuple[list[AttentiveHead], list[Tree]]:
  """Returns one head for each task and their parameters: those of a task are the same in every protocol."""
  heads = [make_attentive_head(width, task.num_classes) for task in tasks]
  keys = jax.random.split(stream(jax.random.key(seed), "heads"), len(heads))
  return heads, [jax.jit(head.init)(key, jnp.zeros((1, 1, width)))["params"] for head, key in zip(heads, keys)]


PROTOCOL = Attentive
