"""What a reader should worry about, in words: collapse, bad images, skipped steps, a probe that jumps, waiting."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from jepa_jax.report.facts import Facts

# The last fifth of a curve is looked at, for noise and for what it is still doing.
_USED = 0.05  # share of the directions below which features count as collapsed
_DEAD_STD = 1e-3
_NOISY_POINTS = 3.0
_WAITING = 0.2  # share of the time of steps
_GOOD = 50.0  # percent of the time
_ENLARGED = 50.0
_BETTER = 0.5  # points over the random encoder
_RISEN, _FALLEN = 2.0, 0.5  # times the first loss; of the best online probe
_FALLING = 0.02  # of the loss's range, over the last fifth


def worries(run: Facts) -> list[str]:
  """Returns a sentence for each thing that is, or may be, wrong with a run; none for a healthy one."""
  return [*_of_progress(run), *_of_features(run), *_of_data(run), *_of_time(run), *_of_tables(run)]


def _of_progress(run: Facts) -> Iterator[str]:
  if not run.rows:
    yield "It has no metrics: metrics.jsonl is missing or empty."
    return
  step = int(run.rows[-1]["step"])
  if run.ended is None:
    newest = f"the newest checkpoint is step {run.steps[-1]:,}" if run.steps else "there is no checkpoint yet"
    yield (
      f"It has not ended: the last metrics are of step {step:,}, {newest}. Unless it is being trained now, the same "
      "command goes on from there."
    )
  broken = [row for row in run.rows if not math.isfinite(row.get("loss", 0.0))]
  if broken:
    first = int(broken[0]["step"])
    yield f"The loss was not finite in {len(broken)} of {len(run.rows)} lines, first at step {first:,}."
  if skipped := run.last("skipped"):
    yield f"{int(skipped)} steps were skipped because their loss or gradient was not finite."
  losses = _values(run, "loss")
  if run.ended is not None and len(losses) >= 50:
    fifth = len(losses) // 5
    before, after = losses[-2 * fifth : -fifth].mean(), losses[-fifth:].mean()
    span = np.ptp(np.quantile(losses, [0.02, 0.98]))
    if span > 0 and (before - after) / span > _FALLING:
      yield "The loss was still falling when the schedule ended: a longer run (`total`) may be better."

  if len(losses) >= 10 and losses[-len(losses) // 5 :].mean() > _RISEN * abs(losses[0]) > 0:
    yield f"The loss ended higher than it began: {losses[0]:.3g} at first, {losses[-1]:.3g} at last."


def _of_features(run: Facts) -> Iterator[str]:
  width = run.cfg.encoder.output_dim
  if (used := run.last("rankme")) is not None:
    most = max(_values(run, "rankme"), default=used)
    width = min(width, run.cfg.batch_size)  # of a batch's features no more can differ
    if used < max(2.0, _USED * width):
      yield f"Collapse: the features use {used:.1f} of {width} directions (RankMe). Images are hardly told apart."
    elif used < 0.5 * most:
      yield f"RankMe fell from {most:.0f} to {used:.0f}: part of the features is dying."
  if (std := run.last("feature_std")) is not None and std < _DEAD_STD:
    yield f"Collapse: features differ by {std:.2g} between images (feature_std)."
  probe = _values(run, "probe_accuracy")
  if len(probe) >= 20:
    tail = probe[-len(probe) // 5 :]
    best = max(float(probe[i : i + 5].mean()) for i in range(len(probe) - 4))
    if tail.mean() < _FALLEN * best:
      yield f"The online probe fell from {best:.0f} to {tail.mean():.0f} %."
    noise = float(np.std(np.diff(tail)) / math.sqrt(2))
    if noise > _NOISY_POINTS:
      yield (
        f"The online probe jumps by {noise:.1f} points from one line to the next: read its mean, or trust `eval` only. "
        "It is measured on one batch."
      )


def _of_data(run: Facts) -> Iterator[str]:
  if bad := run.last("bad_images"):
    yield f"{int(bad)} images did not decode and were replaced; `data inspect` names them."
  enlarged = run.last("enlarged_views")
  if enlarged is not None and enlarged > _ENLARGED and not run.cfg.data.is_small:
    yield f"{enlarged:.0f} % of the global views are enlargements: raise data.canvas_px, or ask for smaller views."


def _of_time(run: Facts) -> Iterator[str]:
  whole = sum(run.seconds.values())
  if not whole:
    return
  step_s = run.seconds.get("step", 0.0)
  waited = run.seconds.get("data_wait", 0.0)
  if waited > _WAITING * (step_s + waited) and waited > 30:
    yield (
      f"Steps waited for images {100 * waited / (step_s + waited):.0f} % of their time: more data.num_threads, a "
      "larger data.cache_mb, or smaller stored images."
    )
  if whole > 600 and 100 * step_s / whole < _GOOD:
    yield f"Only {100 * step_s / whole:.0f} % of {whole / 60:.0f} minutes went into steps."
  if lost := run.seconds.get("lost", 0.0):
    yield f"{lost / 60:.1f} minutes of work were lost between the last checkpoint and a kill."
  if recompiled := run.last("recompiles"):
    yield f"{int(recompiled)} programs were compiled inside the loop, where there should be none."
  if "dirty" in run.written_by.get("commit", ""):
    yield "It was started with changes that are in no commit: the commit alone does not reproduce it."


def _of_tables(run: Facts) -> Iterator[str]:
  if not run.tables:
    yield "It was not evaluated yet: `eval --workdir=...` compares it with raw pixels and a random encoder."
    return
  for table in run.newest_tables():
    if not table.complete:
      yield f"The evaluation of step {table.step:,} is not finished: the same command goes on."
    for column, value in table.rows.get(table.this, {}).items():
      for row, others in table.rows.items():
        other = others.get(column) if row != table.this else None
        if column in ("knn", "linear", "attentive") and other is not None and _number(value) < _number(other) + _BETTER:
          have = "has" if row == "random encoder" else "have"
          yield f"{column}: {_number(value):.1f}, and the {row} {have} {_number(other):.1f}."


def _number(value: float | list[float]) -> float:
  return float(value[0] if isinstance(value, list | tuple) else value)


def _values(run: Facts, key: str) -> np.ndarray:
  return np.array([row[key] for row in run.rows if math.isfinite(row.get(key, math.nan))])
