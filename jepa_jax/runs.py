"""A run that is on disk, opened: its config and its networks, whole or in part."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jepa_jax import checkpoint
from jepa_jax.config import Config, build_config, difference, to_dict
from jepa_jax.data import Tokenizer, canvases_of
from jepa_jax.duration import Duration
from jepa_jax.experiment import Experiment, make_experiment
from jepa_jax.objectives import Objective
from jepa_jax.sharding import MeshConfig, batch_ways, make_mesh
from jepa_jax.upgrade import upgrade_config, upgrade_item, upgrade_tree
from jepa_jax.views import Pixels, center_view, normalize
from jepa_jax.workdir import CHECKPOINTS, CONFIG, FORMAT, check_format, read_json, write_json, written_by

log = logging.getLogger(__name__)
Tree = Any
_TOLERANCE = 1.0  # of the range from black to white, either way: noise is no mistake, 0 to 255 is


@dataclasses.dataclass(frozen=True)
class Run:
  """One checkpoint of a run. Nothing of its networks is read before it is asked for."""

  workdir: Path
  step: int
  meta: dict[str, Any]
  cfg: Config

  @property
  def format(self) -> int:
    return self.meta.get("format", 1)

  def experiment(self, mesh: Mesh | None = None) -> Experiment:
    """Returns its experiment on a mesh (default: one device of this process)."""
    mesh, num_classes = mesh or one_device(), self.meta["num_classes"]
    # What it computes is evaluation: any batch that the mesh takes will do, and any length.
    batch_size, total = batch_ways(mesh) * self.cfg.batch_size, Duration(1, "steps")
    cfg = dataclasses.replace(self.cfg, microbatch=1, batch_size=batch_size, total=total)
    return make_experiment(cfg, mesh, num_train=cfg.batch_size, num_classes=num_classes)

  def read(self, abstract: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns these arrays of {"params": ..., "target": ..., "state": ...}: all of them, or some.

    CheckpointError where one is missing or of another shape.
    """
    old = upgrade_tree(dict(abstract), self.format, back=True)
    item = upgrade_item("networks", self.format)
    verify = self.cfg.checkpoint.verify
    items = checkpoint.restore(self.workdir, self.step, partial=True, verify=verify, **{item: old})
    return upgrade_tree(items[item], self.format)

  @property
  def tokenizer(self) -> Tokenizer | None:
    """What made numbers of the captions it was trained on; None where it was trained on none."""
    text = self.meta.get("tokenizer")
    return Tokenizer(text, f"the tokenizer of {self.workdir}") if text else None

  def networks(self, experiment: Experiment) -> dict[str, Tree]:
    """Returns all networks, {"params", "target", "state"}, where the experiment wants them."""
    return self.read(experiment.abstract_state.networks)

  def variables(self, experiment: Experiment, *names: str) -> dict[str, Tree]:
    """Returns what these networks of the objective are applied to; nothing else is read."""
    wanted = experiment.abstract_state.networks
    pick = lambda networks: {name: v for name, v in _variables(experiment.objective, networks).items() if name in names}
    used = {id(leaf) for leaf in jax.tree.leaves(pick(wanted))}
    is_used = jax.tree.map(lambda leaf: id(leaf) in used, wanted)
    found = self.read(_pruned(wanted, is_used))
    return pick(_filled(wanted, found))


def _variables(objective: Objective, networks: Mapping[str, Tree]) -> dict[str, Tree]:
  return objective.variables(networks["params"], networks["state"], networks["target"])


def _pruned(tree: Tree, keep: Tree) -> Tree:
  """Returns the nested dict less the leaves that are not kept, and less what then is empty."""
  if not isinstance(tree, Mapping):
    return tree
  parts = {key: _pruned(sub, keep[key]) for key, sub in tree.items() if any(jax.tree.leaves(keep[key]))}
  return parts


def _filled(tree: Tree, found: Tree) -> Tree:
  """Returns `tree` with the leaves of `found` where it has any: of the others nobody asks for more than their place."""
  if not isinstance(tree, Mapping):
    return found
  return {key: _filled(sub, found[key]) if key in found else sub for key, sub in tree.items()}


def one_device() -> Mesh:
  """Returns the mesh of this process's first device."""
  return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])


