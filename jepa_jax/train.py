"""The one train loop. It knows nothing of a method but `objectives.base.Objective`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import checkpoint, curves, distributed, frozen, runs, starts, telemetry
from jepa_jax.config import Config, to_dict
from jepa_jax.data import open_images, open_source, prefetch_to_device, train_batches
from jepa_jax.experiment import Experiment, make_experiment
from jepa_jax.goodput import CompileCounter, Goodput, summary
from jepa_jax.holder import hold
from jepa_jax.sharding import batch_sharding, batch_ways, local_shards, make_mesh, report
from jepa_jax.step import GuardConfig, TrainState
from jepa_jax.step import numbers as as_numbers
from jepa_jax.views import Drawn, enlarged_share
from jepa_jax.workdir import PROFILE, TOKENIZER, VIEWS, local_workdir, read_end, remove_end, write_end, write_whole

log = logging.getLogger(__name__)
_MOST_PENDING = 50  # steps whose metrics may wait on the device: a loss that is not finite is found so much later


class TrainingDiverged(FloatingPointError):
  """The loss or the gradient is not finite; the message names the step and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Start:
  """How a run starts, besides its config: see `starts.start`, and `--help`.

  accept_change: resume although the config differs. init_from, init_what: another run to start from, and which of its
  networks. profile: steps of which a trace is written, (first, last) of this start, or None.
  """

  accept_change: bool = False
  init_from: str = ""
  init_what: str = "encoder"
  profile: tuple[int, int] | None = None


def train(cfg: Config, workdir: str | Path, start: Start = Start()) -> TrainState:
  """Trains to the end of the config and returns the final state; resumes from the newest checkpoint in workdir.

  ValueError, before anything is compiled, where the config, the data, the mesh and the workdir do not fit together.
  distributed.Preempted after a SIGTERM, TrainingDiverged where the loss is not finite.
  """
  workdir = local_workdir(workdir)
  with distributed.Preemption() as preemption, contextlib.ExitStack() as stack:
    return _train(cfg, workdir, start, preemption, stack)


