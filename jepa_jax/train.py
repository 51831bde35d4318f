"""The one train loop. It knows nothing of a method but `objectives.base.Objective`."""

from __future__ import annotations

import json
import logging
import math
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

from jepa_jax import checkpoint, distributed, telemetry
from jepa_jax.config import Config, difference, to_dict
from jepa_jax.data import open_images, prefetch_to_device, train_batches
from jepa_jax.experiment import Experiment, make_experiment
from jepa_jax.files import write_whole
from jepa_jax.goodput import CompileCounter, Goodput, summary
from jepa_jax.sharding import batch_sharding, batch_ways, local_shards, make_mesh, report
from jepa_jax.step import GuardConfig, TrainState

log = logging.getLogger(__name__)


class TrainingDiverged(FloatingPointError):
  """The loss or the gradient is not finite; the message names the step and the last good checkpoint."""


class Preempted(Exception):
  """SIGTERM or Ctrl-C: the state was saved, and the same command goes on from there. Exit status 75."""


def train(cfg: Config, workdir: str | Path, accept_change: bool = False) -> TrainState:
  """Trains to the end of the config and returns the final state; resumes from the newest checkpoint in workdir.

  ValueError, before anything is compiled, where the config, the data, the mesh and the workdir do not fit together.
  Preempted after a SIGTERM, TrainingDiverged where the loss is not finite.
  """
  workdir = checkpoint.local_workdir(workdir)
  with distributed.Preemption() as preemption:
    return _train(cfg, workdir, accept_change, preemption)


def _train(cfg: Config, workdir: Path, accept_change: bool, preemption: distributed.Preemption) -> TrainState:
  primary = distributed.is_primary()
  goodput = Goodput(workdir, primary)

  # ---------------------------------------------------------------- mesh, data, networks, objective, optimiser
  mesh = make_mesh(cfg.mesh)
  images = open_images(cfg.data, "train")
  run = make_experiment(cfg, mesh, len(images), images.num_classes)
  cadence = {"log": cfg.log.every, "checkpoint": cfg.checkpoint.every, "keep": cfg.checkpoint.keep_every}
  every = {name: length.steps(run.steps_per_epoch, run.total_steps) for name, length in cadence.items()}

  # ---------------------------------------------------------------- workdir: another run's is refused
  distributed.check_shared(workdir)
  check_workdir(workdir, cfg, accept_change)
  log.info(
    "%s on %s; the largest parameters, bytes per device and sharding:\n%s",
    cfg.name,
    _machine(mesh),
    report(run.abstract_state.params),
  )

  # ---------------------------------------------------------------- restore or init
  state, start_step, spent_s = _restore(workdir, run) if checkpoint.steps(workdir) else (run.init(), 0, {})
  if primary:
    write_config(workdir, cfg)  # only now: a checkpoint of another architecture was refused above
  if start_step >= run.total_steps:
    log.info("The run in %s is complete (%d steps); nothing to train.", workdir, start_step)
    if primary and checkpoint.read_end(workdir) is None:  # killed after its last save: whoever follows it still waits
      telemetry.draw_curves(workdir, run.objective.references)
      checkpoint.write_end(workdir, start_step)
    return state
  if primary:
    checkpoint.remove_end(workdir)  # whoever follows this run waits again
  if start_step:
    log.info("Resumed from the checkpoint of step %d of %d.", start_step, run.total_steps)
  goodput.resume(spent_s)

  # ---------------------------------------------------------------- what runs beside the device
  host_batches = train_batches(
    images, cfg.batch_size, cfg.seed, start_step, local_shards(mesh), num_shards=batch_ways(mesh)
  )
  batches = prefetch_to_device(host_batches, batch_sharding(mesh))
  saver = checkpoint.Saver(workdir, cfg.checkpoint.keep_last, every["keep"])
  writer = telemetry.Metrics(workdir, cfg.log, to_dict(cfg), start_step, primary)
  progress = telemetry.ProgressBar(run.total_steps, start_step, cfg.batch_size, primary)
  compiles = CompileCounter()
  waits_ms: list[float] = []  # since the last written line

  def next_batch():
    with goodput.during("data_wait"):
      batch = next(batches)
    waits_ms.append(batches.last_wait_ms)
    return batch

  def record(step: int, values: dict[str, jax.Array]) -> None:
    numbers = {k: float(v) for k, v in jax.device_get(values).items()}
    numbers |= {"data_wait_ms": sum(waits_ms) / max(len(waits_ms), 1), "bad_images": float(images.bad.num_bad)}
    due = step % max(every["log"], 1) == 0 or step in (1, run.total_steps) or not math.isnan(numbers["rankme"])
    if due:
      writer.write(step, numbers | {"goodput": goodput.share(), "recompiles": float(compiles.count)})
      goodput.write()
      waits_ms.clear()
    progress.update(step, numbers if due else None)
    _stop_if_diverged(step, numbers, cfg.guard, saver, workdir)

  def save(step: int, state: TrainState) -> None:
    with goodput.during("checkpoint"):
      saver.wait()  # for the one before, so that its time is counted as what it is
      spent = {"seconds": goodput.totals(), "examples": step * cfg.batch_size}
      meta = {"step": step, "config": to_dict(cfg), "spent": spent, "num_classes": images.num_classes}
      encoder = run.objective.evaluated(state.params, state.stats, state.target)
      saver.save(step, encoder, state, meta | {"versions": _versions()})

  # ---------------------------------------------------------------- loop
  stop = False
  try:
    batch = next_batch()
    if primary and start_step == 0:
      _draw_views(workdir / "views.png", run, batch)
    with goodput.during("compile"):
      compiled = run.compile()
    stop = preemption.reached(start_step)  # nothing is lost: no step was made
    goodput.enter("step")
    pending = None  # metrics of the step before: fetching those does not stall the device, busy with this one
    with compiles:
      for step in range(start_step + 1, 0 if stop else run.total_steps + 1):
        state, values = compiled(state, batch, run.key)
        if pending:
          record(*pending)
        pending = (step, values)
        stop = preemption.reached(step) and step < run.total_steps
        if stop or step == run.total_steps or (every["checkpoint"] and step % every["checkpoint"] == 0):
          record(*pending)  # not finite: stops here, before anything is saved
          pending = None
          save(step, state)
        if stop:
          break
        if step < run.total_steps:
          batch = next_batch()
  finally:
    goodput.enter("checkpoint")  # the last one is being written
    progress.close()
    batches.close()
    saver.close()
    writer.close()
    goodput.write()

  # ---------------------------------------------------------------- end
  for failure in saver.failures:
    log.error(failure)
  newest = checkpoint.latest_step(workdir)
  if stop:
    where = "no step was finished yet" if newest is None else f"the newest checkpoint is step {newest}"
    raise Preempted(f"Stopped as asked: {where}. The same command goes on from there")
  if newest != run.total_steps:
    raise checkpoint.CheckpointError(f"Training ended, but {saver.failures[-1]}. Make space and run again: it resumes")
  if primary:
    telemetry.draw_curves(workdir, run.objective.references)
    checkpoint.write_end(workdir, run.total_steps)
    log.info("Trained steps %d to %d. %s", start_step + 1, run.total_steps, summary(workdir))
  return state