def find_checkpoint(where: str | Path, step: int | None = None) -> tuple[Path, int]:
  """Returns (workdir, step) for a workdir or for a folder <workdir>/checkpoints/<step>."""
  path = Path(where).expanduser().resolve()
  if path.name.isdigit() and path.parent.name == CHECKPOINTS:
    path, step = path.parent.parent, int(path.name)
  if not path.is_dir():
    what = "is a file" if path.exists() else "does not exist"
    raise checkpoint.CheckpointError(f"{path} {what}; give the --workdir of a run, or one of its checkpoints")
  found = checkpoint.latest_step(path) if step is None else step
  if found is None:
    raise checkpoint.CheckpointError(f"{path} holds no finished checkpoint; train first, or give another --workdir")
  checkpoint.checkpoint_path(path, found)
  return path, found


def open_run(where: str | Path, step: int | None = None) -> Run:
  """Returns a checkpoint of a run: its newest, or `step`, or the one whose folder is given; also of older formats.

  CheckpointError where there is none or it is damaged; ValueError for a format that is newer than this code.
  """
  workdir, step = find_checkpoint(where, step)
  meta = checkpoint.read_meta(workdir, step)
  check_format(meta.get("format", 1), f"the checkpoint of step {step} in {workdir}", meta.get("jepa_jax"))
  return Run(workdir, step, meta, build_config(upgrade_config(meta["config"], meta.get("format", 1))))


class LoadedEncoder(NamedTuple):
  """An encoder for use: (apply_fn, params, config), and a call that takes images of any kind and size.

  apply_fn(params, images_BxHxWxC) -> EncoderOutput(pooled_BxD, tokens_BxNxD, probe_BxF), for jit and grad; images are
  uint8, or float already normalised with config.data.mean and std, and of the size that the encoder is to see.
  """

  apply_fn: Callable[[Tree, jax.Array], Any]
  params: Tree
  config: Config

  def __call__(self, images: Any, batch_size: int = 64) -> np.ndarray:
    """Returns the features of images, float32 (N, D): seen as evaluation sees them.

    images: paths, Pillow images or uint8 arrays (H, W[, C]), of any sizes, in a list or alone; or a uint8 array
    (N, H, W, C). One that does not decode is a ValueError that names it.
    """
    alone = isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    images = [images] if alone else list(images)
    if not images:
      raise ValueError("there are no images: give at least one")
    cfg, rows, found = self.config, min(batch_size, len(images)), []
    see = _view_fn(self.apply_fn, cfg.data.canvas_side, cfg.view_hw, cfg)
    for start in range(0, len(images), rows):
      part = images[start : start + rows]
      canvases = canvases_of([*part, *part[:1] * (rows - len(part))], cfg.data)
      found.append(np.asarray(see(self.params, canvases), np.float32)[: len(part)])
    return np.concatenate(found)


@functools.lru_cache(maxsize=8)
def _view_fn(apply_fn: Callable, side: int, view_hw: tuple[int, int], cfg: Config) -> Callable[[Tree, Tree], jax.Array]:
  pixels, share = Pixels(cfg.data.mean, cfg.data.std), cfg.evals.crop_fraction
  interpolation = cfg.objective.views.interpolation
  view = lambda batch: center_view(batch, view_hw, pixels, share, interpolation)
  return jax.jit(lambda params, batch: apply_fn(params, view(batch)).pooled_BxD)


def load_encoder(where: str | Path, step: int | None = None) -> LoadedEncoder:
  """Returns the encoder of a workdir (its newest checkpoint, or `step`) or of one checkpoint folder.

  It unpacks as (apply_fn, params, config). CheckpointError where it is missing or damaged.
  """
  run = open_run(where, step)
  experiment = run.experiment()
  objective = experiment.objective
  params = run.variables(experiment, "image")["image"]
  return LoadedEncoder(on_pixels(objective), params, run.cfg)


def on_pixels(objective: Objective) -> Callable[[Tree, jax.Array], Any]:
  """Returns (variables, images_BxHxWxC) -> EncoderOutput of the image network, for uint8 or normalised images.

  ValueError for what is neither: other integers, other shapes; outside of jit, values that no normalised pixel has.
  """
  apply_fn, pixels = objective.networks()["image"].apply_fn, objective.pixels

  def apply_to_images(variables: Tree, images_BxHxWxC: jax.Array):
    _check_images(images_BxHxWxC, pixels)
    if images_BxHxWxC.dtype == jnp.uint8:
      images_BxHxWxC = normalize(jnp.asarray(images_BxHxWxC, jnp.float32) / np.float32(255), pixels)
    return apply_fn(variables, images_BxHxWxC)

  return apply_to_images


