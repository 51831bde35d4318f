"""What is saved comes back whole on any topology; what is damaged or foreign is named; nothing is deleted."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_jax import checkpoint
from jepa_jax.checkpoint import CheckpointError, DamagedCheckpoint, Saver
from jepa_jax.sharding import MeshConfig, make_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  step: jax.Array
  params: dict
  target: None
  opt_state: tuple


def make_state(value: float, sharding=None) -> State:
  w = jnp.arange(64.0).reshape(8, 8) + value
  state = State(jnp.int32(value), {"w": w, "b": jnp.ones(3)}, None, (jnp.int32(1), (), {"mu": w}))
  return jax.device_put(state, sharding) if sharding else state


def abstract(state: State, sharding=None) -> State:
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def write(workdir, steps=(1, 2, 3), keep_last=2, keep_every=0, sharding=None, **meta):
  saver = Saver(workdir, keep_last, keep_every)
  for step in steps:
    state = make_state(step, sharding)
    saver.save(step, {"params": state.params}, state, {"step": step, "config": {"a": [1, 2]}} | meta)
  saver.close()
  return saver


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_round_trip_of_every_item(tmp_path):
  write(tmp_path)
  items = checkpoint.restore(tmp_path, 3, training=abstract(make_state(0)), meta=None)
  assert same(items["training"], make_state(3)) and items["training"].target is None
  assert checkpoint.read_meta(tmp_path, 3) == {"step": 3, "config": {"a": [1, 2]}}
  assert json.loads((tmp_path / "checkpoints/3/meta/data.json").read_text())["step"] == 3  # readable by a person


def test_keep_policy(tmp_path):
  write(tmp_path, steps=range(1, 9), keep_last=2, keep_every=3)
  assert checkpoint.steps(tmp_path) == [3, 6, 7, 8]
  assert checkpoint.latest_step(tmp_path) == 8
  assert checkpoint.latest_step(tmp_path / "elsewhere") is None


def test_written_by_eight_devices_restored_by_one_and_by_another_mesh(tmp_path):
  fsdp = NamedSharding(make_mesh(MeshConfig(data=1, fsdp=8)), P("fsdp"))
  sharded = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), fsdp)}
  saver = Saver(tmp_path, 1)
  saver.save(1, sharded, sharded, {})
  saver.close()
  for target in (
    jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    NamedSharding(make_mesh(MeshConfig(data=2, fsdp=4)), P(None, "fsdp")),
  ):
    want = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=target)}
    got = checkpoint.restore(tmp_path, 1, training=want)["training"]["w"]
    assert got.sharding == target and np.array_equal(got, sharded["w"])


def test_missing_checkpoint_lists_those_there_are(tmp_path):
  write(tmp_path)
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 .* there are: \[2, 3\]"):
    checkpoint.read_meta(tmp_path, 9)


def test_another_architecture_lists_the_keys(tmp_path):
  write(tmp_path)
  other = {"params": {"w": jnp.zeros((8, 9)), "new": jnp.zeros(2)}}
  with pytest.raises(CheckpointError) as error:
    checkpoint.restore(tmp_path, 3, networks=abstract(other))
  text = str(error.value)
  assert "missing in the checkpoint: params/new (2,)" in text
  assert "only in the checkpoint: params/b (3,)" in text
  assert "params/w: (8, 8) in the checkpoint, (8, 9) here" in text


def test_a_part_of_an_item_is_read_alone(tmp_path):
  write(tmp_path)
  part = {"params": {"w": abstract(make_state(0).params["w"])}}
  found = checkpoint.restore(tmp_path, 3, partial=True, networks=part)["networks"]
  assert same(found, {"params": {"w": make_state(3).params["w"]}})
  with pytest.raises(CheckpointError, match=r"missing in the checkpoint: params/v \(8, 8\)"):
    checkpoint.restore(tmp_path, 3, partial=True, networks={"params": {"v": part["params"]["w"]}})


@pytest.mark.parametrize("damage", ["truncate metadata", "truncate arrays", "remove arrays", "remove item"])
def test_damaged_checkpoint_is_named_and_the_others_listed(tmp_path, damage):
  write(tmp_path)
  item = tmp_path / "checkpoints" / "3" / "training"
  arrays = [p for p in item.rglob("*") if p.is_file() and (p.parent.name == "d" or "manifest" in p.name)]
  assert arrays
  if damage == "truncate metadata":
    os.truncate(item / "_METADATA", 10)
  elif damage == "remove item":
    item.rename(tmp_path / "gone")
  else:
    for path in arrays:
      os.truncate(path, 10) if damage == "truncate arrays" else path.unlink()
  with pytest.raises(DamagedCheckpoint, match=r"Other checkpoints here: \[2\]"):
    checkpoint.restore(tmp_path, 3, training=abstract(make_state(0)))
  assert same(checkpoint.restore(tmp_path, 2, training=abstract(make_state(0)))["training"], make_state(2))
  moved = checkpoint.set_aside(tmp_path, 3)
  assert checkpoint.steps(tmp_path) == [2] and moved.exists()


@contextlib.contextmanager
def full_disk(limit_bytes: int):
  """Every write past limit_bytes of a file fails with an error of the operating system, as on a full disk."""
  old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old_handler)


def test_a_save_that_fails_in_one_of_several_processes_ends_it_and_waits_for_nobody(tmp_path, monkeypatch):
  """Orbax lets the others wait for this one's part: they are told only when this process ends (status 74)."""
  saver = Saver(tmp_path, keep_last=1)
  noise = jax.random.normal(jax.random.key(0), (256, 1024))
  with full_disk(100_000):
    saver.save(1, {"w": noise}, {"w": noise}, {})
    monkeypatch.setattr("jepa_jax.distributed.num_processes", lambda: 2)
    with pytest.raises(checkpoint.SaveFailed, match="NOT SAVED at step 1.*all of them end here.*it resumes") as caught:
      saver.wait()
  assert caught.value.errno == errno.EIO
  monkeypatch.setattr(saver._checkpointer, "close", lambda: pytest.fail("waits for the others"))
  saver.close()


def test_save_that_fails_is_loud_and_the_one_before_stays_whole(tmp_path, caplog):
  saver = Saver(tmp_path, keep_last=1)
  noise = jax.random.normal(jax.random.key(0), (256, 1024))  # 1 MB that does not compress
  saver.save(1, {"w": noise}, {"w": noise}, {})
  saver.wait()
  with full_disk(100_000):
    saver.save(2, {"w": noise}, {"w": noise}, {})
    saver.wait()
  assert "NOT SAVED at step 2" in saver.failures[0] and "newest whole checkpoint is step 1" in caplog.text
  assert checkpoint.steps(tmp_path) == [1]
  assert same(checkpoint.restore(tmp_path, 1, training=abstract({"w": noise}))["training"], {"w": noise})
  saver.save(3, {"w": noise}, {"w": noise}, {})  # space again: saving goes on
  saver.close()
  assert checkpoint.latest_step(tmp_path) == 3 and len(saver.failures) == 1
