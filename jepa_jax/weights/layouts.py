"""What the same weights are called in other people's checkpoints, and how an array of theirs becomes one of ours.

One table per layout. `Entry.ours` names blocks one by one ("blocks_3/norm1/scale"), whether or not ours are stacked.
Legend: D width in, E width out, H heads, K head width, C channels, p patch, N patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jepa_jax.models import ViTConfig
from jepa_jax.models.vit import ViTSize

Shape = tuple[int, ...]
Turn = Callable[[np.ndarray, int], np.ndarray]  # (array, heads) -> array

# name -> (theirs to ours, ours to theirs). A torch Linear holds (E, D), ours (D, E), with an axis of its own for heads.
TURNS: dict[str, tuple[Turn, Turn]] = {
  "as is": (lambda x, heads: x, lambda x, heads: x),
  "linear": (lambda x, heads: x.T, lambda x, heads: x.T),
  "convolution": (lambda x, heads: x.transpose(2, 3, 1, 0), lambda x, heads: x.transpose(3, 2, 0, 1)),
  "qkv": (lambda x, heads: x.T.reshape(x.shape[1], 3, heads, -1), lambda x, heads: x.reshape(len(x), -1).T),
  "qkv bias": (lambda x, heads: x.reshape(3, heads, -1), lambda x, heads: x.reshape(-1)),
  "vector": (lambda x, heads: x.reshape(-1), lambda x, heads: x.reshape(1, 1, -1)),
  "heads out": (lambda x, heads: x.T.reshape(x.shape[1], heads, -1), lambda x, heads: x.reshape(len(x), -1).T),
  "heads of bias": (lambda x, heads: x.reshape(heads, -1), lambda x, heads: x.reshape(-1)),
  "kv": (lambda x, heads: x.T.reshape(x.shape[1], 2, heads, -1), lambda x, heads: x.reshape(len(x), -1).T),
  "kv bias": (lambda x, heads: x.reshape(2, heads, -1), lambda x, heads: x.reshape(-1)),
  "gate": (lambda x, heads: x.T.reshape(x.shape[1], 2, -1), lambda x, heads: x.reshape(len(x), -1).T),
  "gate bias": (lambda x, heads: x.reshape(2, -1), lambda x, heads: x.reshape(-1)),
  "heads": (lambda x, heads: x.T.reshape(heads, -1, len(x)), lambda x, heads: x.reshape(-1, x.shape[-1]).T),
}
# To ours these are x.T, in another shape.
TRANSPOSED = ("linear", "qkv", "heads out", "kv", "gate", "heads")


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of one kind of checkpoint: our stem -> theirs, within a block and outside.

  Several names are the parts of one array along axis 0: query, key, value. `gated` are the names in a block whose MLP
  is gated, `scales` those of layer scale, whole.
  """

  outside: Mapping[str, str]
  block: str  # prefix of block {}
  inside: Mapping[str, str | tuple[str, ...]]
  gated: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
  scales: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
  """An array of ours, the keys of its parts in a layout, the shape of each part and the name of the turn."""

  ours: str
  theirs: tuple[str, ...]
  shape: Shape
  turn: str


