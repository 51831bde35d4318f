"""Several processes on 127.0.0.1: they meet, agree, stop together, and nobody waits for one that was lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jepa_jax import distributed
from jepa_jax.distributed import EXIT_PEER_LOST, EXIT_PREEMPTED, Preemption
from jepa_jax.distributed.meeting import gather, join

# One process: `python -c CHILD port num id mode`. Only jax and jepa_jax.distributed are imported: a second each.
CHILD = """
import os, signal, sys, time
from pathlib import Path
import jax
from jepa_jax import distributed as d

port, num, me, mode, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])

def say(*words):
  print(*words, flush=True)

def outcome(call, *args, **kwargs):
  try:
    call(*args, **kwargs)
  except (ValueError, TimeoutError) as error:
    return f"{type(error).__name__}: {error}"
  return "passed"

def agree():
  say("apart", outcome(d.check_shared, folder / str(me), timeout_s=4))
  say("file", outcome(d.check_shared, folder / "0.txt" / "below a file"))
  say("same", outcome(d.check_shared, folder / "both"))
  say("alike", outcome(d.check_same, "step", "step 4", 30))
  say("unlike", outcome(d.check_same, "step", f"step {4 + me}", 30))
  say("told", d.from_primary("word", lambda: f"by {me}", 30))
  if me == 0:
    say("barrier", outcome(d.barrier, "paint", 1))
  d.barrier("after", 30)
  say("primary", d.is_primary(), d.process_id(), d.num_processes())
  time.sleep(2 * (me == 0))  # the first draws pictures, the others are done
  d.shutdown()

def loop():
  from jax.sharding import NamedSharding, PartitionSpec as P
  import numpy as np
  mesh = jax.make_mesh((jax.device_count(),), ("data",))
  ones = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), np.ones(1, np.float32))
  total = jax.jit(lambda x: x.sum())
  with d.Preemption() as preemption:
    for step in range(1001, 3000):
      assert float(total(ones)) == num
      say("step", step)
      if mode == "fail" and me == 1 and step == 1003:
        raise KeyError("the label of image 7")
      if mode == "abandon" and me == 1 and step == 1003:
        d.abandon(2, "no space left")
      if preemption.reached(step):
        say("stopped", step)
        break
      time.sleep(0.02)
  d.shutdown()
  sys.exit(d.EXIT_PREEMPTED)

def early():  # told to stop while it compiles, before the first step of a resumed run
  with d.Preemption() as preemption:
    if me == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2.5)  # JAX looks once a second
    say("stopped", next(step for step in range(1001, 1100) if preemption.reached(step)))
  d.shutdown()

