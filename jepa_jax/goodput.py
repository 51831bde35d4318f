"""Where a run's time went, over all its starts: compile, data, steps, checkpoints, and what restarts threw away."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from jepa_jax.workdir import EVALS, GOODPUT, read_json, write_json

ACTIVITIES = ("start", "compile", "data_wait", "step", "checkpoint", "lost")


class Goodput:
  """Seconds by activity, kept in <workdir>/goodput.json so that a killed run's time is not forgotten.

  `saved` are the totals in the checkpoint that is resumed: what the file holds beyond them was worked and lost. Time in
  which nothing ran (a queue, a machine gone) is not counted. Only process 0 writes.
  """

  def __init__(self, workdir: Path, primary: bool = True):
    self._path, self._primary = Path(workdir) / GOODPUT, primary
    self._totals = dict.fromkeys(ACTIVITIES, 0.0)
    self._mark, self._activity = time.monotonic(), "start"

  def resume(self, saved: Mapping[str, float]) -> None:
    """Takes over from earlier starts; call it once the checkpoint to go on from is known ({} for none)."""
    before = read(self._path.parent)
    known = {name: float(saved.get(name, 0.0)) for name in ACTIVITIES}
    known["lost"] += max(0.0, sum(before.values()) - sum(known.values()))
    for name in ACTIVITIES:
      self._totals[name] += known[name]

  def enter(self, activity: str) -> None:
    """From now on time counts for this activity."""
    now = time.monotonic()
    self._totals[self._activity] += now - self._mark
    self._mark, self._activity = now, activity

  @contextlib.contextmanager
  def during(self, activity: str) -> Iterator[None]:
    """Time inside counts for this activity, afterwards for the one before."""
    before = self._activity
    self.enter(activity)
    try:
      yield
    finally:
      self.enter(before)

  def totals(self) -> dict[str, float]:
    """Returns seconds by activity until now."""
    self.enter(self._activity)
    return {name: round(seconds, 2) for name, seconds in self._totals.items()}

  def share(self) -> float:
    """Returns the percentage of all time that went into steps: the goodput."""
    totals = self.totals()
    return 100 * totals["step"] / max(sum(totals.values()), 1e-9)

  def write(self) -> None:
    """Writes goodput.json, at once or not at all; a full disk costs the file, not the run."""
    if self._primary:
      with contextlib.suppress(OSError):
        write_json(self._path, self.totals())


def read(workdir: Path) -> dict[str, float]:
  """Returns the seconds by activity of a run, over all its starts; empty where nothing of the kind was written."""
  try:
    return {name: float(seconds) for name, seconds in read_json(Path(workdir) / GOODPUT).items()}
  except (FileNotFoundError, ValueError, TypeError):
    return {}


def summary(workdir: Path) -> str:
  """Returns one line: the share and seconds of every activity, and what evaluations took in processes of their own."""
  totals = read(workdir)
  whole = max(sum(totals.values()), 1e-9)
  parts = [f"{name.replace('_', ' ')} {100 * s / whole:.1f} % ({s:.0f} s)" for name, s in totals.items() if s >= 0.05]
  seconds = []
  for path in sorted((Path(workdir) / EVALS).glob("*.json")):
    with contextlib.suppress(ValueError, KeyError, TypeError):
      seconds.append(float(read_json(path)["seconds"]))
  beside = f"; beside it {sum(seconds):.0f} s of evaluation" if seconds else ""
  return f"Where {whole:.0f} s went: {', '.join(parts)}{beside}"


class CompileCounter:
  """Counts the programs this process compiles (or takes from the cache) inside the `with`: in a healthy loop none."""

  count = 0

  def __enter__(self) -> CompileCounter:
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(self, event: str, duration_s: float, **_) -> None:
    self.count += event == "/jax/core/compile/backend_compile_duration"
