"""python -m jepa_jax weights {inspect,import,export,compare,push}: other people's checkpoints in, ours out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jepa_jax import checkpoint
from jepa_jax.config import Config, load_config
from jepa_jax.data import Tokenizer, check_vocabulary, read_tokenizer
from jepa_jax.experiment import Experiment, make_experiment
from jepa_jax.runs import check_workdir
from jepa_jax.sharding import make_mesh
from jepa_jax.step import TrainState
from jepa_jax.weights import pairs, resnets
from jepa_jax.weights.comparison import compare_encoders
from jepa_jax.weights.convert import Tree, predictor_from, predictor_size, without
from jepa_jax.weights.describe import (
  check_config,
  check_decoder,
  check_layout,
  choose_item,
  describe,
  is_predictor,
  predictor_of,
  predictor_sizes,
)
from jepa_jax.weights.encoders import check_shapes, encoder_of, import_encoder, save_start
from jepa_jax.weights.export import FORMS, export_weights
from jepa_jax.weights.files import Checkpoint, read
from jepa_jax.weights.hub import push_folder
from jepa_jax.workdir import local_workdir

DESCRIPTION = "Published weights (I-JEPA, DINO to DINOv3, MAE, MoCo v3, LeJEPA, CLIP, SigLIP, ResNets) in, ours out."
LAYOUTS = ("meta", "timm", "hf", "dinov2", "dinov3", "clip", *resnets.LAYOUTS, "jepa_jax")
_OF_AN_ENCODER = ("source", "workdir", "layout", "item", "ignore")
_NUM_TRAIN = 1_281_167  # schedules need a number of images; none of it is written


def add_arguments(parser: Any) -> None:
  """Adds the sub-commands and their arguments to an argparse parser."""
  actions = parser.add_subparsers(dest="action", required=True, metavar="{inspect,import,export,compare,push}")
  inspect = actions.add_parser("inspect", help="what a checkpoint holds, and which of our settings it fits")
  inspect.add_argument("source", metavar="FILE_OR_FOLDER_OR_HUB_ID")
  import_ = actions.add_parser("import", help="make a workdir whose step 0 has these weights")
  import_.add_argument("--from", dest="source", required=True, metavar="FILE", help="file, folder or hub id")
  import_.add_argument(
    "--config", metavar="FILE[:VARIANT]", help="the experiment that they are for (default: an encoder alone, as it is)"
  )
  import_.add_argument("--workdir", required=True, metavar="DIR", help="where to; it must hold no checkpoints")
  import_.add_argument("--layout", choices=LAYOUTS, help="default: recognised by the names")
  import_.add_argument("--item", default="", help="which network, e.g. encoder (default: target_encoder if there)")
  import_.add_argument("--ignore", default="", metavar="A,B", help="names that may stay unused: 'head.*,fc_norm.*'")
  import_.add_argument("--without-predictor", action="store_true", help="leave the checkpoint's predictor out")
  import_.add_argument("--num-classes", type=int, default=1000, help="of the online probe (default: %(default)s)")
  compare = actions.add_parser("compare", help="two encoders on the same images: kNN, linear, CKA, common neighbours")
  compare.add_argument("a", metavar="A", help="the workdir of a run, or a file, folder or hub id of weights")
  compare.add_argument("b", metavar="B")
  compare.add_argument(
    "--images", required=True, metavar="FOLDER", help="with a folder per class, where there are classes"
  )
  export = actions.add_parser("export", help="write the encoder that evaluation uses")
  export.add_argument("--workdir", required=True, metavar="DIR", help="a run, or one of its checkpoints")
  export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
  export.add_argument(
    "--to", required=True, metavar="PATH", help="hf: a new folder; else a file, .safetensors or .stablehlo"
  )
  export.add_argument("--layout", choices=FORMS, required=True, help="stablehlo: a program that needs jax alone")
  export.add_argument("--license", default="", metavar="NAME", help="of the weights, for the card: apache-2.0, ...")
  export.add_argument("--size-px", type=int, default=0, help="stablehlo: side of its images (default: evaluation's)")
  push = actions.add_parser("push", help="a folder that `export --layout=hf` wrote to the Hugging Face hub")
  push.add_argument("--from", dest="folder", required=True, metavar="FOLDER")
  push.add_argument("--to", required=True, metavar="OWNER/NAME")
  push.add_argument("--private", action="store_true")
  push.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
  for action in (inspect, import_, export, compare, push):
    action.add_argument("--json", action="store_true", help="print JSON")


def run(action: str, overrides: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
  """Returns what was found, imported or written, for JSON; ValueError where the input cannot work."""
  if action == "import" and options["config"]:
    return import_weights(overrides=overrides, **options)
  if action == "import":
    return import_encoder(overrides=overrides, **{name: options[name] for name in _OF_AN_ENCODER})
  if action == "compare":
    return compare_encoders(overrides=overrides, **options)
  if overrides:
    raise ValueError(f"--config.{next(iter(overrides))}: only `weights import` and `compare` read settings")
  return {"inspect": inspect_weights, "export": export_weights, "push": push_folder}[action](**options)


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
    "family": about.family,
    "encoder": about.settings,
    "data.channels": about.channels,
    "assumed": list(about.assumed),
    "notes": [*about.notes, *found.config.get("notes", ())],
  }
  result |= {name: found.config[name] for name in ("data", "view") if found.config.get(name)}
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
  check_layout(found, layout)
  notes = list(check_config(found, cfg.encoder, {"mean": cfg.data.mean, "std": cfg.data.std}, item))
  patterns = tuple(pattern for pattern in ignore.split(",") if pattern)
  name = choose_item(found, item)
  both, tokenizer = found.layout == "clip" and hasattr(cfg.objective, "text"), None
  if both:
    pairs.check_text(found.items[name], found.config, cfg)
    tokenizer = _tokenizer(found, cfg)
    given, averages = pairs.pair_from(without(found.items[name], patterns), cfg), {}
    evaluated = given["encoder"]
  else:
    evaluated, averages = encoder_of(found, name, cfg, patterns)
    given = {"encoder": evaluated}
  mesh = make_mesh(cfg.mesh)
  experiment = make_experiment(cfg, mesh, max(_NUM_TRAIN, cfg.batch_size), num_classes)
  new = {"params": given, "target": {}, "model_state": {}}
  used = {f"params/{network}": name for network in given}
  if "encoder" in (experiment.abstract_state.target or {}):
    new["target"], used["target/encoder"] = {"encoder": evaluated}, name
    if name == "target_encoder" and not item and "encoder" in found.items:
      new["params"] = {"encoder": encoder_of(found, "encoder", cfg, patterns)[0]}
      used["params/encoder"] = "encoder"
  if not without_predictor and not {"decoder_*", "decoder.*"} & {*patterns}:
    _add_predictor(new, used, notes, found, experiment)
  if "encoder" in experiment.abstract_state.model_state:
    new["model_state"] = {"encoder": averages}
  state = _replaced(experiment, new)
  where = {"from": str(source), "layout": found.layout, "used": used}
  save_start(folder, cfg, state.networks, state.training, num_classes, where, tokenizer and tokenizer.json)
  return where | {"workdir": str(folder), "step": 0, "notes": notes}


def _add_predictor(
  new: Tree, used: dict[str, str], notes: list[str], found: Checkpoint, experiment: Experiment
) -> None:
  """Adds the predictor that belongs to the encoder in `used`, where the method has one; else a note."""
  like, cfg = experiment.abstract_state.params.get("predictor"), experiment.cfg
  if not like:
    return
  name = predictor_of(found, used["params/encoder"])
  if name is None:
    notes.append("the checkpoint has no predictor: it begins as the config's seed makes it")
    return
  try:
    if name.endswith("decoder"):
      notes += check_decoder(found.config, cfg.objective, predictor_size(like).num_heads)
    new["params"]["predictor"] = predictor_from(found.items[name], like, cfg.encoder)
  except ValueError as error:
    told = "\n(predictor_... is what the file calls decoder_...)" if name.endswith("decoder") else ""
    raise ValueError(f"{error}{told}\nOr begin with a new predictor: --without-predictor") from error
  used["params/predictor"] = name
  if "predictor" in (experiment.abstract_state.target or {}):
    new["target"]["predictor"] = new["params"]["predictor"]


def _replaced(experiment: Experiment, new: Mapping[str, Tree]) -> TrainState:
  """Returns the experiment's state at step 0 with these parts in place of its own; ValueError where shapes differ."""
  changed = {}
  for field, trees in new.items():
    check_shapes(getattr(experiment.abstract_state, field), trees, field)
  state = experiment.init()
  for field, trees in new.items():
    shardings = getattr(experiment.shardings, field)
    placed = {name: jax.device_put(tree, shardings[name]) for name, tree in trees.items()}
    changed |= {field: getattr(state, field) | placed} if placed else {}
  return experiment.begun(dataclasses.replace(state, **changed))


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


def _summary(tensors: Mapping[str, np.ndarray]) -> str:
  count = sum(x.size for x in tensors.values())
  text = f"{len(tensors)} arrays, {count / 1e6:.2f} M numbers"
  if is_predictor(tensors):
    text += ": a predictor, " + ", ".join(f"{key} {value}" for key, value in predictor_sizes(tensors).items())
  return text


def _text(value: Any) -> str:
  return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
