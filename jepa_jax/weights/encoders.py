"""An encoder alone out of other people's weights: a workdir that can be evaluated and started from, without a config.

The settings are those that the file shows and its family has (`weights inspect` prints them), the pixels those that it
was trained with, as far as it says so.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jepa_jax import checkpoint
from jepa_jax.config import Config, build_config, flat, to_dict
from jepa_jax.experiment import make_experiment
from jepa_jax.models import ResNetConfig, ViTConfig
from jepa_jax.runs import check_workdir, make_meta, open_run, write_config
from jepa_jax.sharding import make_mesh
from jepa_jax.weights import pairs, resnets
from jepa_jax.weights.convert import (
  Tree,
  check_numbers,
  compare,
  encoder_from,
  flatten,
  let_go,
  stack,
  unflatten,
  unstack,
  without,
)
from jepa_jax.weights.describe import Description, check_config, check_layout, choose_item, describe
from jepa_jax.weights.files import Checkpoint, read
from jepa_jax.workdir import CONFIG, TOKENIZER, local_workdir, write_whole

# What the weights fix, and not the data that they are evaluated on; the rest of `data` and `evals` changes freely.
OF_THE_WEIGHTS = ("encoder", "data.mean", "data.std", "data.channels")
NO_IMAGES = "synthetic"  # the source of a config that is evaluated on other images
_CROP_FRACTION = 0.875  # a view of 224 px out of 256: how most of these families are evaluated


def workdir_for(source: str) -> str:
  """Returns the folder that weights go to where none is named: workdirs/<name of the file, folder or repository>."""
  name = re.sub(r"[^\w.-]+", "-", str(source).rstrip("/").split("/")[-1])
  return "workdirs/" + re.sub(r"(\.(safetensors|tar|pth|pt|bin|ckpt))+$", "", name)


def import_encoder(
  source: str,
  workdir: str,
  overrides: Mapping[str, str] | None = None,
  layout: str | None = None,
  item: str = "",
  ignore: str = "",
) -> dict[str, Any]:
  """Writes a workdir whose step 0 is this encoder; returns what it is, and what was assumed.

  `eval`, `features`, `load_encoder` and `train --init-from` read it; it has no state of training. A workdir that holds
  the same weights with the same settings is left as it is. ValueError where it holds anything else.
  """
  folder, found = local_workdir(workdir), read(source)
  item = choose_item(found, item)
  check_layout(found, layout)
  about, cfg = _experiment_of(found, item, overrides)
  noted = check_config(found, cfg.encoder, {}, item)
  kept = {
    "from": str(source),
    "digest": _digest(found.items[item]),
    "item": item,
    "encoder_only": True,
    "family": about.family,
  }
  there = bool(checkpoint.steps(folder))
  if there:
    before = _check_same(folder, kept, cfg, overrides or {})
    about, cfg = dataclasses.replace(about, notes=(*about.notes, *_seen_otherwise(folder, before, cfg))), before
  result = {
    "workdir": str(folder),
    "from": str(source),
    "layout": found.layout,
    "family": about.family,
    "item": item,
    "encoder": {name: getattr(cfg.encoder, name) for name in about.settings},
    "pixels": f"mean {cfg.data.mean}, std {cfg.data.std}, view {' x '.join(map(str, cfg.view_hw))} px "
    f"of {cfg.data.canvas_px}, {cfg.objective.views.interpolation}",
    "not read": list(found.rest),
    "assumed": [line for line in about.assumed if not any(_says(line, key) for key in overrides or {})],
    "notes": list(dict.fromkeys((*about.notes, *noted))),
  }
  if there:
    return result
  check_workdir(folder, cfg, accept_change=False)
  if folder.is_dir() and not (folder / CONFIG).exists() and any(folder.iterdir()):
    raise ValueError(f"{folder} holds other files, and no run: choose another --workdir")
  try:
    params, averages = encoder_of(found, item, cfg, tuple(pattern for pattern in ignore.split(",") if pattern))
  except ValueError as error:
    raise ValueError(f"{source}, {item}: {error}") from error
  del found  # its arrays are half of what is held
  _save(folder, cfg, params, averages, kept)
  return result


def _check_same(folder: Path, imported: Mapping[str, Any], cfg: Config, typed: Mapping[str, str]) -> Config:
  """Returns the config of a workdir that holds these weights: what no array shows may have been said when it was made.

  ValueError where it holds anything else, or other settings than those that are typed now.
  """
  before = open_run(folder)
  there = before.meta.get("imported") or {"from": "a run of training"}
  same = all(there.get(key) == imported[key] for key in ("digest", "item"))  # wherever the file lies now
  if not same:
    of = f", {there['item']}" if there.get("item") else ""
    raise ValueError(
      f"{folder} holds {there['from']}{of} as it was then; nothing was changed: choose another --workdir"
    )
  old, new = flat(to_dict(before.cfg)), flat(to_dict(cfg))
  if changed := [key for key in typed if old.get(key) != new.get(key)]:
    raise ValueError(
      f"{folder} holds these weights with {changed[0]}={old.get(changed[0])}, and --config.{changed[0]} says "
      f"{new.get(changed[0])}: choose another --workdir, or move it away"
    )
  return before.cfg


def _seen_otherwise(folder: Path, before: Config, now: Config) -> list[str]:
  """Returns notes on what the workdir shows its weights, where the source says another thing now."""
  old, new = flat(to_dict(before)), flat(to_dict(now))
  names = ("data.mean", "data.std", "evals.view_px", "evals.crop_fraction", "objective.views.interpolation")
  return [
    f"{folder} was made with {name}={old[name]}, which stays; the weights' own is {new[name]}: move it away to import "
    "anew"
    for name in names
    if old[name] != new[name]
  ]


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
  """Returns what stands for the arrays of a network and their names."""
  digest = xxhash.xxh3_128()
  for key in sorted(tensors):
    digest.update(f"{key} {tensors[key].dtype} {tensors[key].shape}".encode())
    digest.update(np.ascontiguousarray(tensors[key]).reshape(-1).view(np.uint8))
    let_go(tensors[key])
  return digest.hexdigest()


def _says(line: str, key: str) -> bool:
  return line.startswith(f"{key.removeprefix('encoder.')}=")


def _of_weights(key: str) -> bool:
  return any(f"{key}.".startswith(f"{name}.") for name in OF_THE_WEIGHTS)


def canvas_px(view_px: int, crop_fraction: float = _CROP_FRACTION) -> int:
  """Returns the shorter side of a canvas that such a view does not enlarge."""
  return math.ceil(view_px / crop_fraction - 1e-6)


def with_canvas(overrides: Mapping[str, str], workdir: str) -> dict[str, str]:
  """Returns the overrides of an evaluation, with a canvas as large as their view needs where they change it."""
  rest = dict(overrides)
  if "data.canvas_px" in rest or not {"evals.view_px", "evals.crop_fraction"} & rest.keys():
    return rest
  cfg = open_run(workdir).cfg
  try:
    view_px = int(rest.get("evals.view_px", cfg.view_hw[0])) or cfg.encoder.image_size
    return rest | {
      "data.canvas_px": str(canvas_px(view_px, float(rest.get("evals.crop_fraction", cfg.evals.crop_fraction))))
    }
  except (ValueError, ArithmeticError):  # no numbers: whoever builds the config says so
    return rest


def split_overrides(overrides: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
  """Returns (those of the weights, those of an evaluation)."""
  own = {key: value for key, value in overrides.items() if _of_weights(key)}
  rest = {key: value for key, value in overrides.items() if not _of_weights(key)}
  return own, rest


def _experiment_of(found: Checkpoint, item: str, overrides: Mapping[str, str] | None) -> tuple[Description, Config]:
  """Returns what the encoder is, and a config with it: its method, LeJEPA, is never trained."""
  if foreign := [key for key in overrides or {} if not _of_weights(key)]:
    raise ValueError(f"--config.{foreign[0]}: of an encoder alone only {', '.join(OF_THE_WEIGHTS)} can be set")
  overrides = dict(overrides or {})
  if found.layout == "clip":
    told = pairs.describe_pair(found.items[item], found.config)
    about = Description(
      told["encoder"], tuple(told["assumed"]), (), pairs.channels_of(found.items[item]), told.get("family", pairs.PAIR)
    )
  else:
    about = describe(found, item)
  pixels = dict(found.config.get("data", {}))
  channels = about.channels or pixels.get("channels", 3)
  if channels != 3 and not pixels.get("mean") and "data.mean" not in overrides:
    raise ValueError(
      f"the encoder reads {channels} channels, and the file does not say how they were normalised: give "
      f"--config.data.mean and --config.data.std, {channels} numbers each"
    )
  pixels |= {"channels": channels}
  image_px, view, notes = about.settings.get("image_size", 224), found.config.get("view", {}), []
  size_px, patch = view.get("size_px", image_px), about.settings.get("patch_size", 1)
  if size_px % patch:
    notes = [f"theirs are seen at {size_px} px, no whole number of patches of {patch}; here at {image_px}"]
    size_px = image_px
  share = view.get("crop_fraction", _CROP_FRACTION)
  about = dataclasses.replace(about, notes=(*about.notes, *found.config.get("notes", ()), *notes))
  data = {"source": NO_IMAGES, "canvas_px": canvas_px(size_px, share)} | pixels
  values = {
    "name": "weights",
    "total": "1ep",
    "batch_size": 64,
    "data": data,
    "encoder": about.settings,
    "objective": {
      "name": "lejepa",
      "views": {
        "global_crops": {"num": 2, "size_px": image_px, "scale": (0.3, 1.0)},
        "interpolation": view.get("interpolation", "bicubic"),
      },
      "projector": {"hidden": (), "out": 16},
    },
    "optim": {"lr": 1e-3},
    "evals": {"crop_fraction": share} | ({"view_px": size_px} if size_px != image_px else {}),
  }
  return about, build_config(values, overrides)


def encoder_of(found: Checkpoint, name: str, cfg: Config, ignore: Sequence[str] = ()) -> tuple[Tree, Tree]:
  """Returns the parameters of an encoder of the checkpoint, blocks stacked as the config has them, and what BatchNorm
  has for evaluation."""
  encoder = cfg.encoder
  if found.layout in resnets.LAYOUTS:
    if not isinstance(encoder, ResNetConfig):
      raise ValueError(f"encoder name={encoder.name!r}: the file holds a ResNet; set encoder.name='resnet'")
    return resnets.resnet_from(without(found.items[name], ignore), encoder, found.layout, cfg.data.channels)
  if found.layout != "jepa_jax":
    if not isinstance(encoder, ViTConfig):
      raise ValueError(
        f"encoder name={encoder.name!r}: the {found.layout} layout holds a ViT; set encoder.name='vit' in the config"
      )
    if found.layout == "clip":
      return pairs.vision_from(without(found.items[name], ignore), cfg), {}
    return encoder_from(found.items[name], encoder, found.layout, ignore, cfg.data.channels), {}
  check_numbers(found.items[name], "the encoder")
  flat = unstack(found.items[name])
  params = unflatten(without(stack(flat) if getattr(encoder, "scan", True) else flat, ignore))
  return params, unflatten(found.items.get("batch_stats", {}))


def check_shapes(abstract: Mapping[str, Tree], trees: Mapping[str, Tree], where: str) -> None:
  """Raises a ValueError that lists the arrays of networks that are missing, not used, or of another shape."""
  shapes = lambda tree: {key: tuple(x.shape) for key, x in flatten(tree).items()}
  for name, tree in trees.items():
    compare(shapes(abstract[name]), shapes(tree), f"{where}/{name}")


def _save(folder: Path, cfg: Config, params: Tree, averages: Tree, imported: Mapping[str, Any]) -> None:
  experiment = make_experiment(cfg, make_mesh(cfg.mesh), max(10_000, cfg.batch_size), 0)
  networks = {"params": {"encoder": params}, "state": {"encoder": averages} if averages else {}}
  fields = {"params": experiment.abstract_state.params, "state": experiment.abstract_state.model_state}
  for field, trees in networks.items():
    check_shapes(fields[field], trees, field)
  save_start(folder, cfg, networks, {"step": np.zeros((), np.int32)}, 0, imported)


def save_start(
  folder: Path,
  cfg: Config,
  networks: Tree,
  training: Tree,
  num_classes: int,
  imported: Mapping[str, Any],
  tokenizer: str | None = None,
) -> None:
  """Writes a workdir whose checkpoint of step 0 this is; CheckpointError where it cannot be written."""
  write_config(folder, cfg)
  spent = {"seconds": {}, "examples": 0}
  meta = make_meta(cfg, 0, num_classes, spent, imported=dict(imported), tokenizer=tokenizer)
  if tokenizer:
    write_whole(folder / TOKENIZER, tokenizer)
  saver = checkpoint.Saver(folder, keep_last=1, copies=False)
  saver.save(0, networks, training, meta)
  saver.close()
  if saver.failures:
    raise checkpoint.CheckpointError(saver.failures[-1])