def _check_images(images: jax.Array, pixels: Pixels) -> None:
  shape, channels = tuple(images.shape), len(pixels.mean)
  if len(shape) != 4 or shape[-1] != channels:
    fix = "images[None] is a batch of one" if len(shape) == 3 and shape[-1] == channels else ""
    fix = "transpose(0, 2, 3, 1) puts channels last" if len(shape) == 4 and shape[1] == channels else fix
    raise ValueError(f"images must be (B, H, W, {channels}), not {shape}" + (f": {fix}" if fix else ""))
  ways = "give uint8, or (x / 255 - mean) / std with config.data.mean and std"
  if images.dtype == jnp.uint8:
    return
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f"images of {images.dtype} are neither uint8 nor normalised: {ways}")
  if isinstance(images, jax.core.Tracer) or not images.size:
    return
  low, high = ((np.float32(x) - np.array(pixels.mean)) / np.array(pixels.std) for x in (0, 1))
  axes, slack = (0, 1, 2), _TOLERANCE * (high - low)
  least, most = np.asarray(images.min(axes), np.float32), np.asarray(images.max(axes), np.float32)
  if not (np.all(least >= low - slack) and np.all(most <= high + slack)):
    raise ValueError(
      f"images of {images.dtype} lie between {least.min():.3g} and {most.max():.3g}, which no pixel does that is "
      f"normalised ({low.min():.3g} to {high.max():.3g}): {ways}"
    )


# ------------------------------------------------------------------------------------------ meta and config.json
def make_meta(cfg: Config, step: int, num_classes: int, spent: Mapping[str, Any], **more: Any) -> dict[str, Any]:
  """Returns what a checkpoint says of itself: format, who wrote it, config, step, classes, time spent, versions."""
  libraries = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  return {
    "format": FORMAT,
    "jepa_jax": written_by(),
    "step": step,
    "config": to_dict(cfg),
    "num_classes": num_classes,
    "spent": dict(spent),
    "versions": {name: version(name) for name in libraries},
  } | {key: value for key, value in more.items() if value is not None}


def check_workdir(workdir: Path, cfg: Config, accept_change: bool) -> None:
  """Raises a ValueError that shows the difference where workdir holds a run with another config."""
  if not (workdir / CONFIG).exists() and checkpoint.latest_step(workdir) is None:
    return
  lines = difference(to_dict(read_config(workdir)), to_dict(cfg))
  if lines and not accept_change:
    shown = "\n  ".join(lines)
    raise ValueError(
      f"{workdir} holds a run with another config. Nothing was changed.\n  {shown}\n"
      "Choose another --workdir, or pass --accept-config-change to go on with the new settings"
    )


def read_config(workdir: Path) -> Config:
  """Returns the config of the run in workdir, also as an older version wrote it.

  Where the file is gone or damaged it is that of the newest checkpoint; ValueError where there is none.
  """
  try:
    values = read_json(workdir / CONFIG)
    if lacking := [key for key in ("data", "encoder", "objective") if not isinstance(values.get(key), dict)]:
      raise ValueError(f"{workdir / CONFIG} is no config of a run: it has no {', '.join(lacking)}")
  except (FileNotFoundError, ValueError) as error:
    for step in reversed(checkpoint.steps(workdir)):
      with contextlib.suppress(checkpoint.DamagedCheckpoint):
        cfg = open_run(workdir, step).cfg
        log.warning("%s. The config is taken from the checkpoint of step %d", error, step)
        return cfg
    raise ValueError(f"{error}. There is no checkpoint to take the config from; choose another --workdir") from error
  number, by = values.pop("format", 1), values.pop("jepa_jax", None)
  check_format(number, workdir / CONFIG, by)
  return build_config(upgrade_config(values, number))


def write_config(workdir: Path, cfg: Config) -> None:
  """Writes the full config to workdir/config.json, at once or not at all."""
  write_json(workdir / CONFIG, {"format": FORMAT, "jepa_jax": written_by()} | to_dict(cfg))
