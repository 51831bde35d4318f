"""What a run tells: metrics.jsonl always, TensorBoard and W&B if asked for, a progress bar, a picture of the loss."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jepa_jax.duration import Duration
from jepa_jax.workdir import METRICS, TENSORBOARD, WANDB, read_json, write_json, write_whole

console = Console(stderr=True)
log = logging.getLogger(__name__)
_COLUMN_PX, _TITLE_PX, _FONT_PX = 110, 24, 14  # of titles above columns


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Metrics are written every `every`; `wandb` names a Weights & Biases project (needs the extra [wandb])."""

  every: Duration = Duration(50, "steps")
  tensorboard: bool = True
  wandb: str = ""
  views: int = 8  # images drawn in views.png; 0: none, and no time spent on it

  def __post_init__(self):
    if self.every.value <= 0:
      raise ValueError(f'every="{self.every}" must be positive')
    if self.views < 0:
      raise ValueError(f"views={self.views}: draw 0 images or more")


class _ConsoleHandler(logging.Handler):
  """Prints records through the console that also draws the progress bar. Long lines stay whole: paths can be copied."""

  def emit(self, record: logging.LogRecord) -> None:
    with contextlib.suppress(OSError):  # output into a file on a full disk costs lines, not the run
      console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


def setup_logging(level: int = logging.INFO) -> None:
  """Sends our log to the console; other libraries only from ERROR on."""
  handler = _ConsoleHandler()
  handler.addFilter(lambda r: r.name.startswith("jepa_jax") or r.levelno >= logging.ERROR)
  # force: absl, which other libraries import, has put a handler of its own on the root logger
  logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
  logging.getLogger("jepa_jax").setLevel(level)


@contextlib.contextmanager
def _as_if_absent(module: str) -> Iterator[None]:
  """An import of `module` fails within, unless it was imported before."""
  absent = module not in sys.modules
  if absent:
    sys.modules[module] = None  # pyright: ignore[reportArgumentType]  # what the import system takes for "not there"
  try:
    yield
  finally:
    if absent:
      sys.modules.pop(module, None)


class Metrics:
  """Writes metrics as they come. Only process 0 writes; the others hold a Metrics that does nothing.

  A disk that is full costs lines of the log, not the run: the first failure is reported, training goes on.
  """

  def __init__(
    self, workdir: Path, cfg: LogConfig, run_config: Mapping[str, Any], start_step: int = 0, primary: bool = True
  ):
    self._primary, self._tensorboard, self._wandb, self._failed = primary, None, None, False
    if not primary:
      return
    self._path = workdir / METRICS
    truncate_metrics(workdir, start_step)
    if cfg.tensorboard:
      with _as_if_absent("torch"):  # tensorboardX takes it in where it is installed, 2.5 s for what no scalar needs
        from tensorboardX import SummaryWriter

      # purge_step: TensorBoard then hides what an interrupted run wrote past the checkpoint that this one resumes
      self._tensorboard = SummaryWriter(str(workdir / TENSORBOARD), purge_step=start_step + 1)
      # Its thread ends at the first error, and then the eleventh value to be added waits for ever.
      events = self._tensorboard._get_file_writer().event_writer._ev_writer
      events.write_event, events.flush = _without_space(events.write_event), _without_space(events.flush)
    if cfg.wandb:
      import wandb

      # Of a resumed run W&B drops the steps that it has seen: they are the same numbers once more.
      identity = _wandb_id(workdir)
      self._wandb = wandb.init(
        project=cfg.wandb, dir=str(workdir), config=dict(run_config), resume="allow", id=identity, name=workdir.name
      )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Appends one line; values that were not measured at this step (NaN) are left out, except the loss."""
    if not self._primary:
      return
    values = {k: float(v) for k, v in values.items() if k == "loss" or not math.isnan(float(v))}
    try:
      with open(self._path, "a") as file:
        file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
      if self._tensorboard:
        for key, value in values.items():
          self._tensorboard.add_scalar(key, value, step)
    except OSError as error:
      if not self._failed:
        log.error("METRICS NOT WRITTEN at step %d: %s. Training goes on; later failures are not shown", step, error)
      self._failed = True
    if self._wandb:
      self._wandb.log(values, step=step)

  def picture(self, name: str, image_HxWx3: np.ndarray, step: int) -> None:
    """Gives TensorBoard and W&B a uint8 picture; the workdir has it as a file."""
    if self._tensorboard:
      with contextlib.suppress(OSError):
        self._tensorboard.add_image(name, image_HxWx3, step, dataformats="HWC")
    if self._wandb:
      import wandb

      self._wandb.log({name: wandb.Image(image_HxWx3)}, step=step)

  def close(self) -> None:
    with contextlib.suppress(OSError):  # a full disk was reported by write()
      if self._tensorboard:
        self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()


def check(cfg: LogConfig) -> None:
  """Raises a ValueError where what the settings ask for is not installed."""
  found = importlib.util.find_spec("wandb") if cfg.wandb else None
  if cfg.wandb and (found is None or found.origin is None):  # without origin: a folder that only has the name
    raise ValueError(f"log.wandb={cfg.wandb!r} needs a package that is not installed: pip install 'wandb>=0.22'")


def _wandb_id(workdir: Path) -> str:
  """Returns the run's id, made once and kept in the workdir: one that is made anew in the same place is another run.

  So is a copy, while what it was copied from is still there: two runs would write into one.
  """
  path = workdir / WANDB
  with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
    known = read_json(path)
    first = Path(known.get("workdir", workdir)) / WANDB
    copied = first.exists() and not first.samefile(path) and read_json(first).get("id") == known["id"]
    if not copied:
      return str(known["id"])
  write_json(path, {"id": (identity := uuid.uuid4().hex), "workdir": str(workdir)})
  return identity


def _without_space(write: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the function, but what it fails to write is dropped."""

  def tolerant(*args: Any) -> Any:
    with contextlib.suppress(OSError):
      return write(*args)

  return tolerant


