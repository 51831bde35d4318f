"""python -m jepa_jax weights {inspect,import,export}: other people's checkpoints in, ours out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jepa_jax import checkpoint
from jepa_jax.config import Config, load_config, to_dict
from jepa_jax.data import Tokenizer, check_vocabulary, read_tokenizer
from jepa_jax.experiment import Experiment, make_experiment
from jepa_jax.models import ViTConfig
from jepa_jax.runs import check_workdir, load_encoder, make_meta, open_run, write_config
from jepa_jax.sharding import make_mesh
from jepa_jax.step import TrainState
from jepa_jax.weights import pairs
from jepa_jax.weights.convert import (
  Tree,
  compare,
  encoder_from,
  encoder_to,
  flatten,
  predictor_from,
  stack,
  unflatten,
  unstack,
  without,
)
from jepa_jax.weights.describe import EPSILON, check_config, choose_item, describe, is_predictor, predictor_sizes
from jepa_jax.weights.files import Checkpoint, read, write_folder, write_ours
from jepa_jax.workdir import TOKENIZER, check_can_hold, local_workdir, write_whole

DESCRIPTION = "Checkpoints of Meta's I-JEPA, Hugging Face (I-JEPA, CLIP, SigLIP) and timm in, ours out."
LAYOUTS = ("meta", "hf", "timm", "clip", "jepa_jax")
_NUM_TRAIN = 1_281_167  # schedules need a number of images; none of it is written


def add_arguments(parser: Any) -> None:
  """Adds the sub-commands and their arguments to an argparse parser."""
  actions = parser.add_subparsers(dest="action", required=True, metavar="{inspect,import,export}")
  inspect = actions.add_parser("inspect", help="what a checkpoint holds, and which of our settings it fits")
  inspect.add_argument("source", metavar="FILE_OR_FOLDER_OR_HUB_ID")
  import_ = actions.add_parser("import", help="make a workdir whose step 0 has these weights")
  import_.add_argument("--from", dest="source", required=True, metavar="FILE", help="file, folder or hub id")
  import_.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="the experiment that they are for")
  import_.add_argument("--workdir", required=True, metavar="DIR", help="where to; it must hold no checkpoints")
  import_.add_argument("--layout", choices=LAYOUTS, help="default: recognised by the names")
  import_.add_argument("--item", default="", help="which network, e.g. encoder (default: target_encoder if there)")
  import_.add_argument("--ignore", default="", metavar="A,B", help="names that may stay unused: 'head.*,fc_norm.*'")
  import_.add_argument("--without-predictor", action="store_true", help="leave the checkpoint's predictor out")
  import_.add_argument("--num-classes", type=int, default=1000, help="of the online probe (default: %(default)s)")
  export = actions.add_parser("export", help="write the encoder that evaluation uses")
  export.add_argument("--workdir", required=True, metavar="DIR", help="a run, or one of its checkpoints")
  export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
  export.add_argument("--to", required=True, metavar="PATH", help="hf: a new folder; jepa_jax: a new *.safetensors")
  export.add_argument("--layout", choices=("hf", "jepa_jax"), required=True)
  for action in (inspect, import_, export):
    action.add_argument("--json", action="store_true", help="print JSON")


def run(action: str, overrides: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
  """Returns what was found, imported or written, for JSON; ValueError where the input cannot work."""
  if action == "import":
    return import_weights(overrides=overrides, **options)
  if overrides:
    raise ValueError(f"--config.{next(iter(overrides))}: only `weights import` reads a config")
  return inspect_weights(**options) if action == "inspect" else export_weights(**options)


def render(result: Mapping[str, Any]) -> str:
  """Returns the result as text, one line per fact."""
  lines = []
  for name, value in result.items():
    if value in ([], {}):
      continue
    rows = value.items() if isinstance(value, Mapping) else ()
    lines.append(f"{name:12s} {'' if rows else _text(value)}".rstrip())
    lines += [f"  {key:18s} {_text(sub)}" for key, sub in rows]
  return "\n".join(lines)


def inspect_weights(source: str) -> dict[str, Any]:
  """Returns the layout, the items, and the settings of the encoder that is taken by default."""
  found = read(source)
  items = {name: _summary(tensors) for name, tensors in found.items.items()}
  result = {"file": found.where, "layout": found.layout, "items": items, "not read": list(found.rest)}
  name = choose_item(found)
  if found.layout == "clip":
    result |= {"item": name} | pairs.describe_pair(found.items[name], found.config)
    return {key: value for key, value in result.items() if value}
  about = describe(found, name)
  result |= {
    "item": name,
    "encoder": about.settings,
    "data.channels": about.channels,
    "assumed": list(about.assumed),
    "notes": list(about.notes),
  }
  return {key: value for key, value in result.items() if value}


def import_weights(
  source: str,
  config: str,
  workdir: str,
  overrides: Mapping[str, str] | None = None,
  layout: str | None = None,
  item: str = "",
  ignore: str = "",
  without_predictor: bool = False,
  num_classes: int = 1000,
) -> dict[str, Any]:
  """Writes a workdir whose step-0 checkpoint is the config's experiment with these weights; returns what went where.

  It is a whole train state: `eval` and `load_encoder` read it, and `train` goes on from it. With a target network, and
  no `item`, the file's encoder and target_encoder go to their places; otherwise the one encoder goes to both.
  ValueError where the weights do not fit the config, or the workdir holds a run.
  """
  cfg, folder = load_config(config, overrides), local_workdir(workdir)
  if not 1 <= num_classes <= 10**6:
    raise ValueError(f"--num-classes={num_classes} must lie between 1 and 1,000,000: of the online probe")
  if steps := checkpoint.steps(folder):
    raise ValueError(f"{folder} holds checkpoints (steps {steps}); nothing was changed: choose another --workdir")
  check_workdir(folder, cfg, accept_change=False)
  found = read(source)
  found = dataclasses.replace(found, layout=layout or found.layout)
  notes = list(check_config(found, cfg.encoder, {"mean": cfg.data.mean, "std": cfg.data.std}))
  patterns = tuple(pattern for pattern in ignore.split(",") if pattern)
  name = choose_item(found, item)
  both, tokenizer = found.layout == "clip" and hasattr(cfg.objective, "text"), None
  if both:
    tokenizer = _tokenizer(found, cfg)
    pairs.check_text(found.items[name], found.config, cfg)
    given = pairs.pair_from(without(found.items[name], patterns), cfg)
    evaluated = given["encoder"]
  else:
    evaluated = _encoder(found, name, cfg, patterns)
    given = {"encoder": evaluated}
  mesh = make_mesh(cfg.mesh)
  experiment = make_experiment(cfg, mesh, max(_NUM_TRAIN, cfg.batch_size), num_classes)
  new = {"params": given, "target": {}, "model_state": {}}
  used = {f"params/{network}": name for network in given}
  if "encoder" in (experiment.abstract_state.target or {}):
    new["target"], used["target/encoder"] = {"encoder": evaluated}, name
    if name == "target_encoder" and not item and "encoder" in found.items:
      new["params"] = {"encoder": _encoder(found, "encoder", cfg, patterns)}
      used["params/encoder"] = "encoder"
  _add_predictor(new, used, notes, found, experiment, without_predictor)
  if "encoder" in experiment.abstract_state.model_state:
    new["model_state"] = {"encoder": unflatten(found.items.get("batch_stats", {}))}
  state = _replaced(experiment, new)
  where = {"from": str(source), "layout": found.layout, "used": used}
  _save(folder, experiment, state, num_classes, where, tokenizer)
  return where | {"workdir": str(folder), "step": 0, "notes": notes}


def export_weights(workdir: str, to: str, layout: str, step: int | None = None) -> dict[str, Any]:
  """Writes the evaluated encoder of a run as a Hugging Face folder or as one safetensors file of ours."""
  if Path(to).expanduser().exists():
    raise ValueError(f"--to={to} exists already and is not overwritten; choose another name, or move it away")
  check_can_hold(Path(to).expanduser(), f"--to={to}")
  if layout == "jepa_jax" and Path(to).suffix != ".safetensors":
    raise ValueError(f"--to={to}: one file is written, whose name must end so: --to={to.rstrip('/')}.safetensors")
  found = open_run(workdir, step)
  folder, step = found.workdir, found.step
  _, variables, cfg = load_encoder(folder, step)
  variables = jax.device_get(variables)
  if layout == "hf" and hasattr(cfg.objective, "text"):
    pairs.check_exportable(cfg)
    tensors = pairs.pair_to(jax.device_get(found.networks(found.experiment())["params"]), cfg)
    assert (words := found.tokenizer) is not None, "a run with a text tower has one"
    documents = {"config.json": pairs.pair_config(cfg, words.end), "preprocessor_config.json": _hf_preprocessor(cfg)}
    write_folder(to, tensors, documents | {"tokenizer.json": json.loads(words.json)})
  elif layout == "hf":
    documents = {"config.json": hf_config(cfg), "preprocessor_config.json": _hf_preprocessor(cfg)}
    write_folder(to, encoder_to(variables["params"], cfg.encoder, "hf", cfg.data.channels), documents)
  else:
    trees = {"encoder": flatten(variables["params"]), "batch_stats": flatten(variables["batch_stats"])}
    data = {name: to_dict(getattr(cfg.data, name)) for name in ("channels", "mean", "std")}
    write_ours(to, trees, {"encoder": to_dict(cfg.encoder), "data": data, "step": step})
  return {"workdir": str(folder), "step": step, "layout": layout, "to": str(to)}


def hf_config(cfg: Config) -> dict[str, Any]:
  """Returns config.json of transformers' IJepaModel; ValueError for an encoder that is no ViT."""
  encoder = cfg.encoder
  if not isinstance(encoder, ViTConfig):
    raise ValueError(f"encoder name={encoder.name!r}: Hugging Face's IJepaModel is a ViT; use --layout jepa_jax")
  size = encoder.size
  return {
    "architectures": ["IJepaModel"],
    "model_type": "ijepa",
    "hidden_size": size.width,
    "num_hidden_layers": size.depth,
    "num_attention_heads": size.num_heads,
    "intermediate_size": size.mlp_dim,
    "hidden_act": "gelu",
    "layer_norm_eps": EPSILON,
    "image_size": encoder.image_size,
    "patch_size": encoder.patch_size,
    "num_channels": cfg.data.channels,
    "qkv_bias": True,
    "dtype": "float32",
  }


