"""transformers' CLIPModel and SiglipModel <-> both our towers, their projections and the learned numbers of the loss.

What they have otherwise is the same network written in another way: CLIP's class token has a position, which goes into
the token; its patches have no bias, ours is zero; SigLIP's image tower has no projection, ours is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jepa_jax.config import Config
from jepa_jax.models import ViTConfig
from jepa_jax.weights.convert import Tensors, Tree, flatten, give, take, to_tree, unstack
from jepa_jax.weights.layouts import LAYOUTS, TEXT, encoder_entries, text_entries
from jepa_jax.weights.names import IMAGE_TOWER, TEXT_TOWER

TOWERS = (IMAGE_TOWER, TEXT_TOWER)
PAIR = "the image tower of CLIP or SigLIP"
_CLASS, _POSITION = "embeddings.class_embedding", "embeddings.position_embedding.weight"
_PATCH_BIAS = "embeddings.patch_embedding.bias"
_HEADS = {"image_head": "visual_projection.weight", "text_head": "text_projection.weight"}
_SIGLIP_HEAD = "head.weight"


def vision_from(tensors: Tensors, cfg: Config) -> Tree:
  """Returns the parameters of the image tower, for a method that has no text tower."""
  encoder = cfg.encoder
  if not isinstance(encoder, ViTConfig):
    raise ValueError(f"encoder name={encoder.name!r}: the image tower of these models is a ViT; set encoder.name='vit'")
  entries, vision = encoder_entries(encoder, "clip", cfg.data.channels), _ours_of_vision(_split(tensors)[0])
  flat = take(entries, vision, LAYOUTS["clip"], encoder.size.num_heads, "the image tower")
  flat["pos_embed"] = np.asarray(flat["pos_embed"], np.float32)
  return to_tree(flat, encoder.scan)


def pair_from(tensors: Tensors, cfg: Config) -> dict[str, Tree]:
  """Returns {"encoder", "text", "image_head", "text_head", "logit_scale", ...} of a method of images and captions.

  ValueError that lists every key which does not fit the config.
  """
  _, text, rest = _split(tensors)
  encoder, words, captions = cfg.encoder, cfg.objective.text, cfg.data.captions
  found: dict[str, Tree] = {"encoder": vision_from(tensors, cfg)}
  siglip = _SIGLIP_HEAD in text
  if siglip != ("logit_bias" in rest) or cfg.objective.name != ("siglip" if siglip else "clip"):
    kind = "SigLIP: set objective.name='siglip'" if siglip else "CLIP: set objective.name='clip'"
    raise ValueError(f"these are the weights of a {kind}, not of {cfg.objective.name}")
  if cfg.objective.projector.hidden:
    raise ValueError(
      f"objective.projector.hidden={cfg.objective.projector.hidden}: the projections of these are linear: ()"
    )
  heads = _heads(rest, text, cfg.objective.projector.out, encoder.size.width, words.width)
  size = words.size
  flat = take(text_entries(size, captions.vocab_size, captions.length), text, TEXT, size.num_heads, "the text tower")
  found["text"] = to_tree(flat, words.scan)
  found |= heads
  found["logit_scale"] = np.float32(np.asarray(rest["logit_scale"]).reshape(()))
  if siglip:
    found["logit_bias"] = np.float32(np.asarray(rest["logit_bias"]).reshape(()))
  return found


def check_exportable(cfg: Config) -> None:
  """Raises a ValueError for a run that is no CLIPModel or SiglipModel: another tower, method or projection."""
  encoder, objective = cfg.encoder, cfg.objective
  other = "use --layout jepa_jax, which holds the image tower"
  if not isinstance(encoder, ViTConfig):
    raise ValueError(f"encoder name={encoder.name!r}: the image tower of these models is a ViT; {other}")
  if objective.name not in _MODELS:
    raise ValueError(f"objective {objective.name!r} is neither CLIP nor SigLIP; {other}")
  model, image, words = _MODELS[objective.name]
  groups = {"encoder": (encoder, image), "objective.text": (objective.text, words)}
  groups["objective.projector"] = objective.projector, {"hidden": (), "last_norm": "none"}
  for group, (own, wanted) in groups.items():
    for name, value in wanted.items():
      if getattr(own, name) != value:
        raise ValueError(f"{group}.{name}={getattr(own, name)!r}, and a {model} has {value!r}; {other}")


# Method -> transformers' model, and what its towers have.
_MODELS = {
  "clip": ("CLIPModel", {"cls_token": True, "pool": "cls", "norm_embeddings": True}, {"pool": "eos"}),
  "siglip": ("SiglipModel", {"cls_token": False, "pool": "map", "norm_embeddings": False}, {"pool": "last"}),
}


def check_text(tensors: Tensors, config: Mapping[str, Any], cfg: Config) -> None:
  """Raises a ValueError where the config's text tower is another than that of config.json, though the shapes fit."""
  if "objective.text" not in (about := describe_pair(tensors, config)):
    raise ValueError(
      f"the checkpoint holds an image tower and no text tower, which objective.name={cfg.objective.name!r} has: give "
      "the whole model, or start the image tower from it, train --init-from=weights:FILE"
    )
  told, own = about["objective.text"], cfg.objective.text
  sizes = {"num_heads": own.size.num_heads, "activation": own.activation, "norm_epsilon": own.norm_epsilon}
  for name, value in (sizes | {"pool": own.pool}).items():
    if told[name] != value:
      raise ValueError(f"objective.text.{name}: the checkpoint has {told[name]}, the config {value}")


