"""Evaluation from a checkpoint: features (cached), protocols, one table; and `load_encoder` for a user's own script."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import time
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jepa_jax import checkpoint
from jepa_jax.config import Config, build_config, to_dict
from jepa_jax.data import ImageSet, eval_batches, open_images
from jepa_jax.evals import (
  OF_FEATURES,
  EvalConfig,
  Task,
  TuningData,
  attentive_probe,
  check_groups,
  check_networks,
  few_shot,
  grouped,
  knn_accuracy,
  linear_probe,
  mean_reciprocal_ranks,
  print_table,
  shots_columns,
  token_width,
  tune_multitask,
  tune_predictor,
)
from jepa_jax.experiment import Experiment, abstract_batch, make_experiment, zero_batch
from jepa_jax.losses import blind_mrr
from jepa_jax.models import make_encoder
from jepa_jax.objectives import make_objective
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.step import TrainState
from jepa_jax.views import center_view

log = logging.getLogger(__name__)
Tree = Any
PIXELS, RANDOM, BLIND = BASELINES = "raw pixels", "random encoder", "blind predictor"
MRR = "MRR"  # of all operations; of one of them, "MRR blur"
PIXEL_PX = 32  # raw-pixel baselines look at this size at most
_MACHINE = ("num_threads", "prefetch", "cache_mb", "max_bad_share")  # settings of the data that change no image


def load_encoder(where: str | Path, step: int | None = None) -> tuple[Callable[[Tree, jax.Array], Any], Tree, Config]:
  """Returns (apply_fn, params, config) of a workdir (its newest checkpoint, or `step`) or of one checkpoint folder.

  apply_fn(params, images_BxHxWxC) -> EncoderOutput(pooled_BxD, tokens_BxNxD, probe_BxF); images are uint8, or float
  already normalised with config.objective.views.mean and std. CheckpointError where it is missing or damaged.
  """
  workdir, step = find_checkpoint(where, step)
  cfg = build_config(checkpoint.read_meta(workdir, step)["config"])
  module = make_encoder(cfg.encoder)
  images = jax.ShapeDtypeStruct((1, cfg.encoder.image_size, cfg.encoder.image_size, cfg.data.channels), jnp.float32)
  abstract = jax.eval_shape(lambda key, x: module.init(key, x, train=False), jax.random.key(0), images)
  abstract = {"params": abstract["params"], "batch_stats": abstract.get("batch_stats", {})}
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
  params = checkpoint.restore(workdir, step, encoder=abstract)["encoder"]
  mean, std = (np.float32(v) for v in (cfg.objective.views.mean, cfg.objective.views.std))

  def apply_fn(params: Tree, images_BxHxWxC: jax.Array):
    if images_BxHxWxC.dtype == jnp.uint8:
      images_BxHxWxC = (images_BxHxWxC / np.float32(255) - mean) / std
    return module.apply(params, images_BxHxWxC, train=False)

  return apply_fn, params, cfg


def load_run(where: str | Path, step: int | None = None) -> tuple[Experiment, TrainState]:
  """Returns the experiment of a checkpoint on one device of this machine and its whole state, all networks included."""
  workdir, step = find_checkpoint(where, step)
  meta = checkpoint.read_meta(workdir, step)
  cfg = build_config(meta["config"])
  mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  run = make_experiment(cfg, mesh, num_train=cfg.batch_size, num_classes=meta["num_classes"])
  return run, checkpoint.restore(workdir, step, state=run.abstract_state)["state"]


def find_checkpoint(where: str | Path, step: int | None = None) -> tuple[Path, int]:
  """Returns (workdir, step) for a workdir or for a folder <workdir>/checkpoints/<step>."""
  path = Path(where).expanduser().resolve()
  if path.name.isdigit() and path.parent.name == "checkpoints":
    path, step = path.parent.parent, int(path.name)
  if not path.is_dir():
    raise checkpoint.CheckpointError(f"{path} does not exist; give the --workdir of a run, or one of its checkpoints")
  found = checkpoint.latest_step(path) if step is None else step
  if found is None:
    raise checkpoint.CheckpointError(f"{path} holds no finished checkpoint; train first, or give another --workdir")
  checkpoint.checkpoint_path(path, found)
  return path, found


def check_overrides(overrides: dict[str, str] | None) -> None:
  """Raises a ValueError where an override changes anything but the data and the protocols."""
  for key in overrides or {}:
    if key.split(".")[0] not in ("data", "evals"):
      raise ValueError(
        f"--config.{key}: evaluation takes its networks from the checkpoint; only data.* and evals.* change"
      )


def result_path(workdir: Path, step: int, overrides: dict[str, str] | None = None) -> Path:
  """Returns where the table goes: with overrides in a file of their own, lest a partial table replace the full one."""
  return workdir / "evals" / f"{step}{f'-{_digest(overrides)}' if overrides else ''}.json"


def evaluate(
  where: str | Path,
  step: int | None = None,
  overrides: dict[str, str] | None = None,
  baselines: bool = True,
  cache: bool = True,
  show: bool = True,
) -> dict[str, dict[str, Any]]:
  """Returns {row: {column: percent}} for raw pixels, the random-initialised encoder and the checkpoint's.

  Features are cached in <workdir>/features (those of the checkpoint only with `cache`), so that an evaluation that was
  killed goes on; the table goes to the screen (with `show`) and to <workdir>/evals/<step>.json, at once or not at all.
  overrides change `data` and `evals` of the checkpoint's config: other images, or the same ones in another place.
  What needs the whole run, predictor included, fills the checkpoint's row only; beside an MRR stands that of a blind
  predictor.
  """
  began = time.monotonic()
  check_overrides(overrides)
  workdir, step = find_checkpoint(where, step)
  apply_fn, params, cfg = load_encoder(workdir, step)
  cfg = build_config(to_dict(cfg), overrides)
  settings, asked = cfg.evals, set(cfg.evals.asked)
  train, test = open_images(cfg.data, "train"), open_images(cfg.data, "test")
  if train.num_classes < 2 and asked - {"mrr"}:
    raise ValueError(
      f"the images of data.source={cfg.data.source!r} have no labels to evaluate with; set data.label_key or classes"
    )
  mesh, labelled = make_mesh(MeshConfig(), jax.local_devices()), None
  if "attentive" in asked:
    task = Task(train.labels(), test.labels(), train.num_classes)
    labelled = TuningData(train, test, _make_view_fn(cfg, _view_px(cfg)), (task,))
    token_width(apply_fn, params, labelled)  # a ValueError before anything is compiled
  networks_row, networks_detail = {}, {}
  if asked & {"mrr", "predictor_tuning"}:
    networks_row, networks_detail = _network_protocols(workdir, step, cfg, labelled, test, mesh)

  this = f"{cfg.objective.name}, step {step}"
  rows, details = {}, {}
  for name in (*(BASELINES if baselines else ()), this):
    rows[name], details[name] = {}, {}
    weights_fn = functools.cache(lambda name=name: _random_encoder(cfg) if name == RANDOM else params)
    if asked & set(OF_FEATURES) and name != BLIND:
      images, keep = {"train": train, "test": test}, cache or name in BASELINES
      features = _split_features(workdir / "features", name, cfg, apply_fn, weights_fn, images, keep)
      rows[name], details[name] = _protocols(*features, settings, train.num_classes, name)
    if labelled and name in (RANDOM, this):
      result = attentive_probe(apply_fn, weights_fn(), labelled, settings.tuning, mesh)
      details[name]["attentive"] = result.summary()
      rows[name]["attentive"] = details[name]["attentive"]["accuracy"][0]
  rows[this], details[this] = rows[this] | networks_row, details[this] | networks_detail
  if BLIND in rows:
    rows[BLIND] = {column: 100 * blind_mrr(settings.mrr_bank) for column in networks_row if column.startswith(MRR)}
  rows = {name: row for name, row in rows.items() if row}
  details = {name: details[name] for name in rows}
  result = {"step": step, "rows": rows, "details": details, "settings": to_dict(settings), "data": to_dict(cfg.data)}
  result |= {"num_train": len(train), "num_test": len(test), "seconds": round(time.monotonic() - began, 1)}
  path = result_path(workdir, step, overrides)
  _write_whole(path, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))
  if show:
    print_table(rows, title=f"{cfg.name}: accuracy in percent, {len(test)} held-out images, step {step}")
  log.info("Written to %s", path)
  return rows


def _network_protocols(
  workdir: Path, step: int, cfg: Config, labelled: TuningData | None, test: ImageSet, mesh: Mesh
) -> tuple[dict[str, float], dict[str, Any]]:
  """Runs the protocols that need the whole run; returns ({column: value}, {protocol: what was selected}).

  MRR in percent. What the checkpoint lacks is a ValueError before anything is compiled.
  """
  settings, row, details = cfg.evals, {}, {}
  names = " and ".join(name for name in ("mrr", "predictor_tuning") if name in settings.asked)
  try:
    run, state = load_run(workdir, step)
  except checkpoint.CheckpointError as error:
    raise type(error)(f"{names} need the whole run, predictor and target networks included: {error}") from error
  networks = run.objective, state.params, state.target
  del state  # and with it what the optimiser holds
  if "predictor_tuning" in settings.asked:
    check_networks(*networks)
    size_px = run.objective.cfg.views.global_crops.size_px  # what the predictor's grid is made for
    if _view_px(cfg) != size_px:
      raise ValueError(f"predictor_tuning shows images as in training: set evals.view_px={size_px}")
  if settings.tuning_groups and labelled:
    check_groups(settings.tuning_groups, labelled.tasks[0].num_classes)
  if "mrr" in settings.asked:
    sizes = {name: getattr(settings, f"mrr_{name}") for name in ("chunk", "distance")}
    sizes |= {"num_images": settings.mrr_images, "num_bank": settings.mrr_bank, "batch_size": settings.mrr_batch}
    sizes |= {"crop_fraction": settings.crop_fraction, "seed": settings.seed}
    found = mean_reciprocal_ranks(*networks, test, mesh=mesh, **sizes)
    row |= {MRR if name == "overall" else f"{MRR} {name}": 100 * value for name, value in found.items()}
  if "predictor_tuning" in settings.asked and labelled:
    results = tune_predictor(*networks, labelled, settings.tuning, mesh)
    columns = {name: (name,) for name in results}
    if settings.tuning_groups:
      groups = grouped(labelled.tasks[0], settings.tuning_groups)
      tasks = [dataclasses.replace(labelled, tasks=tasks) for tasks in ((groups,), (*labelled.tasks, groups))]
      results["groups"] = tune_predictor(*networks, tasks[0], settings.tuning, mesh, only=("predictor",))["predictor"]
      results["multitask"] = tune_multitask(*networks, tasks[1], settings.tuning, mesh)
      columns |= {"groups": ("predictor, groups",), "multitask": ("multitask", "multitask, groups")}
    details |= {name: result.summary() for name, result in results.items()}
    row |= {column: x for name in columns for column, x in zip(columns[name], details[name]["accuracy"])}
  return row, details


def _view_px(cfg: Config) -> int:
  return cfg.evals.view_px or cfg.encoder.image_size


def _split_features(
  folder: Path, name: str, cfg: Config, apply_fn, weights_fn, images: dict[str, ImageSet], keep: bool
) -> list[dict[str, np.ndarray]]:
  """Returns the features of a row of the table, of both splits; from `folder`, where they are there."""
  size = min(_view_px(cfg), PIXEL_PX) if name == PIXELS else _view_px(cfg)
  # What features depend on. Two runs may reach the same step in the same folder, hence the weights themselves.
  seen = [{k: v for k, v in to_dict(cfg.data).items() if k not in _MACHINE}, to_dict(cfg.objective.views)]
  about = (
    None if name == PIXELS else [to_dict(cfg.encoder), cfg.seed if name == RANDOM else _weights_digest(weights_fn())]
  )
  extract = _pixels if name == PIXELS else functools.partial(_features, apply_fn)
  features_fn = _make_features_fn(extract, cfg, size)  # one for both splits: it is compiled once
  features = []
  for split, of_split in images.items():
    tag = _digest([seen, split, len(of_split), size, cfg.evals.crop_fraction, about])
    file = folder / f"{_slug(name)}-{split}-{tag}.npz"
    features.append(
      _cached(file, functools.partial(_run, features_fn, weights_fn, of_split, cfg.evals.batch_size), keep)
    )
  return features


def _protocols(train: dict, test: dict, settings: EvalConfig, num_classes: int, name: str):
  """Runs the protocols asked for; returns ({column: value}, {protocol: what was selected})."""
  row, details = {}, {}
  labelled = lambda kind: (train[kind], train["label"], test[kind], test["label"], num_classes)
  pooled, probe = labelled("pooled"), labelled(settings.features)
  log.info("%s: %s", name, ", ".join(e for e in settings.asked if e in OF_FEATURES))
  if "knn" in settings.asked:
    row["knn"] = knn_accuracy(*pooled, k=settings.knn_k, temperature=settings.knn_temperature)
  if "linear" in settings.asked:
    result = linear_probe(*probe, seed=settings.seed)
    row["linear"], details["linear"] = result.accuracy, dataclasses.asdict(result)
  if "ijepa" in settings.asked:  # I-JEPA reports the best of these four (arXiv 2301.08243, appendix)
    for layers, kind in (("last layer", "pooled"), ("last layers", "probe")):
      for norm, title in (("none", layers), ("batchnorm", f"{layers}, BN")):
        result = linear_probe(*labelled(kind), input_norm=norm, seed=settings.seed)
        row[title], details[title] = result.accuracy, dataclasses.asdict(result)
  if "fewshot" in settings.asked:
    rarest = int(np.bincount(train["label"], minlength=num_classes).min())
    shots = tuple(n for n in settings.shots if n <= rarest)
    if shots != settings.shots:
      log.warning("The rarest class has %d training images: only %s labels per class are evaluated", rarest, shots)
    if shots:
      row |= shots_columns(few_shot(*probe, shots=shots, num_draws=settings.draws, seed=settings.seed))
  return row, details


def _make_features_fn(extract: Callable, cfg: Config, view_px: int) -> Callable:
  """Returns the jitted (weights, batch) -> features of the batch's evaluation views."""
  view_fn = _make_view_fn(cfg, view_px)
  # The weights are an argument: closed over, they would be constants of the program.
  return jax.jit(lambda weights, batch: extract(weights, view_fn(batch)))