_PLAIN_BLOCK = {
  "norm1": "norm1",
  "attn/qkv": "attn.qkv",
  "attn/proj": "attn.proj",
  "norm2": "norm2",
  "mlp/fc1": "mlp.fc1",
  "mlp/fc2": "mlp.fc2",
}
_HF_BLOCK = {
  "norm1": "layernorm_before",
  "attn/qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
  "attn/proj": "attention.output.dense",
  "norm2": "layernorm_after",
  "mlp/fc1": "intermediate.dense",
  "mlp/fc2": "output.dense",
}
_DINOV2_BLOCK = _HF_BLOCK | {"norm1": "norm1", "norm2": "norm2", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_DINOV3_BLOCK = _DINOV2_BLOCK | {
  "attn/qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
  "attn/proj": "attention.o_proj",
  "mlp/fc1": "mlp.up_proj",
  "mlp/fc2": "mlp.down_proj",
}
_LAMBDAS = {"ls1": "layer_scale1.lambda1", "ls2": "layer_scale2.lambda1"}
_PLAIN = {"patch_embed": "patch_embed.proj", "pos_embed": "pos_embed", "norm": "norm"}
_HF = {
  "patch_embed": "embeddings.patch_embeddings.projection",
  "pos_embed": "embeddings.position_embeddings",
  "norm": "layernorm",
  "cls_token": "embeddings.cls_token",
}
_DINOV2 = _HF | {"registers": "embeddings.register_tokens"}
# transformers' CLIPModel and SiglipModel: each tower below a prefix that `weights.pairs` takes off.
_CLIP_BLOCK = {
  "norm1": "layer_norm1",
  "attn/qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  "attn/proj": "self_attn.out_proj",
  "norm2": "layer_norm2",
  "mlp/fc1": "mlp.fc1",
  "mlp/fc2": "mlp.fc2",
}
_CLIP = {
  "patch_embed": "embeddings.patch_embedding",
  "pos_embed": "embeddings.position_embedding.weight",
  "cls_token": "embeddings.class_embedding",
  "norm_embed": "pre_layrnorm",  # spelt so there
  "norm": "post_layernorm",
}
TEXT = Layout(
  {
    "token_embed": "embeddings.token_embedding.weight",
    "pos_embed": "embeddings.position_embedding.weight",
    "norm": "final_layer_norm",
  },
  "encoder.layers.{}.",
  _CLIP_BLOCK,
)
LAYOUTS: dict[str, Layout] = {
  "clip": Layout(_CLIP, "encoder.layers.{}.", _CLIP_BLOCK),
  "meta": Layout(_PLAIN, "blocks.{}.", _PLAIN_BLOCK),
  "timm": Layout(
    _PLAIN | {"cls_token": "cls_token", "registers": "reg_token"},
    "blocks.{}.",
    _PLAIN_BLOCK,
    gated={"mlp/gate": "mlp.fc1", "mlp/fc2": "mlp.fc2"},
    scales={"ls1": "ls1.gamma", "ls2": "ls2.gamma"},
  ),
  # Names in files: transformers 5 has others in memory, which `weights.names` turns into these.
  "hf": Layout(_HF, "encoder.layer.{}.", _HF_BLOCK),
  "dinov2": Layout(
    _DINOV2,
    "encoder.layer.{}.",
    _DINOV2_BLOCK,
    gated={"mlp/gate": "mlp.weights_in", "mlp/fc2": "mlp.weights_out"},
    scales=_LAMBDAS,
  ),
  "dinov3": Layout(
    {name: key for name, key in _DINOV2.items() if name != "pos_embed"}
    | {"patch_embed": "embeddings.patch_embeddings", "norm": "norm"},
    "layer.{}.",
    _DINOV3_BLOCK,
    gated={"mlp/gate": ("mlp.gate_proj", "mlp.up_proj"), "mlp/fc2": "mlp.down_proj"},
    scales=_LAMBDAS,
  ),
}
PREDICTOR = Layout(
  {
    "embed": "predictor_embed",
    "mask_token": "mask_token",
    "pos_embed": "predictor_pos_embed",
    "norm": "predictor_norm",
    "proj": "predictor_proj",
  },
  "predictor_blocks.{}.",
  _PLAIN_BLOCK,
)


def encoder_entries(cfg: ViTConfig, layout: str, channels: int) -> list[Entry]:
  """Returns the entries of a ViT in a layout, position embedding included; ValueError where the layout has no place."""
  names, size, grid = LAYOUTS[layout], cfg.size, cfg.image_size // cfg.patch_size
  tokens = {"cls_token": int(cfg.cls_token), "registers": cfg.num_registers}
  lacking = {name: f"{name}: set cls_token=False and num_registers=0" for name, n in tokens.items() if n}
  lacking |= {"pos_embed": "positions that are added: set pos_embed='rope'"} if cfg.pos_embed != "rope" else {}
  lacking = [what for name, what in lacking.items() if name not in names.outside]
  if cfg.layer_scale and not names.scales:
    lacking.append("layer_scale: set layer_scale=0")
  if cfg.activation == "swiglu" and not names.gated:
    lacking.append("activation='swiglu'")
  if lacking:
    raise ValueError(f"the {layout} layout has no place for {lacking[0]}, or use the layout timm or jepa_jax")
  entries = _linear("patch_embed", names.outside["patch_embed"], (size.width, channels, cfg.patch_size, cfg.patch_size))
  entries += [
    Entry(name, (names.outside[name],), (1, count, size.width), "as is") for name, count in tokens.items() if count
  ]
  if cfg.pos_embed != "rope":
    entries.append(Entry("pos_embed", (names.outside["pos_embed"],), (1, grid**2, size.width), "as is"))
  entries += _extras(cfg, layout)
  entries += _blocks(names, size, cfg.activation == "swiglu", bool(cfg.layer_scale))
  return entries + _norm("norm", "fc_norm" if cfg.norm_after_pool else names.outside["norm"], size.width)


def _extras(cfg: ViTConfig, layout: str) -> list[Entry]:
  """Returns the entries of what only some ViTs have; ValueError where the layout has no place for it."""
  names, size = LAYOUTS[layout], cfg.size
  if layout != "clip" and (cfg.norm_embeddings or cfg.pool == "map"):
    what = "norm_embeddings" if cfg.norm_embeddings else "pool='map'"
    raise ValueError(f"the {layout} layout has no place for {what}; use the layout jepa_jax")
  if cfg.norm_after_pool and layout not in ("timm", "meta"):
    raise ValueError(f"the {layout} layout has no place for norm_after_pool; use the layout timm or jepa_jax")
  entries = _norm("norm_embed", names.outside["norm_embed"], size.width) if cfg.norm_embeddings else []
  if cfg.pool != "map":
    return entries
  width = size.width
  return [
    *entries,
    Entry("pool/query", ("head.probe",), (1, 1, width), "vector"),
    # One array there for query, key and value: `weights.pairs` cuts it.
    Entry("pool/attn/q/kernel", ("head.attention.q.weight",), (width, width), "heads out"),
    Entry("pool/attn/q/bias", ("head.attention.q.bias",), (width,), "heads of bias"),
    Entry("pool/attn/kv/kernel", ("head.attention.kv.weight",), (2 * width, width), "kv"),
    Entry("pool/attn/kv/bias", ("head.attention.kv.bias",), (2 * width,), "kv bias"),
    *_linear("pool/attn/proj", "head.attention.out_proj", (width, width), "heads"),
    *_norm("pool/norm", "head.layernorm", width),
    *_linear("pool/mlp/fc1", "head.mlp.fc1", (size.mlp_dim, width)),
    *_linear("pool/mlp/fc2", "head.mlp.fc2", (width, size.mlp_dim)),
  ]


def text_entries(size: ViTSize, vocab_size: int, length: int) -> list[Entry]:
  """Returns the entries of a text tower in the layout `TEXT`."""
  outside = TEXT.outside
  return [
    Entry("token_embed", (outside["token_embed"],), (vocab_size, size.width), "as is"),
    Entry("pos_embed", (outside["pos_embed"],), (length, size.width), "as is"),
    *_blocks(TEXT, size),
    *_norm("norm", outside["norm"], size.width),
  ]


def predictor_entries(size: ViTSize, encoder_width: int, num_patches: int, out: int = 0) -> list[Entry]:
  """Returns the entries of a predictor of this size in Meta's layout, position embedding included.

  out: width of what it predicts; 0: the encoder's. MAE's decoder predicts the numbers of a patch.
  """
  outside = PREDICTOR.outside
  return [
    *_linear("embed", outside["embed"], (size.width, encoder_width)),
    Entry("mask_token", (outside["mask_token"],), (1, 1, size.width), "as is"),
    Entry("pos_embed", (outside["pos_embed"],), (1, num_patches, size.width), "as is"),
    *_blocks(PREDICTOR, size),
    *_norm("norm", outside["norm"], size.width),
    *_linear("proj", outside["proj"], (out or encoder_width, size.width)),
  ]


def _blocks(names: Layout, size: ViTSize, gated: bool = False, scaled: bool = False) -> list[Entry]:
  width, entries = size.width, []
  inside = {stem: x for stem, x in names.inside.items() if not gated or not stem.startswith("mlp/")}
  inside |= names.gated if gated else {}
  for i in range(size.depth):
    block = names.block.format(i)
    for stem, their in inside.items():
      parts = (their,) if isinstance(their, str) else their
      ours, theirs, num = f"blocks_{i}/{stem}", tuple(block + part for part in parts), len(parts)
      if stem.startswith("norm"):
        entries += _norm(ours, theirs[0], width)
      elif stem == "attn/qkv":
        entries += _linear(ours, theirs, (3 * width // num, width), "qkv", "qkv bias")
      elif stem == "attn/proj":
        entries += _linear(ours, theirs, (width, width), "heads")
      elif stem == "mlp/gate":
        entries += _linear(ours, theirs, (2 * size.mlp_dim // num, width), "gate", "gate bias")
      else:
        shape = (size.mlp_dim, width) if stem == "mlp/fc1" else (width, size.mlp_dim)
        entries += _linear(ours, theirs, shape)
    if scaled:
      entries += [
        Entry(f"blocks_{i}/{stem}/scale", (block + key,), (width,), "as is") for stem, key in names.scales.items()
      ]
  return entries


def _norm(ours: str, theirs: str, width: int) -> list[Entry]:
  names = (("scale", "weight"), ("bias", "bias"))
  return [Entry(f"{ours}/{our}", (f"{theirs}.{their}",), (width,), "as is") for our, their in names]


def _linear(
  ours: str, theirs: str | tuple[str, ...], shape: Shape, kernel: str = "", bias: str = "as is"
) -> list[Entry]:
  parts = (theirs,) if isinstance(theirs, str) else theirs
  kernel = kernel or ("convolution" if len(shape) == 4 else "linear")
  return [
    Entry(f"{ours}/kernel", tuple(f"{part}.weight" for part in parts), shape, kernel),
    Entry(f"{ours}/bias", tuple(f"{part}.bias" for part in parts), shape[:1], bias),
  ]
