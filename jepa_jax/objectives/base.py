"""The seam between the one train loop and a method: what every objective provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jepa_jax.sharding import Rules
from jepa_jax.views import Drawn, Interpolation, Pixels

Tree = Any  # nested dict of arrays
# Columns that a batch has for an objective with `reads_frozen_features` -> of which output of its encoder they are.
FROZEN_FEATURES = {"image_pooled": "pooled", "image_probe": "probe"}


class Aux(NamedTuple):
  """What a loss reports besides its value.

  `probe_BxVxF` are the encoder's features of the views that the online probe sees; `features_NxF` those whose spectrum
  is watched (RankMe, feature std); `views_BxKxD` the embeddings of each image's views, from which the quantities of
  MMCR's theory are measured, or None; `others_NxF` features of further towers, whose RankMe is watched, too. All are
  read behind a stop-gradient.
  """

  metrics: dict[str, jax.Array]
  probe_BxVxF: jax.Array
  features_NxF: jax.Array
  views_BxKxD: jax.Array | None = None
  others_NxF: Mapping[str, jax.Array] = {}


class Network(NamedTuple):
  """A trained network as evaluators see it: apply_fn(variables, inputs) -> EncoderOutput of a batch.

  `reads` is the column of the data that it takes, as it is; "canvas" stands for the evaluation view of the image,
  normalised.
  """

  apply_fn: Callable[[Tree, jax.Array], Any]
  reads: str = "canvas"


class Objective(Protocol):
  """A method. `views` and `encode` look at one example at a time, `loss` may look at the whole global batch.

  That cut keeps statistics of the batch (SIGReg, BatchNorm projectors, nuclear norms) exact under any sharding and any
  accumulation. Parameters are {network name: ...}. `state` is what training carries besides: running averages of
  BatchNorm, a centre, a queue, under the name of a network or one of its own. `target` holds a moving average of the
  parameters of the networks that `averaged` names, or is None.
  """

  cfg: Any
  pixels: Pixels  # of the data
  interpolation: Interpolation  # how images are resized, in training and in evaluation
  rules: Rules  # where the arrays of each network, and of `state`, live, and which of them decay
  averaged: tuple[str, ...]  # networks whose moving average is kept in `target`
  ema_schedule: Callable[[jax.Array], jax.Array] | None  # progress in [0, 1] -> momentum of that average; None = none
  lr_scales: Mapping[str, float]  # networks whose learning rate is this multiple of the others'; 0: frozen
  # still, if there: networks that begin to be trained only after this share of the schedule
  # reads_frozen_features, if there and True: batches hold what the "image" network, which is frozen, makes of them
  references: Mapping[str, float]  # metric -> the value it should be read against; drawn in curves.png

  def init(self, key: jax.Array, batch: Tree) -> tuple[Tree, Tree]:
    """Returns (params, state) at step 0."""
    ...

  def views(self, keys_B: jax.Array, batch: Tree) -> Any:
    """Returns a tree whose leaves begin with B; keys_B holds one key per example."""
    ...

  def encode(self, params: Tree, state: Tree, target: Tree, views: Any, keys_B: jax.Array) -> tuple[Any, Tree]:
    """Returns (a tree whose leaves begin with B, the state after these examples)."""
    ...

  def loss(
    self, params: Tree, state: Tree, target: Tree, encoded: Any, key: jax.Array, progress: jax.Array
  ) -> tuple[jax.Array, tuple[Aux, Tree]]:
    """Returns (loss, (what else to report, the state after the batch)); progress is the share of the schedule done."""
    ...

  def draw(self, views: Any, batch: Tree) -> np.ndarray | Drawn:
    """Returns a uint8 picture (H, W, 3) of the views of a few images, for views.png, perhaps with titles."""
    ...

  def networks(self) -> Mapping[str, Network]:
    """Returns the networks that are evaluated, by name; "image" is the one whose features the usual table is about."""
    ...

  def variables(self, params: Tree, state: Tree, target: Tree) -> dict[str, Tree]:
    """Returns what each of `networks` is applied to. It picks subtrees and computes nothing, so that a checkpoint is
    read only where it is needed."""
    ...


@runtime_checkable
class Predicts(Protocol):
  """An objective on a ViT with a predictor that fills in patches: what reusing that predictor needs."""

  cfg: Any
  encoder: Any
  predictor: Any
  grid_hw: tuple[int, int]
  num_patches: int
  answer_width: int  # of a predicted token
  averaged: tuple[str, ...]

  def whole(self, batch: int) -> Any:
    """Returns the masks with which all patches are seen and all are predicted."""
    ...

  def context(self, seen: Any) -> jax.Array:
    """Returns what the predictor reads of an encoder's output, (B, K, D)."""
    ...

  def predict(
    self,
    params: Tree,
    context_BxKxD: jax.Array,
    masks: Any,
    action_BxA: jax.Array | None = None,
    extra_BxXxP: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the predicted tokens (B, M, T, D) of the masks' targets."""
    ...

  def variables(self, params: Tree, state: Tree, target: Tree) -> dict[str, Tree]: ...


@runtime_checkable
class Imagines(Predicts, Protocol):
  """A world model: its predictor is told actions, so it can be asked what a picture would look like after one."""

  pixels: Pixels
  interpolation: Interpolation

  def to_pixels(self, images_BxHxWxC: jax.Array) -> jax.Array: ...

  def encode_pixels(self, encoder: Tree, pixels_BxCxHxW: jax.Array, **keep: jax.Array) -> jax.Array: ...

  def encode_bank(self, encoder: Tree, pixels_CxHxW: jax.Array, colors_K: Any, settings: Any, chunk: int): ...

  def imagine(self, params: Tree, context_NxD: jax.Array, actions_KxA: jax.Array) -> jax.Array: ...


def vision_variables(network: str, params: Tree, state: Tree) -> Tree:
  """Returns the variables of an image encoder whose parameters and running averages stand under this name."""
  return {"params": params[network], "batch_stats": state.get(network, {})}
