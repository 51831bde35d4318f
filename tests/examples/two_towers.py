"""A throw-away method: an image tower and a tower of another kind, a learned temperature, a centre, a schedule.

What image-text methods, DINO and schedules of a loss need of the seam, in one file: see tests/test_one_file.py.
B batch, D width of an embedding, F encoder features.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jepa_jax.models import EncoderConfig, MLPConfig, ProjectorConfig, make_projector
from jepa_jax.objectives.base import Aux, Network, vision_variables
from jepa_jax.sharding import Rule
from jepa_jax.streams import stream
from jepa_jax.views import MultiCropSettings, Pixels, example_keys, multi_crop, views_grid

TOWERS = ("image", "other")


@dataclasses.dataclass(frozen=True)
class TwoTowersConfig:
  """`other` is the second tower; the centre moves by 1 - momentum; from `warm` (progress) on it is twice as sharp."""

  views: MultiCropSettings
  other: EncoderConfig = MLPConfig(image_size=16, widths=(16, 8))
  name: Literal["two_towers"] = "two_towers"
  width: int = 8
  momentum: float = 0.9
  warm: float = 0.5


class TwoTowers:
  """Which of the batch's images by one tower is this one by the other? At a learned temperature."""

  references = {"centre_norm": 0.0}
  averaged = ()
  lr_scales = {}
  ema_schedule = None

  def __init__(self, cfg: TwoTowersConfig, encoder: Any, pixels: Pixels):
    self.cfg, self.pixels, self.interpolation = cfg, pixels, cfg.views.interpolation
    self.towers = {"image": encoder, "other": cfg.other.make(pixels.channels)}
    self.head = make_projector(ProjectorConfig(hidden=(), out=cfg.width, norm="none"))
    self.rules = {name: tower.rules for name, tower in self.towers.items()}
    head = (Rule("kernel$", ("embed", "mlp"), decays=True), Rule("bias$"))
    self.rules |= {f"{name}_head": head for name in TOWERS} | {"logit_scale": (Rule(""),), "centre": (Rule(""),)}

  def init(self, key, batch):
    views = self.views(example_keys(stream(key, "views"), jnp.arange(len(batch["label"]))), batch)
    params: dict[str, Any] = {"logit_scale": jnp.float32(2.0)}
    for i, (name, tower) in enumerate(self.towers.items()):
      out, variables = tower.init_with_output(stream(key, name), views.groups[0][:, i])
      params[name] = variables["params"]
      params[f"{name}_head"] = self.head.init(stream(key, f"{name}_head"), out.pooled_BxD)["params"]
    return params, {"centre": jnp.zeros((self.cfg.width,))}

  def views(self, keys_B, batch):
    return multi_crop(keys_B, batch, self.cfg.views, self.pixels)

  def encode(self, params, state, target, views, keys_B):
    del target, keys_B
    outs = [
      tower.apply({"params": params[name]}, views.groups[0][:, i])
      for i, (name, tower) in enumerate(self.towers.items())
    ]
    return (tuple(out.pooled_BxD for out in outs), outs[0].probe_BxF), state

  def loss(self, params, state, target, encoded, key, progress):
    del target, key
    features, probe_BxF = encoded
    z_2xBxD = jnp.stack(
      [self.head.apply({"params": params[f"{n}_head"]}, x) for n, x in zip(TOWERS, features, strict=True)]
    )
    unit_2xBxD = z_2xBxD - state["centre"]
    unit_2xBxD = unit_2xBxD / (jnp.linalg.norm(unit_2xBxD, axis=-1, keepdims=True) + 1e-6)
    sharpness = jnp.exp(params["logit_scale"]) * jnp.where(progress < self.cfg.warm, 1.0, 2.0)
    logits_BxB = sharpness * jnp.matmul(unit_2xBxD[0], unit_2xBxD[1].T, precision="highest")
    own_B = jnp.diagonal(logits_BxB)
    loss = -(own_B - jax.nn.logsumexp(logits_BxB, axis=1)).mean()
    moved = self.cfg.momentum * state["centre"] + (1 - self.cfg.momentum) * z_2xBxD.mean((0, 1))
    metrics = {"sharpness": sharpness, "centre_norm": jnp.linalg.norm(moved)}
    aux = Aux(metrics, probe_BxF[:, None], features[0], unit_2xBxD.swapaxes(0, 1))
    return loss, (aux, {"centre": jax.lax.stop_gradient(moved)})

  def draw(self, views, batch):
    return views_grid(batch, views, self.pixels, len(batch["canvas"]))

  def networks(self):
    return {name: Network(tower.apply) for name, tower in self.towers.items()}

  def variables(self, params, state, target):
    del target
    return {name: vision_variables(name, params, state) for name in TOWERS}


METHOD = (TwoTowersConfig, TwoTowers)