def pair_to(params: Mapping[str, Tree], cfg: Config) -> dict[str, np.ndarray]:
  """Returns the tensors of transformers' model, float32: the inverse of `pair_from`.

  What CLIPModel's projections have no place for, their biases, goes into the norm before them. ValueError where that
  cannot be, and where SiglipModel has no projection that ours has learned.
  """
  encoder, words, captions = cfg.encoder, cfg.objective.text, cfg.data.captions
  siglip, tensors = cfg.objective.name == "siglip", {}
  vision = give(
    encoder_entries(encoder, "clip", cfg.data.channels), unstack(flatten(params["encoder"])), encoder.size.num_heads
  )
  tensors |= {TOWERS[0] + key: x for key, x in _theirs_of_vision(vision, siglip).items()}
  size = words.size
  text = give(
    text_entries(size, captions.vocab_size, captions.length), unstack(flatten(params["text"])), size.num_heads
  )
  tensors |= {TOWERS[1] + key: x for key, x in text.items()}
  kernel, bias = (np.asarray(params["image_head"]["layers_0"][leaf], np.float32) for leaf in ("kernel", "bias"))
  text_kernel, text_bias = (
    np.asarray(params["text_head"]["layers_0"][leaf], np.float32) for leaf in ("kernel", "bias")
  )
  if siglip:
    if kernel.shape[0] != kernel.shape[1] or np.abs(kernel - np.eye(len(kernel))).max() > 0 or np.abs(bias).max() > 0:
      raise ValueError("SiglipModel has no projection of the image tower, and this run has learned one: export clip")
    tensors |= {f"{TOWERS[1]}head.weight": text_kernel.T.copy(), f"{TOWERS[1]}head.bias": text_bias}
    tensors["logit_bias"] = np.asarray(params["logit_bias"], np.float32).reshape(1)
    tensors["logit_scale"] = np.asarray(params["logit_scale"], np.float32).reshape(1)
    return tensors
  for key, own, x in ((_LAST_NORMS[0], kernel, bias), (_LAST_NORMS[1], text_kernel, text_bias)):
    tensors[key] = tensors[key] + _before(own, x)
  tensors |= {_HEADS["image_head"]: kernel.T.copy(), _HEADS["text_head"]: text_kernel.T.copy()}
  return tensors | {"logit_scale": np.asarray(params["logit_scale"], np.float32)}


# Whose bias is added to what the projections read.
_LAST_NORMS = ("vision_model.post_layernorm.bias", "text_model.final_layer_norm.bias")


def _before(kernel_FxD: np.ndarray, bias_D: np.ndarray) -> np.ndarray:
  """Returns what added before a linear layer is its bias after it; ValueError where nothing is."""
  added_F = np.linalg.lstsq(kernel_FxD.T.astype(np.float64), bias_D.astype(np.float64), rcond=None)[0]
  if np.abs(added_F @ kernel_FxD - bias_D).max() > 1e-5 * max(np.abs(bias_D).max(), 1e-30):
    raise ValueError(
      f"CLIPModel's projections have no bias, and this run's, of {kernel_FxD.shape[0]} features to "
      f"{kernel_FxD.shape[1]}, cannot be written in another way: use --layout jepa_jax"
    )
  return added_F.astype(np.float32)


