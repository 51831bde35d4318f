"""Reading and writing checkpoint files. Nothing in a file is ever run: tensors and plain values, or an error.

torch and huggingface_hub are imported where they are needed: safetensors files are read without them.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jepa_jax.weights import open_clip
from jepa_jax.weights.hub import download
from jepa_jax.weights.names import (
  Tensors,
  below_tower,
  find_networks,
  layout_of,
  respelt,
  take_decoders,
  unwrap,
  without_heads,
)
from jepa_jax.weights.pixels import pixels_known, pixels_of
from jepa_jax.workdir import CHECKPOINTS, read_json, write_whole

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
_OURS = "jepa_jax"
_INTEGERS = tuple(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))
_DTYPES = {  # of safetensors
  **{f"F{n}": np.dtype(f"float{n}") for n in (16, 32, 64)},
  **{f"{letter}{n}": np.dtype(f"{name}{n}") for letter, name in (("I", "int"), ("U", "uint")) for n in (8, 16, 32, 64)},
  "BF16": np.dtype(jnp.bfloat16),
  "BOOL": np.dtype(bool),
}
WRITTEN = ("float32", "bfloat16", "float16", "float64", *_INTEGERS, "bool")
_OTHERS = {  # how the file begins -> what it is
  b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for: git lfs pull fetches that",
  b"<!doctype": "a web page, not a checkpoint: the address leads to a page about the file, or asks to log in",
  b"<html": "a web page, not a checkpoint: the address leads to a page about the file, or asks to log in",
  b"<?xml": "a message of a web server, not a checkpoint: look into it, and get the file again",
  b"{": "JSON text, not a checkpoint: look into it; servers answer so where a file may not be read",
  b"\x1f\x8b": "compressed by gzip: unpack it first (gunzip)",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What was read: tensors by item ("target_encoder", "encoder", "predictor", ...), and what they are called like.

  `config` is a Hugging Face folder's config.json or the settings in a file of ours, {} where there is none; `rest` are
  the names of what else the file holds (optimiser, epoch, ...).
  """

  where: str
  layout: str  # a table of `weights.layouts` (meta, timm, hf, dinov2, dinov3, clip), resnet, hf_resnet or jepa_jax
  items: dict[str, Tensors]
  config: dict[str, Any]
  rest: tuple[str, ...] = ()


def read(where: str | Path) -> Checkpoint:
  """Returns the checkpoint in a file, a folder or a repository of the Hugging Face hub ("owner/name").

  ValueError for a file that is damaged, of an unknown kind, or that holds code.
  """
  path = Path(where).expanduser()
  if not path.exists():
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(where)) or path.suffix in (*TORCH_SUFFIXES, ".safetensors"):
      raise ValueError(f"{where}: no such file or folder, and not the id of a hub repository (owner/name)")
    path = download(str(where))
  if path.name in ("model.safetensors", "pytorch_model.bin") and (path.parent / "config.json").exists():
    path = path.parent  # what config.json says belongs to it
  if (path / CHECKPOINTS).is_dir():
    raise ValueError(f"{where} is the workdir of a run, and no file of weights: name it by --workdir, or --init-from")
  if path.is_dir():
    tensors, config = _read_folder(path)
    return _checkpoint(str(where), {"encoder": tensors}, config)
  if path.suffix == ".safetensors":
    tensors, metadata = _read_safetensors(path)
    if metadata.get("format") == _OURS:
      return _read_ours(str(where), tensors, metadata)
    return _checkpoint(str(where), {"encoder": tensors}, {})
  if path.suffix in TORCH_SUFFIXES:
    items, rest = _items(_read_torch(path))
    return _checkpoint(str(where), items, {}, rest)
  raise ValueError(f"{where}: of unknown kind; *.safetensors, {', '.join('*' + s for s in TORCH_SUFFIXES)} or a folder")


