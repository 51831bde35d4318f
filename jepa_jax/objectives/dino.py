"""DINO (arXiv 2104.14294): a student's views, small ones too, say the same prototypes as a teacher's large views.

B batch, V views, G global views, F encoder features, D embedding width, P prototypes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jepa_jax import losses
from jepa_jax.choices import check_choices
from jepa_jax.losses.unit import unit
from jepa_jax.models import ProjectorConfig
from jepa_jax.objectives.base import Aux
from jepa_jax.objectives.multiview import MultiView, check_views
from jepa_jax.objectives.simclr import check_temperature
from jepa_jax.objectives.teacher import check_momenta, cosine_momentum
from jepa_jax.sharding import Rule
from jepa_jax.streams import stream
from jepa_jax.views import MultiCropSettings, Pixels, Views


@dataclasses.dataclass(frozen=True)
class DINOConfig:
  """Defaults are the official code's, for ViT-S and 100 epochs.

  Attributes:
    projector: to the bottleneck that is made unit length; activation="gelu", norm="none" in the paper.
    prototypes: P; each a direction, its length is fixed at 1.
    student_temperature, teacher_temperature: the teacher's at the start and after `warmup`, a share of the schedule.
    centre_momentum: of the average of the teacher's outputs that is taken from them.
    still: share of the schedule in which the prototypes keep their start, of the optimiser, too (one epoch of 100).
    ema: momentum at the first and after the last step, along a cosine.
  """

  views: MultiCropSettings
  projector: ProjectorConfig = ProjectorConfig(hidden=(2048, 2048), out=256, norm="none", activation="gelu")
  name: Literal["dino"] = "dino"
  prototypes: int = 65536
  student_temperature: float = 0.1
  teacher_temperature: tuple[float, float] = (0.04, 0.07)
  warmup: float = 0.3
  centre_momentum: float = 0.9
  still: float = 0.01
  ema: tuple[float, float] = (0.996, 1.0)
  compares_images: ClassVar[bool] = True

  def __post_init__(self):
    check_choices(self)
    check_momenta(self.ema)
    check_views(self.views, "DINO")
    check_temperature(self.student_temperature, "student_temperature")
    for temperature in self.teacher_temperature:
      check_temperature(temperature, "teacher_temperature")
    if self.prototypes < 2:
      raise ValueError(f"prototypes={self.prototypes} must be at least 2, such as 4096 or 65536")
    for name in ("warmup", "still", "centre_momentum"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name}={getattr(self, name)} lies in [0, 1]")


class DINO(MultiView):
  """The objective of `DINOConfig`. The teacher is evaluated, or, of encoders with BatchNorm, the student."""

  averaged = ("encoder", "projector", "prototypes")

  def __init__(self, cfg: DINOConfig, encoder: Any, pixels: Pixels):
    super().__init__(cfg, encoder, pixels)
    self.ema_schedule, self.still = cosine_momentum(cfg.ema), {"prototypes": cfg.still}
    self.rules = {**self.rules, "prototypes": (Rule("kernel", ("embed", "mlp"), decays=True),), "centre": (Rule(""),)}

  def init(self, key, batch):
    params, state = super().init(key, batch)
    shape = (self.cfg.projector.out, self.cfg.prototypes)
    # torch's start of a linear layer: the length means nothing, but how fast a step turns a direction goes by it.
    most = self.cfg.projector.out**-0.5
    kernel = jax.random.uniform(stream(key, "prototypes"), shape, minval=-most, maxval=most)
    params["prototypes"] = {"kernel": kernel}
    return params, state | {"centre": jnp.zeros(self.cfg.prototypes)}

  def encode(self, params, state, target, views: Views, keys_B):
    """Returns ((pooled_BxVxF, probe features), the teacher's pooled features of the global views) and the new state."""
    student, new_state = self.encode_views(params, state, views, keys_B)
    return (student, self.teach(target, state, Views(views.groups[:1], views.params[:1]))), new_state

  def loss(self, params, state, target, encoded, key, progress):
    del key
    cfg = self.cfg
    (pooled_BxVxF, probe_BxVxF), teacher_BxGxF = encoded
    z_BxVxD, new_state = self.project(params, state, pooled_BxVxF)
    teacher_BxGxD, _ = self.project(target, state, teacher_BxGxF)
    teacher_BxGxP = jax.lax.stop_gradient(logits(teacher_BxGxD, target["prototypes"]["kernel"]))
    first, last = cfg.teacher_temperature
    temperature = first + (last - first) * jnp.minimum(progress / max(cfg.warmup, 1e-9), 1)
    student_BxVxP = logits(z_BxVxD, params["prototypes"]["kernel"])
    loss, terms = losses.dino(student_BxVxP, teacher_BxGxP, state["centre"], cfg.student_temperature, temperature)
    new_state = new_state | {"centre": losses.dino_centre(state["centre"], teacher_BxGxP, cfg.centre_momentum)}
    terms |= {"teacher_temperature": temperature, "centre_norm": jnp.linalg.norm(state["centre"])}
    return loss, (Aux(terms, probe_BxVxF, pooled_BxVxF[:, 0], z_BxVxD), new_state)

  def variables(self, params, state, target):
    statistics = getattr(self.encoder, "uses_batch_statistics", False)
    return super().variables(params if statistics else target or params, state, target)


def logits(z_BxVxD: jax.Array, kernel_DxP: jax.Array) -> jax.Array:
  """Returns the cosines of embeddings and prototypes (B, V, P): both of unit length, whatever they are given as."""
  columns = kernel_DxP / jnp.maximum(jnp.linalg.norm(kernel_DxP, axis=0, keepdims=True), 1e-12)
  return unit(z_BxVxD)[0] @ columns


METHOD = (DINOConfig, DINO)
