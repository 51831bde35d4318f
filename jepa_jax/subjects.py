"""The rows of an evaluation's table: raw pixels, the encoder as it began, the checkpoint; with their features."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jepa_jax import distributed
from jepa_jax.config import Config, to_dict
from jepa_jax.data import ImageSet, Tokenizer
from jepa_jax.evals import PIXEL_PX, Data, Splits, Subject
from jepa_jax.evals.base import Features
from jepa_jax.evals.features import NO_ROWS, digest, make_features, of_output, of_pixels, weights_digest
from jepa_jax.experiment import Experiment
from jepa_jax.objectives import Objective, first_variables, without_pull
from jepa_jax.runs import Run
from jepa_jax.sharding import replicated
from jepa_jax.streams import stream
from jepa_jax.views import center_view
from jepa_jax.workdir import FEATURES, code_digest

Tree = Any
PIXELS, RANDOM = "raw pixels", "random encoder"
_MACHINE = ("root", "num_threads", "prefetch", "cache_mb", "max_bad_share")  # settings of the data that change no image
_EVERYTHING = frozenset({"features", "encoder", "networks"})


# What features depend on, of the code: with another version of it they are made again.
_MAKERS = ("models", "views", "objectives", "data", "streams.py", "evals/features.py", "evals/dense.py", "subjects.py")


def seen_of(
  cfg: Config, objective: Objective, train: ImageSet, test: ImageSet, tokenizer: Tokenizer | None = None
) -> Data:
  """Returns both splits and what is seen of them."""
  size_hw, share = cfg.view_hw, cfg.evals.crop_fraction
  view_fn = lambda batch: center_view(batch, size_hw, objective.pixels, share, objective.interpolation)
  return Data(
    train, test, view_fn, size_hw, share, cfg.data.canvas_px, cfg.data.max_aspect, cfg.encoder.image_size, tokenizer
  )


@contextmanager
def subjects(
  run: Run, cfg: Config, experiment: Experiment, data: Data, mesh: Mesh, baselines: bool, keep: bool, again: bool
) -> Iterator[list[Subject]]:
  """Yields the rows to evaluate, the checkpoint's last. Features that are made for it stay on disk with `keep` only.

  again: features that lie on disk are made anew.
  """
  folder, made = run.workdir / FEATURES, []
  held = [0.0]  # GB of features in memory, where the disk does not take them
  common = dict(cfg=cfg, experiment=experiment, data=data, mesh=mesh, folder=folder, held=held, again=again)
  names = tuple(experiment.objective.networks())
  applied = [to_dict(run.cfg.encoder), to_dict(run.cfg.objective)]  # the same weights may be applied otherwise
  variables = functools.cache(lambda: run.variables(experiment, *names))
  # Two runs may reach the same step in the same folder: hence the weights themselves.
  weights = functools.cache(lambda: digest([applied, weights_digest([variables()[name] for name in names])]))
  networks = functools.cache(lambda: run.networks(experiment))
  gives = _EVERYTHING | data.train.columns.keys()
  imported = run.meta.get("imported") or {}
  title = imported["family"] if imported.get("encoder_only") else f"{cfg.objective.name}, step {run.step}"
  this = _subject(title, gives, variables, weights, networks, made, **common)
  rows = [*(_baselines(cfg, experiment, data, mesh, common) if baselines else ()), this]
  try:
    yield rows
  finally:
    if not keep and distributed.is_primary():
      for path in made:
        shutil.rmtree(path, ignore_errors=True)


def _baselines(cfg: Config, experiment: Experiment, data: Data, mesh: Mesh, common: Mapping[str, Any]) -> list[Subject]:
  start = functools.cache(lambda: _random_variables(experiment, mesh))
  about = digest([to_dict(cfg.encoder), to_dict(cfg.objective), cfg.seed])
  pixels = _subject(PIXELS, frozenset({"features"}), dict, lambda: "", dict, [], **common)
  gives = frozenset({"features", "encoder"}) | data.train.columns.keys()
  return [pixels, _subject(RANDOM, gives, start, lambda: about, dict, [], **common)]


def _subject(
  row: str,
  gives: frozenset[str],
  variables: Callable[[], Mapping[str, Tree]],
  about: Callable[[], str],
  networks: Callable[[], Mapping[str, Tree]],
  made: list[Path],
  *,
  cfg: Config,
  experiment: Experiment,
  data: Data,
  mesh: Mesh,
  folder: Path,
  held: list[float],
  again: bool,
) -> Subject:
  """Returns a row; `about` stands for its weights, the folders of features that it makes are added to `made`."""
  objective, networks_here = experiment.objective, experiment.abstract_state.networks
  abstract = objective.variables(networks_here["params"], networks_here["state"], networks_here["target"])
  splits = {"train": data.train, "test": data.test}
  seen = seen_of_images(cfg, objective, data.train, data.test)

  @functools.cache
  def of_split(name: str, split: str) -> Features:
    features_fn = network_features(None if row == PIXELS else name, experiment, data.view_hw, data.crop_fraction)
    return make(features_fn, {} if row == PIXELS else variables()[name], name, name, split)

  def make(features_fn: Callable, weights: Tree, name: str, what: str, split: str, cost: float = 1.0) -> Features:
    half = _is_half(cfg, features_fn, weights, splits)
    path = folder / f"{_slug(row)}-{name}-{split}-{digest([seen, split, about(), what, half])}"
    if not path.exists():
      made.append(path)
    title = f"{row}, {split}" if name == "image" else f"{row}, {name}, {split}"
    memory_gb, batch_size = cfg.evals.memory_gb - held[0], max(1, int(cfg.evals.batch_size / cost))
    found = make_features(path, title, features_fn, weights, splits[split], mesh, batch_size, half, memory_gb, again)
    arrays = {id(x): x for x in found if not isinstance(x, np.memmap)}.values()
    held[0] += sum(x.nbytes for x in arrays) / 1e9
    return found

  def features(name: str, wanted: tuple[str, ...] = tuple(splits)) -> Splits:
    return Splits(**{split: of_split(name, split) if split in wanted else NO_ROWS for split in splits})

  return Subject(
    row=row,
    gives=gives,
    settings=cfg.evals,
    data=data,
    mesh=mesh,
    objective=objective,
    features=features,
    made=_by_functions(make, variables),
    variables=lambda name: variables()[name],
    abstract=abstract,
    networks=networks,
    about=lambda: digest([row, seen, about()]),
  )


def _by_functions(make: Callable[..., Features], variables: Callable[[], Mapping[str, Tree]]) -> Callable:
  """Returns `Subject.made`: features that a protocol's own function makes, each of them once."""
  kept: dict[tuple[str, str], Features] = {}

  def made(what: str, features_fn: Callable, wanted: tuple[str, ...], cost: float) -> dict[str, Features]:
    program, weights, name = jax.jit(features_fn), variables()["image"], what.split("-")[0]
    for split in wanted:
      if (what, split) not in kept:
        kept[what, split] = make(program, weights, name, what, split, cost)
    return {split: kept[what, split] for split in wanted}

  return made


