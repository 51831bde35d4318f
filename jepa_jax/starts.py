"""Where a run starts: the newest whole checkpoint of its workdir, another run's networks, or the config's seed."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax import checkpoint, distributed
from jepa_jax.config import difference, flat, to_dict
from jepa_jax.data.tokenizer import digest_of
from jepa_jax.experiment import Experiment
from jepa_jax.runs import Run, open_run
from jepa_jax.step import TrainState, join_state
from jepa_jax.workdir import CHECKPOINTS, FORMAT, TOKENIZER, check_format

log = logging.getLogger(__name__)
Tree = Any
_WAIT_S = 300  # for another process, which starts late or sees a shared folder late


def start(
  run: Experiment,
  workdir: Path,
  data: Mapping[str, Any],
  init_from: str = "",
  what: str = "encoder",
  accept_change: bool = False,
):
  """Returns (state, its step, seconds spent by activity, where it came from or None): the one place where runs begin.

  1. The newest whole checkpoint in workdir, if there is any: the run goes on, bit for bit. `data` is what the training
    images say of themselves; other ones than the checkpoint's are a ValueError, unless `accept_change`.
  2. `init_from`, "WORKDIR" or "WORKDIR:STEP" of another run (or of imported weights): its networks, with a new
     optimiser, at step 0. what: "encoder", "everything", or names of networks with commas between.
  3. The config's seed.
  """
  # One look for all: who saw no checkpoint would begin anew while the others wait for it to resume.
  steps = json.loads(distributed.from_primary("steps", lambda: json.dumps(checkpoint.steps(workdir)), _WAIT_S))
  if steps and init_from:
    log.warning("--init-from=%s is not read: %s has checkpoints of its own, from which it goes on", init_from, workdir)
  if steps:
    return _resume(workdir, steps, run, data, accept_change)
  names = _network_names(run.abstract_state.params, what) if init_from else []
  if lacking := [n for n, scale in run.objective.lr_scales.items() if scale == 0 and n not in names]:
    raise ValueError(
      f"the network {', '.join(lacking)} is frozen (its learning rate is 0), and nothing says where it comes from: "
      "--init-from=WORKDIR --init-what=" + ",".join(dict.fromkeys([*names, *lacking]))
    )
  if run.cfg.pull_to_start and "encoder" not in names:
    raise ValueError(
      f"pull_to_start={run.cfg.pull_to_start} holds the encoder near the one that the run starts from, and nothing "
      "says which that is: --init-from=WORKDIR or weights:FILE, with the encoder in --init-what; or set it to 0"
    )
  if not init_from:
    if what != "encoder":
      raise ValueError(f"--init-what={what} says what to take from another run: name it by --init-from=WORKDIR")
    return run.init(), 0, {}, None
  source = open_run(*_split_step(init_from))
  _check_tokenizer(source.meta if "text" in names else {}, data, source.workdir)
  networks = _chosen(run, source, what)
  state = run.init()
  for line in difference(to_dict(source.cfg), to_dict(run.cfg), ignore=()):
    log.info("  differs from where it starts: %s", line)
  merge = lambda tree, taken: tree if tree is None else {**tree, **taken}
  state = dataclasses.replace(
    state, **{field: merge(getattr(state, field), networks[part]) for part, field in _FIELDS.items()}
  )
  origin = {"workdir": str(source.workdir), "step": source.step, "what": what}
  log.info("Starts from %s of step %d in %s", what, source.step, source.workdir)
  return run.begun(state), 0, {}, origin


_FIELDS = {"params": "params", "target": "target", "state": "model_state"}


def _split_step(text: str) -> tuple[str, int | None]:
  where, colon, step = text.rpartition(":")
  return (where, int(step)) if colon and step.isdigit() else (text, None)


def _chosen(run: Experiment, source: Run, what: str) -> dict[str, dict[str, Tree]]:
  """Returns {"params", "target", "state"} of the networks that are taken over, each {network: arrays}, in their places.

  What is evaluated in the source, a moving average or the trained networks, is the parameters and the average here.
  ValueError that lists the keys that differ.
  """
  here = run.abstract_state
  names = _network_names(here.params, what)
  source_run = source.experiment(run.mesh)
  theirs = source_run.abstract_state
  if lacking := [name for name in names if name not in theirs.params]:
    raise ValueError(f"{source.workdir} has no {', '.join(lacking)}; it has {', '.join(sorted(theirs.params))}")
  _check_alike(here, theirs, names, source.workdir)
  averaged = theirs.target or {}
  shown = source_run.objective.variables(theirs.params, theirs.model_state, theirs.target)
  if what != "everything" and shown.get("image", {}).get("params") is theirs.params.get("encoder", ()):
    averaged = {}  # a teacher that is not what is evaluated
  place = lambda tree, field: {name: getattr(here, field)[name] for name in tree}
  wanted = {
    "params": place([name for name in names if name not in averaged or what == "everything"], "params"),
    "target": {name: here.params[name] for name in names if name in averaged},
    "state": place(
      [name for name in here.model_state if name in names or (what == "everything" and name in theirs.model_state)],
      "model_state",
    ),
  }
  found = source.read({part: tree for part, tree in wanted.items() if tree})
  best = {**found.get("params", {}), **found.get("target", {})}
  params = {**best, **found.get("params", {})}
  copied = {name: jax.tree.map(jnp.copy, best[name]) for name in here.target or {} if name in best}
  return {"params": params, "target": copied, "state": found.get("state", {})}


def _network_names(params: Mapping[str, Tree], what: str) -> list[str]:
  names = sorted(params) if what == "everything" else [name.strip() for name in what.split(",")]
  if unknown := [name for name in names if name not in params]:
    raise ValueError(
      f"--init-what={what}: this method has no network {', '.join(unknown)}; choose 'everything', or of: "
      f"{', '.join(sorted(params))}"
    )
  return names


def _check_alike(here: TrainState, theirs: TrainState, names: Sequence[str], where: Path) -> None:
  shapes = lambda state, name: {
    f"{name}/{checkpoint.path_name(path)}": leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params[name], state.model_state.get(name, {})))
  }
  lines = []
  for name in names:
    ours, other = shapes(here, name), shapes(theirs, name)
    differ = [key for key in sorted(ours.keys() | other.keys()) if ours.get(key) != other.get(key)]
    lines += [f"  {key}: {other.get(key, 'missing')} there, {ours.get(key, 'missing')} here" for key in differ]
  if lines:
    shown = lines[:20] + ([f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else [])
    stacked = any("/blocks/" in line for line in lines) and any("/blocks_" in line for line in lines)
    hint = "\nBlocks are stacked in one of them: encoder.scan differs, give both the same" if stacked else ""
    raise ValueError(f"--init-from={where}: its networks are of another architecture:\n" + "\n".join(shown) + hint)


def _resume(workdir: Path, steps: list[int], run: Experiment, data: Mapping[str, Any], accept_change: bool):
  """Returns what `start` does, of the newest of these checkpoints that is whole."""
  several, verify = distributed.num_processes() > 1, run.cfg.checkpoint.verify
  for step in reversed(steps):
    _wait_for(workdir, step)
    fault, checked = _agreed_fault(workdir, step, verify)
    if not fault:
      try:
        return _loaded(workdir, step, run, data, accept_change)
      except checkpoint.DamagedCheckpoint as error:
        if checked or (several and not verify):
          hint = f"To resume from the one before, move {workdir / CHECKPOINTS / str(step)} away"
          raise checkpoint.CheckpointError(f"{error}. {hint}") from error  # to move it away would not help in itself
        if several:  # the others may have what they need, and wait for this one in the load
          checkpoint.mark(workdir, step, error)
          raise ConnectionError(f"{error}. The next start leaves this checkpoint out") from error
        fault = str(error)
    if step == steps[0]:
      hint = f" It is the last one here: move {workdir / CHECKPOINTS} away to begin anew" if len(steps) > 1 else ""
      raise checkpoint.DamagedCheckpoint(fault + hint)
    log.error("%s", fault)
    if distributed.is_primary():
      log.error("It was moved to %s; the checkpoint before it is used.", checkpoint.set_aside(workdir, step))
    distributed.barrier(f"set aside {step}", timeout_s=_WAIT_S)
  raise AssertionError("unreachable: the oldest checkpoint either loads or raises")


def _wait_for(workdir: Path, step: int) -> None:
  """Returns when this process sees the checkpoint that process 0 sees: shared folders show news late."""
  deadline_s = time.monotonic() + _WAIT_S
  while step not in checkpoint.steps(workdir):
    if time.monotonic() > deadline_s:
      raise ConnectionError(f"process 0 sees the checkpoint of step {step} in {workdir}, and this one does not")
    time.sleep(0.5)


def _agreed_fault(workdir: Path, step: int, verify: bool) -> tuple[str, bool]:
  """Returns what any process finds wrong with a checkpoint, or "", and whether its bytes were compared.

  Each compares its share of the blocks; all agree before any of them loads or moves it: one that alone saw a fault
  would leave the others waiting inside the load.
  """
  mine, checked = "", False
  try:
    share = (distributed.process_id(), distributed.num_processes())
    checked = verify and checkpoint.check_whole(workdir, step, share=share)
    checkpoint.check_meta_file(workdir, step)
  except checkpoint.DamagedCheckpoint as error:
    mine = str(error)
  return next(filter(None, distributed.from_all("fault", mine, timeout_s=24 * 3600)), ""), checked


def _loaded(workdir: Path, step: int, run: Experiment, data: Mapping[str, Any], accept_change: bool):
  meta, abstract = checkpoint.read_meta(workdir, step, verify=False), run.abstract_state
  _check_resumable(meta, workdir, step)
  _check_batch(meta["config"]["batch_size"], run.cfg.batch_size, workdir, step)
  _check_frozen(meta["config"], to_dict(run.cfg), workdir, step)
  _check_arrays(meta["config"], to_dict(run.cfg), workdir, step)
  _check_tokenizer(meta, data, workdir)
  _check_data(meta.get("data"), data, workdir, step, accept_change)
  classes = max(len(data["classes"]), 1)
  if "imported" in meta and max(meta["num_classes"], 1) != classes:
    raise ValueError(
      f"the weights in {workdir} were imported with --num-classes={meta['num_classes']}, and the data have {classes}: "
      f"import them again with --num-classes={classes}, or start another --workdir from them: --init-from={workdir}"
    )
  items = checkpoint.restore(workdir, step, verify=False, networks=abstract.networks, training=abstract.training)
  state = join_state(items["networks"], items["training"])
  return state, step, meta["spent"]["seconds"], meta.get("started_from")


def _check_resumable(meta: Mapping[str, Any], workdir: Path, step: int) -> None:
  check_format(meta.get("format", 1), f"the checkpoint of step {step} in {workdir}", meta.get("jepa_jax"))
  if (meta.get("imported") or {}).get("encoder_only"):
    raise ValueError(
      f"{workdir} holds imported weights of an encoder alone, which no run goes on from: start another --workdir from "
      f"them: --init-from={workdir}"
    )
  if meta.get("format", 1) < FORMAT:
    raise ValueError(
      f"checkpoint {step} in {workdir} has format {meta.get('format', 1)}, of jepa_jax up to 0.2: "
      "it can be evaluated, shown and exported, but not resumed, since random numbers are drawn otherwise now. Start "
      f"another --workdir from it: --init-from={workdir} --init-what=everything"
    )


def _check_batch(before: int, now: int, workdir: Path, step: int) -> None:
  """Raises a ValueError where steps would count other numbers of images: half an epoch could be called a whole one."""
  if before != now:
    raise ValueError(
      f"the run in {workdir} counted {step} steps of {before} images; with batch_size={now} its schedules, epochs and "
      f"order of images would all be others. Keep {before}, or start another --workdir from it: --init-from={workdir} "
      "--init-what=everything"
    )


def _check_frozen(before: Mapping[str, Any], now: Mapping[str, Any], workdir: Path, step: int) -> None:
  """Raises a ValueError where a tower was frozen and is not now, or the reverse, or has seen its images otherwise."""
  old, new = before["objective"], now["objective"]
  scales = [name for name in ("image_lr", "text_lr") if {name} <= old.keys() & new.keys()]
  if changed := [name for name in scales if (old[name] == 0) != (new[name] == 0)]:
    raise ValueError(
      f"{changed[0]}={new[changed[0]]}, and it was {old[changed[0]]} up to step {step} in {workdir}: a frozen tower "
      f"has no moments to go on with. Start another --workdir from it: --init-from={workdir} --init-what=everything"
    )
  views = [
    name
    for name in ("view_px", "view_width_px", "crop_fraction")
    if before["evals"].get(name) != now["evals"].get(name)
  ]
  if views and new.get("features_once"):
    raise ValueError(
      f"evals.{views[0]}={now['evals'][views[0]]}, and up to step {step} the features of the frozen encoder were made "
      f"with {before['evals'].get(views[0])}: keep that, and evaluate with another afterwards"
    )


# Settings that say which arrays the state of training has, and what of them does.
_OF_THE_STATE = {"optim.lora_rank": int, "pull_to_start": bool}


def _check_arrays(before: Mapping[str, Any], now: Mapping[str, Any], workdir: Path, step: int) -> None:
  """Raises a ValueError where the state of training has other arrays now."""
  old, new = flat(before), flat(now)
  for name, kind in _OF_THE_STATE.items():
    if kind(old.get(name, 0)) != kind(new[name]):
      raise ValueError(
        f"{name}={new[name]}, and it was {old.get(name, 0)} up to step {step} in {workdir}, whose state has other "
        f"arrays: keep it, or start another --workdir from it: --init-from={workdir} --init-what=everything"
      )


def _check_tokenizer(meta: Mapping[str, Any], data: Mapping[str, Any], workdir: Path) -> None:
  """Raises a ValueError where a text tower would be given ids that mean other tokens than those it has learned."""
  before = digest_of(meta["tokenizer"]) if meta.get("tokenizer") else None
  if before is not None and before != data.get("tokenizer"):
    raise ValueError(
      f"the text tower of {workdir} learned the ids of the tokenizer {before}, not those of {data.get('tokenizer')} "
      "(the training captions, their vocab_size or their tokenizer are others): take its own, "
      f"--config.data.captions.tokenizer={workdir / TOKENIZER}"
    )


def _check_data(before: Mapping[str, Any] | None, data: Mapping[str, Any], workdir: Path, step: int, accept: bool):
  """Raises a ValueError that says what changed where a checkpoint was trained on other images.

  Names and sizes are compared, not what is in the files. Nothing is compared with a checkpoint that does not say.
  """
  if before is None or before["fingerprint"] == data["fingerprint"]:
    return
  lines = _data_differences(before, data)
  if accept:
    log.warning("The training images are not those of the run until step %d: %s", step, "; ".join(lines))
    return
  raise ValueError(
    f"the training images are not those that the run in {workdir} was trained on until step {step}:\n  "
    + "\n  ".join(lines)
    + "\nNothing was changed. Give it the old ones, choose another --workdir (--init-from starts from this run), or "
    "pass --accept-config-change to go on with the new ones"
  )


def _data_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  lines = []
  if before["images"] != now["images"]:
    lines.append(f"{before['images']:,} images then, {now['images']:,} now")
  for word, one, other in (("gone", before, now), ("new", now, before)):
    if names := [name for name in one["classes"] if name not in other["classes"]]:
      shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
      lines.append(f"classes that are {word}: {shown}")
  if not lines and before["classes"] != now["classes"]:
    lines.append("the same classes in another order")
  return lines or ["as many images and the same classes, but other names, sizes or labels"]
