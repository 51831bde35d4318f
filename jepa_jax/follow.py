"""Evaluates the checkpoints of a run as they come, each once: what `eval --follow` does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jepa_jax import checkpoint
from jepa_jax.data import ImageSet, open_images
from jepa_jax.evals import cell_text, print_table
from jepa_jax.evaluate import as_value, check_overrides, evaluate, result_path
from jepa_jax.workdir import CHECKPOINTS, EVALS, local_workdir, read_end, read_json

log = logging.getLogger(__name__)
Rows = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Asked:
  """What is evaluated, and how: as the arguments of `evaluate`."""

  overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
  names: tuple[str, ...] | None = None
  baselines: bool = True

  def path(self, workdir: Path, step: int) -> Path:
    return result_path(workdir, step, self.overrides, self.names, self.baselines)


def follow(
  workdir: str | Path, asked: Asked = Asked(), poll_s: float = 10, timeout_s: float | None = None
) -> list[int]:
  """Returns the steps evaluated by this call, when the run has ended and all its checkpoints have their table.

  May start before the run does. Oldest first, so that the curve grows from its beginning; a checkpoint with a table in
  <workdir>/evals (asked for alike) is not evaluated again, also by a later call. The baselines, which stay the
  same, are evaluated once, images that fit into data.cache_mb are decoded once, and no features of checkpoints are
  kept. A checkpoint that the run removes meanwhile is
  left out, a damaged one is reported and left out. Ctrl-C and SIGTERM return early, as do timeout_s seconds without a
  new checkpoint. ValueError for a workdir or overrides that cannot work; CheckpointError where, after timeout_s, there
  never was a checkpoint.
  """
  workdir = _checked(workdir, asked, poll_s, timeout_s)
  images = functools.cache(open_images)  # decoded images stay for the next checkpoint
  evaluated: list[int] = []
  seen: set[int] = set()
  damaged: set[int] = set()
  last_news_s = time.monotonic()
  log.info("Waiting for checkpoints in %s%s", workdir, "" if workdir.exists() else " (which does not exist yet)")
  try:
    with _sigterm_as_ctrl_c():
      while True:
        ended = read_end(workdir)  # before the listing, which then holds the last checkpoint
        listed = checkpoint.steps(workdir)
        tables = read_tables(workdir, asked)
        seen |= set(listed)
        damaged &= set(listed)  # moved aside and written again by the run: that one is new
        done = {*tables, *damaged, *evaluated}  # also what was evaluated and could not be written
        waiting = [step for step in listed if step not in done]
        if waiting:  # only the first of them: what comes after is listed anew
          try:
            if _evaluate_one(workdir, waiting[0], asked, images, poll_s):
              evaluated.append(waiting[0])
          except checkpoint.DamagedCheckpoint as error:
            log.error("%s. It is left out", error)
            damaged.add(waiting[0])
          last_news_s = time.monotonic()
        elif ended is not None:
          break
        elif (left_s := (timeout_s or math.inf) - (time.monotonic() - last_news_s)) <= 0:
          if not (seen or tables):
            raise checkpoint.CheckpointError(
              f"no checkpoint came to {workdir} in {timeout_s:g} s; is it the right one?"
            )
          log.warning("No new checkpoint in %g s, and no mark that the run has ended", timeout_s)
          break
        else:
          time.sleep(min(poll_s, left_s))
  except KeyboardInterrupt:
    log.info("Stopped; the same command goes on from here")
  _sum_up(workdir, asked, seen, damaged)
  return evaluated


def read_tables(workdir: str | Path, asked: Asked = Asked()) -> dict[int, Rows]:
  """Returns {step: {row: {column: percent}}} of the whole tables that were asked for alike, oldest first.

  A file that is no whole JSON, or a table that is not finished, is left out, as if it were not there. The checkpoint's
  row is the last.
  """
  tables = {}
  for path in (Path(workdir) / EVALS).glob("*.json"):
    number = path.stem.partition("-")[0]
    if number.isdigit() and path == asked.path(Path(workdir), int(number)):
      with contextlib.suppress(ValueError, KeyError, AttributeError):
        table = read_json(path)
        if table.get("complete", True):
          tables[int(number)] = {
            name: {column: as_value(value) for column, value in row.items()} for name, row in table["rows"].items()
          }
  return dict(sorted(tables.items()))


def _checked(workdir: str | Path, asked: Asked, poll_s: float, timeout_s: float | None) -> Path:
  """Returns the absolute workdir; ValueError before any waiting for what would be waited for in vain."""
  path = local_workdir(workdir)
  if path.parent.name == CHECKPOINTS and path.name.isdigit():
    raise ValueError(f"{path} is one checkpoint; --follow watches a whole run: give {path.parent.parent}")
  if not poll_s > 0 or (timeout_s is not None and not timeout_s > 0):
    raise ValueError(f"poll_s={poll_s} and timeout_s={timeout_s} are seconds and must be positive")
  check_overrides(asked.overrides)
  return path


def _evaluate_one(workdir: Path, step: int, asked: Asked, images: Callable[..., ImageSet], poll_s: float) -> bool:
  """Evaluates a checkpoint; False where it is gone, DamagedCheckpoint where it is there and cannot be read."""
  try:
    arguments = dict(names=asked.names, baselines=asked.baselines, cache=False, show=False, images=images)
    found = evaluate(workdir, step, asked.overrides, **arguments)
  except checkpoint.CheckpointError as error:
    if isinstance(error, checkpoint.DamagedCheckpoint):
      time.sleep(poll_s)  # one that is just being removed looks damaged for a moment
    if step in checkpoint.steps(workdir):
      raise
    log.info("Checkpoint %d is gone (removed by the run); next", step)
    return False
  log.info("Step %d: %s", step, ", ".join(f"{k} {cell_text(v)}" for k, v in found.row.items()))
  return True


def _sum_up(workdir: Path, asked: Asked, seen: set[int], damaged: set[int]) -> None:
  """Prints the table over all steps, and names the checkpoints that have no row in it."""
  tables = read_tables(workdir, asked)
  if tables:
    rows = {name: row for table in tables.values() for name, row in table.items()}
    of_checkpoints = {list(table)[-1] for table in tables.values() if table}
    print_table(
      {name: rows[name] for name in sorted(rows, key=lambda name: name in of_checkpoints)},
      title=f"{workdir.name}: accuracy in percent",
    )
  if gone := sorted(seen - tables.keys() - set(checkpoint.steps(workdir))):
    log.warning(
      "Removed by the run before they were evaluated: steps %s. checkpoint.keep_every keeps such for good", gone
    )
  if damaged:
    log.error("Damaged, so not evaluated: steps %s", sorted(damaged))


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
  """Makes SIGTERM (what schedulers send) raise KeyboardInterrupt here; only the main thread may catch signals."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)