def seen_of_images(cfg: Config, objective: Objective, *splits: ImageSet) -> list[Any]:
  """Returns what stands for the images and for what is seen of them."""
  settings = {key: value for key, value in to_dict(cfg.data).items() if key not in _MACHINE}
  code = code_digest(type(without_pull(objective)), only=_MAKERS)
  images = [(split.fingerprint, len(split)) for split in splits]
  square = cfg.view_hw[0] == cfg.view_hw[1]
  return [
    settings,
    cfg.view_px if square else cfg.view_hw,
    cfg.evals.crop_fraction,
    objective.interpolation,
    code,
    *images,
  ]


# The checkpoints of a run are evaluated by the same programs: what is jitted is kept, so that it is traced once.
@functools.lru_cache(maxsize=16)
def network_features(
  name: str | None, experiment: Experiment, view_hw: tuple[int, int], share: float
) -> Callable[[Tree, Tree], dict[str, jax.Array]]:
  """Returns the jitted (variables, batch) -> features of a network, or (None) the pixels; the variables are an
  argument: closed over, they would be constants of the program."""
  objective = experiment.objective
  size = view_hw if name else (min(view_hw[0], PIXEL_PX), min(view_hw[1], PIXEL_PX))
  view_fn = lambda batch: center_view(batch, size, objective.pixels, share, objective.interpolation)
  if name is None:
    return jax.jit(lambda weights, batch: of_pixels(weights, view_fn(batch)))
  network = objective.networks()[name]
  extract = of_output(network.apply_fn)
  inputs = view_fn if network.reads == "canvas" else lambda batch: batch[network.reads]
  return jax.jit(lambda weights, batch: extract(weights, inputs(batch)))


def _is_half(cfg: Config, features_fn: Callable, weights: Tree, splits: Mapping[str, ImageSet]) -> bool:
  """Whether features are stored in half precision: as asked for, or where they would be too large otherwise."""
  widths = sum(x.shape[1] for x in jax.eval_shape(features_fn, weights, splits["train"].empty_rows(1)).values())
  return cfg.evals.in_half(4 * widths * sum(len(images) for images in splits.values()))


def _random_variables(experiment: Experiment, mesh: Mesh) -> dict[str, Tree]:
  """The variables that training began with: same seed, step 0."""
  return _random_fn(experiment, mesh)(experiment.key)


@functools.lru_cache(maxsize=4)
def _random_fn(experiment: Experiment, mesh: Mesh) -> Callable[[jax.Array], dict[str, Tree]]:
  init = lambda key: first_variables(experiment.objective, stream(key, "init"), experiment.init_batch())
  return jax.jit(init, out_shardings=replicated(mesh))


def _slug(name: str) -> str:
  return "".join(c if c.isalnum() else "_" for c in name)
