"""Any method, with its encoder held near the one that the run started from: by the cosine of their features.

For going on from an encoder that knows more than the images at hand can teach: loss + weight (1 - cosine), the mean
over the images of the batch, of pooled features of the whole image. B batch, F encoder features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax.losses.unit import unit
from jepa_jax.models.interface import RUNNING_AVERAGES
from jepa_jax.objectives.base import Objective, Tree, vision_variables
from jepa_jax.objectives.multiview import with_averages
from jepa_jax.views import center_view

_START, _AVERAGES = "start", "start_averages"


def without_pull(objective: Any) -> Any:
  """Returns the method itself, whether or not it is pulled."""
  return objective.inner if isinstance(objective, Pulled) else objective


class Pulled:
  """An objective that is another one, and the pull; whatever is not here is the other's.

  The state holds the encoder of the start, "start", and, of BatchNorm, its averages: one more copy of the encoder. A
  step encodes every image twice more, and goes back through one of them. Both encoders are as in evaluation: nothing is
  dropped, and BatchNorm has its averages.
  """

  def __init__(self, inner: Objective, weight: float, image_px: int):
    """image_px: side of the view, the largest square in the middle of the image."""
    if "encoder" not in inner.rules or inner.lr_scales.get("encoder", 1) == 0:
      raise ValueError("pull_to_start needs an encoder that is trained; set it to 0")
    # Each is an attribute of its own: `isinstance` with a Protocol asks no __getattr__ (from Python 3.12 on).
    own = {name for name in dir(inner) if not name.startswith("_")} - set(dir(type(self)))
    self.__dict__ |= {name: getattr(inner, name) for name in own}
    self.inner, self.weight, self.image_px = inner, weight, image_px
    self.rules = {**inner.rules, _START: inner.rules["encoder"], _AVERAGES: (RUNNING_AVERAGES,)}

  def init(self, key: jax.Array, batch: Tree) -> tuple[Tree, Tree]:
    params, state = self.inner.init(key, batch)
    return params, self.started(params, state)

  def started(self, params: Tree, state: Tree) -> Tree:
    """Returns the state of a run that starts from these parameters."""
    encoder, averages = jax.tree.map(jnp.copy, (params["encoder"], state.get("encoder", {})))
    return with_averages({**state, _START: encoder}, _AVERAGES, averages)

  def views(self, keys_B: jax.Array, batch: Tree) -> Any:
    sides = (self.image_px, self.image_px)
    whole_BxHxWxC = center_view(batch, sides, self.inner.pixels, 1.0, self.inner.interpolation)
    return self.inner.views(keys_B, batch), whole_BxHxWxC

  def encode(self, params: Tree, state: Tree, target: Tree, views: Any, keys_B: jax.Array) -> tuple[Any, Tree]:
    own, whole_BxHxWxC = views
    encoded, new_state = self.inner.encode(params, state, target, own, keys_B)
    apply = self.inner.networks()["image"].apply_fn
    pooled = lambda variables: apply(variables, whole_BxHxWxC).pooled_BxD
    now_BxF = pooled(vision_variables("encoder", params, state))
    before = {"params": state[_START], "batch_stats": state.get(_AVERAGES, {})}
    before_BxF = jax.lax.stop_gradient(pooled(before))
    return (encoded, (unit(now_BxF)[0] * unit(before_BxF)[0]).sum(-1)), new_state

  def loss(self, params: Tree, state: Tree, target: Tree, encoded: Any, key: jax.Array, progress: jax.Array):
    own, cosine_B = encoded
    loss, (aux, new_state) = self.inner.loss(params, state, target, own, key, progress)
    cosine = cosine_B.mean()
    aux = aux._replace(metrics={**aux.metrics, "start_cosine": cosine})
    return loss + self.weight * (1 - cosine), (aux, new_state)

  def draw(self, views: Any, batch: Tree) -> Any:
    return self.inner.draw(views[0], batch)
