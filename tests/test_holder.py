"""One trainer in a workdir: the second is refused and told who is there, a dead one is replaced without a human."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jepa_jax.holder import HOLDER, Holder, WorkdirHeld, WorkdirLost
from jepa_jax.train import train
from tests.test_train import small_config

QUICK = {"beat_s": 0.05, "lease_s": 0.6}
HOLD = """
import sys, time
from pathlib import Path
from jepa_jax.holder import Holder
with Holder(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(100)
"""


def write(folder, **about):
  there = {"id": "other", "host": "elsewhere", "pid": 7, "since": "then", "last": "lately", "machine": {"boot": "x"}}
  (folder / HOLDER).write_text(json.dumps(there | about))


def test_the_second_is_refused_at_once_and_told_who_is_there(tmp_path):
  with Holder(tmp_path):
    began_s = time.monotonic()
    with (
      pytest.raises(WorkdirHeld, match=rf"process {os.getpid()} on host .* since .* \(last sign of life"),
      Holder(tmp_path),
    ):
      pass
    assert time.monotonic() - began_s < 1
  assert not list(tmp_path.iterdir())
  with Holder(tmp_path):
    pass


def test_a_killed_holder_of_this_machine_is_replaced_at_once(tmp_path):
  child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  assert child.stdout and child.stdout.readline() == "held\n"
  with pytest.raises(WorkdirHeld, match=f"process {child.pid} "), Holder(tmp_path):
    pass
  child.send_signal(signal.SIGKILL)
  time.sleep(0.2)  # dead, but nobody has waited for it: a supervisor may come before its parent does
  with Holder(tmp_path):
    child.wait()


def test_a_number_that_was_given_again_is_another_process(tmp_path):
  with Holder(tmp_path):
    about = json.loads((tmp_path / HOLDER).read_text())
  write(tmp_path, **about | {"id": "other", "started": "1"})
  with Holder(tmp_path):
    pass


def test_a_holder_on_another_machine_lives_as_long_as_it_beats(tmp_path):
  """Whose clock is right does not matter: nothing is compared with the time that it writes."""
  ended, beats = threading.Event(), iter(range(1000))

  def beat():
    while not ended.wait(0.05):
      write(tmp_path, beats=next(beats), last="1970-01-01T00:00:00+00:00")

  write(tmp_path)
  thread = threading.Thread(target=beat)
  thread.start()
  with pytest.raises(WorkdirHeld, match="process 7 on host elsewhere since then"), Holder(tmp_path, **QUICK):
    pass
  ended.set()
  thread.join()
  began_s = time.monotonic()
  with Holder(tmp_path, **QUICK):
    assert time.monotonic() - began_s > QUICK["lease_s"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_a_file_that_says_nothing_is_a_holder_that_is_gone(tmp_path, text):
  (tmp_path / HOLDER).write_text(text)
  with Holder(tmp_path, **QUICK) as holder:
    holder.check()


@pytest.mark.parametrize("turn", range(5))
def test_of_many_who_replace_a_dead_one_at_once_one_holds(tmp_path, turn):
  write(tmp_path)
  start, done, held, refused = threading.Barrier(8), threading.Event(), [], []

  def take():
    start.wait()
    try:
      with Holder(tmp_path, beat_s=0.05, lease_s=0.2) as holder:
        held.append(holder)
        done.wait(5)
        holder.check()
    except WorkdirHeld:
      refused.append(1)

  threads = [threading.Thread(target=take) for _ in range(8)]
  for thread in threads:
    thread.start()
  time.sleep(0.8)
  done.set()
  for thread in threads:
    thread.join()
  assert len(held) == 1 and len(refused) == 7
  assert not list(tmp_path.iterdir())


def test_one_that_died_while_it_replaced_a_dead_one_stops_nobody(tmp_path):
  write(tmp_path)
  (tmp_path / f".{HOLDER}.other.gone").touch()
  with Holder(tmp_path, beat_s=0.05, lease_s=0.2):
    assert [path.name for path in tmp_path.iterdir()] == [HOLDER]


def test_one_that_was_suspended_and_replaced_stops_before_it_writes(tmp_path):
  with Holder(tmp_path, **QUICK) as holder:
    holder.check()
    write(tmp_path)
    time.sleep(0.2)
    with pytest.raises(WorkdirLost, match="taken over by process 7 on host elsewhere.*Nothing more is written"):
      holder.check()
  assert json.loads((tmp_path / HOLDER).read_text())["id"] == "other"  # not removed: it is not ours


@pytest.mark.parametrize("text", [None, "", "{", "[1]"])
def test_a_file_that_is_gone_or_unreadable_stops_no_run_and_is_written_again(tmp_path, text):
  with Holder(tmp_path, **QUICK) as holder:
    (tmp_path / HOLDER).unlink() if text is None else (tmp_path / HOLDER).write_text(text)
    holder.check()
    time.sleep(0.3)
    assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()


def test_training_where_another_trains_changes_nothing(tmp_path):
  with Holder(tmp_path):
    with pytest.raises(WorkdirHeld, match="Choose another --workdir"):
      train(small_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [HOLDER]
