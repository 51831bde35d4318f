"""What methods share that embed several views of an image with one encoder and one projector.

B batch, V views, F encoder features, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax.models import make_projector
from jepa_jax.objectives.base import Aux, Network, Tree, vision_variables
from jepa_jax.sharding import constrain
from jepa_jax.streams import stream
from jepa_jax.views import (
  Drawn,
  MultiCropSettings,
  Pixels,
  Views,
  example_keys,
  multi_crop,
  view_keys,
  views_grid,
  views_titles,
)


class MultiView:
  """Views, encoder and projector; a method adds its loss: `loss`, or, where that is a function of the embeddings alone,
  `embedding_loss`. See `objectives.base.Objective` for what is returned."""

  references: Mapping[str, float] = {}
  averaged: tuple[str, ...] = ()
  lr_scales: Mapping[str, float] = {}
  ema_schedule: Callable[[jax.Array], jax.Array] | None = None

  def __init__(self, cfg: Any, encoder: Any, pixels: Pixels):
    """cfg has `views` and `projector`; encoder: any module with Linen's init and apply that maps (images, train=) to an
    EncoderOutput, and with `rules`."""
    self.cfg, self.encoder, self.pixels, self.interpolation = cfg, encoder, pixels, cfg.views.interpolation
    self.projector = make_projector(cfg.projector)
    self.rules = {"encoder": encoder.rules, "projector": self.projector.rules}

  def init(self, key: jax.Array, batch: Tree) -> tuple[Tree, Tree]:
    keys_B = example_keys(stream(key, "views"), jnp.arange(len(batch["label"])))
    images = MultiView.views(self, keys_B, batch).groups[0][:, 0]  # a method may add to them
    out, encoder = self.encoder.init_with_output(stream(key, "encoder"), images, train=False)
    projector = self.projector.init(stream(key, "projector"), out.pooled_BxD, train=False)
    both = {"encoder": encoder, "projector": projector}
    params = {k: v["params"] for k, v in both.items()}
    return params, {k: v["batch_stats"] for k, v in both.items() if "batch_stats" in v}

  def views(self, keys_B: jax.Array, batch: Tree) -> Views:
    return multi_crop(keys_B, batch, self.cfg.views, self.pixels)

  def encode(self, params, state, target, views: Views, keys_B):
    """Returns (pooled_BxVxF, probe features of the global views), and the encoder's new state."""
    del target
    return self.encode_views(params, state, views, keys_B)

  def loss(self, params, state, target, encoded, key, progress):
    del target, key, progress
    pooled_BxVxF, probe_BxVxF = encoded
    z_BxVxD, new_state = self.project(params, state, pooled_BxVxF)
    loss, terms = self.embedding_loss(z_BxVxD)
    return loss, (Aux(terms, probe_BxVxF, pooled_BxVxF[:, 0], z_BxVxD), new_state)

  def embedding_loss(self, z_BxVxD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, terms) of the embeddings of the whole batch."""
    raise NotImplementedError

  def encode_views(self, params: Tree, state: Tree, views: Views, keys_B: jax.Array | None):
    """Runs the encoder in training, all sizes in one call where it `takes_several`: returns what `encode` does.

    An encoder that has a `drop_path` > 0 is given keys_B=, one key per image, besides train=True; without keys (of a
    teacher) nothing is dropped.
    """
    batch_stats, num_views = state.get("encoder", {}), [x.shape[1] for x in views.groups]
    flat = tuple(constrain(x.reshape(-1, *x.shape[2:]), "batch", None, None, None) for x in views.groups)
    keys, drops = None, bool(getattr(self.encoder, "drop_path", 0))
    if drops and keys_B is not None:
      keys = tuple(view_keys(keys_B, i, num).reshape(-1) for i, num in enumerate(num_views))

    def run(images, batch_stats, keys):
      variables = {"params": params["encoder"], "batch_stats": batch_stats}
      random = {} if keys is None else {"keys_B": keys}
      train = keys is not None or not drops  # statistics of the batch, but where they are not what train is about
      out, new = self.encoder.apply(variables, images, train=train, mutable=["batch_stats"], **random)
      return out, new.get("batch_stats", batch_stats)

    if getattr(self.encoder, "takes_several", False):
      outputs, batch_stats = run(flat, batch_stats, keys)
    else:
      outputs = []
      for i, images in enumerate(flat):
        out, batch_stats = run(images, batch_stats, keys and keys[i])
        outputs.append(out)
    by_view = lambda x, num: x.reshape(-1, num, x.shape[-1])
    pooled = [by_view(out.pooled_BxD, num) for out, num in zip(outputs, num_views, strict=True)]
    probe_BxVxF = by_view(outputs[0].probe_BxF, num_views[0])
    return (jnp.concatenate(pooled, axis=1), probe_BxVxF), with_averages(state, "encoder", batch_stats)

  def teach(self, target: Tree, state: Tree, views: Views, keys_B: jax.Array | None = None) -> jax.Array:
    """Returns the pooled features (B, V, F) of a teacher with these parameters, without a gradient.

    Its BatchNorm has the statistics of these views, and no average of them is kept.
    """
    return jax.lax.stop_gradient(self.encode_views(target, state, views, keys_B)[0][0])

  def project(self, params: Tree, state: Tree, pooled_BxVxF: jax.Array) -> tuple[jax.Array, Tree]:
    """Returns the embeddings z_BxVxD, normalised with the statistics of the whole batch, and the new state."""
    return apply_head("projector", self.projector, params, state, pooled_BxVxF)

  def draw(self, views: Views, batch: Tree):
    return Drawn(views_grid(batch, views, self.pixels, num_images=len(batch["canvas"])), views_titles(views))

  def networks(self):
    return {"image": Network(self.encoder.apply)}

  def variables(self, params, state, target):
    del target
    return {"image": vision_variables("encoder", params, state)}


def apply_head(name: str, head: Any, params: Tree, state: Tree, x: jax.Array) -> tuple[jax.Array, Tree]:
  """Returns what a head makes of x in training, with the statistics of the whole batch, and the new state."""
  variables = {"params": params[name], "batch_stats": state.get(name, {})}
  z, new = head.apply(variables, x, train=True, mutable=["batch_stats"])
  return z, with_averages(state, name, new.get("batch_stats", {}))


def check_views(views: MultiCropSettings, method: str, exactly: int = 0) -> None:
  """Raises a ValueError unless there are two views of an image or more, or `exactly` so many global ones."""
  if exactly and (views.global_crops.num != exactly or views.local_crops.num):
    raise ValueError(
      f"views has {views.global_crops.num} global and {views.local_crops.num} local crops, and {method} takes "
      f"{exactly} global views: global_crops.num={exactly}, and no local_crops"
    )
  if views.num_views < 2:
    raise ValueError(f"views has {views.num_views} view of each image: {method} compares two or more")


def with_averages(state: Tree, name: str, batch_stats: Tree) -> Tree:
  """Returns the state with the running averages of one network, which has no entry where it keeps none."""
  return state | ({name: batch_stats} if batch_stats else {})
