"""The frozen settings of a run, built strictly from a config file and command-line overrides."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import math
import re
import runpy
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jepa_jax.checkpoint import CheckpointConfig
from jepa_jax.choices import did_you_mean, require_choice, union_members
from jepa_jax.data import DataConfig, reset_unread
from jepa_jax.duration import Duration
from jepa_jax.evals import EvalConfig, only_asked
from jepa_jax.models import Encoder, EncoderConfig
from jepa_jax.objectives import METHODS
from jepa_jax.optim import OptimConfig
from jepa_jax.sharding import MeshConfig
from jepa_jax.shipped import find_config
from jepa_jax.shorthand import expand
from jepa_jax.step import GuardConfig, ProbeConfig
from jepa_jax.telemetry import LogConfig

if TYPE_CHECKING:
  ObjectiveConfig = Any
else:
  ObjectiveConfig = typing.Union[tuple(METHODS)]  # noqa: UP007  (told apart by `name`)


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment. `total` and every cadence are Durations; `batch_size` is global.

  `microbatch` is the number of parts in which the batch goes through the encoder, one after the other: less memory and
  the same gradient, since the loss is taken once over all of it. Where the encoder itself mixes the examples of a
  batch (BatchNorm) that is another objective, and refused unless the last setting accepts it.

  `pull_to_start` > 0 holds the encoder near the one that --init-from gave it: that times 1 - the cosine of the features
  that both make of an image is added to the loss (`objectives.pulled`).
  """

  name: str
  total: Duration
  batch_size: int
  data: DataConfig
  encoder: EncoderConfig
  objective: ObjectiveConfig
  optim: OptimConfig
  seed: int = 0
  probe: ProbeConfig = ProbeConfig()
  evals: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  mesh: MeshConfig = MeshConfig()
  guard: GuardConfig = GuardConfig()
  microbatch: int = 1
  pull_to_start: float = 0.0
  change_objective_to_batch_norm_per_microbatch: bool = False

  def __post_init__(self):
    if not 0 <= self.seed < 2**32:  # JAX drops what is above 32 bits
      raise ValueError(f"seed={self.seed} must lie between 0 and {2**32 - 1:,}")
    if self.batch_size < 1:
      raise ValueError(f"batch_size={self.batch_size}: a batch has at least 1 image")
    if self.microbatch < 1:
      raise ValueError(f"microbatch={self.microbatch}: the batch goes through the encoder in at least 1 part")
    if self.pull_to_start < 0:
      raise ValueError(f"pull_to_start={self.pull_to_start} weighs a part of the loss: 0 (off) or more")

  @property
  def view_px(self) -> int:
    """Side of the view that evaluation sees, in px; its height where it is no square."""
    return self.evals.view_px or self.encoder.image_size

  @property
  def view_hw(self) -> tuple[int, int]:
    """Height and width of the view that evaluation sees, in px."""
    return self.view_px, self.evals.view_width_px or self.view_px


# What may change between two runs of one workdir: the machine, how it computes and what is reported, never what is
# computed. "*." stands for every place: there may be several networks.
RESUMABLE = (
  "mesh",
  "microbatch",
  "log",
  "checkpoint",
  "evals",
  "data.root",
  "data.test",
  "data.num_threads",
  "data.prefetch",
  "data.cache_mb",
  "data.max_bad_share",
  "data.captions.tokenizer",  # its digest is compared instead
  "data.captions.test",
  "data.label_maps",  # no method reads them
  "*.remat",
  "*.weight_grads",
  "*.attention",
)


class Override(str):
  """A value typed on the command line: its type is decided by the setting that it goes to. `before`: the file's own."""

  before: Any

  def __new__(cls, text: str, before: Any = None):
    made = super().__new__(cls, text)
    made.before = before
    return made


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> Config:
  """Returns the Config of a Python file that defines get_config(); overrides map "optim.lr" to the typed text.

  `path` may be the name of a config that comes with the project. A file with several experiments takes the name of one,
  as ml_collections does: "configs/lejepa_imagenet.py:vitl" calls get_config("vitl").
  """
  name, colon, variant = str(path).rpartition(":")
  if not colon or "/" in variant:  # no variant: the default one
    name, variant = str(path), ""
  path = find_config(name)
  module = _run(path)
  if "get_config" not in module:
    raise ValueError(f"{path} defines no get_config() -> ml_collections.ConfigDict")
  values = _call(module, path, variant)
  values = values.to_dict() if hasattr(values, "to_dict") else values
  if not isinstance(values, Mapping):
    raise ValueError(f"{path}: get_config() returns {type(values).__name__}, not an ml_collections.ConfigDict")
  return build_config(values, overrides)


