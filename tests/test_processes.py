"""Whole runs in several processes, by the command line: the numbers of one device; stopped, killed, started again."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jepa_jax import checkpoint, telemetry
from jepa_jax.config import build_config
from jepa_jax.distributed import EXIT_PEER_LOST, EXIT_PREEMPTED
from jepa_jax.evals.features import read_features
from jepa_jax.evaluate import evaluate
from jepa_jax.runs import open_run
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.train import train
from jepa_jax.workdir import read_json
from tests.tiny import MLP, TINY, tiny_values

pytestmark = pytest.mark.slow
# SGD: AdamW turns the rounding of another topology into steps of its own size where a gradient is almost zero.
SMALL = {"encoder": MLP, "objective__views__local_crops__num": 0, "optim__name": "sgd", "total": "4steps"}
# name -> (processes, devices of each, mesh)
TOPOLOGIES = {
  "2 processes, data x fsdp": (2, 2, {"data": 2, "fsdp": 2}),
  "4 processes, fsdp across them": (4, 1, {"data": 1, "fsdp": 4}),
}


@contextlib.contextmanager
def running(
  folder: Path, workdirs: list[Path], devices_each: int, mesh: dict[str, int], *flags: str, **changes
) -> Iterator[list[subprocess.Popen]]:
  """Starts one training process per workdir (most often the same one); their output is in folder/<process id>.txt."""
  folder.mkdir(parents=True, exist_ok=True)
  config = folder / "config.py"
  values = tiny_values(**(SMALL | changes), **{f"mesh__{axis}": size for axis, size in mesh.items()})
  config.write_text(f"import ml_collections\n\ndef get_config():\n  return ml_collections.ConfigDict({values!r})\n")
  command = ["train", f"--config={config}", *flags]
  with started(folder, [[*command, f"--workdir={workdir}"] for workdir in workdirs], devices_each) as processes:
    yield processes


@contextlib.contextmanager
def started(folder: Path, commands: list[list[str]], devices_each: int) -> Iterator[list[subprocess.Popen]]:
  """Starts one process of the command line per command, which join each other; output is in folder/<process id>.txt."""
  folder.mkdir(parents=True, exist_ok=True)
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  env = os.environ | {
    "XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={devices_each}", os.environ["XLA_FLAGS"]),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
  }
  several = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={len(commands)}"]
  processes = []
  try:
    for i, command in enumerate(commands):
      full = [sys.executable, "-m", "jepa_jax", *command, *several, f"--process-id={i}"]
      with (folder / f"{i}.txt").open("w") as output:
        pipes = {"stdout": output, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(full, env=env, cwd=Path(__file__).parent.parent, **pipes))
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.wait()


def ends(processes: list[subprocess.Popen], folder: Path, timeout_s: float = 240) -> list[int]:
  """Returns the exit statuses; pytest shows what the processes wrote."""
  statuses = [process.wait(timeout=timeout_s) for process in processes]
  for i in range(len(processes)):
    print(f"--- process {i}: {statuses[i]}\n{(folder / f'{i}.txt').read_text()[-3000:]}")
  return statuses


def params(workdir: Path, step: int, num_devices: int = 1, mesh: MeshConfig | None = None) -> dict[str, np.ndarray]:
  """Returns the parameters of a checkpoint, restored on that many devices of this process."""
  found = open_run(workdir, step)
  params = found.networks(found.experiment(make_mesh(mesh or MeshConfig(), jax.devices()[:num_devices])))["params"]
  assert all(len(x.sharding.device_set) == num_devices for x in jax.tree.leaves(params))
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Returns the workdir of a finished run by topology; "one" is this process with one device."""
  done: dict[str, Path] = {}

  def workdir_of(name: str) -> Path:
    if name not in done:
      folder = tmp_path_factory.mktemp("run")
      workdir = folder / "workdir"
      if name == "one":
        with pytest.MonkeyPatch.context() as patch:
          patch.setattr("jepa_jax.train.make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
          train(build_config(tiny_values(**SMALL)), workdir)
      else:
        num, devices_each, mesh = TOPOLOGIES[name]
        with running(folder, [workdir] * num, devices_each, mesh) as processes:
          assert ends(processes, folder) == [0] * num
      done[name] = workdir
    return done[name]

  return workdir_of


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_processes_give_the_metrics_and_parameters_of_one_device(finished, name):
  alone, together = finished("one"), finished(name)
  rows = [telemetry.read_metrics(workdir) for workdir in (alone, together)]
  assert [r["step"] for r in rows[1]] == [1, 2, 3, 4] and checkpoint.steps(alone) == checkpoint.steps(together)
  for key in ("loss", "inv", "sigreg", "grad_norm", "probe_loss"):
    np.testing.assert_allclose([r[key] for r in rows[1]], [r[key] for r in rows[0]], rtol=1e-4, err_msg=key)
  expected, got = params(alone, 4), params(together, 4)
  for key in expected:
    np.testing.assert_allclose(got[key], expected[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_a_checkpoint_of_4_processes_is_restored_on_1_2_and_8_devices(finished):
  workdir = finished("4 processes, fsdp across them")
  one = params(workdir, 4)
  assert_same(one, params(workdir, 4, 2, MeshConfig(data=1, fsdp=2)))
  assert_same(one, params(workdir, 4, 8, MeshConfig(data=2, fsdp=4)))


def test_two_processes_evaluate_as_one(finished, tmp_path):
  """Each makes features of half of the images, in its own devices; the joined features are those of one process."""
  workdir = shutil.copytree(finished("2 processes, data x fsdp"), tmp_path / "workdir")
  names, knn = ("knn", "linear"), "--config.evals.knn.k=5"
  command = ["eval", f"--workdir={workdir}", "--evals=knn,linear", knn]
  with started(tmp_path / "out", [command] * 2, 2) as processes:
    assert ends(processes, tmp_path / "out", timeout_s=300) == [0, 0]
  (workdir / "features").rename(workdir / "together")
  alone = evaluate(workdir, overrides={"evals.knn.k": "5"}, names=names, again=True, show=False)
  (file,) = (workdir / "evals").glob("4-*.json")
  together = read_json(file)
  for row, columns in alone.rows.items():
    assert together["rows"][row] == pytest.approx(columns, abs=0.05), row
  folders = sorted(path.name for path in (workdir / "together").iterdir())
  assert folders == sorted(path.name for path in (workdir / "features").iterdir()) and len(folders) == 6
  for name in folders:
    for x, y in zip(*(read_features(workdir / place / name) for place in ("together", "features")), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)


# A text tower beside the image's, captions drawn by the example's key, logits of all pairs of both processes.
PAIRS = {
  "data": TINY["data"] | {"captions": {"train": "random words", "per_image": 2, "length": 8, "vocab_size": 300}},
  "objective": {
    "name": "clip",
    "projector": {"hidden": (), "out": 8, "norm": "none"},
    "text": {"width": 16, "depth": 2, "num_heads": 2},
    "views": {"global_crops": {"num": 1, "size_px": 16, "scale": (0.5, 1.0)}},
  },
  "evals": {"names": ("retrieval",)},
}


def test_two_processes_learn_from_captions_and_retrieve_as_one(tmp_path):
  folder, together, alone = tmp_path / "out", tmp_path / "together", tmp_path / "alone"
  with running(folder, [together] * 2, 2, {"data": 2, "fsdp": 2}, **PAIRS) as processes:
    assert ends(processes, folder) == [0, 0]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("jepa_jax.train.make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    train(build_config(tiny_values(**(SMALL | PAIRS))), alone)
  rows = [telemetry.read_metrics(workdir) for workdir in (alone, together)]
  for key in ("loss", "image_to_text", "scale", "grad_norm"):
    np.testing.assert_allclose([r[key] for r in rows[1]], [r[key] for r in rows[0]], rtol=1e-4, err_msg=key)
  expected, got = params(alone, 4), params(together, 4)
  for key in expected:
    np.testing.assert_allclose(got[key], expected[key], rtol=1e-4, atol=1e-6, err_msg=key)
  with started(folder, [["eval", f"--workdir={together}"]] * 2, 2) as processes:
    assert ends(processes, folder) == [0, 0]
  file = read_json(together / "evals" / "4.json")
  found = evaluate(alone, show=False)
  assert file["rows"]["clip, step 4"] == pytest.approx(found.row, abs=0.3)  # of 512 images: one or two ranks


def wait_for_checkpoint_after(step: int, workdir: Path, processes: list[subprocess.Popen]) -> None:
  for _ in range(24_000):
    if (checkpoint.latest_step(workdir) or 0) > step:
      return
    assert all(process.poll() is None for process in processes)
    time.sleep(0.01)
  raise AssertionError("no checkpoint within four minutes")


def flip_a_bit(folder: Path) -> None:
  path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_stopped_then_killed_then_started_again_ends_like_an_undisturbed_run(tmp_path):
  workdir, undisturbed = tmp_path / "workdir", tmp_path / "undisturbed"
  mesh = (1, {"data": 2})
  # No schedule depends on the length, so the first two runs can be without end: no race with it.
  endless = {"total": "1000000steps", "checkpoint__every": "10steps", "optim__schedule": "constant"}

  with running(tmp_path / "1", [workdir] * 2, *mesh, **endless) as processes:
    wait_for_checkpoint_after(0, workdir, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes, tmp_path / "1") == [EXIT_PREEMPTED] * 2
  *_, before, stopped = checkpoint.steps(workdir)
  assert stopped == telemetry.read_metrics(workdir)[-1]["step"]  # saved where it stopped, not ten steps before
  flip_a_bit(workdir / "checkpoints" / str(stopped))  # one process sees it, both leave this checkpoint out

  with running(tmp_path / "2", [workdir] * 2, *mesh, **endless) as processes:
    wait_for_checkpoint_after(stopped, workdir, processes)
    processes[1].kill()
    assert ends(processes, tmp_path / "2", timeout_s=60) == [EXIT_PEER_LOST, -signal.SIGKILL]
  text = (tmp_path / "2" / "0.txt").read_text()
  assert f"Resumed from the checkpoint of step {before}" in text and "holds other bytes than were written" in text
  assert len(list((workdir / "checkpoints_damaged").iterdir())) == 1
  assert f"process 1 (host {socket.gethostname()}) was lost: its connection closed" in text

  end = checkpoint.steps(workdir)[-1] + 15
  ending = endless | {"total": f"{end}steps"}
  with running(tmp_path / "3", [workdir] * 2, *mesh, "--accept-config-change", **ending) as processes:
    assert ends(processes, tmp_path / "3") == [0, 0]
  with running(tmp_path / "4", [undisturbed] * 2, *mesh, **ending) as processes:
    assert ends(processes, tmp_path / "4") == [0, 0]
  assert_same(params(workdir, end), params(undisturbed, end))
  assert [r["step"] for r in telemetry.read_metrics(workdir)] == list(range(1, end + 1))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
@pytest.mark.parametrize("full", [(1,), (0, 1)])
def test_a_disk_that_is_full_for_some_ends_all_within_a_minute(tmp_path, full):
  """Orbax alone would let the others wait for minutes for the part that never comes. Their stderr is on that disk."""
  workdir, changes = tmp_path / "workdir", {"total": "1000000steps", "checkpoint__every": "10steps"}
  with running(tmp_path, [workdir] * 2, 1, {"data": 1, "fsdp": 2}, **changes) as processes:
    wait_for_checkpoint_after(0, workdir, processes)
    for i in full:
      resource.prlimit(processes[i].pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    statuses = ends(processes, tmp_path, timeout_s=60)
  assert 74 in [statuses[i] for i in full] and set(statuses) <= {74, EXIT_PEER_LOST} and checkpoint.latest_step(workdir)
  if full == (1,):
    assert "CHECKPOINT NOT SAVED" in (tmp_path / "0.txt").read_text()


def test_workdirs_that_are_not_shared_are_refused_at_the_start(tmp_path):
  with running(tmp_path, [tmp_path / "a", tmp_path / "b"], 1, {"data": 2}) as processes:
    assert ends(processes, tmp_path) == [2, 2]
  for i in range(2):
    assert "is not one folder for all processes: process 1" in (tmp_path / f"{i}.txt").read_text()
  assert not [p for name in "ab" for p in (tmp_path / name).rglob("*")]
