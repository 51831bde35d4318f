"""What methods share that learn from images and their captions: two towers, a projection of each, one view, some texts.

B batch, C captions drawn of an image, L tokens, F features of a tower, D width of an embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jepa_jax import losses
from jepa_jax.models import EncoderOutput, ProjectorConfig, TextConfig, make_projector
from jepa_jax.objectives.base import FROZEN_FEATURES, Aux, Network, Tree, vision_variables
from jepa_jax.objectives.multiview import MultiView, apply_head
from jepa_jax.sharding import Rule, constrain
from jepa_jax.streams import stream
from jepa_jax.views import MultiCropSettings, Pixels, Views, example_keys

if TYPE_CHECKING:
  from jepa_jax.data import CaptionConfig

TOWERS = {"image": ("encoder", "image_head"), "text": ("text", "text_head")}  # tower -> its networks


@dataclasses.dataclass(frozen=True)
class ImageTextConfig:
  """What these methods have in common; the image tower is config.encoder.

  Attributes:
    views: one global crop of each image.
    projector: of each tower, to embeddings of one width; the linear layer of CLIP is hidden=().
    text: the text tower.
    captions: how many of an image's captions a step sees, drawn anew each time.
    sigreg: weight lam of SIGReg, the mean over both towers, on their embeddings before they get unit length:
      (1 - lam) loss + lam SIGReg; 0 leaves it out.
    num_slices: SIGReg's directions.
    image_lr, text_lr: multiples of optim.lr for the encoder of each side; 0 freezes it (it is then started from another
      run or from weights: LiT, arXiv 2111.07991).
    features_once: a frozen image encoder sees every image once, before the first step, as evaluation does, and its
      features take the place of the views; without it the views are drawn and encoded in every step.
  """

  views: MultiCropSettings
  projector: ProjectorConfig
  text: TextConfig = TextConfig()
  captions: int = 1
  sigreg: float = 0.0
  num_slices: int = 256
  image_lr: float = 1.0
  text_lr: float = 1.0
  features_once: bool = False

  def __post_init__(self):
    if self.views.num_views != 1:
      raise ValueError(f"views has {self.views.num_views} views; a pair is one view and its text: global_crops.num=1")
    if self.captions < 1:
      raise ValueError(f"captions={self.captions} must be at least 1")
    if not 0 <= self.sigreg < 1:
      raise ValueError(f"sigreg={self.sigreg} lies in [0, 1): (1 - sigreg) loss + sigreg SIGReg; 0 leaves it out")
    if self.num_slices < 1:
      raise ValueError(f"num_slices={self.num_slices} must be at least 1")
    if min(self.image_lr, self.text_lr) < 0:
      raise ValueError(f"image_lr={self.image_lr} and text_lr={self.text_lr} are multiples of optim.lr: 0 or more")
    if self.features_once and self.image_lr:
      raise ValueError(
        f"features_once=True, and image_lr={self.image_lr} trains what makes them: image_lr=0 freezes it"
      )


class Pairs(NamedTuple):
  """What a step sees of the images: a view each, and the ids of C captions (B, C, L); of a frozen encoder that sees
  them once its features, by `FROZEN_FEATURES`."""

  images: Views
  ids_BxCxL: jax.Array
  frozen: Mapping[str, jax.Array] = {}


class ImageText(MultiView):
  """Views, towers and projections; a method adds `pair_loss`. See `objectives.base.Objective` for what is returned."""

  reads_captions = True

  def __init__(self, cfg: Any, encoder: Any, pixels: Pixels, captions: CaptionConfig):
    super().__init__(cfg, encoder, pixels)
    if cfg.captions > captions.per_image:
      raise ValueError(
        f"objective.captions={cfg.captions}, and data.captions.per_image={captions.per_image} keeps fewer: raise that, "
        "or draw fewer"
      )
    self.text = cfg.text.make(captions.vocab_size, captions.length)
    heads = {"image_head": self.projector, "text_head": make_projector(cfg.projector)}
    self.heads: Mapping[str, Any] = heads
    networks = {"encoder": encoder, "text": self.text, **heads}
    self.rules = {name: network.rules for name, network in networks.items()}
    self.rules |= {name: (Rule(""),) for name in self.scalars()}
    self.lr_scales = {"encoder": cfg.image_lr, "text": cfg.text_lr}
    self.references = {"sigreg": losses.EXPECTED_GAUSSIAN} if cfg.sigreg else {}
    self.reads_frozen_features = cfg.features_once

  def init(self, key: jax.Array, batch: Tree) -> tuple[Tree, Tree]:
    pairs = self.views(example_keys(stream(key, "views"), jnp.arange(len(batch["label"]))), batch)
    image, encoder = self.encoder.init_with_output(stream(key, "encoder"), pairs.images.groups[0][:, 0], train=False)
    text, variables = self.text.init_with_output(stream(key, "text"), pairs.ids_BxCxL[:, 0], train=False)
    made = {"encoder": encoder, "text": variables}
    for name, out in (("image_head", image), ("text_head", text)):
      made[name] = self.heads[name].init(stream(key, name), out.pooled_BxD, train=False)
    params = {name: own["params"] for name, own in made.items()}
    params |= {name: jnp.float32(number) for name, number in self.scalars().items()}
    return params, {name: own["batch_stats"] for name, own in made.items() if "batch_stats" in own}

  def scalars(self) -> dict[str, float]:
    """Returns the learned numbers of the loss as they begin; none of them decays."""
    return {}

  def views(self, keys_B: jax.Array, batch: Tree) -> Any:
    frozen = {name: batch[name] for name in FROZEN_FEATURES if name in batch}
    return Pairs(super().views(keys_B, batch), _drawn(keys_B, batch["caption"], self.cfg.captions), frozen)

  def encode(self, params, state, target, views: Any, keys_B):
    """Returns (image features (B, F), the probe's (B, 1, F), text features (B, C, F), share of full captions (B,))."""
    del target
    if views.frozen:
      pooled_BxVxF, probe_BxVxF = (views.frozen[name][:, None] for name in FROZEN_FEATURES)
      new_state = state
    else:
      (pooled_BxVxF, probe_BxVxF), new_state = self.encode_image(params, state, views.images, keys_B)
    num_captions, length = views.ids_BxCxL.shape[1:]
    ids = constrain(views.ids_BxCxL.reshape(-1, length), "batch", None)
    keys = None
    if self.cfg.text.drop_path:
      of_caption = lambda key: jax.vmap(lambda i: jax.random.fold_in(stream(key, "text"), i))(jnp.arange(num_captions))
      keys = jax.vmap(of_caption)(keys_B).reshape(-1)
    text = self.text.apply({"params": params["text"]}, ids, train=self.cfg.text_lr > 0, keys_B=keys)
    text_BxCxF = text.pooled_BxD.reshape(-1, num_captions, text.pooled_BxD.shape[-1])
    if not self.cfg.text_lr:
      text_BxCxF = jax.lax.stop_gradient(text_BxCxF)
    is_full_B = (views.ids_BxCxL[:, :, -1] >= 0).mean(1)
    return (pooled_BxVxF[:, 0], probe_BxVxF, text_BxCxF, is_full_B), new_state

  def encode_image(self, params, state, images: Views, keys_B):
    """Returns what `encode_views` does; of a frozen encoder with its running averages, and without a gradient."""
    if self.cfg.image_lr:
      return self.encode_views(params, state, images, keys_B)
    out = self.encoder.apply(vision_variables("encoder", params, state), images.groups[0][:, 0], train=False)
    return jax.lax.stop_gradient((out.pooled_BxD[:, None], out.probe_BxF[:, None])), state

  def loss(self, params, state, target, encoded, key, progress):
    del target, progress
    image_BxF, probe_BxVxF, text_BxCxF, is_full_B = encoded
    image_BxD, state = self.embed("image_head", params, state, image_BxF)
    text_BxCxD, state = self.embed("text_head", params, state, text_BxCxF)
    loss, terms = self.pair_loss(params, image_BxD, text_BxCxD)
    if lam := self.cfg.sigreg:
      directions_DxM = losses.slice_directions(key, image_BxD.shape[-1], self.cfg.num_slices)
      by_tower = [losses.sliced(z, directions_DxM) for z in (image_BxD, text_BxCxD.swapaxes(0, 1))]
      terms["sigreg"] = (by_tower[0] + by_tower[1]) / 2
      loss = (1 - lam) * loss + lam * terms["sigreg"]
    terms["full_captions"] = 100 * is_full_B.mean()  # as long as data.captions.length: cut there, or just fitting
    views_BxKxD = jnp.concatenate([image_BxD[:, None], text_BxCxD], axis=1)
    return loss, (Aux(terms, probe_BxVxF, image_BxF, views_BxKxD, {"text": text_BxCxF[:, 0]}), state)

  def pair_loss(
    self, params: Tree, image_BxD: jax.Array, text_BxCxD: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, terms) of the embeddings, of any length, of the whole batch."""
    raise NotImplementedError

  def embed(self, head: str, params: Tree, state: Tree, features: jax.Array, train: bool = True):
    """Returns the embeddings (..., D) of a tower's features, and the new state."""
    if train:
      return apply_head(head, self.heads[head], params, state, features)
    variables = {"params": params[head], "batch_stats": state.get(head, {})}
    return self.heads[head].apply(variables, features, train=False), state

  def draw(self, views: Any, batch: Tree):
    return super().draw(views.images, batch)

  def networks(self) -> Mapping[str, Network]:
    """ "image": the encoder; "image_embedding" and "text_embedding": what is compared, the second of all captions."""
    texts = Network(self._embed_captions, reads="caption")
    return {**super().networks(), "image_embedding": Network(self._embed_image), "text_embedding": texts}

  def variables(self, params, state, target):
    pick = lambda names: {name: vision_variables(name, params, state) for name in names}
    embeddings = {f"{tower}_embedding": pick(names) for tower, names in TOWERS.items()}
    return super().variables(params, state, target) | embeddings

  def _embed_image(self, variables: Tree, images: jax.Array, train: bool = False) -> EncoderOutput:
    del train
    pooled_BxF = self.encoder.apply(variables["encoder"], images, train=False).pooled_BxD
    return _as_output(self.heads["image_head"].apply(variables["image_head"], pooled_BxF, train=False))

  def _embed_captions(self, variables: Tree, ids_BxCxL: jax.Array, train: bool = False) -> EncoderOutput:
    """The embeddings of all captions of an image end to end, (B, C D); zero for those that it has not."""
    del train
    ids = ids_BxCxL.reshape(-1, ids_BxCxL.shape[-1])
    features = self.text.apply(variables["text"], ids, train=False).pooled_BxD
    z = self.heads["text_head"].apply(variables["text_head"], features, train=False)
    z = z * (ids[:, :1] >= 0)
    return _as_output(z.reshape(len(ids_BxCxL), -1))


def _as_output(z_BxD: jax.Array) -> EncoderOutput:
  return EncoderOutput(z_BxD, None, z_BxD)


def _drawn(keys_B: jax.Array, ids_BxPxL: jax.Array, num: int) -> jax.Array:
  """Returns `num` of each image's P captions in a random order, without repeats while it has so many."""
  num_B = (ids_BxPxL[:, :, 0] >= 0).sum(1)

  def of_image(key, ids_PxL, has):
    places = jnp.where(jnp.arange(len(ids_PxL)) < has, jax.random.uniform(stream(key, "captions"), (len(ids_PxL),)), 2)
    return ids_PxL[jnp.argsort(places)[jnp.arange(num) % jnp.maximum(has, 1)]]

  return jax.vmap(of_image)(keys_B, ids_BxPxL, num_B)


@jax.custom_vjp
def bounded(x: jax.Array, most: jax.Array | float) -> jax.Array:
  """Returns a learned number x, at most `most`: beyond it only a gradient that leads back is let through.

  What clamping after every step does, with a step that knows nothing of it; the momentum of an optimiser may carry x
  itself past the bound for a while, where it acts as if it were the bound.
  """
  return jnp.minimum(x, most)


def _bounded_forward(x, most):
  return jnp.minimum(x, most), x <= most


def _bounded_backward(inside, grad):
  return jnp.where(inside | (grad > 0), grad, 0), None  # a positive gradient makes x smaller


bounded.defvjp(_bounded_forward, _bounded_backward)