def _train(
  cfg: Config, workdir: Path, start: Start, preemption: distributed.Preemption, stack: contextlib.ExitStack
) -> TrainState:
  telemetry.check(cfg.log)
  primary = distributed.is_primary()
  goodput = Goodput(workdir, primary)

  # ---------------------------------------------------------------- mesh, data, networks, objective, optimiser
  mesh = make_mesh(cfg.mesh)
  images = open_images(cfg.data, "train")
  run = make_experiment(cfg, mesh, len(images), images.num_classes)
  if wanted := getattr(cfg.objective, "captions", 0):
    images.check_captions(wanted)
  cadence = {"log": cfg.log.every, "checkpoint": cfg.checkpoint.every, "keep": cfg.checkpoint.keep_every}
  # A share of a short run may round to nothing, which would be "never": then it is every step.
  in_steps = lambda length: max(length.steps(run.steps_per_epoch, run.total_steps), length.value > 0)
  every = {name: in_steps(length) for name, length in cadence.items()}

  # ---------------------------------------------------------------- workdir: another run's is refused
  distributed.check_shared(workdir)
  held = stack.enter_context(hold(workdir))
  runs.check_workdir(workdir, cfg, start.accept_change)
  if primary:
    log.info("Training images: %s", images.summary(counted=False))
    _look_for_test_images(cfg)
  log.info(
    "%s on %s; the largest parameters, bytes per device and sharding:\n%s",
    cfg.name,
    _machine(mesh),
    report(run.abstract_state.params),
  )

  # ---------------------------------------------------------------- restore or init
  data = images.about()
  init = (start.init_from, start.init_what)
  state, start_step, spent_s, origin = starts.start(run, workdir, data, *init, start.accept_change)
  if start_step >= run.total_steps:
    log.info("The run in %s is complete (%d steps); nothing to train.", workdir, start_step)
    if primary and read_end(workdir) is None:  # killed after its last save: whoever follows it still waits
      write_end(workdir, start_step)
      curves.draw_curves(workdir, run.references)
    return state
  if primary:
    runs.write_config(workdir, cfg)  # only now: a checkpoint of another architecture was refused above
    if images.tokenizer:
      write_whole(workdir / TOKENIZER, images.tokenizer.json)
    remove_end(workdir)  # whoever follows this run waits again
  if start_step:
    log.info("Resumed from the checkpoint of step %d of %d.", start_step, run.total_steps)
  goodput.resume(spent_s)

  # ---------------------------------------------------------------- what runs beside the device
  join = frozen.join_features(run, state, images, workdir)
  here = (local_shards(mesh), batch_ways(mesh))
  host_batches = train_batches(images, cfg.batch_size, cfg.seed, start_step, *here, join)
  batches = prefetch_to_device(host_batches, batch_sharding(mesh))
  saver = checkpoint.Saver(workdir, cfg.checkpoint.keep_last, every["keep"])
  writer = telemetry.Metrics(workdir, cfg.log, to_dict(cfg), start_step, primary)
  live = curves.LiveCurves(workdir, run.references, primary)
  progress = telemetry.ProgressBar(run.total_steps, start_step, cfg.batch_size, primary)
  compiles = CompileCounter()
  trace = _Trace(workdir / PROFILE, start.profile if primary else None)
  waits_ms: list[float] = []  # since the last written line
  pending: list[tuple[int, dict[str, jax.Array]]] = []  # metrics that are still on the device

  def next_batch():
    with goodput.during("data_wait"):
      batch = next(batches)
    waits_ms.append(batches.last_wait_ms)
    return batch

  def is_due(step: int) -> bool:
    at = every["log"], cfg.probe.spectrum_every
    return any(n and step % n == 0 for n in at) or step in (1, run.total_steps)

  def record() -> None:
    """Fetches the metrics of the steps that wait for it: whole lines where they are due, the rest for its health."""
    for step, values in jax.device_get([(s, v if is_due(s) else _health(v)) for s, v in pending]):
      numbers = as_numbers(values)
      if is_due(step):
        numbers |= {"data_wait_ms": sum(waits_ms) / max(len(waits_ms), 1), "bad_images": float(images.bad.num_bad)}
        numbers["enlarged_views"] = enlarged
        writer.write(step, numbers | {"goodput": goodput.share(), "recompiles": float(compiles.count)})
        goodput.write()
        waits_ms.clear()
        live.update()
        progress.update(step, numbers)
      _stop_if_diverged(step, numbers, cfg.guard, saver, workdir)
    pending.clear()

  def save(step: int, state: TrainState) -> None:
    with goodput.during("checkpoint"):
      held.check()
      spent = {"seconds": goodput.totals(), "examples": step * cfg.batch_size}
      tokenizer = images.tokenizer and images.tokenizer.json
      about = {"data": data, "started_from": origin, "tokenizer": tokenizer, "machine": _machine(mesh)}
      meta = runs.make_meta(cfg, step, images.num_classes, spent, **about)
      saver.save(step, state.networks, state.training, meta, hurry=stop)

  # ---------------------------------------------------------------- loop
  stop = False
  try:
    batch = next_batch()
    if primary and start_step == 0 and cfg.log.views:
      writer.picture("views", _draw_views(workdir / VIEWS, run, batch), 0)
    enlarged = _enlarged_views(run, batch, warn=primary)
    with goodput.during("compile"):
      compiled = run.compile()
    stop = preemption.reached(start_step)  # nothing is lost: no step was made
    goodput.enter("step")
    with compiles:
      for step in range(start_step + 1, 0 if stop else run.total_steps + 1):
        with trace.step(step - start_step):
          state, values = compiled(state, batch, run.key)
        trace.stop_after(step - start_step, values)
        progress.update(step)
        # Of a step before the last: fetching it does not stall the device, which is busy with this one.
        if pending and (is_due(pending[-1][0]) or len(pending) >= _MOST_PENDING):
          record()
        pending.append((step, values))
        stop = preemption.reached(step) and step < run.total_steps
        if stop or step == run.total_steps or (every["checkpoint"] and step % every["checkpoint"] == 0):
          record()  # not finite: stops here, before anything is saved
          save(step, state)
        if stop:
          break
        if step < run.total_steps:
          batch = next_batch()
  finally:
    goodput.enter("checkpoint")  # the last one is being written
    trace.close()
    progress.close()
    batches.close()
    saver.close()
    writer.close()
    live.draw()  # however it ended
    goodput.write()

  # ---------------------------------------------------------------- end
  for failure in saver.failures:
    log.error(failure)
  newest = checkpoint.latest_step(workdir)
  if stop:
    where = "no step was finished yet" if newest is None else f"the newest checkpoint is step {newest}"
    raise distributed.Preempted(f"Stopped as asked: {where}. The same command goes on from there")
  if newest != run.total_steps:
    raise checkpoint.CheckpointError(f"Training ended, but {saver.failures[-1]}. Make space and run again: it resumes")
  if primary:
    write_end(workdir, run.total_steps)
    log.info("Trained steps %d to %d. %s", start_step + 1, run.total_steps, summary(workdir))
  return state


