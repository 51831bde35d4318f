"""What older versions wrote, in today's words: configs and the trees of checkpoints. Nothing on disk is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jepa_jax.data import unread_settings

# Format 1: the settings that each kind of encoder read, besides those that all did.
_ENCODER_READS = {
  "vit": "variant patch_size num_registers cls_token pool drop_path pos_embed init scan remat width depth num_heads "
  "mlp_dim probe_layers",
  "resnet": "variant stem width remat",
  "convnet": "widths",
  "mlp": "widths",
}
_PROTOCOL_OPTIONS = {  # old name -> (protocol or group, new name, old default)
  "knn_k": ("knn", "k", 20),
  "knn_temperature": ("knn", "temperature", 0.07),
  "shots": ("fewshot", "shots", [1, 5, 10]),
  "draws": ("fewshot", "draws", 10),
  "features": ("linear", "features", "probe"),
  "tuning_lrs": ("tuning", "learning_rates", [1e-3]),
  "tuning_epochs": ("tuning", "epochs", 20),
  "tuning_batch": ("tuning", "batch_size", 128),
  "tuning_weight_decay": ("tuning", "weight_decay", 0.05),
  "tuning_groups": ("predictor_tuning", "groups", []),
  "mrr_images": ("mrr", "images", 64),
  "mrr_bank": ("mrr", "bank", 256),
  "mrr_chunk": ("mrr", "chunk", 64),
  "mrr_batch": ("mrr", "batch_size", 8),
  "mrr_distance": ("mrr", "distance", "l2"),
}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def upgrade_config(values: Mapping[str, Any], format_number: int) -> dict[str, Any]:
  """Returns the settings, nested plain values as an older version wrote them, as today's `build_config` reads them."""
  values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
  if isinstance(values.get("data"), dict):
    values["data"].setdefault("max_aspect", 0.0)  # what was written before there was this setting
  return _from_1(values) if format_number < 2 else values


def _from_1(values: dict[str, Any]) -> dict[str, Any]:
  values["encoder"] = _encoder(values["encoder"])
  views = dict(values["objective"]["views"])
  values["data"] |= {name: views.pop(name, default) for name, default in _IMAGENET.items()}
  values["data"] = {k: v for k, v in values["data"].items() if k not in unread_settings(values["data"])}
  values["objective"]["views"] = views
  if "evals" in values:
    values["evals"] = _evals(values["evals"], values["objective"]["name"])
  return values


def _encoder(old: Mapping[str, Any]) -> dict[str, Any]:
  """`kind` is `name` now; channels are the data's; a field that the kind did not read held its default."""
  kind = old.get("kind", "vit")
  read = {"image_size", "compute_dtype", *_ENCODER_READS[kind].split()}
  new = {"name": kind} | {key: value for key, value in old.items() if key in read}
  if kind == "resnet" and not new.get("width"):  # 0 was the native one, and the default variant a ViT's
    new.pop("width", None)
  if kind in ("convnet", "mlp") and not new.get("widths"):
    new.pop("widths", None)
  return new


def _evals(old: Mapping[str, Any], method: str) -> dict[str, Any]:
  """Options stand with their protocol now, and one that has options is asked for, lest they be lost.

  Except where the method lacks what the protocol needs, and for `features`: it went with whatever was asked for.
  """
  new: dict[str, Any] = {key: old[key] for key in ("batch_size", "view_px", "crop_fraction", "seed") if key in old}
  names = list(old.get("evals", ("knn", "linear", "fewshot")))
  found: dict[str, dict[str, Any]] = {}
  for key, (group, name, default) in _PROTOCOL_OPTIONS.items():
    value = list(old[key]) if isinstance(old.get(key), tuple) else old.get(key, default)
    if value != default:
      for reader in ("linear", "fewshot") if key == "features" else (group,):
        found.setdefault(reader, {})[name] = value
  if found.get("linear") and not {"linear", "predictor_tuning"} & set(names):
    del found["linear"]
  if found.get("fewshot", {}).keys() == {"features"} and "fewshot" not in names:
    del found["fewshot"]
  has_predictor, tunes = method in ("ijepa", "iwm"), "attentive" in names
  usable = {"mrr": method == "iwm", "predictor_tuning": has_predictor, "tuning": has_predictor or tunes}
  found = {group: options for group, options in found.items() if usable.get(group, True)}
  asked = [group for group in found if group != "tuning"]
  if "tuning" in found and not tunes:
    asked.append("predictor_tuning")
  if "linear" in asked and "predictor_tuning" in names:
    asked.remove("linear")  # it runs beside
  return new | found | {"names": list(dict.fromkeys([*names, *asked]))}


def upgrade_item(name: str, format_number: int) -> str:
  """Returns in which item of a checkpoint of this format the trees `networks` stand."""
  return "state" if name == "networks" and format_number < 2 else name


def upgrade_tree(tree: dict[str, Any], format_number: int, back: bool = False) -> dict[str, Any]:
  """Returns the trees of `networks`, by today's names; with `back`, by those of the older format."""
  if format_number >= 2:
    return tree
  names = {"state": "stats"} if back else {"stats": "state"}
  return {names.get(key, key): value for key, value in tree.items()}
