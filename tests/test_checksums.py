"""What was written is what is read: every file of a checkpoint, however it was changed; and what verify says of it."""

import os
import shutil
import threading
import time

import numpy as np
import pytest

import jepa_jax.__main__ as cli
from jepa_jax import checkpoint
from jepa_jax.checkpoint import DamagedCheckpoint
from jepa_jax.checksums import CHECKSUMS, damage, mark_damaged, write_checksums
from tests.test_checkpoint import abstract, make_state, same, write


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("written")
  write(workdir, format=2)
  return workdir


@pytest.fixture
def workdir(written, tmp_path):
  return shutil.copytree(written, tmp_path / "workdir")


def files_of(workdir, step=3):
  folder = workdir / "checkpoints" / str(step)
  return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def flip(path, bit=0):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1 << bit
  path.write_bytes(data)


CHANGES = {
  "a bit flipped": flip,
  "zeros in it": lambda path: path.write_bytes(path.read_bytes()[:-8] + bytes(8)),
  "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
  "empty": lambda path: os.truncate(path, 0),
  "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
  "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_found_whichever_it_is(workdir, change):
  """Orbax alone restores a flipped bit without a word."""
  names = [path.relative_to(workdir) for path in files_of(workdir) if path.name != CHECKSUMS]
  assert len(names) > 10
  for name in names:
    before = (workdir / name).read_bytes()
    CHANGES[change](workdir / name)
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoints/3 is damaged .*{name.relative_to('checkpoints/3')}"):
      checkpoint.check_whole(workdir, 3)
    (workdir / name).write_bytes(before)
  assert checkpoint.check_whole(workdir, 3)


def test_restoring_compares_the_items_that_are_asked_for_first(workdir):
  arrays = max(files_of(workdir / "", 3), key=lambda path: ("networks" in path.parts, path.stat().st_size))
  flip(arrays)
  with pytest.raises(DamagedCheckpoint, match=f"networks/.*{arrays.name} holds other bytes"):
    checkpoint.restore(workdir, 3, networks={"params": abstract(make_state(0)).params})
  assert same(checkpoint.restore(workdir, 3, training=abstract(make_state(0)))["training"], make_state(3))
  assert checkpoint.read_meta(workdir, 3)["step"] == 3


def test_a_checkpoint_without_checksums_is_restored(workdir):
  """One that was written by an older version, or by a process that was killed right after."""
  (workdir / "checkpoints" / "3" / CHECKSUMS).unlink()
  assert checkpoint.check_whole(workdir, 3) is False
  assert same(checkpoint.restore(workdir, 3, training=abstract(make_state(0)))["training"], make_state(3))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"files": [1]}', '{"files": {"a": 3}}', "null"])
def test_checksums_that_are_none_are_damage(workdir, text):
  (workdir / "checkpoints" / "3" / CHECKSUMS).write_text(text)
  with pytest.raises(DamagedCheckpoint, match=f"{CHECKSUMS} is no list"):
    checkpoint.check_whole(workdir, 3)


def test_what_was_found_while_loading_is_said_again(workdir):
  (workdir / "checkpoints" / "3" / CHECKSUMS).unlink()
  mark_damaged(workdir / "checkpoints" / "3", "it could not be loaded: a reason")
  with pytest.raises(DamagedCheckpoint, match="could not be loaded: a reason"):
    checkpoint.check_whole(workdir, 3)