def _look_for_test_images(cfg: Config) -> None:
  """Says of the test split what is there, or why it cannot be opened: training does not need it, evaluation will."""
  if not cfg.evals.names:
    return
  try:
    found = open_source(cfg.data, "test")
  except Exception as error:  # whatever it is: training goes on without
    log.warning("There are no test images yet, and `eval` will need them: %s", error)
    return
  log.info("Test images: %s", f"{len(found):,}")


def _stop_if_diverged(
  step: int, values: dict[str, float], guard: GuardConfig, saver: checkpoint.Saver, workdir: Path
) -> None:
  if guard.skip_nonfinite:
    if values["skipped_in_row"] < guard.max_in_row:
      return
    what = f"{guard.max_in_row} steps in a row were skipped by the guard, the last was step {step}"
  else:
    broken = [k for k in ("loss", "grad_norm", "param_norm") if not math.isfinite(values[k])]
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


def _health(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns of a step's metrics what says whether the run may go on."""
  return {name: values[name] for name in ("loss", "grad_norm", "param_norm", "skipped_in_row") if name in values}


class _Trace:
  """A profile of some early steps, for TensorBoard or Perfetto, in <workdir>/profile; nothing where steps is None."""

  def __init__(self, folder: Path, steps: tuple[int, int] | None):
    self._folder, self._steps, self._on = folder, steps, False

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Around the `number`-th step of this start."""
    if self._steps is None:
      yield
      return
    if number == self._steps[0]:
      jax.profiler.start_trace(str(self._folder))
      self._on = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def stop_after(self, number: int, values: dict[str, jax.Array]) -> None:
    """Ends the trace with the last step that is asked for, once the device has made it."""
    if self._on and self._steps and number >= self._steps[1]:
      jax.block_until_ready(values)
      self.close()

  def close(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False
      log.info("Profile written to %s", self._folder)


def _draw_views(path: Path, run: Experiment, batch) -> np.ndarray:
  """Writes views.png, and returns it: this host's first images with the views that the first step uses, made on the CPU
  where there is one: it is a program of its own, and a GPU's compiler takes minutes for it."""
  num, device = run.cfg.log.views, None
  with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave it out
    device = jax.local_devices(backend="cpu")[0]
  local = jax.device_put(jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[:num], batch), device)
  rows = (batch["label"].addressable_shards[0].index[0].start or 0) + jnp.arange(len(local["label"]))
  views = jax.jit(run.objective.views)(run.views_keys(0, rows), local)
  drawn = run.objective.draw(views, local)
  picture = telemetry.titled(*drawn) if isinstance(drawn, Drawn) else drawn
  telemetry.write_png(path, picture)
  return picture


def _enlarged_views(run: Experiment, batch, warn: bool) -> float:
  """Returns the percentage of global views with more pixels than they show, from this host's first images; or NaN."""
  crops = getattr(getattr(run.cfg.objective, "views", None), "global_crops", None)
  if crops is None:
    return math.nan
  share = enlarged_share(crops, *(batch[side].addressable_shards[0].data for side in ("height", "width")))
  if warn and share > 0.5 and not run.cfg.data.is_small:
    log.warning(
      "%.0f %% of the views of %d px will be enlargements of what they show. Where the pictures are larger than "
      "data.canvas_px=%d, raise it; or ask for smaller views",
      100 * share,
      crops.size_px,
      run.cfg.data.canvas_px,
    )
  return 100 * share


def _machine(mesh) -> str:
  shape = " x ".join(f"{k}={v}" for k, v in mesh.shape.items() if v > 1) or "one device"
  return f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({shape}), {jax.process_count()} process(es)"
