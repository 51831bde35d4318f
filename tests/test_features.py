"""Features of all images: on every device, on disk, in half precision where asked; parts of processes joined."""

import dataclasses
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.data import DataConfig, open_images
from jepa_jax.evals import features as features_module
from jepa_jax.evals.features import make_features, part_of, read_features
from jepa_jax.models import EncoderOutput
from jepa_jax.objectives import Network
from jepa_jax.plan import run as plan
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.subjects import network_features
from jepa_jax.workdir import write_json
from tests.images import write_folder
from tests.tiny import tiny_experiment

DATA = DataConfig(source="synthetic", canvas_px=8, channels=1, mean=(0.5,), std=(0.5,), max_train=30)
SCALE = {"scale": jnp.float32(1.0)}


@jax.jit
def means(variables, batch):
  """Two features of an image: the mean of its upper and of its lower half; and the same four times over."""
  halves_Bx2 = batch["canvas"].reshape(len(batch["label"]), 2, -1).astype(jnp.float32).mean(-1) * variables["scale"]
  return {"pooled": halves_Bx2, "probe": jnp.tile(halves_Bx2, (1, 4))}


def expected(images):
  canvas = images.read(np.arange(len(images)))["canvas"]
  return canvas.reshape(len(images), 2, -1).astype(np.float32).mean(-1)


def make(folder, images, num_devices=8, batch_size=12, half=False, variables=SCALE, memory_gb=1.0, fn=means, **more):
  mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
  return make_features(folder, "title", fn, variables, images, mesh, batch_size, half, memory_gb, **more)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("half", [False, True])
def test_every_image_in_order_whatever_the_devices_and_the_batch(tmp_path, num_devices, half):
  images = open_images(DATA, "train")
  found = make(tmp_path / "features", images, num_devices, half=half)
  assert found.pooled.dtype == found.probe.dtype == (np.float16 if half else np.float32)
  assert isinstance(found.pooled, np.memmap) and found.probe.shape == (30, 8)
  np.testing.assert_allclose(found.pooled, expected(images), rtol=1e-3 if half else 1e-6)
  np.testing.assert_array_equal(found.label, images.labels())
  assert [path.name for path in tmp_path.iterdir()] == ["features"]  # no part is left


def test_every_batch_lies_on_all_devices(tmp_path):
  def spread(variables, batch):
    jax.debug.inspect_array_sharding(batch["canvas"], callback=lambda found: seen.append(len(found.device_set)))
    return means(variables, batch)

  seen = []
  make(tmp_path / "features", open_images(DATA, "train"), fn=jax.jit(spread))
  assert set(seen) == {8}


def test_a_tower_that_reads_another_column_is_given_it_as_it_is():
  """What a text tower needs: its column of the batch, not the image."""
  tower = lambda variables, x_B: EncoderOutput(x_B[:, None] * variables, None, x_B[:, None] * variables)
  objective = SimpleNamespace(networks=lambda: {"text": Network(tower, reads="label")})
  experiment = dataclasses.replace(tiny_experiment(), objective=objective)
  out = network_features("text", experiment, 16, 1.0)(2.0, {"label": jnp.arange(3.0)})
  np.testing.assert_array_equal(out["pooled"][:, 0], [0, 2, 4])


def test_what_is_there_is_read_and_what_is_damaged_is_made_again(tmp_path, caplog):
  images, folder = open_images(DATA, "train"), tmp_path / "features"
  first = np.array(make(folder, images).pooled)
  never = lambda *_: pytest.fail("made again")
  np.testing.assert_array_equal(make(folder, images, fn=never).pooled, first)
  for name in ("pooled.npy", "label.npy", "done.json"):
    (folder / name).write_bytes((folder / name).read_bytes()[:5])
    np.testing.assert_array_equal(make(folder, images).pooled, first)
    assert "its features are made again" in caplog.text
    caplog.clear()