def _hf_preprocessor(cfg: Config) -> dict[str, Any]:
  """What the run's images were normalised with: transformers would take mean and std .5."""
  side = {"height": cfg.encoder.image_size, "width": cfg.encoder.image_size}
  means = {"image_mean": list(cfg.data.mean), "image_std": list(cfg.data.std)}
  scale = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_resize": True}
  return {"image_processor_type": "ViTImageProcessor", "size": side} | scale | means


def _encoder(found: Checkpoint, name: str, cfg: Config, ignore: Sequence[str]) -> Tree:
  """Returns the parameters of an encoder of the checkpoint, blocks stacked as the config has them."""
  encoder = cfg.encoder
  if found.layout != "jepa_jax":
    if not isinstance(encoder, ViTConfig):
      raise ValueError(
        f"encoder name={encoder.name!r}: the {found.layout} layout holds a ViT; set encoder.name='vit' in the config"
      )
    if found.layout == "clip":
      return pairs.vision_from(without(found.items[name], ignore), cfg)
    return encoder_from(found.items[name], encoder, found.layout, ignore, cfg.data.channels)
  flat = unstack(found.items[name])
  return unflatten(without(stack(flat) if getattr(encoder, "scan", True) else flat, ignore))


def _add_predictor(
  new: Tree, used: dict[str, str], notes: list[str], found: Checkpoint, experiment: Experiment, without: bool
) -> None:
  name = next((name for name, tensors in found.items.items() if is_predictor(tensors)), None)
  like = experiment.abstract_state.params.get("predictor")
  if name is None or not like:
    if like:
      notes.append("the checkpoint has no predictor: it begins as the config's seed makes it")
    return
  if without:
    return
  try:
    new["params"]["predictor"] = predictor_from(found.items[name], like, experiment.cfg.encoder)
  except ValueError as error:
    raise ValueError(f"{error}\nOr begin with a new predictor: --without-predictor") from error
  used["params/predictor"] = name
  if "predictor" in (experiment.abstract_state.target or {}):
    new["target"]["predictor"] = new["params"]["predictor"]


