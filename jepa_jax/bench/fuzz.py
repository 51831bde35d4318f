"""Odd settings: every one either makes an experiment or is refused by a sentence that names it."""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jepa_jax.config import build_config, load_config, to_dict, variants
from jepa_jax.experiment import make_experiment
from jepa_jax.sharding import MeshConfig, make_mesh

DESCRIPTION = "Odd settings, at random: each makes an experiment or is refused by a sentence that names it."
ODD: tuple[Any, ...] = (
  *(None, True, -1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**30, 0.5, -0.5, 1.5, 1e30, -1e30, 1e-30),
  *(float("inf"), float("-inf"), float("nan"), "", "x", "none", "1", "0steps", "1%", "1e999steps", "1e30steps", "-1ep"),
  *([], [1], [1, 2], [0.0, 0.0], [1e9, 1e9], [2.0, 1.0], ["vit"], [[1]], [float("nan")], {}, {"name": "vit"}, {"x": 1}),
)
TYPED = ("", "nan", "inf", "-1", "1e999", "(", "[1,2", "None", "True", "lambda: 0", "{'a': 1}", "1_000", "0x10", "'x'")


class NotRefused(AssertionError):
  """A setting that ended in another error than a ValueError, or in one that does not say which setting it was."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("--cases", type=int, default=10_000, help="how many settings to try (default: %(default)s)")
  parser.add_argument("--seed", type=int, default=0, help="draws them (default: %(default)s)")
  parser.add_argument(
    "--networks-every", type=int, default=20, help="of every so many, one is also built (default: %(default)s)"
  )
  parser.add_argument("--configs", default="configs", metavar="DIR", help="the folder of config files")


def run(cases: int = 10_000, seed: int = 0, networks_every: int = 20, configs: str = "configs") -> dict[str, Any]:
  """Returns how many of the settings were refused and how many accepted, for JSON, and the first faults.

  One setting of a shipped config is replaced by an odd value, as in a config file or as typed on the command line.
  """
  rng, counts, faults, began_s = np.random.default_rng(seed), collections.Counter(), [], time.monotonic()
  whole = [to_dict(load_config(f"{path}:{name}")) for path, name in _files(Path(configs))]
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  for case in range(cases):
    values, key, typed, value = draw(rng, whole)
    try:
      counts[try_one(values, key, typed, value, mesh if case % networks_every == 0 else None)] += 1
    except NotRefused as fault:
      counts["faults"] += 1
      faults.append(str(fault))
  return {
    "cases": cases,
    "seed": seed,
    **{name: counts[name] for name in ("refused", "accepted", "built", "faults")},
    "first_faults": faults[:20],
    "seconds": round(time.monotonic() - began_s, 1),
  }


def draw(rng: np.random.Generator, whole: list[dict]) -> tuple[dict, str, bool, Any]:
  """Returns (config values, dotted key, whether the value is typed, value)."""
  values = whole[rng.integers(len(whole))]
  keys = list(_keys(values))
  key = keys[rng.integers(len(keys))]
  typed = bool(rng.random() < 0.3)
  pool = TYPED if typed else ODD
  return values, key, typed, pool[rng.integers(len(pool))]


def try_one(values: dict, key: str, typed: bool, value: Any, mesh: Any = None) -> str:
  """Returns "refused", "accepted", or "built" where its networks' shapes were made on `mesh`; NotRefused else."""
  said = f"{key}={value!r}" + (" (typed)" if typed else "")
  try:
    if typed:
      cfg = build_config(values, {key: value})
    else:
      changed = copy.deepcopy(values)
      node = changed
      *parents, leaf = key.split(".")
      for parent in parents:
        node = node[parent]
      node[leaf] = value
      cfg = build_config(changed)
    if mesh is None:
      return "accepted"
    make_experiment(cfg, mesh, num_train=10**6, num_classes=10)
    return "built"
  except ValueError as error:
    if not any(word in str(error) for word in key.split(".")):
      raise NotRefused(f"{said}: refused without its name: {error}") from error
    return "refused"
  except Exception as error:
    raise NotRefused(f"{said}: {type(error).__name__}: {str(error)[:200]}") from error


def _keys(values: Any, path: str = "") -> Iterator[str]:
  for name, below in values.items():
    here = f"{path}.{name}".lstrip(".")
    yield here
    if isinstance(below, dict):
      yield from _keys(below, here)


def _files(folder: Path) -> list[tuple[Path, str]]:
  files = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
  if not files:
    raise ValueError(
      f"--configs={folder}: there are no config files; run it from the top of the clone, or name a folder"
    )
  return list(itertools.chain.from_iterable(((f, v) for v in variants(f) or ("",)) for f in files))