def pair_config(cfg: Config, end: int) -> dict[str, Any]:
  """Returns config.json of transformers' CLIPModel or SiglipModel; end: the id that ends every text.

  ValueError for CLIP and an end of 2: transformers then takes the largest id of a text for its end.
  """
  if end == 2 and cfg.objective.name == "clip":
    raise ValueError(
      "the tokenizer's end has the id 2, for which transformers' CLIPModel takes the largest id instead: such a "
      "run cannot be written for it; use --layout jepa_jax"
    )
  encoder, words, captions = cfg.encoder, cfg.objective.text, cfg.data.captions
  siglip = cfg.objective.name == "siglip"
  kind, theirs = "siglip" if siglip else "clip", {ours: name for name, ours in _ACTIVATIONS.items()}
  sizes = lambda size, own: {
    "hidden_size": size.width,
    "intermediate_size": size.mlp_dim,
    "num_hidden_layers": size.depth,
    "num_attention_heads": size.num_heads,
    "hidden_act": theirs.get(own.activation, own.activation),
    "layer_norm_eps": own.norm_epsilon,
  }
  out = cfg.objective.projector.out
  vision = {"image_size": encoder.image_size, "patch_size": encoder.patch_size, "num_channels": cfg.data.channels}
  text = {"vocab_size": captions.vocab_size, "max_position_embeddings": captions.length, "eos_token_id": end}
  return {
    "architectures": ["SiglipModel" if siglip else "CLIPModel"],
    "model_type": kind,
    "vision_config": {"model_type": f"{kind}_vision_model"} | sizes(encoder.size, encoder) | vision,
    "text_config": {"model_type": f"{kind}_text_model"} | sizes(words.size, words) | text | {"projection_size": out},
    "projection_dim": out,
    "dtype": "float32",
  }


def channels_of(tensors: Tensors) -> int:
  """Returns how many channels the image tower reads."""
  return tensors[f"{IMAGE_TOWER}embeddings.patch_embedding.weight"].shape[1]


