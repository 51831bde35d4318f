"""Fine-tuning: the encoder and a linear head trained on labelled images, what MAE-like methods are read by.

Layers near the input move less: the rate of block i of L is layer_decay^(L + 1 - i) times the head's, as in MAE (arXiv
2111.06377). Legend: B images, L blocks, D features, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.tuning import Tunable, TuningData, tune
from jepa_jax.optim import layer_shares
from jepa_jax.streams import stream
from jepa_jax.views import CropSettings, MultiCropSettings, multi_crop

Tree = Any
_HEAD_STD = 0.01


@dataclasses.dataclass(frozen=True)
class FineTuning(Protocol):
  """The encoder and a linear head trained on labelled images, as MAE is read; how long is said by `evals.tuning`.

  Biases, scales and tokens do not decay.

  Attributes:
    layer_decay: of a ViT's blocks; 1, and every other encoder, trains all layers at the head's rate.
    scale, flip_p: of the crop that is drawn of a training image; (1, 1) and 0 show it as in evaluation.
    drop_path: of a ViT in fine-tuning, whatever it was in training.
    mixup: alpha of mixup (Zhang et al. 2017, arXiv 1710.09412): each batch is mixed with itself in reverse, images and
      labels alike, by one share drawn from Beta(alpha, alpha); 0 is off, .8 in DeiT and MAE.
  """

  layer_decay: float = 0.75
  scale: tuple[float, float] = (0.35, 1.0)
  flip_p: float = 0.5
  drop_path: float = 0.1
  mixup: float = 0.0

  needs: ClassVar[frozenset[str]] = frozenset({"encoder", "labels"})
  shares: ClassVar[tuple[str, ...]] = ("tuning",)

  def __post_init__(self):
    if not 0 < self.layer_decay <= 1:
      raise ValueError(f"layer_decay={self.layer_decay} lies in (0, 1]; 1 trains all layers alike")
    if not 0 <= self.drop_path < 1:
      raise ValueError(f"drop_path={self.drop_path} lies in [0, 1); 0 drops nothing")
    if self.mixup < 0:
      raise ValueError(f"mixup={self.mixup} is the alpha of Beta(alpha, alpha): 0 (off) or more")
    if not 0 <= self.flip_p <= 1 or len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
      raise ValueError(f"scale={self.scale} are shares of the area in (0, 1], and flip_p={self.flip_p} lies in [0, 1]")

  def run(self, subject: Subject) -> Iterator[Result]:
    data = TuningData.of(subject)
    if self.scale != (1.0, 1.0) or self.flip_p:
      data = dataclasses.replace(data, train_view_fn=self._crops(subject))
    networks = self.networks(subject, subject.variables("image"), data.seed)
    found = tune(networks, data, subject.settings.tuning, subject.mesh).summary()
    yield Result(subject.row, "fine-tuned", found["accuracy"][0], found)

  def _crops(self, subject: Subject):
    objective = subject.objective
    height_px, width_px = subject.data.view_hw
    crop = CropSettings(num=1, size_px=height_px, width_px=width_px, scale=self.scale)
    views = MultiCropSettings(crop, flip_p=self.flip_p, interpolation=objective.interpolation)
    return lambda batch, keys_B: multi_crop(keys_B, batch, views, objective.pixels).groups[0][:, 0]

  def networks(self, subject: Subject, variables: Tree, seed: int) -> Tunable:
    """Returns encoder and head to tune; BatchNorm of an encoder stays with its running averages."""
    encoder, rest = subject.objective.encoder, {k: v for k, v in variables.items() if k != "params"}
    drops = self.drop_path > 0 and hasattr(encoder, "drop_path")
    dropping = encoder.clone(drop_path=self.drop_path) if drops else encoder
    size_hw, channels = subject.data.view_hw, subject.objective.pixels.channels
    view = jax.ShapeDtypeStruct((1, *size_hw, channels), jnp.float32)
    width = jax.eval_shape(encoder.apply, variables, view).pooled_BxD.shape[-1]
    kernel = _HEAD_STD * jax.random.normal(stream(jax.random.key(seed), "heads"), (width, subject.data.num_classes))
    head = {"kernel": kernel, "bias": jnp.zeros(subject.data.num_classes)}

    def logits(trained, frozen, images, keys_B=None):
      whole = {"params": trained["encoder"], **frozen["rest"]}
      if keys_B is not None and drops:
        pooled_BxD = dropping.apply(whole, images, train=True, keys_B=keys_B).pooled_BxD
      else:
        pooled_BxD = encoder.apply(whole, images, train=False).pooled_BxD
      return pooled_BxD @ trained["head"]["kernel"] + trained["head"]["bias"]

    return Tunable(
      forward_fn=lambda trained, frozen, images, task: logits(trained, frozen, images),
      trained={"encoder": variables["params"], "head": head},
      frozen={"rest": rest},
      shares={"encoder": layer_shares(variables["params"], self.layer_decay), "head": 1.0},
      train_fn=lambda trained, frozen, images, task, keys_B: logits(trained, frozen, images, keys_B),
      mixup=self.mixup,
    )


PROTOCOL = FineTuning