@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_several_processes_compare_all_blocks_together(tmp_path, monkeypatch, num):
  monkeypatch.setattr("jepa_jax.checksums._BLOCK", 16)
  rng = np.random.default_rng(0)
  sizes = [0, 1, 15, 16, 17, 160, 163]
  for size in sizes:
    (tmp_path / f"{size}").write_bytes(rng.bytes(size))
  write_checksums(tmp_path)
  seen = lambda: {line for process in range(num) for line in damage(tmp_path, share=(process, num))}
  assert seen() == set()
  for size in sizes[1:]:
    for place in {0, size // 2, size - 1}:
      data = bytearray((tmp_path / f"{size}").read_bytes())
      data[place] ^= 4
      (tmp_path / f"{size}").write_bytes(data)
      assert seen() == {f"{size} holds other bytes than were written"}
      data[place] ^= 4
      (tmp_path / f"{size}").write_bytes(data)


def test_lists_of_crc32_as_once_written_are_compared(tmp_path):
  (tmp_path / "data").write_bytes(b"123456789")
  (tmp_path / CHECKSUMS).write_text('{"files": {"data": [9, [3421780262]]}}')  # CRC-32's check value, cbf43926
  assert damage(tmp_path) == []
  flip(tmp_path / "data")
  assert damage(tmp_path) == ["data holds other bytes than were written"]


def test_storage_that_cannot_be_read_is_not_damage(workdir, monkeypatch):
  """To move a good checkpoint away would lose progress."""

  def fail(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr("jepa_jax.checksums._sum", fail)
  with pytest.raises(OSError, match="Input/output"):
    checkpoint.check_whole(workdir, 3)


def test_verify_says_of_every_checkpoint_what_it_is(workdir, capsys):
  assert cli.main(["verify", str(workdir)]) == 0
  assert capsys.readouterr().out.splitlines() == [f"{workdir}, step {step}: whole" for step in (2, 3)]
  flip(files_of(workdir, 2)[0])
  (workdir / "checkpoints" / "3" / CHECKSUMS).unlink()
  assert cli.main(["verify", str(workdir)]) == 2
  said = capsys.readouterr().out
  assert "step 2: DAMAGED" in said and "step 3: NOT COMPARED: it has no checksums" in said
  assert cli.main(["verify", str(workdir), "--step=3"]) == 0
  assert cli.main(["verify", str(workdir / "checkpoints" / "2"), "--json"]) == 2
  assert cli.main(["verify", str(workdir / "nowhere")]) == 2


def test_verify_knows_a_run_by_its_checkpoints_and_not_by_its_name(written, tmp_path, capsys):
  workdir = shutil.copytree(written, tmp_path / "3")  # and its newest step is 3
  assert cli.main(["verify", str(workdir)]) == 0
  assert len(capsys.readouterr().out.splitlines()) == 2


def test_verify_of_a_living_run_is_no_false_alarm(workdir, monkeypatch, capsys):
  """The run removes its oldest checkpoint after it was listed."""
  check = checkpoint.check_whole

  def removed(folder, step, *more, **options):
    if step == 2:
      shutil.rmtree(workdir / "checkpoints" / "2")
    return check(folder, step, *more, **options)

  monkeypatch.setattr(checkpoint, "check_whole", removed)
  assert cli.main(["verify", str(workdir)]) == 0
  assert "step 2: was removed by the run meanwhile" in capsys.readouterr().out


def test_a_mark_does_not_replace_checksums(workdir):
  mark_damaged(workdir / "checkpoints" / "3", "a reason")
  assert checkpoint.check_whole(workdir, 3)


def test_in_a_hurry_the_checksums_of_the_save_before_are_given_up(tmp_path, monkeypatch):
  """A machine that is about to be taken away must not read a large checkpoint back first."""
  summed = threading.Event()
  monkeypatch.setattr("jepa_jax.checksums._sum", lambda *_: summed.set() or time.sleep(0.3) or 0)
  state, saver = make_state(1), checkpoint.Saver(tmp_path, 2)
  saver.save(1, {"params": state.params}, state, {})
  assert summed.wait(60)
  saver.save(2, {"params": state.params}, state, {}, hurry=True)
  assert not (tmp_path / "checkpoints" / "1" / CHECKSUMS).exists()
  saver.close()
  assert (tmp_path / "checkpoints" / "2" / CHECKSUMS).exists() and not saver.failures