d.initialise(f"127.0.0.1:{port}", num, me, timeout_s=60, heartbeat_s=4)
say("met")
{"agree": agree, "early": early}.get(mode, loop)()
"""


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Processes:
  """`num` processes in one mode, their output in files."""

  def __init__(self, folder: Path, num: int, mode: str):
    self.files = [folder / f"{i}.txt" for i in range(num)]
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
      "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    port = free_port()
    self.all = []
    for i, path in enumerate(self.files):
      command = [sys.executable, "-c", CHILD, str(port), str(num), str(i), mode, str(folder)]
      with path.open("w") as file:
        self.all.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))

  def __enter__(self) -> Processes:
    return self

  def __exit__(self, *_):
    for process in self.all:
      process.kill()
      process.wait()

  def text(self, i: int) -> str:
    return self.files[i].read_text()

  def wait_for(self, word: str) -> None:
    """Returns when every process has said `word`."""
    for _ in range(1200):
      if all(word in self.text(i) for i in range(len(self.all))):
        return
      if any(process.poll() not in (None, 0) for process in self.all):
        break
      time.sleep(0.05)
    raise AssertionError("\n".join(self.text(i)[-3000:] for i in range(len(self.all))))

  def end(self, i: int) -> int:
    """Returns the exit status of process i, which must end within a minute."""
    return self.all[i].wait(timeout=60)

  def said(self, i: int, word: str) -> str:
    """Returns what process i said after `word`, the last time."""
    lines = [line for line in self.text(i).splitlines() if line.startswith(word)]
    assert lines, self.text(i)[-3000:]
    return lines[-1].removeprefix(word).strip()


# ---------------------------------------------------------------- meeting
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"coordinator": "127.0.0.1:1234", "num_processes": 2}, "process_id missing"),
    ({"process_id": 1}, "coordinator and num_processes missing"),
    ({"coordinator": "somewhere", "num_processes": 2, "process_id": 0}, '"host:port"'),
    ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id=2 must be from 0"),
    ({"coordinator": "h:1", "num_processes": 2, "process_id": 0, "heartbeat_s": 1}, "heartbeat_s=1"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    distributed.initialise(**arguments)


def test_without_a_cluster_to_ask_all_three_are_needed(monkeypatch):
  clusters = ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "CLOUD_TPU", "MEGASCALE")
  for name in [n for n in os.environ if n.startswith(clusters)]:
    monkeypatch.delenv(name)
  with pytest.raises(ValueError, match="no cluster was found"):
    distributed.initialise(timeout_s=1)


def test_one_process_needs_no_others():
  distributed.initialise("127.0.0.1:1", 1, 0)
  distributed.barrier("nobody else", 1)
  distributed.check_shared("/does/not/exist")
  assert distributed.is_primary() and distributed.num_processes() == 1


def test_unreachable_coordinator_is_an_error_with_address_and_time_out():
  port = free_port()
  with pytest.raises(ConnectionError, match=rf"process 1 cannot reach .* 127\.0\.0\.1:{port} within 1 s: .*refused"):
    distributed.initialise(f"127.0.0.1:{port}", 2, 1, timeout_s=1)


def meet(*processes: tuple[int, int], timeout_s: float = 20) -> list:
  """Returns what each (process id, number of processes) gets from meeting the others: its links or its error."""
  address, results = f"127.0.0.1:{free_port()}", [None] * len(processes)

  def enter(place: int, me: int, num: int):
    try:
      results[place] = gather(address, num, timeout_s) if me == 0 else join(address, num, me, timeout_s)
    except Exception as error:
      results[place] = error

  threads = [threading.Thread(target=enter, args=(i, *p)) for i, p in enumerate(processes)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return results


def test_processes_that_do_not_come_are_named_to_those_that_did():
  zero, two = meet((0, 4), (2, 4), timeout_s=2)
  for error in (zero, two):
    assert isinstance(error, TimeoutError) and "2 of 4 processes came within 2 s; process 1, 3 did not" in str(error)


def test_processes_that_disagree_are_told():
  zero, one = meet((0, 2), (1, 3))
  for error in (zero, one):
    assert isinstance(error, ValueError) and "has num_processes=3, process 0 has 2" in str(error)
  results = meet((0, 3), (1, 3), (1, 3))
  for error in results:
    assert isinstance(error, ValueError) and "two processes have process_id=1" in str(error)


def test_a_stranger_on_the_port_is_ignored():
  port = free_port()
  met = threading.Thread(target=lambda: links.append(gather(f"127.0.0.1:{port}", 2, 20)))
  links: list[dict] = []
  met.start()
  for _ in range(100):
    try:
      stranger = socket.create_connection(("127.0.0.1", port))
      break
    except OSError:
      time.sleep(0.05)
  stranger.sendall(b"PRI * HTTP/2.0\r\n\r\n")
  assert join(f"127.0.0.1:{port}", 2, 1, 20).host == socket.gethostname()
  met.join(20)
  assert list(links[0]) == [1]


def test_a_taken_port_is_an_error_of_process_0():
  with socket.create_server(("", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"cannot listen on port {port}"):
      distributed.initialise(f"127.0.0.1:{port}", 2, 0, timeout_s=5)


# ---------------------------------------------------------------- agreeing
def test_folders_barriers_and_ends_at_different_times(tmp_path):
  for i in range(2):
    (tmp_path / str(i)).mkdir()
  with Processes(tmp_path, 2, "agree") as run:
    assert [run.end(i) for i in range(2)] == [0, 0], run.text(0) + run.text(1)
    host = socket.gethostname()
    for i in range(2):
      assert "is not one folder for all processes" in run.said(i, "apart ValueError:")
      assert f"process 1 (host {host}) does not see" in run.said(i, "apart ValueError:")
      assert "process 0 cannot write there (Not a directory)" in run.said(i, "file ValueError:")
      assert run.said(i, "same") == "passed"
      assert run.said(i, "alike") == "passed" and run.said(i, "told") == "by 0"
      assert "ValueError: the processes do not have the same step:" in run.said(i, "unlike")
      assert re.search("process 0: step 4 on host .*\n  process 1: step 5 on host", run.text(i))
    assert "TimeoutError: barrier 'paint': process 1 did not come within 1 s" in run.said(0, "barrier")
    assert [run.said(i, "primary") for i in range(2)] == ["True 0 2", "False 1 2"]
  assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["0.txt", "1.txt"]  # no probe stays


# ---------------------------------------------------------------- stopping
def test_sigterm_to_one_stops_all_after_the_same_step(tmp_path):
  with Processes(tmp_path, 2, "loop") as run:
    run.wait_for("step 1005")
    run.all[1].send_signal(signal.SIGTERM)
    run.all[1].send_signal(signal.SIGTERM)  # the impatient scheduler
    assert [run.end(i) for i in range(2)] == [EXIT_PREEMPTED] * 2, run.text(0) + run.text(1)
    steps = [run.said(i, "stopped") for i in range(2)]
    assert steps[0] == steps[1] == run.said(0, "step") == run.said(1, "step")


def test_sigterm_before_the_first_step_of_a_resumed_run_counts(tmp_path):
  with Processes(tmp_path, 2, "early") as run:
    assert [run.end(i) for i in range(2)] == [0, 0], run.text(0) + run.text(1)
    assert [run.said(i, "stopped") for i in range(2)] == ["1001", "1001"]


def test_signals_of_one_process_only_set_a_flag_and_handlers_come_back(capfd):
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with Preemption() as preemption:
    assert not preemption.reached(1)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert preemption.reached(2) and preemption.reached(3)
  with Preemption() as preemption:
    signal.raise_signal(signal.SIGINT)
    assert preemption.reached(1) and "Ctrl-C again stops at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


# ---------------------------------------------------------------- losing one
def assert_names(run: Processes, i: int, lost: int, why: str, then: str = "resume from"):
  text = run.text(i)
  assert f"process {lost} (host {socket.gethostname()}) was lost: {why}" in text and then in text, text[-3000:]


def test_kill_one_of_three_and_the_others_end_naming_it(tmp_path):
  with Processes(tmp_path, 3, "loop") as run:
    run.wait_for("step 1003")
    run.all[1].kill()
    assert [run.end(0), run.end(2)] == [EXIT_PEER_LOST] * 2
    assert_names(run, 0, 1, "its connection closed")
    assert_names(run, 2, 1, "its connection closed")


def test_kill_the_coordinator_and_the_other_ends_naming_it(tmp_path):
  with Processes(tmp_path, 2, "loop") as run:
    run.wait_for("step 1003")
    run.all[0].kill()
    # JAX aborts as soon as its coordination service is gone; the watchdog says who it was, and mostly ends it first.
    assert run.end(1) in (EXIT_PEER_LOST, -signal.SIGABRT)
    assert_names(run, 1, 0, "its connection closed")


def test_a_process_that_hangs_is_named_after_the_heartbeat(tmp_path):
  with Processes(tmp_path, 2, "loop") as run:
    run.wait_for("step 1003")
    run.all[1].send_signal(signal.SIGSTOP)
    assert run.end(0) == EXIT_PEER_LOST
    assert_names(run, 0, 1, "no sign of life for 4 s")
    run.all[1].send_signal(signal.SIGCONT)  # woken up, it finds the others gone
    assert run.end(1) != 0


@pytest.mark.parametrize(
  ("mode", "status", "other", "why", "then"),
  [
    ("fail", 1, EXIT_PEER_LOST, "the label of image 7", "resume from"),
    ("abandon", 2, 2, "no space left", "start all again when that is mended"),
  ],
)
def test_an_error_of_one_process_ends_all_and_is_told(tmp_path, mode, status, other, why, then):
  """Where another start cannot help, no status of any process asks for one."""
  with Processes(tmp_path, 2, mode) as run:
    assert [run.end(1), run.end(0)] == [status, other], run.text(0) + run.text(1)
    assert_names(run, 0, 1, "it ended with an error: ", then)
    assert why in run.text(0)