def _replaced(experiment: Experiment, new: Mapping[str, Tree]) -> TrainState:
  """Returns the experiment's state at step 0 with these parts in place of its own; ValueError where shapes differ."""
  shapes = lambda tree: {key: tuple(x.shape) for key, x in flatten(tree).items()}
  changed = {}
  for field, trees in new.items():
    for name, tree in trees.items():
      compare(shapes(getattr(experiment.abstract_state, field)[name]), shapes(tree), f"{field}/{name}")
  state = experiment.init()
  for field, trees in new.items():
    shardings = getattr(experiment.shardings, field)
    placed = {name: jax.device_put(tree, shardings[name]) for name, tree in trees.items()}
    changed |= {field: getattr(state, field) | placed} if placed else {}
  return dataclasses.replace(state, **changed)


def _tokenizer(found: Checkpoint, cfg: Config) -> Tokenizer:
  """Returns the tokenizer that the text tower has learned: of the folder, or the one that the config names."""
  if text := found.config.get("tokenizer"):
    tokenizer = Tokenizer(text, f"{found.where}/tokenizer.json")
  elif cfg.data.captions.tokenizer:
    tokenizer = read_tokenizer(Path(cfg.data.captions.tokenizer).expanduser())
  else:
    raise ValueError(f"{found.where} has no tokenizer.json: name one by --config.data.captions.tokenizer=FILE")
  check_vocabulary(tokenizer, cfg.data.captions)
  return tokenizer


def _save(
  folder: Path,
  experiment: Experiment,
  state: TrainState,
  num_classes: int,
  where: dict[str, Any],
  tokenizer: Tokenizer | None,
) -> None:
  write_config(folder, experiment.cfg)
  text = tokenizer and tokenizer.json
  meta = make_meta(experiment.cfg, 0, num_classes, {"seconds": {}, "examples": 0}, imported=where, tokenizer=text)
  if text:
    write_whole(folder / TOKENIZER, text)
  saver = checkpoint.Saver(folder, keep_last=1)
  saver.save(0, state.networks, state.training, meta)
  saver.close()
  if saver.failures:
    raise checkpoint.CheckpointError(saver.failures[-1])


def _summary(tensors: Mapping[str, np.ndarray]) -> str:
  count = sum(x.size for x in tensors.values())
  text = f"{len(tensors)} arrays, {count / 1e6:.2f} M numbers"
  if is_predictor(tensors):
    text += ": a predictor, " + ", ".join(f"{key} {value}" for key, value in predictor_sizes(tensors).items())
  return text


def _text(value: Any) -> str:
  return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
