"""What networks are called in files: which layout it is, what stands before the names, and other spellings of them.

A layout has one spelling, that of its table in `weights.layouts`; what families, versions and wrappers call otherwise
is turned into it here, and what no encoder needs (heads, mask tokens) is left out by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

Tensors = dict[str, np.ndarray]

_WRAPPERS = ("module.", "_orig_mod.", "ijepa.")  # DistributedDataParallel, torch.compile, HF's model with a head
# An early layer of a network: what stands before it is the prefix of the whole.
_FIRST = {
  "patch_embed.proj.weight": "timm",
  "embeddings.patch_embeddings.projection.weight": "hf",
  "embeddings.patch_embeddings.weight": "dinov3",
  "layer1.0.conv1.weight": "resnet",
  "embedder.embedder.convolution.weight": "hf_resnet",
}
# Left out by name: heads of training and of classifiers, the token of masked patches, what is computed.
LEFT_OUT = (
  "head.*",
  "classifier.*",
  "pooler.*",
  "fc.*",
  "projection_head.*",
  "prototypes.*",
  "projector.*",
  "cva_module_proj.*",
  "mask_token",
  "embeddings.mask_token",
  "local_cls_norm.*",
  "rope_embed.*",
  "*.bias_mask",
  "*.num_batches_tracked",
  "decoder_*",  # MAE's
  "decoder.*",
)

# Other spellings -> the layout's, tried in this order.
_SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {
  "timm": (
    (r"^(register|storage)_tokens$", "reg_token"),  # DINOv2, DINOv3
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's training keeps blocks in chunks
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DINOv3 in timm
    (r"\.mlp\.w12\.", ".mlp.fc1."),  # DINOv2
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),  # timm's name of what DINOv3 calls w1
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
  ),
  "hf": (  # transformers 5 in memory; its files have the names of 4
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
  ),
  "dinov3": ((r"^model\.layer\.", "layer."),),
}
_SPELLINGS["dinov2"] = (
  *_SPELLINGS["hf"][:5],
  (r"\.mlp\.gate_proj\.", ".mlp.w1."),
  (r"\.mlp\.up_proj\.", ".mlp.w2."),
  (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
)
# What stands before, Hugging Face's module, and the name.
_OF_DECODER = re.compile(r"(|.*?\.)(decoder\.)?(decoder_(?:embed|pos_embed|blocks|layers|encoder|norm|pred)\b.*)")
_DECODER_BLOCK = (  # Hugging Face's names -> the originals
  (r"\.layernorm_before\.", ".norm1."),
  (r"\.layernorm_after\.", ".norm2."),
  (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
  (r"\.intermediate\.dense\.", ".mlp.fc1."),
  (r"\.output\.dense\.", ".mlp.fc2."),
)
# CLIP's and SigLIP's towers, and what the image tower has, and no other of transformers' vision models.
IMAGE_TOWER, TEXT_TOWER = "vision_model.", "text_model."
_OF_TOWER = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
_OF_TOWER += ("encoder.layers.0.layer_norm1.weight", "encoder.layers.0.self_attn.q_proj.weight")
_TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "head.")
# By layout, what has query, key and value: their biases may be missing.
_QKV = {
  "timm": (".attn.qkv",),
  "dinov3": tuple(f".attention.{n}_proj" for n in "qkv"),
  "hf": tuple(f".attention.attention.{n}" for n in ("query", "key", "value")),
}
_QKV["dinov2"] = _QKV["hf"]
# The two halves of a gated layer that a layout has as one.
_GATED = {"timm": "mlp.fc1", "dinov2": "mlp.weights_in"}


def unwrap(tensors: Tensors, where: str) -> Tensors:
  """Returns the tensors without the prefixes of wrappers, wherever only a part of the names has them."""
  for prefix in _WRAPPERS:
    bare = {key.removeprefix(prefix): x for key, x in tensors.items()}
    if len(bare) != len(tensors):
      raise ValueError(f"{where}: some names are there with and without the prefix {prefix!r}")
    tensors = bare
  return tensors


def take_decoders(items: Mapping[str, Tensors]) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
  """Returns the items without MAE's decoders, and the decoders under the names of Meta's predictor: {"decoder": it}, of
  several {"model_ema.decoder": ...}, by the item or prefix of each.

  The decoder adds no position to the class token; ValueError where a file's does.
  """
  found: dict[str, Tensors] = {}
  rest = {name: dict(tensors) for name, tensors in items.items()}
  for name, tensors in items.items():
    by_prefix: dict[str, Tensors] = {}
    for key, x in tensors.items():
      if match := _OF_DECODER.match(key):
        by_prefix.setdefault(match[1], {})[match[3]] = x
        del rest[name][key]
    for prefix, own in by_prefix.items():
      # Hugging Face's encoder has a mask token of its own, which masks nothing.
      token = next((key for key in (f"{prefix}decoder.mask_token", f"{prefix}mask_token") if key in tensors), None)
      own |= {"mask_token": rest[name].pop(token)} if token else {}
      of = prefix.rstrip(".") if len(by_prefix) > 1 else name
      found[f"{of}.decoder"] = _respelt_decoder(own, name)
  return rest, found if len(found) > 1 else dict(zip(("decoder",), found.values()))


def _respelt_decoder(tensors: Tensors, where: str) -> Tensors:
  # transformers 5 writes decoder_encoder.layer, 4 and the published files have decoder_layers.
  blocks = r"^decoder_(blocks|layers|encoder\.layer)\."
  spelling = [(blocks, "predictor_blocks."), (r"^decoder_pred\.", "predictor_proj.")]
  spelling += [(r"^decoder_", "predictor_"), *_SPELLINGS["hf"][1:4], *_DECODER_BLOCK]
  new = {}
  for key, x in tensors.items():
    for pattern, with_ in spelling:
      key = re.sub(pattern, with_, key)
    new[key] = x
  for key in [key for key in new if ".attention.attention.query." in key]:
    parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
    joined = np.concatenate([np.asarray(new.pop(part)) for part in parts if part in new])
    new[key.replace(".attention.attention.query.", ".attn.qkv.")] = joined
  pos = new.get("predictor_pos_embed")
  if pos is not None and pos.ndim == 3 and pos.shape[1] != (num := round(pos.shape[1] ** 0.5) ** 2):
    if np.asarray(pos[:, : pos.shape[1] - num], np.float32).any():
      raise ValueError(f"{where}: decoder_pos_embed has a position of the class token, which MAE's has not")
    new["predictor_pos_embed"] = pos[:, pos.shape[1] - num :]
  return new


def find_networks(items: Mapping[str, Tensors]) -> tuple[dict[str, Tensors], tuple[str, ...]]:
  """Returns the networks of the items without what stands before their names, at any depth ("model.student.backbone."),
  and what lies beside them ("projector.*").

  An item that holds several becomes as many, called by their prefixes; one in which none is found stays as it is.
  """
  found: dict[str, Tensors] = {}
  beside: dict[str, None] = {}
  for name, tensors in items.items():
    prefixes = sorted({key.removesuffix(end) for key in tensors for end in _FIRST if _ends(key, end)})
    if prefixes in ([], [""]):
      found[name] = tensors
      continue
    taken = set()
    for prefix in sorted(prefixes, key=len, reverse=True):
      own = {key for key in tensors if key.startswith(prefix) and key not in taken}
      called = name if len(prefixes) == 1 else prefix.rstrip(".") or name
      called = f"{name}.{called}" if called in found else called
      found[called] = {key.removeprefix(prefix): tensors[key] for key in own}
      taken |= own
    beside |= {f"{key.split('.')[0]}.*": None for key in sorted(tensors.keys() - taken)}
  return found, tuple(beside)


def _ends(key: str, end: str) -> bool:
  return key == end or key.endswith("." + end)


def below_tower(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
  """Returns the towers of CLIP or SigLIP, or the image tower alone, under the names of a CLIPModel, and the names of
  what else lies there; anything else as it is.

  Whatever stands before the names; transformers 5 writes CLIPVisionModel bare, 4 and WithProjection below vision_model.
  """
  first = _OF_TOWER[0]
  starts = [key.removesuffix(first) for key in tensors if _ends(key, first)]
  starts = [start for start in starts if all(start + key in tensors for key in _OF_TOWER)]
  if len(starts) != 1:
    return tensors, ()
  (start,) = starts
  stem = start.removesuffix(IMAGE_TOWER)
  pair = start != stem and any(key.startswith(stem + TEXT_TOWER) for key in tensors)
  below = lambda key: key.startswith(stem) if pair else key.startswith(tuple(start + part for part in _TOWER_PARTS))
  named = lambda key: key.removeprefix(stem) if pair else IMAGE_TOWER + key.removeprefix(start)
  return {named(key): x for key, x in tensors.items() if below(key)}, tuple(key for key in tensors if not below(key))


def layout_of(tensors: Tensors) -> str | None:
  """Returns the layout of one network by its names; None where it is none that is known.

  "meta" are timm's names without a class token, registers or layer scale: Meta's I-JEPA has no other.
  """
  towers = [any(key.startswith(tower) for key in tensors) for tower in (IMAGE_TOWER, TEXT_TOWER)]
  if all(towers) or all(IMAGE_TOWER + key in tensors for key in _OF_TOWER):
    return "clip"
  layout = next((layout for key, layout in _FIRST.items() if key in tensors), None)
  if layout == "hf" and any(re.match(r"(encoder\.layer|layers)\.0\.norm1\.", key) for key in tensors):
    return "dinov2"
  if layout != "timm":
    return layout
  more = ("cls_token", "reg_token", "register_tokens", "storage_tokens", "head.weight", "fc_norm.weight")
  plain = not any(key in tensors for key in (*more, "blocks.0.ls1.gamma")) and "pos_embed" in tensors
  return "meta" if plain else "timm"


def without_heads(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
  """Returns the tensors that an encoder has, and the patterns of the names of the others."""
  patterns = [p for p in LEFT_OUT if any(fnmatchcase(key, p) for key in tensors)]
  masked = {key: x * _mask_of(key, tensors) if f"{key}_mask" in tensors else x for key, x in tensors.items()}
  kept = {key: x for key, x in masked.items() if x.size and not any(fnmatchcase(key, p) for p in patterns)}
  return kept, tuple(patterns)


def respelt(layout: str, tensors: Tensors) -> Tensors:
  """Returns a network in its layout's spelling.

  Query, key and value have a bias each then: where a file has none it is 0, which is the same network.
  """
  if "pos_embed" in tensors and any(key.endswith((".gamma_1", ".attn.q_bias")) for key in tensors):
    raise ValueError("timm's Eva networks with both rotary and added positions (eva02, rope_ape) are not read")
  names = "timm" if layout == "meta" else layout
  new = {}
  for key, x in tensors.items():
    for pattern, with_ in _SPELLINGS.get(names, ()):
      key = re.sub(pattern, with_, key)
    new[key] = x
  if len(new) != len(tensors):
    raise ValueError(f"two names of the file mean the same in the layout {layout}: {sorted(tensors.keys() - new)[:3]}")
  if half := _GATED.get(names):
    _join_gates(new, half)
  _give_biases(new, _QKV.get(names, ()))
  return new


def _mask_of(key: str, tensors: Tensors) -> np.ndarray | int:
  """Returns what DINOv3 multiplies a bias with: 0 for the keys; a mask that was never filled (NaN) is none."""
  mask = tensors.get(key + "_mask")
  return 1 if mask is None or not np.isfinite(np.asarray(mask, np.float32)).all() else np.asarray(mask, np.float32)


def _join_gates(tensors: Tensors, name: str) -> None:
  for key in [key for key in tensors if ".mlp.w1." in key]:
    block, end = key.split(".mlp.w1.")
    if (other := f"{block}.mlp.w2.{end}") in tensors:
      tensors[f"{block}.{name}.{end}"] = np.concatenate([tensors.pop(key), tensors.pop(other)])


def _give_biases(tensors: Tensors, parts: tuple[str, ...]) -> None:
  """Adds the biases that a network has in no block, as 0, and joins those that timm keeps apart.

  Where some blocks have one, another that is missing is a fault of the file, and stays missing.
  """
  has = lambda end: any(key.endswith(end) for key in tensors)
  for part in (part for part in parts if not has(f"{part}.bias")):
    apart = [n for n in "qkv" if part == _QKV["timm"][0] and has(f".attn.{n}_bias")]
    for key in [key for key in tensors if key.endswith(f"{part}.weight")]:
      stem = key.removesuffix("weight")
      own = {n: f"{stem.removesuffix('qkv.')}{n}_bias" for n in "qkv"}
      if all(own[n] in tensors for n in apart):
        zeros = np.zeros(len(tensors[key]) // (3 if apart else 1), np.float32)
        joined = [tensors.pop(own[n]) if n in apart else zeros for n in ("qkv" if apart else "q")]
        tensors[f"{stem}bias"] = np.concatenate(joined)
