"""For `bench faults`: the undisturbed run, a run that is disturbed, and what must hold of it after every fault."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from PIL import Image

from jepa_jax import checkpoint, runs, telemetry
from jepa_jax.config import build_config
from jepa_jax.distributed import EXIT_PEER_LOST, EXIT_PREEMPTED
from jepa_jax.experiment import make_experiment
from jepa_jax.huge_pages import KEEP
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.workdir import read_end

STEPS, EVERY = 60, 5  # of a run; between its checkpoints
# Metrics that measure the machine; all others are a function of the step.
MEASURED = {"time", "data_wait_ms", "bad_images", "goodput", "recompiles", "enlarged_views"}
KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM
JOIN_S, MOST_S = 30, 60  # what processes wait for each other at the start; a longer wait for anything is a hang
INPUT_ERROR, DIVERGED, STORAGE_FAILED = 2, 3, 74  # exit statuses, as are EXIT_PREEMPTED and 0
NUM_IMAGES, CLASSES, SIZE_PX = {"train": 64, "test": 16}, 4, 16
# Of several processes, where a checkpoint without checksums is damaged: they end, and the next start goes on.
LEFT_OUT = "The next start leaves this checkpoint out"
ROOT = Path(__file__).resolve().parents[2]


class NotSafeToKill(ValueError):
  """A disturbed run is not what it should be; the message says how, and where its files are."""


def require(holds: bool, otherwise: str) -> None:
  """Raises NotSafeToKill(otherwise) unless it holds."""
  if not holds:
    raise NotSafeToKill(otherwise)


def settings(images: Path) -> dict[str, Any]:
  """Returns the config of all runs: small, but its checkpoints are larger than everything else it writes."""
  crops = {"global_crops": {"num": 2, "size_px": SIZE_PX, "scale": (0.3, 1.0)}}
  crops |= {"local_crops": {"num": 0, "size_px": 8, "scale": (0.1, 0.3)}}
  return {
    "name": "faults",
    "total": f"{STEPS}steps",
    "batch_size": 16,
    "data": {"source": "folder", "root": str(images), "canvas_px": SIZE_PX, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    "encoder": {"name": "mlp", "image_size": SIZE_PX, "widths": (256, 64)},
    "objective": {"name": "lejepa", "num_slices": 64, "projector": {"hidden": (64,), "out": 16}, "views": crops},
    "optim": {"lr": 1e-2, "warmup": "2steps"},
    "checkpoint": {"every": f"{EVERY}steps", "keep_last": 3},
    "evals": {"names": ("knn",), "knn": {"k": 5}},
    "log": {"every": "1steps"},
  }


def write_images(folder: Path) -> Path:
  """Writes random pictures, one of which is broken; returns its path."""
  rng, path = np.random.default_rng(0), folder
  for split, num in NUM_IMAGES.items():
    for i in range(num):
      path = folder / split / f"class{i % CLASSES}" / f"{i:02d}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, (SIZE_PX, SIZE_PX, 3), np.uint8)).save(path)
  broken = folder / "train" / "class0" / "00.png"
  broken.write_bytes(broken.read_bytes()[:100])
  return broken


class Child:
  """A command of ours in a process of its own, or in several that join each other; their output goes to `text`.

  process: the one that signals go to. first_step_s: when a step had been made.
  """

  def __init__(self, commands: Sequence[Sequence[str]], compile_cache: Path, target: int = 0):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "JEPA_")) or k == KEEP}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    clean |= {"XLA_FLAGS": " ".join(flags)} if flags else {}  # of the compiler only: one device, as for the reference
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compile_cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = clean | cache | {"JAX_PLATFORMS": "cpu"}
    self.text, self.first_step_s, self._began = "", None, time.monotonic()
    self._all = [subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipes) for command in commands]
    self._readers = [threading.Thread(target=self._read, args=(process,), daemon=True) for process in self._all]
    for reader in self._readers:
      reader.start()
    self.process = self._all[target]

  @property
  def primary(self) -> subprocess.Popen:
    """The process that writes the checkpoints."""
    return self._all[0]

  @property
  def statuses(self) -> set[int]:
    """The exit statuses of all processes, which have ended."""
    return {process.wait() for process in self._all}

  @property
  def others(self) -> set[int]:
    """Those of the processes that no signal went to."""
    return {process.wait() for process in self._all if process is not self.process}

  def _read(self, process: subprocess.Popen) -> None:
    assert process.stdout
    with process.stdout as lines:
      for line in lines:
        if self.first_step_s is None and re.match(r"step \d+/\d+ ", line):
          self.first_step_s = time.monotonic() - self._began
        self.text += line

  def until(self, happened: Callable[[], bool], timeout_s: float = 900) -> bool:
    """Returns True as soon as it happened, False where a process ended before."""
    deadline = time.monotonic() + timeout_s
    while not happened():
      if any(process.poll() is not None for process in self._all):
        return False
      if time.monotonic() > deadline:
        self._hung(timeout_s)
      time.sleep(0.001)
    return True

  def end(self, number: int | None = None) -> int:
    """Sends a signal (None: none), waits for the end of all and returns the exit status of the one that it went to."""
    if number is not None:
      self.process.send_signal(number)
    self.until(lambda: False)
    for process in self._all:  # the first has ended
      try:
        process.wait(MOST_S)
      except subprocess.TimeoutExpired:
        self._hung(MOST_S)
    for reader in self._readers:
      reader.join(10)
    return self.process.wait()

  def _hung(self, seconds: float) -> NoReturn:
    for process in self._all:
      process.kill()
    raise NotSafeToKill(f"a process hung for {seconds} s:\n{self.text}")


class Undisturbed:
  """The run that the others are compared with: its folder, the hash of its last state, its metrics by step."""

  def __init__(self, folder: Path, num_processes: int = 1, seed: int = 0):
    self.num_processes, self._rng = num_processes, np.random.default_rng(seed)
    self.folder, self.workdir, self.config = folder, folder / "undisturbed", folder / "config.py"
    self.bad_image, self.cache = write_images(folder / "images"), folder / "compiled"
    values = settings(folder / "images")
    self.config.write_text(
      f"from ml_collections import ConfigDict\n\n\ndef get_config():\n  return ConfigDict({values})\n"
    )
    self.cfg = build_config(values)
    mesh = make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    self.abstract_state = make_experiment(self.cfg, mesh, NUM_IMAGES["train"], CLASSES).abstract_state
    self._train(folder / "compiling")
    child = self._train(self.workdir)
    self.startup_s = child.first_step_s or 0.0
    self.hash = self.state_hash(self.workdir, STEPS)
    self.rows = {row["step"]: function_of_step(row) for row in telemetry.read_metrics(self.workdir)}
    require(sorted(self.rows) == list(range(1, STEPS + 1)), f"{self.workdir}: not every step is in metrics.jsonl")
    require("does not decode" in child.text, f"{self.bad_image} is broken, and nobody said so")
    again = self.state_hash(folder / "compiling", STEPS)
    require(again == self.hash, f"two undisturbed runs in {folder} differ: {again}, {self.hash}")
    shutil.rmtree(folder / "compiling")

  def start(self, *arguments: str, before: Sequence[str] = ("-m", "jepa_jax")) -> Child:
    """Starts a command, training in as many processes as this run has, one of which, drawn, gets the signals."""
    command = [*before, *arguments]
    if self.num_processes == 1 or "train" not in arguments:
      return Child([command], self.cache)
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      several = [f"--coordinator=127.0.0.1:{probe.getsockname()[1]}", f"--num-processes={self.num_processes}"]
    several += [f"--join-timeout-s={JOIN_S}"]
    commands = [[*command, *several, f"--process-id={i}"] for i in range(self.num_processes)]
    return Child(commands, self.cache, int(self._rng.integers(self.num_processes)))

  def _train(self, workdir: Path) -> Child:
    child = self.start("train", f"--config={self.config}", f"--workdir={workdir}")
    require((status := child.end()) == 0, f"undisturbed training ended with {status}:\n{child.text}")
    return child

  def table(self, workdir: Path) -> dict:
    """Evaluates the last checkpoint of a run; returns the rows of the table."""
    child = self.start("eval", f"--workdir={workdir}")
    require((status := child.end()) == 0, f"evaluation of {workdir} ended with {status}:\n{child.text}")
    return json.loads((workdir / "evals" / f"{STEPS}.json").read_text())["rows"]

  def state_hash(self, workdir: Path, step: int) -> str:
    """Returns the SHA-256 of everything that training changes; DamagedCheckpoint where it cannot be read."""
    networks, training = self.abstract_state.networks, self.abstract_state.training
    items = checkpoint.restore(workdir, step, networks=networks, training=training, meta=None)
    state = items["networks"], items["training"]
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
      about = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} "
      digest.update(about.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


class Disturbed:
  """One run that faults happen to. `broken`: its newest checkpoint, damaged on purpose and not yet met by a start."""

  def __init__(self, reference: Undisturbed, name: str, rng: np.random.Generator):
    self.reference, self.rng, self.workdir = reference, rng, reference.folder / name
    self.starts = self.set_aside = self.unharmed = self.saves_cut_short = self.steps_repeated = 0
    self.broken: int | None = None
    self._moved: set[str] = set()
    self._hashes: dict[int, str] = {}  # of the sound checkpoints: none may change, the newest is where a start goes on

  @property
  def several(self) -> bool:
    """Whether the run has more than one process."""
    return self.reference.num_processes > 1

  @property
  def newest(self) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return checkpoint.latest_step(self.workdir) or 0

  @property
  def num_sound(self) -> int:
    """How many checkpoints were seen to be whole, and have not been damaged since."""
    return len(self._hashes.keys() - {self.broken})

  @property
  def last_row(self) -> int:
    """The last step in metrics.jsonl."""
    rows = telemetry.read_metrics(self.workdir) if (self.workdir / "metrics.jsonl").exists() else []
    return int(rows[-1]["step"]) if rows else 0

  @property
  def unfinished_saves(self) -> list[Path]:
    """Checkpoints that are being written, or whose writing was cut short."""
    return list((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

  def train(self, before: Sequence[str] = ("-m", "jepa_jax"), more: Sequence[str] = ()) -> Child:
    """Starts the run again."""
    self.starts += 1
    arguments = ("train", f"--config={self.reference.config}", f"--workdir={self.workdir}")
    return self.reference.start(*more, *arguments, before=before)

  def advance(self, child: Child) -> bool:
    """Waits for a random number of steps of this start; returns False where the process ended before."""
    if not child.until(lambda: child.first_step_s is not None):
      return False
    goal = self.last_row + self.rng.integers(0, 3 * EVERY)
    return child.until(lambda: self.last_row >= goal)

  def stop(self, child: Child, number: int | None = None, may_lose: int = 2 * EVERY) -> int:
    """Sends a signal (None: none), waits for the end, checks what was said and what is left; returns the status.

    may_lose: steps since the newest checkpoint; more than EVERY, since a save takes its time beside the steps.
    """
    status = child.end(number)
    expected = (0, DIVERGED, EXIT_PREEMPTED, KILLED, TERMINATED)
    without_space = status == INPUT_ERROR and "Training ended, but CHECKPOINT NOT SAVED" in child.text
    # One of several may hear that another ended before it comes upon the same itself.
    told = STORAGE_FAILED in child.statuses and "CHECKPOINT NOT SAVED" in child.text or DIVERGED in child.statuses
    told |= LEFT_OUT in child.text
    require(
      status in expected or without_space or self.several and told,
      f"{self.workdir}: ended with {status}:\n{child.text}",
    )
    self._check_others(child, status)
    self.saves_cut_short += bool(self.unfinished_saves)
    self._check_resumed(child.text)
    if child.first_step_s is not None and status != 0:
      lost = self.last_row - self.newest
      self.steps_repeated += max(lost, 0)
      require(
        lost <= may_lose, f"{self.workdir}: {lost} steps are lost, {self.newest} of {self.last_row}:\n{child.text}"
      )
    self.check()
    return status

  def _check_others(self, child: Child, status: int) -> None:
    """Requires that the processes which no signal went to ended as they must."""
    lost = {EXIT_PEER_LOST, EXIT_PREEMPTED} if child.first_step_s is None else {EXIT_PEER_LOST}
    right = {0: {0}, DIVERGED: {DIVERGED}, KILLED: {0} | lost, TERMINATED: lost, STORAGE_FAILED: lost}
    right[EXIT_PREEMPTED] = {EXIT_PREEMPTED} | (lost if child.first_step_s is None else set())
    wrong = [other for other in child.others if status in right and other not in right[status]]
    require(not wrong, f"{self.workdir}: one process ended with {status}, others with {wrong}:\n{child.text}")

  def _check_resumed(self, text: str) -> None:
    found = re.search(r"Resumed from the checkpoint of step (\d+)|is complete \((\d+) steps\)", text)
    resumed = int(found[1] or found[2]) if found else None
    if self.broken is not None:
      moved = {path.name for path in (self.workdir / "checkpoints_damaged").glob("*")} - self._moved
      if moved:
        require(f"checkpoints/{self.broken} is damaged or incomplete" in text, f"set aside in silence:\n{text}")
        self.set_aside += 1
        self._moved |= moved
        self._hashes.pop(self.broken)
      elif resumed is not None:
        self.unharmed += 1  # the file was none that training needs
      self.broken = None if moved or resumed is not None else self.broken
    if resumed is not None:
      expected = max(self._hashes, default=None)
      require(resumed == expected, f"{self.workdir}: resumed at {resumed} and not at {expected}:\n{text}")

  def check(self) -> None:
    """Requires that what lies in the workdir is whole, and that what was computed is what it should be."""
    for name in ("config.json", "goodput.json"):
      if (path := self.workdir / name).exists():
        values = json.loads(path.read_text())
        same = name != "config.json" or runs.read_config(self.workdir) == self.reference.cfg
        require(same, f"{path} is another config: {values}")
    if (path := self.workdir / "metrics.jsonl").exists():
      rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # only the last may be cut off
      steps = [row["step"] for row in rows if row["step"] <= self.newest]
      require(steps == list(range(1, self.newest + 1)), f"{path} does not hold each step once: {steps}")
      right = self.reference.rows
      wrong = [step for step, row in zip(steps, rows) if function_of_step(row) != right[step]]
      require(not wrong, f"{path}: steps {wrong} differ from those of the undisturbed run")
    steps = checkpoint.steps(self.workdir)
    last = max(self._hashes, default=0)
    require(self.newest >= last, f"{self.workdir}: the checkpoint of step {last} is gone; there are {steps}")
    for step in (s for s in steps[-2:] if s != self.broken):
      found = self.reference.state_hash(self.workdir, step)  # DamagedCheckpoint: nobody has damaged that one
      require(
        found == self._hashes.setdefault(step, found), f"{self.workdir}: the checkpoint of step {step} has changed"
      )
    self._hashes = {step: found for step, found in self._hashes.items() if step in steps}

  def finish(self) -> None:
    """Trains to the end, undisturbed, and requires that it is that of the undisturbed run."""
    while self.newest < STEPS or self.broken is not None or read_end(self.workdir) is None:
      child = self.train()
      status = self.stop(child)
      if self.several and LEFT_OUT in child.text:
        continue
      require(status == 0, f"{self.workdir}: the last start did not end well:\n{child.text}")
      ended = read_end(self.workdir)
      require(ended == STEPS, f"{self.workdir} says that it ended at step {ended}, not {STEPS}:\n{child.text}")
    found, expected = self.reference.state_hash(self.workdir, STEPS), self.reference.hash
    require(found == expected, f"the final state of {self.workdir} has the hash {found}, undisturbed {expected}")
    rows = {row["step"]: function_of_step(row) for row in telemetry.read_metrics(self.workdir)}
    require(rows == self.reference.rows, f"{self.workdir}/metrics.jsonl is not that of the undisturbed run")


def function_of_step(row: Mapping[str, float]) -> dict[str, float]:
  """Returns the metrics that do not measure the machine."""
  return {name: value for name, value in row.items() if name not in MEASURED}
