"""The seam between the one train loop and a method: what every objective provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Tree = Any  # nested dict of arrays


class Aux(NamedTuple):
  """What a loss reports besides its value.

  `probe_BxVxF` are the encoder's features of the views that the online probe sees; `features_NxF` those whose spectrum
  is watched (RankMe, feature std); `views_BxKxD` the embeddings of each image's views, from which the quantities of
  MMCR's theory are measured, or None. All are read behind a stop-gradient.
  """

  metrics: dict[str, jax.Array]
  probe_BxVxF: jax.Array
  features_NxF: jax.Array
  views_BxKxD: jax.Array | None = None


class Objective(Protocol):
  """A method. `views` and `encode` look at one example at a time, `loss` may look at the whole global batch.

  That cut keeps statistics of the batch (SIGReg, BatchNorm projectors, nuclear norms) exact under any sharding and any
  accumulation. Parameters are {"encoder": ..., ...}; `stats` holds BatchNorm's running averages in the same layout.

  A method that has `monitor(params, target, batch, keys_B) -> {metric: number}` is asked for it as often as RankMe is
  measured: for what needs the networks once more (IWM's rank in a bank).
  """

  references: Mapping[str, float]  # metric -> the value it should be read against; drawn in curves.png
  ema_schedule: Callable[[jax.Array], jax.Array] | None  # progress in [0, 1] -> momentum of the target; None = none

  def init(self, key: jax.Array, batch: Tree) -> tuple[Tree, Tree]: ...

  def views(self, keys_B: jax.Array, batch: Tree) -> Any:
    """Returns a tree whose leaves begin with B; keys_B holds one key per example."""
    ...

  def encode(self, params: Tree, stats: Tree, target: Tree, views: Any, keys_B: jax.Array) -> tuple[Any, Tree]:
    """Returns (a tree whose leaves begin with B, the running statistics after these examples)."""
    ...

  def loss(
    self, params: Tree, stats: Tree, target: Tree, encoded: Any, key: jax.Array
  ) -> tuple[jax.Array, tuple[Aux, Tree]]:
    """Returns (loss, (what else to report, the running statistics after the batch))."""
    ...

  def draw(self, views: Any, batch: Tree) -> np.ndarray:
    """Returns a uint8 picture (H, W, 3) of the views of a few images, for views.png."""
    ...

  def evaluated(self, params: Tree, stats: Tree, target: Tree) -> Tree:
    """Returns the variables of the encoder that evaluation uses: {"params": ..., "batch_stats": ...}."""
    ...