def variants(path: str | Path) -> tuple[str, ...]:
  """Returns the names of the experiments in a config file, the default first; () where there is one."""
  return tuple(_run(find_config(path)).get("VARIANTS", ()))


def _run(path: Path) -> dict[str, Any]:
  try:
    return runpy.run_path(str(path))
  except (SyntaxError, UnicodeDecodeError, NameError, ImportError) as error:
    where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
    raise ValueError(f"{path}{where} is no config file in Python: {type(error).__name__}: {error}") from error


def _call(module: Mapping[str, Any], path: Path, variant: str) -> Any:
  get_config, known = module["get_config"], tuple(module.get("VARIANTS", ()))
  if not variant:
    return get_config()
  if not inspect.signature(get_config).parameters:
    raise ValueError(f"--config={path}:{variant}: {path} holds one experiment; leave out :{variant}")
  if known and variant not in known:
    near = did_you_mean(variant, known)
    raise ValueError(f"--config={path}:{variant}: {path} has no {variant!r}, but {', '.join(known)}{near}")
  return get_config(variant)


def build_config(values: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
  """Returns the Config of nested plain values; every fault is a ValueError that says where and what to write."""
  try:
    tree = json.loads(json.dumps(values, default=_plain))
  except (TypeError, RecursionError) as error:
    raise ValueError(f"config: its names are text, and it does not hold itself ({error})") from error
  hints = typing.get_type_hints(Config)
  named = {key: union_members(hints[key]) for key in ("encoder", "objective")}
  overrides = expand(overrides or {}, named, tree)
  typed = {key.removeprefix("data."): text for key, text in (overrides or {}).items() if key.startswith("data.")}
  if typed and isinstance(tree.get("data"), dict):
    tree["data"] = reset_unread(tree["data"], typed)
  names = (overrides or {}).get("evals.names")
  if names is not None and isinstance(tree.get("evals"), dict):  # what the file says of others is read no more
    typed = {key.split(".")[1] for key in overrides or {} if key.startswith("evals.")}
    own = {key: value for key, value in tree["evals"].items() if key in typed}
    tree["evals"] = only_asked(tree["evals"], tuple(re.findall(r"\w+", str(names)))) | own
  for key, text in (overrides or {}).items():
    node = tree
    *parents, leaf = key.split(".")
    for i, parent in enumerate(parents):
      node = node.setdefault(parent, {})
      if not isinstance(node, dict):
        raise ValueError(f"--config.{key}: config.{'.'.join(parents[: i + 1])} is a value, not a group of settings")
    node[leaf] = Override(text, node.get(leaf))
  return _build(Config, tree, "config")


def to_dict(value: Any) -> Any:
  """Returns the settings as nested plain values that build_config reads back (dataclass -> dict, Duration -> str)."""
  if isinstance(value, Duration):
    return str(value)
  if dataclasses.is_dataclass(value):
    return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
  return [to_dict(v) for v in value] if isinstance(value, tuple | list) else value


def settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted path, group of settings) for value and every group below it."""
  yield path, value
  for field in dataclasses.fields(value):
    below = getattr(value, field.name)
    if dataclasses.is_dataclass(below) and not isinstance(below, Duration):
      yield from settings(below, f"{path}.{field.name}".lstrip("."))


def encoders(cfg: Config) -> list[tuple[str, Encoder]]:
  """Returns (dotted path, settings) of every encoder of an experiment: the one at the top, and a method's own."""
  return [(path, value) for path, value in settings(cfg) if isinstance(value, Encoder)]


