"""The encoder of a run for others: a Hugging Face folder, timm's names, our own file, or a program of its own.

Beside each lies a card that says where it comes from. B images, H W C image, D width.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.config import Config, to_dict
from jepa_jax.models import ResNetConfig, ViTConfig
from jepa_jax.models.resnet import STAGES
from jepa_jax.objectives import make_objective
from jepa_jax.runs import LoadedEncoder, Run, load_encoder, on_pixels, open_run
from jepa_jax.views import Pixels
from jepa_jax.weights import pairs, resnets
from jepa_jax.weights.card import model_card
from jepa_jax.weights.convert import Tree, encoder_to, flatten
from jepa_jax.weights.families import ACTIVATIONS
from jepa_jax.weights.files import write_folder, write_ours, write_safetensors
from jepa_jax.weights.layouts import LAYOUTS
from jepa_jax.workdir import check_can_hold, write_whole

FORMS = ("hf", "timm", "stablehlo", "jepa_jax")
_ENDINGS = {"timm": ".safetensors", "jepa_jax": ".safetensors", "stablehlo": ".stablehlo"}
PLATFORMS = ("cpu", "cuda", "tpu")
_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {"swiglu": "silu"}


def export_weights(
  workdir: str, to: str, layout: str, step: int | None = None, license: str = "", size_px: int = 0
) -> dict[str, Any]:
  """Writes the evaluated encoder of a run; returns {"workdir", "step", "layout", "to", "card"}.

  layout: "hf" is a folder for `from_pretrained`, "timm" one file with timm's names (torchvision's of a ResNet),
  "jepa_jax" one of ours, "stablehlo" a program that needs nothing but JAX. license goes into the card. size_px: of the
  images that the program takes (default: evaluation's). ValueError where `to` exists or the layout lacks a place.
  """
  path = Path(to).expanduser()
  if path.exists():
    raise ValueError(f"--to={to} exists already and is not overwritten; choose another name, or move it away")
  ending = _ENDINGS.get(layout, "")
  if ending and path.suffix != ending:
    raise ValueError(f"--to={to}: one file is written, whose name must end so: --to={to.rstrip('/')}{ending}")
  check_can_hold(path, f"--to={to}")
  found = open_run(workdir, step)
  encoder = load_encoder(found.workdir, found.step)
  variables, cfg = jax.device_get(encoder.params), encoder.config
  card = model_card(found, layout, license)
  if layout == "hf":
    tensors, documents = _hugging_face(found, variables, cfg)
    write_folder(to, tensors, documents, {"README.md": card})
    return _result(found, layout, to, path / "README.md")
  if layout == "timm":
    write_safetensors(to, _timm(variables, cfg), {"format": "pt"})
  elif layout == "stablehlo":
    data = program(encoder, size_px)
    write_whole(path, lambda temporary: temporary.write_bytes(data), overwrite=False)
  else:
    trees = {"encoder": flatten(variables["params"]), "batch_stats": flatten(variables["batch_stats"])}
    data = {name: to_dict(getattr(cfg.data, name)) for name in ("channels", "mean", "std")}
    (height_px, width_px), seen = cfg.view_hw, {"crop_fraction": cfg.evals.crop_fraction}
    seen |= {"interpolation": cfg.objective.views.interpolation} | (
      {"size_px": height_px} if height_px == width_px else {}
    )
    write_ours(to, trees, {"encoder": to_dict(cfg.encoder), "data": data, "view": seen, "step": found.step})
  beside = path.with_suffix(".md")
  if not beside.exists():
    write_whole(beside, card)
  return _result(found, layout, to, beside)


def _result(found: Run, layout: str, to: str, card: Path) -> dict[str, Any]:
  return {"workdir": str(found.workdir), "step": found.step, "layout": layout, "to": str(to), "card": str(card)}


def program(encoder: LoadedEncoder, size_px: int = 0, platforms: tuple[str, ...] = PLATFORMS) -> bytes:
  """Returns the encoder as one serialised StableHLO program, weights and normalisation within: uint8 images
  (B, H, W, C) in, features float32 (B, D) out, for any B and for each of these platforms.

  `jax.export.deserialize(data).call(images)` runs it with jax and flatbuffers alone. Products are float32.
  """
  cfg = encoder.config
  height_px, width_px = (size_px, size_px) if size_px else cfg.view_hw
  # What a kernel would be chosen for is not known here; and what the backend can do decides about 16 bits.
  apply_fn = _exportable(cfg) if isinstance(cfg.encoder, ViTConfig) else encoder.apply_fn
  run: Callable = lambda images: apply_fn(encoder.params, images).pooled_BxD.astype(jnp.float32)
  if importlib.util.find_spec("flatbuffers") is None:  # jax does not ask for it
    raise ValueError("--layout=stablehlo writes by flatbuffers: python -m pip install flatbuffers")
  (batch,) = jax.export.symbolic_shape("batch")
  images = jax.ShapeDtypeStruct((batch, height_px, width_px, cfg.data.channels), jnp.uint8)
  return bytes(jax.export.export(jax.jit(run), platforms=platforms)(images).serialize())


def _exportable(cfg: Config) -> Callable:
  assert isinstance(cfg.encoder, ViTConfig)
  encoder = dataclasses.replace(cfg.encoder, attention="xla", compute_dtype="float32", remat="none")
  return on_pixels(make_objective(cfg.objective, encoder, Pixels(cfg.data.mean, cfg.data.std), cfg.data.captions))


def _timm(variables: Mapping[str, Tree], cfg: Config) -> dict[str, np.ndarray]:
  encoder = cfg.encoder
  if isinstance(encoder, ResNetConfig):
    return resnets.resnet_to(variables["params"], variables["batch_stats"], encoder, "resnet", cfg.data.channels)
  if not isinstance(encoder, ViTConfig) or encoder.pos_embed == "rope":
    what = getattr(encoder, "pos_embed", encoder.name)
    raise ValueError(f"encoder {what!r}: the layout timm has ViTs with added positions and ResNets; use jepa_jax")
  return encoder_to(variables["params"], encoder, "timm", cfg.data.channels)


def _hugging_face(found: Run, variables: Mapping[str, Tree], cfg: Config) -> tuple[dict[str, np.ndarray], dict]:
  """Returns the tensors of transformers' model, and config.json, preprocessor_config.json, ... by name."""
  pixels = {"preprocessor_config.json": hf_preprocessor(cfg)}
  if hasattr(cfg.objective, "text"):
    pairs.check_exportable(cfg)
    tensors = pairs.pair_to(jax.device_get(found.networks(found.experiment())["params"]), cfg)
    assert (words := found.tokenizer) is not None, "a run with a text tower has one"
    return tensors, {
      "config.json": pairs.pair_config(cfg, words.end),
      "tokenizer.json": json.loads(words.json),
    } | pixels
  encoder, documents = cfg.encoder, {"config.json": hf_config(cfg)} | pixels
  if isinstance(encoder, ResNetConfig):
    params, averages = variables["params"], variables["batch_stats"]
    return resnets.resnet_to(params, averages, encoder, "hf_resnet", cfg.data.channels), documents
  assert isinstance(encoder, ViTConfig), "hf_config refuses others"
  layout = _hf_model(encoder)[1]
  tensors = encoder_to(variables["params"], encoder, layout, cfg.data.channels)
  if layout != "hf":  # it is there whether or not a run has masked anything
    shape = (1, 1, encoder.size.width) if layout == "dinov3" else (1, encoder.size.width)
    tensors["embeddings.mask_token"] = np.zeros(shape, np.float32)
  if layout == "dinov3" and not encoder.num_registers:
    tensors["embeddings.register_tokens"] = np.zeros((1, 0, encoder.size.width), np.float32)
  return tensors, documents


def _hf_model(encoder: ViTConfig) -> tuple[str, str, str]:
  """Returns (class, layout, model_type) of transformers for a ViT; ValueError where it has none."""
  tokens = (encoder.cls_token, encoder.num_registers > 0, encoder.layer_scale > 0, encoder.pos_embed == "rope")
  known = {
    (False, False, False, False): ("IJepaModel", "hf", "ijepa"),
    (True, False, False, False): ("ViTModel", "hf", "vit"),
    (True, False, True, False): ("Dinov2Model", "dinov2", "dinov2"),
    (True, True, True, False): ("Dinov2WithRegistersModel", "dinov2", "dinov2_with_registers"),
    (True, True, True, True): ("DINOv3ViTModel", "dinov3", "dinov3_vit"),
    (True, False, True, True): ("DINOv3ViTModel", "dinov3", "dinov3_vit"),
  }
  if tokens not in known:
    names = ("cls_token", "num_registers", "layer_scale", "pos_embed='rope'")
    has = ", ".join(name for name, there in zip(names, tokens, strict=True) if there)
    raise ValueError(f"transformers has no ViT with {has} and nothing else of these; use the layout timm or jepa_jax")
  return known[tokens]


def hf_config(cfg: Config) -> dict[str, Any]:
  """Returns config.json of the model that transformers has for this encoder; ValueError where it has none."""
  encoder = cfg.encoder
  if isinstance(encoder, ResNetConfig):
    if encoder.stem != "imagenet":
      raise ValueError(
        "stem='cifar': transformers' ResNetModel has the stem of ImageNet; use the layout timm or jepa_jax"
      )
    grow = 4 if encoder.has_bottleneck else 1
    return {
      "architectures": ["ResNetModel"],
      "model_type": "resnet",
      "num_channels": cfg.data.channels,
      "embedding_size": encoder.width,
      "hidden_sizes": [encoder.width * 2**i * grow for i in range(4)],
      "depths": list(STAGES[encoder.variant]),
      "layer_type": "bottleneck" if encoder.has_bottleneck else "basic",
      "dtype": "float32",
    }
  if not isinstance(encoder, ViTConfig):
    raise ValueError(f"encoder name={encoder.name!r}: transformers has ViTs and ResNets of ours; use jepa_jax")
  model, layout, model_type = _hf_model(encoder)
  size, gated = encoder.size, encoder.activation == "swiglu"
  if gated and not LAYOUTS[layout].gated:
    raise ValueError(f"activation='swiglu': transformers' {model} has none; use the layout timm or jepa_jax")
  document = {
    "architectures": [model],
    "model_type": model_type,
    "hidden_size": size.width,
    "num_hidden_layers": size.depth,
    "num_attention_heads": size.num_heads,
    "intermediate_size": size.mlp_dim,
    "hidden_act": _ACTIVATIONS[encoder.activation],
    "layer_norm_eps": encoder.norm_epsilon,
    "image_size": encoder.image_size,
    "patch_size": encoder.patch_size,
    "num_channels": cfg.data.channels,
    "qkv_bias": True,
    "dtype": "float32",
  }
  if layout == "dinov2":
    document |= {"mlp_ratio": _mlp_ratio(encoder), "use_swiglu_ffn": gated}
    document |= {"num_register_tokens": encoder.num_registers} if encoder.num_registers else {}
  if layout == "dinov3":
    document |= {"use_gated_mlp": gated, "num_register_tokens": encoder.num_registers, "key_bias": True}
  return document


def _mlp_ratio(encoder: ViTConfig) -> int:
  """Returns what transformers' DINOv2 makes the hidden width of; ValueError where no integer gives it."""
  width, wanted = encoder.size.width, encoder.size.mlp_dim
  made = (lambda r: (int(width * r * 2 / 3) + 7) // 8 * 8) if encoder.activation == "swiglu" else (lambda r: width * r)
  for ratio in range(1, 17):
    if made(ratio) == wanted:
      return ratio
  raise ValueError(f"mlp_dim={wanted} is no multiple of width={width} as transformers' DINOv2 has it; use timm")


def hf_preprocessor(cfg: Config) -> dict[str, Any]:
  """Returns how the run's images are evaluated: scaled, cut out of the middle, normalised."""
  (height_px, width_px), share = cfg.view_hw, cfg.evals.crop_fraction
  cut = {"size": {"shortest_edge": round(min(height_px, width_px) / share)}, "do_center_crop": True}
  cut |= {"crop_size": {"height": height_px, "width": width_px}}
  means = {"image_mean": list(cfg.data.mean), "image_std": list(cfg.data.std)}
  scale = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_resize": True}
  scale["resample"] = 3 if cfg.objective.views.interpolation == "bicubic" else 2  # Pillow's numbers
  return {"image_processor_type": "BitImageProcessor"} | cut | scale | means