def test_again_makes_what_is_there_anew(tmp_path):
  images, folder = open_images(DATA, "train"), tmp_path / "features"
  first = np.array(make(folder, images).pooled)
  other = make(folder, images, variables={"scale": jnp.float32(2.0)}, again=True).pooled
  np.testing.assert_allclose(other, 2 * first, rtol=1e-6)
  assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_two_evaluations_at_once_do_not_write_into_the_same_files(tmp_path):
  """The second begins and ends while the first is half done, as in two shells; each has its rows."""
  images, folder = open_images(DATA, "train"), tmp_path / "features"
  found, read = {}, images.read

  def read_while_another(rows):
    if not found and rows[0] >= 12:
      found["other"] = None
      found["other"] = np.array(make(folder, images).pooled)
    return read(rows)

  images.read = read_while_another
  first = make(folder, images).pooled
  np.testing.assert_allclose(first, expected(images), rtol=1e-6)
  np.testing.assert_array_equal(found["other"], first)
  assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_parts_that_a_killed_evaluation_left_are_removed_and_those_of_a_living_one_are_not(tmp_path):
  images, folder = open_images(DATA, "train"), tmp_path / "features"
  dead, living = (part_of(folder, name, 0) for name in ("dead", "living"))
  for path in (dead, living):
    path.mkdir()
    os.utime(path, (0, 0))  # long ago
  lock = features_module._locked(living)
  make(folder, images)
  assert {path.name for path in tmp_path.iterdir()} == {"features", living.name}
  os.close(lock)


def test_pooled_and_probe_that_are_one_are_stored_once(tmp_path):
  found = make(tmp_path / "f", open_images(DATA, "train"), fn=jax.jit(lambda v, b: {"pooled": means(v, b)["pooled"]}))
  assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [
    "done.json",
    "index.npy",
    "label.npy",
    "pooled.npy",
  ]
  np.testing.assert_array_equal(found.pooled, found.probe)
  assert found.probe is found.pooled  # and held once


def test_images_that_do_not_decode_are_left_out(tmp_path):
  write_folder(tmp_path / "images" / "train", 20, corrupt=(3, 8, 19))
  data = DataConfig(source="folder", root=str(tmp_path / "images"), canvas_px=8, channels=1, mean=(0.5,), std=(0.5,))
  images = open_images(data, "train")
  found = make(tmp_path / "f", images, fn=jax.jit(lambda v, b: {"pooled": b["index"][:, None].astype(jnp.float32)}))
  assert len(found.pooled) == len(found.label) == len(images) - 3
  assert np.all(np.diff(found.pooled[:, 0]) > 0)  # no image stands in for another
  np.testing.assert_array_equal(found.index, found.pooled[:, 0])


def test_a_number_that_half_precision_does_not_have_is_an_error(tmp_path):
  images = open_images(DATA, "train")
  with pytest.raises(ValueError, match="too large for half precision; set evals.precision='float32'"):
    make(tmp_path / "f", images, half=True, variables={"scale": jnp.float32(1e3)})
  assert not (tmp_path / "f").exists()


def test_parts_of_several_processes_are_joined_in_order(tmp_path, monkeypatch):
  """As process 0 finds them: each has made its rows, one of them less than it has room for."""
  images, folder = open_images(DATA, "train"), tmp_path / "features"
  whole = make(tmp_path / "whole", images)
  for process, (start, stop, room) in enumerate([(0, 15, 15), (15, 28, 16)]):
    part = part_of(folder, "token", process)
    part.mkdir()
    for name in ("pooled", "probe"):
      rows = np.zeros((room, getattr(whole, name).shape[1]), np.float32)
      rows[: stop - start] = getattr(whole, name)[start:stop]
      np.save(part / f"{name}.npy", rows)
    for name in ("label", "index"):
      rows = np.pad(getattr(whole, name)[start:stop], (0, room - (stop - start)), constant_values=-1)
      np.save(part / f"{name}.npy", rows)
    write_json(part / "done.json", {"rows": stop - start})
  features_module._join(folder, [part_of(folder, "token", i) for i in range(2)])
  found = read_features(folder)
  np.testing.assert_array_equal(found.pooled, whole.pooled[:28])
  np.testing.assert_array_equal(found.label, whole.label[:28])
  np.testing.assert_array_equal(found.index, np.arange(28))
  assert not part_of(folder, "token", 1).exists()


def test_plan_says_what_an_evaluation_holds_and_takes():
  config = "configs/ijepa_imagenet.py:vitb"
  found = plan(config, "v5e:4x4", eval=True, num_train=1_000_000, num_test=10_000)
  row = found["evaluation"]["ijepa, a checkpoint"]
  assert row["precision"] == "float16" and row["features_bytes"] == 2 * 1_010_000 * (768 + 4 * 768)
  assert row["flops"]["knn"] == 2 * 1_000_000 * 10_000 * 768
  assert row["flops"]["features"] == found["flops_per_image"] * 1_010_000
  assert 34e9 < found["flops_per_image"] < 36e9  # ViT-B/16 at 224 px: 17.6 GFLOP multiply-adds
  single = plan(config, "v5e:4x4", {"evals.precision": "float32"}, eval=True, num_train=1_000_000, num_test=10_000)
  assert single["evaluation"]["ijepa, a checkpoint"]["features_bytes"] == 2 * row["features_bytes"]