def changed_everywhere(value: Any, name: str, change: Callable[[str, Any], Any], path: str = "") -> Any:
  """Returns the settings with change(dotted path, old value) for every setting of this name, at any depth."""
  changes = {}
  for field in dataclasses.fields(value):
    here, old = f"{path}.{field.name}".lstrip("."), getattr(value, field.name)
    if field.name == name:
      new = change(here, old)
    elif dataclasses.is_dataclass(old) and not isinstance(old, Duration):
      new = changed_everywhere(old, name, change, here)
    else:
      continue
    if new != old:
      changes[field.name] = new
  return dataclasses.replace(value, **changes) if changes else value


def without_recomputation(cfg: Config) -> Config:
  """Returns the experiment without what is computed twice to save memory: remat, attention's weights, microbatches."""
  for name, plain in (("remat", "none"), ("attention", "plain")):
    cfg = changed_everywhere(cfg, name, lambda path, old, plain=plain: plain)
  return dataclasses.replace(cfg, microbatch=1)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], ignore: tuple[str, ...] = RESUMABLE) -> list[str]:
  """Returns one line per setting that differs between two to_dict() trees, less those in `ignore`, see RESUMABLE."""
  a, b = flat(old), flat(new)
  within = lambda key, name: key.endswith(name[1:]) if name[:2] == "*." else f"{key}.".startswith(f"{name}.")
  keys = [key for key in sorted(a.keys() | b.keys()) if not any(within(key, name) for name in ignore)]
  absent = "(not set)"
  return [f"{k}: {a.get(k, absent)} -> {b.get(k, absent)}" for k in keys if a.get(k, absent) != b.get(k, absent)]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Returns {dotted name: value} of nested settings as `to_dict` gives them."""
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{prefix}.{key}".lstrip(".")).items()}


def _plain(value: Any) -> Any:
  if isinstance(value, tuple | set):
    return list(value)
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return to_dict(value)
  raise ValueError(
    f"a config holds plain values (numbers, text, tuples, groups), not {type(value).__name__}: {value!r}"
  )


def _build(cls: type, values: Any, path: str) -> Any:
  if not isinstance(values, Mapping):
    raise ValueError(f"{path} is a group of settings ({', '.join(_names(cls))}), not the value {values!r}")
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  for key in values:
    if key not in fields:
      raise ValueError(_unknown(cls, key, path))
  built = {k: _convert(v, hints[k], f"{path}.{k}") for k, v in values.items()}
  for name, field in fields.items():
    if name not in built and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise ValueError(f"{path}.{name} is missing: it has no default, so the config must set it")
  try:
    return cls(**built)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _convert(value: Any, hint: Any, path: str) -> Any:
  typed = isinstance(value, Override)
  if options := union_members(hint):
    return _choose(value, options, path)
  if typing.get_origin(hint) is Literal:
    require_choice(path, value, typing.get_args(hint))
    return str(value)
  if hint is Duration:
    try:
      return Duration.parse(value)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, path)
  if hint is str and isinstance(value, str):
    return str(value)
  if typed:
    try:
      value = {"true": True, "false": False}.get(value.lower(), value) if hint is bool else ast.literal_eval(value)
    except (ValueError, SyntaxError):
      value = str(value)
  if typing.get_origin(hint) is tuple:
    if typed and isinstance(value, str) and typing.get_args(hint)[0] is str:  # knn,linear as in --evals
      value = [word.strip() for word in value.split(",") if word.strip()]
    if not isinstance(value, list | tuple):
      raise ValueError(f"{path} takes a list such as (1, 2), not {value!r}")
    args = typing.get_args(hint)
    args = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(args) != len(value):
      raise ValueError(f"{path} takes {len(args)} values, not {len(value)}: {value!r}")
    return tuple(_convert(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value) if abs(value) < 2**1023 else math.inf
  if hint is float and isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{path} takes a finite number, not {value!r}")
  if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
    raise ValueError(f"{path} takes {'true or false' if hint is bool else hint.__name__}, not {value!r}")
  return value


def _choose(value: Any, options: tuple[type, ...], path: str) -> Any:
  """A union of dataclasses is told apart by its `name`, whose default is the name of the method."""
  by_name = {o.__dataclass_fields__["name"].default: o for o in options}
  name = value.get("name") if isinstance(value, Mapping) else None
  if name is None and isinstance(value, Mapping):
    raise ValueError(f"{path}.name is missing: set it to one of {', '.join(sorted(by_name))}")
  if not isinstance(value, Mapping):
    raise ValueError(f"{path} is a group of settings with a name of {', '.join(sorted(by_name))}, not {value!r}")
  require_choice(f"{path}.name", str(name), tuple(sorted(by_name)))
  cls = by_name[str(name)]
  if isinstance(name, Override) and name.before != name:  # typed: the file speaks of another choice
    kept = _shared(by_name.get(str(name.before), cls), cls)
    others = {key: v for key, v in value.items() if key not in kept}
    value = {key: _sizes(v, kept[key]) for key, v in value.items() if key in kept} | _typed(others)
  return _build(cls, value, path)


def _sizes(value: Any, kind: Any) -> Any:
  """Returns a group of settings with what says a size alone, and what was typed, where its class tells sizes apart."""
  sizes = getattr(kind, "sizes", None)
  if sizes is None or not isinstance(value, Mapping):
    return value
  return {key: v for key, v in value.items() if key in sizes or isinstance(v, Override)}


def _typed(value: Mapping[str, Any]) -> dict[str, Any]:
  """Returns those of nested settings that were typed."""
  below = {key: _typed(v) if isinstance(v, Mapping) else v for key, v in value.items()}
  return {key: v for key, v in below.items() if isinstance(v, Override) or (isinstance(v, dict) and v)}


def _shared(one: type, other: type) -> dict[str, Any]:
  """Returns the settings that mean the same in both, and their types: declared by one class for both, or a group of the
  same kind that neither has a default of its own for.

  A name alone says little: `lam` weighs SIGReg in one method and correlations in another.
  """
  owner = lambda cls, name: next(base for base in cls.__mro__ if name in base.__dict__.get("__annotations__", ()))
  hints = [typing.get_type_hints(cls) for cls in (one, other)]
  bare = lambda cls, name: cls.__dataclass_fields__[name].default is dataclasses.MISSING  # else it is a method's own
  of_one_kind = lambda name: dataclasses.is_dataclass(hints[1][name]) and hints[0][name] == hints[1][name]
  group = lambda name: of_one_kind(name) and bare(one, name) and bare(other, name)
  same = [name for name in _names(one) if name in _names(other)]
  kept = ["name", *(name for name in same if owner(one, name) is owner(other, name) or group(name))]
  return {name: hints[1][name] for name in kept}


def _names(cls: type) -> list[str]:
  return [f.name for f in dataclasses.fields(cls) if f.init]


def _all_keys(cls: Any, path: str) -> list[str]:
  """Every setting below cls as a dotted path, through unions and nested groups."""
  keys, hints = [], typing.get_type_hints(cls)
  for name in _names(cls):
    here, hint = f"{path}.{name}", hints[name]
    keys.append(here)
    for option in union_members(hint) or (hint,):
      if dataclasses.is_dataclass(option) and option is not Duration:
        keys.extend(_all_keys(option, here))
  return keys


def _unknown(cls: type, key: str, path: str) -> str:
  near = difflib.get_close_matches(key, _names(cls), n=1, cutoff=0.6)
  right = [f"{path}.{near[0]}"] if near else []
  if path == "config" and key == "config":
    return "config.config is not a setting: leave out one of the two, as in --config.objective.lam=0.1"
  if not right:  # perhaps right name, wrong group: config.lr for config.optim.lr
    everywhere = {k.rsplit(".", 1)[1]: k for k in reversed(_all_keys(Config, "config"))}
    right = [everywhere[k] for k in difflib.get_close_matches(key, everywhere, n=1, cutoff=0.6)]
  hint = f"did you mean {right[0]}? " if right else ""
  if right == [f"{path}.{key}"]:  # it is one, of another encoder, objective, ...
    hint = f"{getattr(cls, 'name', cls.__name__)!r} has none, others have. "
  return f"{path}.{key} is not a setting; {hint}{path} has: {', '.join(_names(cls))}"
