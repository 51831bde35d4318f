"""CLIP as OpenAI and open_clip have it: the names of transformers' CLIPModel for its arrays, and its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jepa_jax.weights.names import Tensors
from jepa_jax.weights.pixels import view_of

CONFIG, WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of OpenAI's, and most others
_NAMES = {
  "visual.class_embedding": "vision_model.embeddings.class_embedding",
  "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
  "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
  "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
  "positional_embedding": "text_model.embeddings.position_embedding.weight",
}
_NORMS = {
  "visual.ln_pre": "vision_model.pre_layrnorm",
  "visual.ln_post": "vision_model.post_layernorm",
  "ln_final": "text_model.final_layer_norm",
}
_NAMES |= {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in _NORMS.items() for leaf in ("weight", "bias")}
_TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_IN_BLOCK |= {"attn.out_proj": "self_attn.out_proj"}
_NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")  # of OpenAI's files


def is_open_clip(tensors: Tensors) -> bool:
  """Returns whether these are both towers under open_clip's names, the text tower's below "text." or not."""
  texts = ("transformer.resblocks.0.ln_1.weight", "text.transformer.resblocks.0.ln_1.weight")
  return "visual.conv1.weight" in tensors and any(key in tensors for key in texts)


def as_transformers(tensors: Tensors) -> Tensors:
  """Returns the arrays under the names of CLIPModel; an unknown name stays what it is, for others to refuse."""
  new: Tensors = {}
  for key, x in tensors.items():
    key = key.removeprefix("text.")
    if match := _BLOCK.fullmatch(key):
      block = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}."
      part, _, leaf = match[3].rpartition(".")
      if match[3].startswith("attn.in_proj_"):
        leaf = match[3].removeprefix("attn.in_proj_")
        new |= {f"{block}self_attn.{n}_proj.{leaf}": third for n, third in zip("qkv", np.split(x, 3), strict=True)}
      else:
        new[f"{block}{_IN_BLOCK.get(part, part)}.{leaf}"] = x
    elif key in _TURNED:
      new[_TURNED[key]] = x.T
    elif key not in _NO_WEIGHTS:
      new[_NAMES.get(key, key)] = x
  return new


def settings(document: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what open_clip_config.json says, as CLIPModel's config.json would; ValueError for other towers."""
  model, pixels = document.get("model_cfg", {}), document.get("preprocess_cfg", {})
  image, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
  foreign = [name for name in ("timm_model_name", "attentional_pool", "no_ln_pre") if image.get(name)]
  foreign += [name for name in ("hf_model_name", "no_causal_mask", "embed_cls") if text.get(name)]
  if foreign or isinstance(image.get("layers"), list) or text.get("pool_type", "argmax") != "argmax":
    raise ValueError(f"{CONFIG}: {foreign[0] if foreign else 'a tower'} is none of CLIP's own, and not read")
  common = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu", "layer_norm_eps": 1e-5}
  heads = image.get("width", 768) // image.get("head_width", 64)
  size, mode = pixels.get("size", image.get("image_size", 224)), pixels.get("resize_mode", "shortest")
  sides = size if isinstance(size, list) else [size, size]
  notes = [] if mode == "shortest" else [f"{CONFIG} has resize_mode={mode!r}; here the middle of an image is cut out"]
  return {
    "vision_config": common | {"num_attention_heads": heads},
    "text_config": common | {"num_attention_heads": text.get("heads", 8)},
    "data": {"mean": pixels.get("mean", _MEAN), "std": pixels.get("std", _STD)},
  } | view_of(sides, min(sides, key=str), pixels.get("interpolation", "bicubic"), notes)