def _make_view_fn(cfg: Config, view_px: int) -> Callable:
  """Returns batch -> the evaluation views of its images."""
  views, share = cfg.objective.views, cfg.evals.crop_fraction
  return lambda batch: center_view(batch, view_px, views.mean, views.std, share, views.interpolation)


def _run(features_fn: Callable, weights_fn: Callable[[], Tree], images, batch_size: int) -> dict[str, np.ndarray]:
  """Returns the features and labels of every image of a set, in order."""
  weights, parts = weights_fn(), []
  for batch in eval_batches(images, batch_size):
    mask = batch.pop("mask")
    out = jax.device_get(features_fn(weights, batch)) | {"label": batch["label"]}
    parts.append({k: np.asarray(v)[mask] for k, v in out.items()})
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def _pixels(_: Tree, images_BxHxWxC: jax.Array) -> dict[str, jax.Array]:
  flat = images_BxHxWxC.reshape(len(images_BxHxWxC), -1)
  return {"pooled": flat, "probe": flat}


def _features(apply_fn, params: Tree, images: jax.Array) -> dict[str, jax.Array]:
  out = apply_fn(params, images)
  return {"pooled": out.pooled_BxD.astype(jnp.float32), "probe": out.probe_BxF.astype(jnp.float32)}


def _random_encoder(cfg: Config) -> Tree:
  """The variables that training began with: same seed, step 0."""
  objective = make_objective(cfg.objective, cfg.encoder)
  batch = abstract_batch(cfg.data, cfg.evals.batch_size)

  @jax.jit
  def init(key):
    params, stats = objective.init(key, zero_batch(batch))
    return objective.evaluated(params, stats, params)

  return init(jax.random.key(cfg.seed))


def _cached(path: Path, compute: Callable[[], dict[str, np.ndarray]], keep: bool) -> dict[str, np.ndarray]:
  """Returns the features in `path`; where there are none to be read, computes them and, with `keep`, writes them."""
  try:
    with np.load(path) as file:
      return dict(file)
  except FileNotFoundError:
    pass
  except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
    log.warning("%s cannot be read (%s); its features are computed again", path, error)
  features = compute()
  if keep:
    try:
      _write_whole(path, lambda file: np.savez(file, **features))
      for left in path.parent.glob(f"{path.name}.*.tmp"):  # of killed writers, or of one that is late with the same
        left.unlink(missing_ok=True)
    except OSError as error:  # a full disk must not cost the evaluation
      if not path.exists():
        log.warning("Features not cached: %s. The evaluation goes on", error)
  return features


def _write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
  """Writes a file at once or not at all; two processes may write the same one."""
  path.parent.mkdir(exist_ok=True)
  temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
  try:
    with open(temporary, "wb") as file:
      write(file)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def _weights_digest(weights: Tree) -> str:
  """Returns a digest of every weight."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(weights):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def _slug(name: str) -> str:
  return "".join(c if c.isalnum() else "_" for c in name)