def _stop_if_diverged(
  step: int, values: dict[str, float], guard: GuardConfig, saver: checkpoint.Saver, workdir: Path
) -> None:
  if guard.skip_nonfinite:
    if values["skipped_in_row"] < guard.max_in_row:
      return
    what = f"{guard.max_in_row} steps in a row were skipped by the guard, the last was step {step}"
  else:
    broken = [k for k in ("loss", "grad_norm") if not math.isfinite(values[k])]
    if not broken:
      return
    what = f"{' and '.join(broken)} not finite at step {step}"
  saver.wait()
  last = checkpoint.latest_step(workdir)
  where = f"is that of step {last}" if last is not None else "does not exist yet"
  raise TrainingDiverged(
    f"{what}. Nothing of it was saved; the last good checkpoint {where}. Lower optim.lr, lengthen optim.warmup, set "
    "optim.clip_norm, or skip single bad batches with guard.skip_nonfinite=True, and go on with --accept-config-change"
  )


def check_workdir(workdir: Path, cfg: Config, accept_change: bool) -> None:
  """Raises a ValueError that shows the difference where workdir holds a run with another config."""
  path = workdir / "config.json"
  if path.exists():
    lines = difference(json.loads(path.read_text()), to_dict(cfg))
    if lines and not accept_change:
      shown = "\n  ".join(lines)
      raise ValueError(
        f"{workdir} holds a run with another config. Nothing was changed.\n  {shown}\n"
        "Choose another --workdir, or pass --accept-config-change to go on with the new settings"
      )


def write_config(workdir: Path, cfg: Config) -> None:
  """Writes the full config to workdir/config.json, at once or not at all."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_whole(workdir / "config.json", json.dumps(to_dict(cfg), indent=2) + "\n")


def _restore(workdir: Path, run: Experiment) -> tuple[TrainState, int, dict[str, float]]:
  """Returns (state, its step, seconds spent by activity) of the newest checkpoint that can be read."""
  for step in reversed(steps := checkpoint.steps(workdir)):
    try:
      abstract = run.abstract_state
      # The encoder is in the state, too: it is read to know that what evaluation will load is whole.
      encoder = run.objective.evaluated(abstract.params, abstract.stats, abstract.target)
      items = checkpoint.restore(workdir, step, state=abstract, encoder=encoder, meta=None)
      return items["state"], step, items["meta"]["spent"]["seconds"]
    except checkpoint.DamagedCheckpoint as error:
      if step == steps[0]:
        raise
      log.error("%s", error)
      if distributed.is_primary():
        log.error("It was moved to %s; the checkpoint before it is used.", checkpoint.set_aside(workdir, step))
      distributed.barrier(f"set aside {step}", timeout_s=300)
  raise AssertionError("unreachable: the oldest checkpoint either loads or raises")


def _draw_views(path: Path, run: Experiment, batch) -> None:
  """Writes views.png: this host's first images with the views that the first step really uses."""
  num = run.cfg.log.views
  local = jax.tree.map(lambda x: jnp.asarray(x.addressable_shards[0].data[:num]), batch)
  rows = (batch["label"].addressable_shards[0].index[0].start or 0) + jnp.arange(len(local["label"]))
  views = jax.jit(run.objective.views)(run.views_keys(0, rows), local)
  telemetry.write_png(path, run.objective.draw(views, local))


def _machine(mesh) -> str:
  shape = " x ".join(f"{k}={v}" for k, v in mesh.shape.items() if v > 1) or "one device"
  return f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({shape}), {jax.process_count()} process(es)"


def _versions() -> dict[str, str]:
  return {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")}