def truncate_metrics(workdir: Path, step: int) -> None:
  """Drops lines past `step`, which a resumed run will write again, so that the file holds each step once.

  Lines before the last one that cannot be read are kept, in a file beside it.
  """
  path = workdir / METRICS
  if not path.exists():
    if step:
      log.warning("%s is gone: the curves begin at step %d", path, step)
    return
  rows = [_row(line) for line in path.read_text(errors="replace").splitlines()]
  if bad := rows[:-1].count(None):
    aside = path.with_name(f"{METRICS}.damaged")
    with aside.open("ab") as file:  # after what was kept before
      file.write(path.read_bytes())
    log.warning("%d of %d lines of %s cannot be read and are left out; all of it is kept in %s", bad, len(rows),
                path, aside)  # fmt: skip
  kept = [json.dumps(row) + "\n" for row in rows if row is not None and row["step"] <= step]
  write_whole(path, "".join(kept))


def read_metrics(workdir: Path) -> list[dict[str, float]]:
  """Returns the rows of metrics.jsonl; what is none (a line cut off by a crash, one without a step) is left out."""
  lines = (Path(workdir) / METRICS).read_text(errors="replace").splitlines()
  return [row for line in lines if (row := _row(line)) is not None]


def _row(line: str) -> dict[str, float] | None:
  with contextlib.suppress(json.JSONDecodeError):
    row = json.loads(line)
    if isinstance(row, dict) and isinstance(row.get("step"), int):
      return {key: value for key, value in row.items() if isinstance(value, int | float)}
  return None


class ProgressBar:
  """One line: step, images/s, loss, online probe accuracy, time left. Plain lines where there is no terminal."""

  def __init__(self, total_steps: int, start_step: int, batch_size: int, enabled: bool = True):
    self._batch_size, self._total, self._enabled, self._start_step = batch_size, total_steps, enabled, start_step
    self._mark, self._last_line = (time.monotonic(), start_step), 0.0
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    self._bar = Progress(*columns, console=console) if enabled and console.is_terminal else None
    if self._bar:
      self._task = self._bar.add_task("train", total=total_steps, completed=start_step, text="compiling")
      self._bar.start()

  def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
    """Moves the bar to `step`; with metrics, refreshes its text (and prints a line every ten seconds without one)."""
    if not self._enabled:
      return
    text = None
    if metrics is not None:
      now, (then, at) = time.monotonic(), self._mark
      rate = (step - at) * self._batch_size / max(now - then, 1e-9)
      self._mark = (now, step)
      probe = metrics.get("probe_accuracy", math.nan)
      text = f"{rate:,.0f} img/s  loss {metrics['loss']:.4f}" + ("" if math.isnan(probe) else f"  probe {probe:.1f} %")
      left_s = (self._total - step) * self._batch_size / max(rate, 1e-9)
    if self._bar:
      self._bar.update(self._task, completed=step)
      if text:
        self._bar.update(self._task, text=text)
    elif text and (time.monotonic() - self._last_line > 10 or step >= self._total):
      self._last_line = time.monotonic()
      shown = at > self._start_step and step < self._total  # the first rate holds the compilation
      left = f"  {left_s // 60:.0f} min {left_s % 60:.0f} s left" if shown else ""
      with contextlib.suppress(OSError):  # as above: a full disk
        console.print(f"step {step}/{self._total}  {text}{left}", highlight=False, soft_wrap=True)

  def close(self) -> None:
    if self._bar:
      self._bar.stop()


def titled(picture: np.ndarray, titles: Sequence[str]) -> np.ndarray:
  """Returns a picture of equally wide columns with the title of each above it, enlarged by a whole number until there
  is room for words."""
  from PIL import Image, ImageDraw, ImageFont

  times = max(1, math.ceil(_COLUMN_PX * len(titles) / picture.shape[1]))
  large = picture.repeat(times, 0).repeat(times, 1)
  strip = Image.new("RGB", (large.shape[1], _TITLE_PX), "white")
  draw, width = ImageDraw.Draw(strip), large.shape[1] / len(titles)
  for i, title in enumerate(titles):
    place = ((i + 0.5) * width, _TITLE_PX / 2)
    draw.text(place, title, fill="black", anchor="mm", font=ImageFont.load_default(_FONT_PX))
  return np.concatenate([np.asarray(strip), large])


def write_png(path: Path, image_HxWx3: np.ndarray, least_px: int = 800) -> None:
  """Writes a uint8 picture, each pixel enlarged to a square so that the shorter side is about least_px or more."""
  from PIL import Image

  times = max(1, round(least_px / min(image_HxWx3.shape[:2])))
  Image.fromarray(image_HxWx3.repeat(times, 0).repeat(times, 1)).save(path)