def describe_pair(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of ours that such weights fit, by group; heads, activation and epsilon as config.json says.

  Of an image tower alone "family", "encoder" and "assumed".
  """
  vision, text, rest = _split(tensors)
  siglip = _SIGLIP_HEAD in text if text else _CLASS not in vision
  alone = config if not text and "model_type" in config else {}  # where the settings are those of the one tower
  found = _describe_vision(vision, siglip, config.get("vision_config") or alone)
  if not text:
    return {"family": f"the image tower of {'SigLIP' if siglip else 'CLIP'}"} | found
  vocab_size, text_width = text["embeddings.token_embedding.weight"].shape
  out = len(rest[_HEADS["image_head"]]) if not siglip else len(text[_SIGLIP_HEAD])
  words = _sizes(text, text_width, siglip, config.get("text_config") or {}) | {"pool": "last" if siglip else "eos"}
  return {
    "encoder": found["encoder"],
    "objective": {"name": "siglip" if siglip else "clip", "projector": {"hidden": (), "out": out, "norm": "none"}},
    "objective.text": words,
    "data.captions": {"vocab_size": vocab_size, "length": len(text[_POSITION])},
    "assumed": found["assumed"],
  }


def _describe_vision(vision: Tensors, siglip: bool, told: Mapping[str, Any]) -> dict[str, Any]:
  kernel, cls_token = vision["embeddings.patch_embedding.weight"], _CLASS in vision
  if kernel.ndim != 4:
    raise ValueError(
      f"the patches of the image tower are made by a layer of shape {kernel.shape}, no convolution: SigLIP 2's towers "
      "for any aspect ratio (naflex) are not read"
    )
  width, _, patch, _ = kernel.shape
  side = round((len(vision[_POSITION]) - cls_token) ** 0.5)
  encoder = {"name": "vit", "image_size": side * patch, "patch_size": patch} | _sizes(vision, width, siglip, told)
  encoder["pos_filter"] = "torch"  # transformers' interpolate_pos_encoding
  if cls_token:
    encoder |= {"cls_token": True, "pool": "cls", "norm_embeddings": True}
  elif "head.probe" in vision:  # else vision_use_head=False: the mean of the tokens
    encoder |= {"pool": "map"}
  assumed = [] if told else ["heads of 64 numbers, activation and epsilon: no array shows them"]
  if assumed and not siglip:
    assumed.append("activation=quick_gelu, OpenAI's; others that open_clip trained have gelu, in both towers")
  return {"encoder": encoder, "assumed": assumed}


def _sizes(tower: Tensors, width: int, siglip: bool, told: Mapping[str, Any]) -> dict[str, Any]:
  told = _DEFAULTS[siglip] | dict(told)
  return {
    "width": width,
    "depth": len({key.split(".")[2] for key in tower if key.startswith("encoder.layers.")}),
    "num_heads": told.get("num_attention_heads") or max(width // 64, 1),
    "mlp_dim": len(tower["encoder.layers.0.mlp.fc1.bias"]),
    "activation": _ACTIVATIONS.get(told["hidden_act"], told["hidden_act"]),
    "norm_epsilon": told["layer_norm_eps"],
  }


# config.json leaves out what is the library's default.
_DEFAULTS = {
  False: {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
  True: {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh"}


def _split(tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
  below = lambda tower: {key[len(tower) :]: x for key, x in tensors.items() if key.startswith(tower)}
  rest = {key: x for key, x in tensors.items() if not key.startswith(TOWERS)}
  drop = lambda tower: {key: x for key, x in tower.items() if not key.endswith("position_ids")}  # of older versions
  return drop(below(TOWERS[0])), drop(below(TOWERS[1])), rest


def _heads(rest: dict, text: dict, out: int, image_width: int, text_width: int) -> dict[str, Tree]:
  """Returns our projections, and takes SigLIP's out of the text tower."""
  if _SIGLIP_HEAD in text:
    kernels = {"image_head": np.eye(image_width, dtype=np.float32), "text_head": np.asarray(text.pop(_SIGLIP_HEAD)).T}
    biases = {"image_head": np.zeros(image_width, np.float32), "text_head": np.asarray(text.pop("head.bias"))}
  else:
    if lacking := [key for key in (*_HEADS.values(), "logit_scale") if key not in rest]:
      raise ValueError(f"missing in the checkpoint: {', '.join(lacking)}; it is no whole CLIPModel")
    kernels = {name: np.asarray(rest[key]).T for name, key in _HEADS.items()}
    biases = {name: np.zeros(kernel.shape[1], np.float32) for name, kernel in kernels.items()}
  for name, kernel in kernels.items():
    width = image_width if name == "image_head" else text_width
    if kernel.shape != (width, out):
      raise ValueError(f"{name}: {kernel.shape} in the checkpoint, {(width, out)} wanted; set objective.projector.out")
  return {
    name: {
      "layers_0": {"kernel": np.ascontiguousarray(kernel, np.float32), "bias": np.asarray(biases[name], np.float32)}
    }
    for name, kernel in kernels.items()
  }


def _ours_of_vision(vision: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the image tower's tensors as `layouts` has them: no position of the class token, a bias of patches."""
  vision = {key: np.asarray(x) for key, x in vision.items()}
  if _CLASS in vision:
    position = vision[_POSITION].astype(np.float32)
    vision[_CLASS] = (vision[_CLASS].astype(np.float32) + position[0])[None, None]
    vision[_POSITION] = position[1:]
  vision[_POSITION] = vision[_POSITION][None]
  kernel = vision.get("embeddings.patch_embedding.weight")
  if kernel is not None:
    vision.setdefault(_PATCH_BIAS, np.zeros(len(kernel), np.float32))
  for leaf in ("weight", "bias"):
    if (joined := vision.pop(f"head.attention.in_proj_{leaf}", None)) is not None:
      third = len(joined) // 3
      vision |= {f"head.attention.q.{leaf}": joined[:third], f"head.attention.kv.{leaf}": joined[third:]}
  return vision


def _theirs_of_vision(vision: dict[str, np.ndarray], siglip: bool) -> dict[str, np.ndarray]:
  """The inverse of `_ours_of_vision`: the class token keeps all, its position is zero."""
  vision = dict(vision)
  position = vision[_POSITION][0]
  if _CLASS in vision:
    vision[_CLASS] = vision[_CLASS].reshape(-1)
    position = np.concatenate([np.zeros_like(position[:1]), position])
  vision[_POSITION] = position
  if not siglip and np.abs(vision[_PATCH_BIAS]).max() > 0:
    # x + bias at every patch: the positions of the patches take it.
    vision[_POSITION] = vision[_POSITION] + np.concatenate(
      [[np.zeros_like(vision[_PATCH_BIAS])], np.tile(vision[_PATCH_BIAS], (len(position) - 1, 1))]
    )
  if not siglip:
    del vision[_PATCH_BIAS]
  for leaf in ("weight", "bias"):
    if f"head.attention.q.{leaf}" in vision:
      parts = [vision.pop(f"head.attention.{part}.{leaf}") for part in ("q", "kv")]
      vision[f"head.attention.in_proj_{leaf}"] = np.concatenate(parts)
  return vision
