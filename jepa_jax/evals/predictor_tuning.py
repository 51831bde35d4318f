"""Predictor fine-tuning (IWM, arXiv 2403.00504): the world model itself is reused downstream, on a frozen encoder.

The predictor is asked for all positions of the whole image after the null action; an attentive head reads the answer.
Legend: B images, N patches, D encoder width, P predictor width, T tasks, A numbers of an action.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jepa_jax.evals.attentive import make_heads
from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.tuning import Task, Tunable, Tuned, TuningData, TuningSettings, tune
from jepa_jax.objectives import Objective, Predicts
from jepa_jax.streams import stream
from jepa_jax.views import NUM_ACTIONS

Tree = Any
PRETRAINED_SHARE = 0.1  # of the learning rate of what starts at random, as in the paper
_TOKEN_STD = 0.02  # as other learned tokens begin


@dataclasses.dataclass(frozen=True)
class PredictorTuning(Protocol):
  """Of an I-JEPA, IWM or MAE: its predictor tuned on the frozen encoder, beside a random one and other probes.

  How is said by `evals.tuning`. groups: the group of each class, (0, 0, 1) for a, b | c: a second label set, on which
  the predictor is tuned alone and together with the first.
  """

  groups: tuple[int, ...] = ()

  needs: ClassVar[frozenset[str]] = frozenset({"networks", "labels"})
  shares: ClassVar[tuple[str, ...]] = ("tuning",)
  beside: ClassVar[tuple[str, ...]] = ("linear", "attentive")

  def __post_init__(self):
    if self.groups:
      check_groups(self.groups)

  def check(self, subject: Subject) -> None:
    check_predicts(subject.objective)
    height_px, width_px = subject.objective.cfg.views.global_crops.size_hw  # what the predictor's grid is made for
    if subject.data.view_hw != (height_px, width_px):
      wide = f" and evals.view_width_px={width_px}" if width_px != height_px else ""
      raise ValueError(f"predictor_tuning shows images as in training: set evals.view_px={height_px}{wide}")
    if self.groups:
      check_groups(self.groups, subject.data.num_classes)

  def run(self, subject: Subject) -> Iterator[Result]:
    networks, data, tuning = subject.networks(), TuningData.of(subject), subject.settings.tuning
    trained = subject.objective, networks["params"], networks["target"]
    for name in VARIANTS:
      found = tune_predictor(*trained, data, tuning, subject.mesh, only=(name,))[name].summary()
      yield Result(subject.row, name, found["accuracy"][0], found)
    if not self.groups:
      return
    groups = grouped(data.tasks[0], self.groups)
    alone, both = (dataclasses.replace(data, tasks=tasks) for tasks in ((groups,), (*data.tasks, groups)))
    found = tune_predictor(*trained, alone, tuning, subject.mesh, only=("predictor",))["predictor"].summary()
    yield Result(subject.row, "predictor, groups", found["accuracy"][0], found)
    found = tune_multitask(*trained, both, tuning, subject.mesh).summary()
    for column, value in zip(("multitask", "multitask, groups"), found["accuracy"]):
      yield Result(subject.row, column, value, found)


def check_groups(groups: tuple[int, ...], num_classes: int | None = None) -> None:
  """Raises a ValueError unless every class has a group, and these are 0 to G - 1, all in use, and at least two."""
  if num_classes is not None and len(groups) != num_classes:
    raise ValueError(f"groups has {len(groups)} entries for {num_classes} classes: give the group of each class")
  used = sorted(set(groups))
  if len(used) < 2 or used != list(range(len(used))):
    raise ValueError(f"groups uses the groups {used}: number them from 0 without gaps, at least 0 and 1")


VARIANTS = ("tuned encoder", "random predictor", "predictor", "end to end")


def tune_predictor(
  objective: Predicts,
  params: Tree,
  target: Tree,
  data: TuningData,
  settings: TuningSettings,
  mesh: Mesh | None = None,
  only: Sequence[str] = (),
) -> dict[str, Tuned]:
  """Returns {variant: Tuned} of `variants`, all or `only` some: the same heads, epochs and order of images for each.

  objective, params, target: an I-JEPA or IWM and its networks. ValueError as of `check_networks`.
  """
  networks = variants(objective, params, target, data.tasks, data.seed)
  return {name: tune(each, data, settings, mesh) for name, each in networks.items() if name in (only or networks)}


def tune_multitask(
  objective: Predicts,
  params: Tree,
  target: Tree,
  data: TuningData,
  settings: TuningSettings,
  mesh: Mesh | None = None,
) -> Tuned:
  """Returns what one pre-trained predictor, told the task by a learned token, makes of all tasks of `data`.

  It takes as many steps as tuning for one task does; each task has its share of the rows of every batch.
  """
  networks = variants(objective, params, target, data.tasks, data.seed)["predictor"]
  return tune(networks, data, settings, mesh)


def grouped(task: Task, groups: Sequence[int]) -> Task:
  """Returns the task of telling groups of classes apart, groups[class] in [0, G)."""
  group_C = np.asarray(groups, np.int32)
  return Task(group_C[task.train_N], group_C[task.test_N], int(group_C.max()) + 1)


def variants(objective: Predicts, params: Tree, target: Tree, tasks: Sequence[Task], seed: int) -> dict[str, Tunable]:
  """Returns the networks to compare, by name.

  - "tuned encoder": the head on the encoder's tokens, both trained;
  - "random predictor": the encoder frozen, a predictor that starts at random;
  - "predictor": the encoder frozen, the pre-trained predictor;
  - "end to end": the encoder and the pre-trained predictor trained.

  The encoder is the one that is evaluated (the moving average). What is pre-trained has a tenth of the learning rate.
  With several tasks, the predictor's sequence has the token of the task.
  """
  check_networks(objective, params, target)
  encoder = objective.variables(params, {}, target)["image"]["params"]
  predictor_key, tokens_key = (stream(jax.random.key(seed), name) for name in ("predictor", "task tokens"))
  # Heads of the attentive probe, on the encoder's tokens or on what the predictor answers (with MAE: pixels).
  widths = {"encoder": objective.encoder.width, "predictor": objective.answer_width}
  heads = {last: make_heads(width, tasks, seed) for last, width in widths.items()}
  new, new_task = {last: {"heads": params} for last, (_, params) in heads.items()}, {}
  if len(tasks) > 1:
    shape = (len(tasks), objective.cfg.predictor.width)
    new_task = {"tokens_TxP": _TOKEN_STD * jax.random.normal(tokens_key, shape)}

  def forward(trained, frozen, images, task):
    nets = {**frozen, **trained}
    seen = objective.encoder.apply({"params": nets["encoder"]}, images)
    tokens_BxNxD = seen.tokens_BxNxD
    last = "predictor" if "predictor" in nets else "encoder"
    if last == "predictor":
      token_P = nets["tokens_TxP"][task] if "tokens_TxP" in nets else None
      tokens_BxNxD = answer(objective, nets["predictor"], objective.context(seen), token_P)
    return heads[last][0][task].apply({"params": nets["heads"][task]}, tokens_BxNxD)

  def tunable(pretrained: dict[str, Tree], random: dict[str, Tree], frozen: dict[str, Tree]) -> Tunable:
    shares = dict.fromkeys(pretrained, PRETRAINED_SHARE) | dict.fromkeys(random, 1.0)
    return Tunable(forward, pretrained | random, frozen, shares)

  encoder, predictor = {"encoder": encoder}, {"predictor": params["predictor"]}
  random_predictor = {"predictor": init_predictor(objective, predictor_key)}
  return {
    "tuned encoder": tunable(encoder, new["encoder"], {}),
    "random predictor": tunable({}, random_predictor | new["predictor"] | new_task, encoder),
    "predictor": tunable(predictor, new["predictor"] | new_task, encoder),
    "end to end": tunable(encoder | predictor, new["predictor"] | new_task, {}),
  }


def answer(
  objective: Predicts, predictor: Tree, context_BxKxD: jax.Array, token_P: jax.Array | None = None
) -> jax.Array:
  """Returns what the predictor says of all positions (B, N, D) after the null action, with the token of a task."""
  batch = len(context_BxKxD)
  extra_BxXxP = None if token_P is None else jnp.broadcast_to(token_P, (batch, 1, *token_P.shape))
  null_BxA = jnp.zeros((batch, NUM_ACTIONS))
  return objective.predict({"predictor": predictor}, context_BxKxD, objective.whole(batch), null_BxA, extra_BxXxP)[:, 0]


def init_predictor(objective: Predicts, key: jax.Array) -> Tree:
  """Returns the parameters of a predictor of this architecture that has learned nothing."""
  masks = objective.whole(1)
  tokens_1xNxD = jnp.zeros((1, objective.num_patches, objective.encoder.width))
  places = (masks.context_BxK, masks.targets_BxMxT, masks.valid_BxMxT)
  kwargs = dict(grid_hw=objective.grid_hw, action_BxA=jnp.zeros((1, NUM_ACTIONS)))
  return jax.jit(lambda key: objective.predictor.init(key, tokens_1xNxD, *places, **kwargs)["params"])(key)


def check_predicts(objective: Objective, protocol: str = "predictor_tuning") -> None:
  """Raises a ValueError, in the name of a protocol, unless the objective has a predictor."""
  if not isinstance(objective, Predicts):
    raise ValueError(
      f"{protocol} needs a predictor, and objective {objective.cfg.name!r} has none: leave it out (the "
      'evaluation "attentive" is for every method), or train an ijepa, iwm or mae'
    )
  if not objective.cfg.predictor.depth:
    raise ValueError(f"{protocol} needs a predictor, and objective.predictor.depth=0: leave it out")


def check_networks(objective: Objective, params: Tree, target: Tree, protocol: str = "predictor_tuning") -> None:
  """Raises a ValueError unless there are a predictor and the target encoder that the objective declares."""
  check_predicts(objective, protocol)
  if "predictor" not in params:
    held = ", ".join(sorted(params))
    raise ValueError(f"{protocol} needs a predictor, and this checkpoint has none (it holds {held}): leave it out")
  if "encoder" in objective.averaged and "encoder" not in (target or {}):
    raise ValueError(
      f"{protocol} takes the target encoder, the moving average, and this checkpoint has none: give the "
      "checkpoint of a whole run, or set objective.target='online' in its config"
    )


PROTOCOL = PredictorTuning