def write_safetensors(path: str | Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
  """Writes one safetensors file, at once or not at all; ValueError where there is one already."""
  write_whole(Path(path).expanduser(), lambda temporary: _save(tensors, temporary, metadata), overwrite=False)


def write_ours(path: str | Path, variables: Mapping[str, Tensors], config: Mapping[str, Any]) -> None:
  """Writes flattened trees as "<tree>/<name>", for example "encoder/blocks/attn/qkv/kernel", and the settings."""
  tensors = {f"{tree}/{key}": np.asarray(x) for tree, flat in variables.items() for key, x in flat.items()}
  write_safetensors(path, tensors, {"format": _OURS, "config": json.dumps(config)})


def write_folder(
  path: str | Path,
  tensors: Tensors,
  documents: Mapping[str, Mapping[str, Any]],
  texts: Mapping[str, str] | None = None,
) -> None:
  """Writes a Hugging Face folder, model.safetensors, JSON documents and texts; ValueError where it exists already."""

  def write(folder: Path) -> None:
    folder.mkdir()
    _save(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, document in documents.items():
      (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    for name, text in (texts or {}).items():
      (folder / name).write_text(text)

  write_whole(Path(path).expanduser(), write, overwrite=False)


def _save(tensors: Tensors, path: Path, metadata: Mapping[str, str]) -> None:
  """Writes the file and reads it back: safetensors 0.8.0 stores an array that is not contiguous as its bytes lie."""
  for key, x in tensors.items():
    if x.dtype.name not in WRITTEN:
      raise ValueError(f"{key} is {x.dtype.name}, which the file cannot hold: convert it to {', '.join(WRITTEN[:3])}")
  tensors = {key: np.ascontiguousarray(x).reshape(x.shape) for key, x in tensors.items()}
  save_file(tensors, path, dict(metadata))
  found, _ = _read_safetensors(path)
  bad = [key for key, x in tensors.items() if key not in found or found[key].tobytes() != x.tobytes()]
  if bad or len(found) != len(tensors):
    raise OSError(f"{path} does not hold what was written ({', '.join(bad[:3]) or 'other names'}): nothing was kept")
  path.chmod(0o644)  # safetensors leaves it to its owner alone


def _check_is_no_other(path: Path) -> None:
  """Raises a ValueError that says what a file really is, where a download left something else under its name."""
  with path.open("rb") as file:
    start = file.read(512)
  for sign, what in _OTHERS.items():
    if start.lstrip().lower().startswith(sign) and start[8:9] != b"{":  # there safetensors' own JSON begins
      raise ValueError(f"{path} is {what}")
  if not start and path.suffix in (*TORCH_SUFFIXES, ".safetensors"):
    raise ValueError(f"{path} is empty: a download was cut short; get it again")


def _checkpoint(
  where: str, items: Mapping[str, Tensors], config: dict[str, Any], rest: tuple[str, ...] = ()
) -> Checkpoint:
  _check_tensors(where, items)
  items = {name: unwrap(tensors, where) for name, tensors in items.items()}
  items = {name: open_clip.as_transformers(x) if open_clip.is_open_clip(x) else x for name, x in items.items()}
  found = {name: below_tower(tensors) for name, tensors in items.items()}
  items, other = {name: own for name, (own, _) in found.items()}, [key for _, keys in found.values() for key in keys]
  items, decoders = take_decoders(items)
  items, beside = find_networks(items)
  layout = next(filter(None, map(layout_of, items.values())), None)
  if layout is None:
    some = ", ".join(sorted(key for tensors in items.values() for key in tensors)[:5])
    raise ValueError(
      f"{where}: no network in a layout known here (ViTs of timm, DINO, MAE, MoCo v3, I-JEPA and Hugging Face, CLIP, "
      f"SigLIP, ResNets); it has {some}"
    )
  periods = next((x for of in items.values() for key, x in of.items() if key == "rope_embed.periods"), None)
  if periods is not None:
    config = {**config, "rope_periods": np.asarray(periods, np.float32).tolist()}
  dropped: dict[str, None] = {}
  for name, tensors in items.items():
    if own := layout_of(tensors):
      layout = "timm" if {own, layout} == {"meta", "timm"} else layout
      kept, left_out = without_heads(tensors)
      if config.get("qkv_bias") is True and not any(re.search(r"\b(query|q_proj)\.bias$", key) for key in kept):
        raise ValueError(
          f"{where}: config.json has qkv_bias=true, and {name} has no bias of a query: get the file again"
        )
      items[name] = respelt(own, kept)
      dropped |= dict.fromkeys(left_out)
  return Checkpoint(where, layout, items | decoders, config, (*rest, *other, *beside, *dropped))


def _check_tensors(where: str, items: Mapping[str, Tensors]) -> None:
  for tensors in items.values():
    for key, x in tensors.items():
      if not isinstance(key, str):
        raise ValueError(f"{where}: tensors have numbers for names ({key!r}), as in an optimiser's state: give a model")
      if x.dtype.kind == "c":
        raise ValueError(f"{where}: {key} is complex ({x.dtype}), which no weight of a ViT is")


def _items(content: Any) -> tuple[dict[str, Tensors], tuple[str, ...]]:
  """Returns ({item: tensors}, names of the rest) of what a torch file holds: a state dict, or several under names."""
  is_tensors = lambda x: isinstance(x, Mapping) and x and all(hasattr(v, "numpy") for v in x.values())
  if is_tensors(content):
    return {"encoder": _arrays(content)}, ()
  if not isinstance(content, Mapping):
    raise ValueError(f"the file holds a {type(content).__name__}, not a dict of tensors")
  flat = {name: x for name, x in content.items() if hasattr(x, "numpy") and hasattr(x, "layout")}
  if len(flat) > len(content) / 2:  # a state dict with a few numbers beside its arrays
    return {"encoder": _arrays(flat)}, tuple(str(name) for name in content if name not in flat)
  items = {str(name): _arrays(value) for name, value in content.items() if is_tensors(value)}
  if not items:
    raise ValueError(f"the file holds no dict of tensors, only {', '.join(map(str, content)) or 'an empty dict'}")
  return items, tuple(str(name) for name in content if str(name) not in items)


def _arrays(state_dict: Mapping[str, Any]) -> Tensors:
  torch = _torch()

  def to_numpy(key, x):
    if x.layout != torch.strided or x.is_quantized:
      raise ValueError(f"{key} is stored sparse or quantised ({x.dtype}, {x.layout}): make it dense, float32, first")
    x = x.detach()
    try:
      return x.view(torch.int16).numpy().view(jnp.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
    except TypeError as error:  # float8 and what is to come
      raise ValueError(f"{key} is {x.dtype}, which is not read here: convert it to float32 or bfloat16") from error

  return {key: to_numpy(key, x) for key, x in state_dict.items()}


def _read_torch(path: Path) -> Any:
  _check_is_no_other(path)
  torch = _torch()
  try:  # mapped into memory: of a file with several networks only what is used is read
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
  except pickle.UnpicklingError as error:
    named = re.search(r"(?:GLOBAL|class|global) ([\w.]+\.\w+)", str(error))
    with path.open("rb") as file:
      start = file.read(20)
    if not named and start[:1] != b"\x80" and not zipfile.is_zipfile(path):
      raise ValueError(f"{path} is damaged or no file of torch.save (it begins {start!r}); get it again") from error
    what = named[1] if named else "a pickle of unknown things"
    raise ValueError(
      f"{path} holds more than tensors and plain values ({what}), and reading that would run code from the file, so it "
      "was not read.\nIf you trust who made it, turn it into tensors where nothing can be lost, for example in a "
      "container:\n"
      "  python -c \"import torch; c = torch.load('FILE', weights_only=False, map_location='cpu'); "
      "torch.save({k: v for k, v in c.items() if isinstance(v, dict) and all(map(torch.is_tensor, v.values()))}, "
      "'weights.pth')\""
    ) from error
  except PermissionError:
    raise
  # torch says "invalid argument" of half a file, and of a text whatever its letters mean to an unpickler.
  except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, LookupError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is damaged or no file of torch.save ({_first_line(error)}); get it again") from error


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
  """Returns (arrays, metadata); the arrays lie in the file still, which is mapped into memory."""
  _check_is_no_other(path)
  try:
    with safe_open(path, framework="numpy") as file:  # which also compares the header with the file's length
      metadata = dict(file.metadata() or {})
  except SafetensorError as error:
    raise ValueError(f"{path} is damaged or no safetensors file ({_first_line(error)}); get it again") from error
  with path.open("rb") as file:
    start = 8 + int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(start - 8))
  content = np.memmap(path, np.uint8, "r", offset=0) if path.stat().st_size > start else np.zeros(start, np.uint8)
  found = {}
  for key, entry in header.items():
    if key == "__metadata__":
      continue
    if entry["dtype"] not in _DTYPES:
      raise ValueError(f"{path}: {key} is {entry['dtype']}, which is not read here: convert it to float32 or bfloat16")
    first, end = (start + offset for offset in entry["data_offsets"])
    # A copy where numpy would read across its alignment, and a plain array, not a memmap, in what is made of it.
    found[key] = np.asarray(content[first:end]).view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
  return found, metadata


_OWN = ("data", "view", "notes", "tokenizer", "rope_periods")  # what other files say, beside config.json


def _read_folder(path: Path) -> tuple[Tensors, dict[str, Any]]:
  """Returns (tensors, config.json) of a Hugging Face folder: one safetensors file, several and an index, or a .bin."""
  config = path / "config.json"
  settings = read_json(config) if config.exists() else {}
  settings = {key: value for key, value in settings.items() if key not in _OWN}  # of another meaning there
  if isinstance(made_with := settings.get("model_args"), dict):  # timm's
    names = {"num_heads": "num_attention_heads", "act_layer": "hidden_act"}
    settings |= {ours: made_with[name] for name, ours in names.items() if name in made_with}
  settings |= pixels_of(path, settings)
  if (words := path / "tokenizer.json").exists():
    settings["tokenizer"] = json.dumps(read_json(words))
  if (pair := path / open_clip.CONFIG).exists():
    settings |= open_clip.settings(read_json(pair))
  for name in (*(open_clip.WEIGHTS if pair.exists() else ()), "model.safetensors"):
    if (path / name).exists():
      return _read_one(path / name), settings
  for index in (path / f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")):
    if not index.exists():
      continue
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
      raise ValueError(f"{index} has no weight_map {{name of a tensor: file}}: get it again")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
      raise ValueError(f"{index} names files outside of its folder ({outside[0]}); none of them was read")
    if lacking := [name for name in names if not (path / name).exists()]:
      raise ValueError(f"{path} lacks {', '.join(lacking)}, of which {index.name} speaks")
    return {k: x for name in names for k, x in _read_one(path / name).items()}, settings
  if (path / "pytorch_model.bin").exists():
    return _read_one(path / "pytorch_model.bin"), settings
  raise ValueError(f"{path} holds none of model.safetensors, pytorch_model.bin, and no index of their parts")


def _read_one(path: Path) -> Tensors:
  """Returns the tensors of a file that holds one model; ValueError for one that holds several."""
  if path.suffix == ".safetensors":
    return _read_safetensors(path)[0]
  items, _ = _items(_read_torch(path))
  if set(items) != {"encoder"}:
    raise ValueError(f"{path} holds {', '.join(items)}, not one model; give the file itself")
  return items["encoder"]


def _read_ours(where: str, tensors: Tensors, metadata: Mapping[str, str]) -> Checkpoint:
  items: dict[str, Tensors] = {}
  for name, x in tensors.items():
    tree, _, key = name.partition("/")
    items.setdefault(tree, {})[key] = x
  try:
    config = json.loads(metadata.get("config", "{}"))
  except ValueError as error:
    raise ValueError(f"{where}: the settings in it are no JSON ({error}); get it again") from error
  groups = isinstance(config, dict) and all(isinstance(config.get(key, {}), dict) for key in ("encoder", "data"))
  if not groups or not pixels_known(config.get("data", {})):
    raise ValueError(f"{where}: the settings in it are not those of a file of ours ({str(config)[:60]}); get it again")
  return Checkpoint(where, _OURS, items, config)


def _torch() -> Any:
  try:
    import torch
  except ImportError as error:
    raise ValueError("*.pth, *.pt and *.bin are read by torch: python -m pip install torch") from error
  return torch


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [repr(error)])[0][:200]
