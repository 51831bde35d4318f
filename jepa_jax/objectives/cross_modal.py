"""Image and text without negatives: each side's embedding is predicted from the other's, and SIGReg keeps both spread.

The idea of LeVLJEPA (arXiv 2607.00784, known here from its abstract): no temperature, no pairs of the batch compared,
no target network, no stop-gradient. B batch, C captions, D width of an embedding.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jepa_jax import losses
from jepa_jax.models import ProjectorConfig, make_projector
from jepa_jax.objectives.image_text import ImageText, ImageTextConfig
from jepa_jax.streams import stream
from jepa_jax.views import Pixels

if TYPE_CHECKING:
  from jepa_jax.data import CaptionConfig


@dataclasses.dataclass(frozen=True)
class CrossModalConfig(ImageTextConfig):
  """`predictor`: an MLP for each direction; its `out` is that of the projector. Without hidden layers there is none:
  the two embeddings themselves are to agree, as LeJEPA's views are. `sigreg` must be above 0: it is all that keeps
  the embeddings from collapsing.
  """

  name: Literal["cross_modal"] = "cross_modal"
  predictor: ProjectorConfig = ProjectorConfig(hidden=(), out=1)
  sigreg: float = 0.05

  def __post_init__(self):
    super().__post_init__()
    if not self.sigreg:
      raise ValueError("sigreg=0: without it every embedding becomes the same; give .02 to .1")
    if self.predictor.hidden and self.predictor.out != self.projector.out:
      raise ValueError(f"predictor.out={self.predictor.out} must be projector.out={self.projector.out}, its target")


class CrossModal(ImageText):
  """The objective of `CrossModalConfig`."""

  def __init__(self, cfg: CrossModalConfig, encoder: Any, pixels: Pixels, captions: CaptionConfig):
    super().__init__(cfg, encoder, pixels, captions)
    self.predictor = make_projector(cfg.predictor) if cfg.predictor.hidden else None
    if self.predictor:
      self.rules = {**self.rules, "to_text": self.predictor.rules, "to_image": self.predictor.rules}

  def init(self, key, batch):
    params, state = super().init(key, batch)
    if self.predictor:
      zeros = jnp.zeros((2, self.cfg.projector.out))
      for name in ("to_text", "to_image"):
        params[name] = self.predictor.init(stream(key, name), zeros, train=False)["params"]
    return params, state

  def pair_loss(self, params, image_BxD, text_BxCxD):
    def predict(name: str, z: jax.Array) -> jax.Array:
      if self.predictor is None:
        return z
      # With BatchNorm: the statistics of the batch, always; a predictor is not evaluated, so none are kept.
      return self.predictor.apply({"params": params[name]}, z, train=True, mutable=["batch_stats"])[0]

    to_text = jnp.square(predict("to_text", image_BxD)[:, None] - text_BxCxD).mean()
    to_image = jnp.square(predict("to_image", text_BxCxD) - image_BxD[:, None]).mean()
    terms = {"to_text": to_text, "to_image": to_image} | losses.pair_geometry(image_BxD, text_BxCxD)
    return (to_text + to_image) / 2, terms | losses.pair_recalls(image_BxD, text_BxCxD)


METHOD = (CrossModalConfig, CrossModal)
