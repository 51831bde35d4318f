"""Files of weights that are something else, or hold what no weight is: each named for what it is, with what to do."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jepa_jax.weights.convert import encoder_from, encoder_to
from jepa_jax.weights.files import read, write_folder, write_ours, write_safetensors
from tests.test_weights import ENCODER, random_params

GOOD = encoder_to(random_params(ENCODER), ENCODER, "hf")
KEY = next(key for key in GOOD if key.endswith("norm1.weight") or key.endswith("layernorm_before.weight"))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.bin"])
@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer.*git lfs pull"),
    (b"<!DOCTYPE html><html></html>", "is a web page"),
    (b"\n  <HTML lang='en'>", "is a web page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a message of a web server"),
    (b'{"error": "Repository not found"}', "is JSON text"),
    (b"\x1f\x8b\x08\x00", "is compressed by gzip"),
    (b"", "is empty"),
    (b"Not Found", "damaged or no"),
  ],
)
def test_what_a_download_left_is_called_by_its_name(tmp_path, name, content, message):
  if not name.endswith("safetensors"):
    pytest.importorskip("torch") if message == "damaged or no" else None
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    read(tmp_path / name)
  assert "weights_only" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
  "settings",
  [[], None, {"data": None}, {"data": [1]}, {"data": {"mean": None}}, {"data": {"std": 0.5}}, {"encoder": "vit"}],
)
def test_a_file_of_ours_with_other_settings_is_named(tmp_path, settings):
  write_ours(tmp_path / "x.safetensors", {"encoder": {"a": np.ones(2, np.float32)}}, settings)
  with pytest.raises(ValueError, match="x.safetensors: the settings in it are not those of a file of ours"):
    read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("mean", ["0.5", ["a"], {}, [None]])
def test_a_folder_whose_pixels_are_told_otherwise_is_refused(tmp_path, mean):
  write_folder(tmp_path / "model", GOOD, {"preprocessor_config.json": {"image_mean": mean}})
  with pytest.raises(ValueError, match="preprocessor_config.json: image_mean and image_std are no lists"):
    read(tmp_path / "model")


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "{", ""])
def test_a_folder_whose_config_is_none_is_refused(tmp_path, text):
  write_folder(tmp_path / "model", GOOD, {})
  (tmp_path / "model" / "config.json").write_text(text)
  with pytest.raises(ValueError, match="config.json"):
    read(tmp_path / "model")


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ("{}", "no weight_map"),
    ("[]", "index.json holds"),
    ('{"weight_map": []}', "no weight_map"),
    ('{"weight_map": {"a": 3}}', "no weight_map"),
    ('{"weight_map": {"a": "part.safetensors"}}', "lacks part.safetensors"),
    ('{"weight_map": {"a": "../model.safetensors"}}', "outside of its folder"),
    ('{"weight_map": {"a": "/etc/hostname"}}', "outside of its folder"),
    ('{"weight_map": {"a": "sub/part.safetensors"}}', "outside of its folder"),
  ],
)
def test_an_index_of_parts_names_files_of_its_own_folder(tmp_path, index, message):
  (tmp_path / "model.safetensors.index.json").write_text(index)
  with pytest.raises(ValueError, match=message):
    read(tmp_path)


def test_shards_of_torch_are_one_checkpoint_too(tmp_path):
  torch = pytest.importorskip("torch")
  tensors, weight_map = GOOD, {}
  for i, names in enumerate((sorted(tensors)[:20], sorted(tensors)[20:])):
    file = f"pytorch_model-0000{i + 1}-of-00002.bin"
    torch.save({key: torch.from_numpy(tensors[key]) for key in names}, tmp_path / file)
    weight_map |= dict.fromkeys(names, file)
  index = tmp_path / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  found = read(tmp_path).items["encoder"]
  assert found.keys() == tensors.keys() and all((found[key] == tensors[key]).all() for key in tensors)
  index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../pytorch_model.bin")}))
  with pytest.raises(ValueError, match="outside of its folder"):
    read(tmp_path)


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (np.full(32, np.nan, np.float32), "holds NaN or infinite numbers"),
    (np.full(32, np.inf, np.float16), "holds NaN or infinite numbers"),
    (np.ones(32, np.int8), "int8, no floating-point numbers"),
    (np.ones(32, bool), "bool, no floating-point numbers"),
    (np.ones(32, np.int64), "int64, no floating-point numbers"),
  ],
)
def test_numbers_that_no_weight_is_are_not_imported(tmp_path, value, message):
  write_safetensors(tmp_path / "x.safetensors", GOOD | {KEY: value}, {})
  found = read(tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match=message):
    encoder_from(found.items["encoder"], ENCODER, found.layout)


def test_what_is_not_used_may_be_anything(tmp_path):
  """Counters and the like: only what becomes a weight must be one."""
  write_safetensors(tmp_path / "x.safetensors", GOOD | {"head.counter": np.int64(3) * np.ones((), np.int64)}, {})
  found = read(tmp_path / "x.safetensors")
  encoder_from(found.items["encoder"], ENCODER, found.layout, ignore=["head.*"])


# ------------------------------------------------------------------------------------------ files that we write
@pytest.mark.parametrize(
  "odd",
  [
    lambda x: np.asfortranarray(x),
    lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    lambda x: x[::-1],
    lambda x: x.T,
    lambda x: np.broadcast_to(x[:1], x.shape),
  ],
)
def test_an_array_is_stored_as_its_numbers_however_it_lies_in_memory(tmp_path, odd):
  """safetensors 0.8.0 stores the bytes as they lie (its issue 825): another matrix."""
  x = odd(np.arange(12.0, dtype=np.float32).reshape(3, 4))
  write_safetensors(tmp_path / "x.safetensors", {"patch_embed.proj.weight": x}, {})
  np.testing.assert_array_equal(read(tmp_path / "x.safetensors").items["encoder"]["patch_embed.proj.weight"], x)


def test_a_type_that_the_file_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
  for x in (jnp.ones(3, jnp.float8_e4m3fn), np.ones(3, np.complex64)):
    with pytest.raises(ValueError, match="cannot hold: convert it to float32"):
      write_safetensors(tmp_path / "x.safetensors", {"a": np.asarray(x)}, {})
  assert not list(tmp_path.iterdir())


def test_what_is_read_back_otherwise_is_not_kept(tmp_path, monkeypatch):
  spoil = lambda tensors, path, metadata: save_file({key: x + 1 for key, x in tensors.items()}, path, metadata)
  monkeypatch.setattr("jepa_jax.weights.files.save_file", spoil)
  with pytest.raises(OSError, match="does not hold what was written"):
    write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(3, np.float32)}, {})
  assert not list(tmp_path.iterdir())


def test_settings_in_a_file_of_ours_that_are_no_json_are_named(tmp_path):
  for config, message in (("{", "no JSON"), (json.dumps([1]), "not those of a file of ours")):
    save_file(
      {"encoder/a": np.zeros(3, np.float32)}, tmp_path / "x.safetensors", {"format": "jepa_jax", "config": config}
    )
    with pytest.raises(ValueError, match=message):
      read(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------------ tensors of torch
@pytest.mark.filterwarnings("ignore")  # of torch, about quantised tensors
@pytest.mark.parametrize("kind", ["sparse", "quantised", "float8", "complex", "numbers for names"])
def test_tensors_of_torch_that_are_no_dense_floats_are_named(tmp_path, kind):
  torch = pytest.importorskip("torch")
  x = torch.ones(4, 4)
  state = {
    "sparse": {"patch_embed.proj.weight": x.to_sparse()},
    "quantised": {"patch_embed.proj.weight": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)},
    "float8": {"patch_embed.proj.weight": x.to(torch.float8_e4m3fn)},
    "complex": {"patch_embed.proj.weight": x.to(torch.complex64)},
    "numbers for names": {0: x, 1: x},
  }[kind]
  torch.save(state, tmp_path / "x.pth")
  message = {"sparse": "sparse", "quantised": "quantised", "float8": "float8", "complex": "complex"}.get(
    kind, "numbers for"
  )
  with pytest.raises(ValueError, match=message):
    read(tmp_path / "x.pth")


def test_float8_in_safetensors_is_named(tmp_path):
  torch = pytest.importorskip("torch")
  from safetensors.torch import save_file as save_torch

  save_torch({"patch_embed.proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
  try:
    found = read(tmp_path / "x.safetensors")
  except ValueError as error:
    assert "convert it to float32" in str(error)
  else:  # a version whose numpy has the type: then its numbers are what they are
    np.testing.assert_array_equal(np.asarray(found.items["encoder"]["patch_embed.proj.weight"], np.float32), 1)
