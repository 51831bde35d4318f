"""Checkpoints in and out: nothing is lost, nothing is taken silently, nothing in a file is run."""

import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest

from jepa_jax.models import ViTConfig, sincos_position_embedding
from jepa_jax.weights.convert import (
  encoder_from,
  encoder_to,
  flatten,
  predictor_from,
  predictor_to,
  stack,
  unflatten,
  unstack,
)
from jepa_jax.weights.describe import check_config, choose_item, describe
from jepa_jax.weights.files import Checkpoint, read, write_folder, write_ours, write_safetensors
from tests.checkpoints import ENCODER, meta_encoder, meta_predictor, random_tensors
from tests.networks import abstract_init

LEARNED = dataclasses.replace(ENCODER, pos_embed="learned")


def same(a, b):
  """Equal names, and every array equal to the bit."""
  a, b = flatten(a), flatten(b)
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def random_params(cfg, channels=3):
  abstract = flatten(abstract_init(cfg, channels=channels)["params"])
  return unflatten(random_tensors({key: x.shape for key, x in abstract.items()}))


def prefixed(tensors, prefix="module."):
  return {prefix + key: x for key, x in tensors.items()}


# ---------------------------------------------------------------- names, shapes, round trips


@pytest.mark.parametrize("layout", ["meta", "hf", "dinov2", "timm"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_ours_to_a_layout_and_back_is_bit_identical(layout, scan):
  for cfg in (dataclasses.replace(ENCODER, scan=scan), dataclasses.replace(LEARNED, scan=scan)):
    params = random_params(cfg)
    back = encoder_from(encoder_to(params, cfg, layout), cfg, layout.removesuffix("5"))
    assert same(params, back)


def test_timms_class_and_register_tokens_come_back():
  cfg = dataclasses.replace(LEARNED, cls_token=True, num_registers=2)
  params = random_params(cfg)
  assert same(params, encoder_from(encoder_to(params, cfg, "timm"), cfg, "timm"))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_meta_to_ours_and_back_is_bit_identical(scan):
  cfg, theirs = dataclasses.replace(ENCODER, scan=scan), meta_encoder()
  params = encoder_from(theirs, cfg, "meta")
  assert {key: x.shape for key, x in flatten(params).items()} == {
    key: x.shape for key, x in flatten(abstract_init(cfg)["params"]).items()
  }
  assert same(theirs, encoder_to(params, cfg, "meta"))


def test_metas_predictor_to_ours_and_back_is_bit_identical():
  theirs = meta_predictor()
  params = predictor_from(theirs, predictor_like(), ENCODER)
  assert {key: x.shape for key, x in flatten(params).items()} == {
    key: x.shape for key, x in flatten(predictor_like()).items()
  }
  assert same(theirs, predictor_to(params, ENCODER))


def predictor_like(width=16, depth=2, heads=4, out=32):
  """Names and shapes of our predictor's parameters, blocks stacked."""
  block = {
    "norm1/scale": (width,),
    "norm1/bias": (width,),
    "attn/qkv/kernel": (width, 3, heads, width // heads),
    "attn/qkv/bias": (3, heads, width // heads),
    "attn/proj/kernel": (heads, width // heads, width),
    "attn/proj/bias": (width,),
    "norm2/scale": (width,),
    "norm2/bias": (width,),
    "mlp/fc1/kernel": (width, 4 * width),
    "mlp/fc1/bias": (4 * width,),
    "mlp/fc2/kernel": (4 * width, width),
    "mlp/fc2/bias": (width,),
  }
  rest = {"embed/kernel": (out, width), "embed/bias": (width,), "mask_token": (1, 1, width)}
  rest |= {"norm/scale": (width,), "norm/bias": (width,), "proj/kernel": (width, out), "proj/bias": (out,)}
  shapes = {f"blocks/{key}": (depth, *shape) for key, shape in block.items()} | rest
  return unflatten({key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()})


def test_stacking_is_undone_by_unstacking_also_beyond_ten_blocks():
  flat = {f"blocks_{i}/norm1/scale": np.full(2, i) for i in range(12)} | {"norm/scale": np.ones(2)}
  assert np.array_equal(stack(flat)["blocks/norm1/scale"][:, 0], np.arange(12))
  assert same(unstack(stack(flat)), flat)


# ---------------------------------------------------------------- strictness


def test_one_error_lists_every_fault_with_its_shapes():
  theirs = meta_encoder()
  del theirs["norm.bias"], theirs["blocks.1.attn.qkv.bias"]
  theirs |= {"head.weight": np.zeros((10, 32)), "blocks.0.mlp.fc1.weight": np.zeros((128, 31))}
  with pytest.raises(ValueError) as caught:
    encoder_from(theirs, ENCODER, "meta")
  for part in (
    "missing in the checkpoint: norm.bias (32,)",
    "missing in the checkpoint: blocks.1.attn.qkv.bias (96,)",
    "in the checkpoint, but not used: head.weight (10, 32)",
    "blocks.0.mlp.fc1.weight: (128, 31) in the checkpoint, (128, 32) wanted",
  ):
    assert part in str(caught.value)


@pytest.mark.parametrize(
  ("change", "part"),
  [
    ({"depth": 5}, "depth: the checkpoint has 3, the config 5"),
    ({"width": 48}, "width: the checkpoint has 32, the config 48"),
    ({"mlp_dim": 64}, "mlp_dim: the checkpoint has 128, the config 64"),
    ({"patch_size": 8}, "patch_size: the checkpoint has 4, the config 8"),
    ({"image_size": 32}, "positions: the checkpoint has 16, the config 64"),
    ({"cls_token": True}, "the meta layout has no place for cls_token"),
  ],
)
def test_another_architecture_is_named_before_its_keys(change, part):
  with pytest.raises(ValueError, match=part.replace("(", r"\(")):
    encoder_from(meta_encoder(), dataclasses.replace(ENCODER, **change), "meta")


def test_another_number_of_channels_is_named_before_its_keys():
  with pytest.raises(ValueError, match="channels: the checkpoint has 3, the config 1"):
    encoder_from(meta_encoder(), ENCODER, "meta", channels=1)


def test_a_predictor_of_another_depth_or_width_is_named():
  with pytest.raises(ValueError, match="depth: the checkpoint has 2, the config 3") as caught:
    predictor_from(meta_predictor(), predictor_like(width=24, depth=3), ENCODER)
  assert "width: the checkpoint has 16, the config 24" in str(caught.value)


def test_names_are_left_out_only_when_asked_for_and_only_if_they_are_there():
  theirs = meta_encoder() | {"head.weight": np.zeros((10, 32)), "head.bias": np.zeros(10)}
  assert same(encoder_from(theirs, ENCODER, "timm", ignore=["head.*"]), encoder_from(meta_encoder(), ENCODER, "meta"))
  with pytest.raises(ValueError, match="nothing in the checkpoint is called fc_norm"):
    encoder_from(theirs, ENCODER, "timm", ignore=["head.*", "fc_norm.*"])


def test_another_constant_than_ours_is_refused_and_the_order_of_its_halves_named():
  swapped = np.roll(meta_encoder()["pos_embed"], 16, axis=-1)
  with pytest.raises(ValueError, match=r"its halves are in the order \[y \| x\]"):
    encoder_from(meta_encoder() | {"pos_embed": swapped}, ENCODER, "meta")
  off = meta_encoder()["pos_embed"] + np.float32(1e-3)
  with pytest.raises(ValueError, match=r"largest difference is 0.001; set encoder.pos_embed='learned'"):
    encoder_from(meta_encoder() | {"pos_embed": off}, ENCODER, "meta")
  assert np.array_equal(encoder_from(meta_encoder() | {"pos_embed": off}, LEARNED, "meta")["pos_embed"], off)
  with pytest.raises(ValueError, match="predictor_pos_embed is not the sin-cos constant"):
    predictor_from(meta_predictor() | {"predictor_pos_embed": np.zeros((1, 16, 16))}, predictor_like(), ENCODER)


def test_half_precision_files_are_read_and_their_constant_recognised():
  halves = {key: x.astype(np.float16) for key, x in meta_encoder().items()}
  params = encoder_from(halves, ENCODER, "meta")
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


# ---------------------------------------------------------------- what a checkpoint fits


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_settings_are_read_off_the_shapes(layout, tmp_path):
  first = dataclasses.replace(LEARNED, width=0, num_heads=0, depth=2, variant="tiny", patch_size=8)
  others = dataclasses.replace(first, pos_embed="sincos"), dataclasses.replace(first, mlp_dim=100), LEARNED
  for i, cfg in enumerate((first, *others)):
    path, channels = tmp_path / f"{i}.safetensors", 1 if cfg.variant == "tiny" else 3
    write_safetensors(path, encoder_to(random_params(cfg, channels), cfg, layout, channels), {})
    about = describe(read(path), "encoder")
    found = ViTConfig(**about.settings | {"num_heads": cfg.num_heads}, scan=False)
    assert (found.size, found.pos_embed, found.image_size) == (cfg.size, cfg.pos_embed, cfg.image_size)
    assert about.channels == channels and about.settings["name"] == "vit"
    assert ("num_heads=3" if cfg.variant == "tiny" else "num_heads=1") in about.assumed[0]


def test_class_token_and_registers_are_read_off_with_and_without_positions(tmp_path):
  cfg = dataclasses.replace(LEARNED, cls_token=True, num_registers=4)
  for num in (16, 21):
    tokens = {"cls_token": (1, 1, 32), "reg_token": (1, 4, 32), "pos_embed": (1, num, 32)}
    write_safetensors(path := tmp_path / f"{num}.safetensors", meta_encoder(**tokens), {})
    found = read(path)
    settings = describe(found, choose_item(found)).settings
    assert found.layout == "timm"
    assert (settings["cls_token"], settings["num_registers"], settings["image_size"]) == (True, 4, 16)
    params = encoder_from(found.items["encoder"], cfg, "timm")
    assert {k: x.shape for k, x in flatten(params).items()} == {
      k: x.shape for k, x in flatten(abstract_init(cfg)["params"]).items()
    }


def test_what_no_shape_shows_is_taken_from_config_json(tmp_path):
  document = {"num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
  write_folder(tmp_path / "hf", encoder_to(random_params(ENCODER), ENCODER, "hf"), {"config.json": document})
  found = read(tmp_path / "hf")
  assert describe(found, "encoder").settings["num_heads"] == 2
  with pytest.raises(ValueError, match="num_attention_heads: the checkpoint has 2, the config 4"):
    check_config(found, ENCODER, {})
  assert describe(found, "encoder").settings["norm_epsilon"] == 1e-12
  notes = check_config(found, dataclasses.replace(ENCODER, num_heads=2), {})
  assert "the checkpoint has norm_epsilon=1e-12, the config 1e-06" in notes
  tanh = dataclasses.replace(found, config={"hidden_act": "gelu_new"})
  with pytest.raises(ValueError, match="encoder.activation: the checkpoint has 'gelu_tanh'"):
    check_config(tanh, ENCODER, {})
  ours = dataclasses.replace(found, layout="jepa_jax", config={"encoder": {"image_size": 32}})
  with pytest.raises(ValueError, match="image_size: the checkpoint has 32, the config 16"):  # sin-cos: in no shape
    check_config(ours, ENCODER, {})


# ---------------------------------------------------------------- files


def test_ours_to_safetensors_and_back_is_bit_identical_and_nothing_is_overwritten(tmp_path):
  params, path = random_params(dataclasses.replace(ENCODER, scan=True)), tmp_path / "ours.safetensors"
  write_ours(path, {"encoder": flatten(params)}, {"encoder": {"name": "vit"}})
  found = read(path)
  assert found.layout == "jepa_jax" and same(unflatten(found.items["encoder"]), params)
  assert "blocks/attn/qkv/kernel" in found.items["encoder"] and describe(found, "encoder").settings == {"name": "vit"}
  with pytest.raises(ValueError, match="exists already and is not overwritten"):
    write_ours(path, {}, {})
  assert [p.name for p in tmp_path.iterdir()] == ["ours.safetensors"]


def test_a_folder_of_shards_is_one_checkpoint_and_a_lost_shard_is_named(tmp_path):
  tensors = encoder_to(random_params(ENCODER), ENCODER, "hf")
  keys, files = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
  parts = {files[0]: keys[:20], files[1]: keys[20:]}
  for file, names in parts.items():
    write_safetensors(tmp_path / file, {key: tensors[key] for key in names}, {"format": "pt"})
  weight_map = {key: file for file, names in parts.items() for key in names}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  assert same(read(tmp_path).items["encoder"], tensors)
  (tmp_path / files[1]).unlink()
  with pytest.raises(ValueError, match=f"lacks {files[1]}"):
    read(tmp_path)


def test_a_model_with_a_head_is_read_without_its_prefix(tmp_path):
  tensors = prefixed(encoder_to(random_params(ENCODER), ENCODER, "hf"), "ijepa.")
  head = {"classifier.weight": np.zeros((10, 32), np.float32), "classifier.bias": np.zeros(10, np.float32)}
  write_folder(tmp_path / "head", tensors | head, {})
  found = read(tmp_path / "head")
  assert found.rest == ("classifier.*",)
  wanted = encoder_from(found.items["encoder"], ENCODER, found.layout)
  with pytest.raises(ValueError, match="not used: classifier.bias") as caught:
    encoder_from({key.removeprefix("ijepa."): x for key, x in (tensors | head).items()}, ENCODER, "hf")
  assert str(caught.value).count("not used") == 2
  assert same(
    encoder_from(
      {key.removeprefix("ijepa."): x for key, x in (tensors | head).items()}, ENCODER, "hf", ignore=["classifier.*"]
    ),
    wanted,
  )
  assert same(encoder_from(found.items["encoder"], ENCODER, found.layout, ignore=["classifier.*"]), wanted)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("x.safetensors", b"\x00" * 20, "is damaged or no safetensors file"),
    ("x.npz", b"", "of unknown kind"),
  ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read(tmp_path / name)


def test_what_is_not_there_is_refused(tmp_path):
  for where, message in {tmp_path / "no.pth": "no such file or folder", tmp_path: "holds none of"}.items():
    with pytest.raises(ValueError, match=message):
      read(where)
  write_safetensors(tmp_path / "cnn.safetensors", {"conv1.weight": np.zeros((3, 3))}, {})
  with pytest.raises(ValueError, match="no network in a layout known here.*conv1.weight"):
    read(tmp_path / "cnn.safetensors")


def test_a_hub_id_is_fetched_as_a_folder_without_code(tmp_path, monkeypatch):
  hub = pytest.importorskip("huggingface_hub")
  tensors, asked = encoder_to(random_params(ENCODER), ENCODER, "hf"), []
  write_folder(tmp_path / "snapshot", tensors, {})
  fetch = lambda repository, allow_patterns: asked.append((repository, allow_patterns)) or str(tmp_path / "snapshot")
  monkeypatch.setattr(hub, "snapshot_download", fetch)
  assert same(read("facebook/ijepa_vith14_1k").items["encoder"], tensors)
  patterns = ["config.json", "tokenizer.json", "preprocessor_config.json"]
  patterns += ["processor_config.json", "open_clip_config.json"]
  patterns += ["*.safetensors", "*.index.json"]
  assert asked == [("facebook/ijepa_vith14_1k", patterns)]
  torch = pytest.importorskip("torch")  # a repository that has nothing else gives what torch has saved
  (tmp_path / "snapshot" / "model.safetensors").unlink()
  torch.save({key: torch.from_numpy(x) for key, x in tensors.items()}, tmp_path / "snapshot" / "pytorch_model.bin")
  assert same(read("facebook/ijepa_vith14_1k").items["encoder"], tensors)
  assert [sorted(set(p) - set(patterns)) for _, p in asked[1:]] == [
    [],
    ["open_clip_pytorch_model.bin", "pytorch_model*.bin"],
  ]


# ---------------------------------------------------------------- files of torch


@pytest.fixture(scope="module")
def pth_tar(tmp_path_factory):
  """A file as Meta's trainer saves it: (path, encoder, target encoder, predictor)."""
  torch = pytest.importorskip("torch")
  path = tmp_path_factory.mktemp("meta") / "vit-ep300.pth.tar"
  networks = {"encoder": meta_encoder(seed=1), "target_encoder": meta_encoder(seed=2), "predictor": meta_predictor()}
  content = {
    name: {key: torch.from_numpy(x) for key, x in prefixed(tensors).items()} for name, tensors in networks.items()
  }
  optimiser = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
  torch.save(content | {"opt": optimiser, "scaler": None, "epoch": 300, "loss": 0.1, "batch_size": 8}, path)
  return path, *networks.values()


def test_metas_file_has_three_networks_and_the_rest_is_named(pth_tar):
  path, encoder, target_encoder, predictor = pth_tar
  found = read(path)
  assert found.layout == "meta" and found.rest == ("opt", "scaler", "epoch", "loss", "batch_size")
  assert same(found.items["encoder"], encoder) and same(found.items["target_encoder"], target_encoder)
  assert same(found.items["predictor"], predictor)
  assert choose_item(found) == "target_encoder" and choose_item(found, "encoder") == "encoder"
  with pytest.raises(ValueError, match="no encoder 'predictor'; choose by --item: encoder, target_encoder"):
    choose_item(found, "predictor")


def test_a_file_without_an_encoder_says_what_it_has():
  only = Checkpoint("x.pth", "meta", {"predictor": meta_predictor()}, {})
  with pytest.raises(ValueError, match="x.pth holds no encoder, only predictor"):
    choose_item(only)


def test_a_bare_state_dict_and_bfloat16_are_read(tmp_path):
  torch = pytest.importorskip("torch")
  torch.save({key: torch.from_numpy(x).bfloat16() for key, x in meta_encoder().items()}, tmp_path / "x.pth")
  found = read(tmp_path / "x.pth")
  params = encoder_from(found.items["encoder"], ENCODER, found.layout)
  assert np.allclose(params["norm"]["scale"], meta_encoder()["norm.weight"], rtol=2**-8)


class Code:
  def __reduce__(self):
    return (pytest.fail, ("code in a checkpoint was run",))


def test_a_pickle_with_code_is_refused_unread(tmp_path):
  torch = pytest.importorskip("torch")
  torch.save({"encoder": {"norm.bias": torch.zeros(3)}, "evil": Code()}, tmp_path / "evil.pth")
  (tmp_path / "evil.bin").write_bytes(pickle.dumps(Code()))
  for name, named in {"evil.pth": "_pytest.outcomes.", "evil.bin": "a pickle of unknown things"}.items():
    with pytest.raises(ValueError, match="holds more than tensors and plain values") as caught:
      read(tmp_path / name)
    assert named in str(caught.value)
    assert "container" in str(caught.value) and "weights_only=False" in str(caught.value)


def test_a_truncated_torch_file_is_refused(pth_tar, tmp_path):
  (tmp_path / "half.pth").write_bytes(pth_tar[0].read_bytes()[:5000])
  with pytest.raises(ValueError, match="is damaged or no file of torch.save"):
    read(tmp_path / "half.pth")


def test_the_constant_of_the_published_models_is_ours_in_closed_form():
  """I-JEPA's order: x first, sin before cos, frequencies 10000^(-i / (D/4)); here row 1, column 2 of D = 8."""
  x, y = 2, 1
  half = lambda p: [np.sin(p), np.sin(p / 100), np.cos(p), np.cos(p / 100)]
  assert np.allclose(sincos_position_embedding((4, 4), 8)[y * 4 + x], [*half(x), *half(y)])
