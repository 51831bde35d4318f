"""Every family of published weights computes what it computes in timm or transformers: every layer, float32, random
weights, at its own image size and at others, wide ones too."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from jepa_jax.config import to_dict
from jepa_jax.models import ResNetConfig, ViTConfig
from jepa_jax.weights.convert import encoder_from, encoder_to, flatten
from jepa_jax.weights.describe import choose_item, describe
from jepa_jax.weights.encoders import import_encoder
from jepa_jax.weights.export import export_weights
from jepa_jax.weights.files import read, write_ours, write_safetensors
from jepa_jax.weights.resnets import resnet_from, resnet_to
from tests.checkpoints import random_array
from tests.test_weights_parity import channels_first, our_layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def whole(name):
  """The package, or a skip where it cannot be imported, as a torchvision that was built for another PyTorch."""
  try:
    return importlib.import_module(name)
  except (ImportError, RuntimeError, OSError) as error:
    pytest.skip(f"{name} cannot be imported: {error}")


TOLERANCE = 1e-5  # of the largest activation
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
HF = {
  "ijepa": ("IJepaConfig", "IJepaModel", {"image_size": 32, "patch_size": 8}),
  "vit": ("ViTConfig", "ViTModel", {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}),
  "mae": ("ViTMAEConfig", "ViTMAEModel", {"image_size": 32, "patch_size": 8, "mask_ratio": 0.0}),
  "dinov2": ("Dinov2Config", "Dinov2Model", {"image_size": 28, "patch_size": 7, "layer_norm_eps": 1e-6}),
  "dinov2_swiglu": ("Dinov2Config", "Dinov2Model", {"image_size": 28, "patch_size": 7, "use_swiglu_ffn": True}),
  "dinov2_registers": (
    "Dinov2WithRegistersConfig",
    "Dinov2WithRegistersModel",
    {"image_size": 28, "patch_size": 7, "num_register_tokens": 3},
  ),
  "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {"image_size": 32, "patch_size": 8, "num_register_tokens": 4}),
  "dinov3_gated": ("DINOv3ViTConfig", "DINOv3ViTModel", {"image_size": 32, "patch_size": 8} | GATED),
}
# At the size that the weights are for, at a larger, a smaller and a wide one, in patches.
GRIDS = [(4, 4), (6, 6), (3, 3), (3, 5)]


def randomised(model, seed=0):
  """The model with random biases, norms, layer scales and tokens, too."""
  rng = np.random.default_rng(seed)
  for name, parameter in model.named_parameters():
    if not name.endswith("periods"):
      parameter.data = torch.from_numpy(random_array(rng, name, tuple(parameter.shape)))
  return model.eval()


def relative_gap(theirs, ours):
  scale = max(float(np.abs(x).max()) for x in theirs)
  return max(float(np.abs(x - y).max()) for x, y in zip(theirs, ours, strict=True)) / scale


def pictures(grid_hw, patch, channels=3):
  shape = (2, grid_hw[0] * patch, grid_hw[1] * patch, channels)
  return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def imported(found, image_size=None):
  """(config as `inspect` prints it, parameters) of a checkpoint that was read."""
  item = choose_item(found)
  told = describe(found, item)
  cfg = ViTConfig(**(told.settings | {"scan": False} | ({"image_size": image_size} if image_size else {})))
  return cfg, encoder_from(found.items[item], cfg, found.layout, channels=told.channels)


@pytest.mark.parametrize("kind", HF)
def test_every_layer_of_transformers_models_agrees(tmp_path, kind):
  config, model, options = HF[kind]
  config = getattr(transformers, config)(**SMALL, **options)
  model = randomised(getattr(transformers, model)(config))
  model.save_pretrained(tmp_path)
  cfg, params = imported(read(tmp_path))
  assert (cfg.pool == "cls") == (kind != "ijepa")
  resizes = {"interpolate_pos_encoding": True} if kind in ("ijepa", "vit", "mae") else {}
  for grid_hw in GRIDS if kind != "ijepa" else GRIDS[:1]:
    images = pictures(grid_hw, cfg.patch_size)
    noise = {"noise": torch.arange(grid_hw[0] * grid_hw[1]).repeat(2, 1).float()} if kind == "mae" else {}
    with torch.no_grad():
      out = model(torch.from_numpy(channels_first(images)), output_hidden_states=True, **resizes, **noise)
    ours, seen = our_layers(cfg, params, images)
    prefix = int(cfg.cls_token) + cfg.num_registers
    theirs = [x.numpy() for x in (*out.hidden_states[1:], out.last_hidden_state[:, prefix:])]
    assert relative_gap(theirs, ours) < TOLERANCE, grid_hw
    if cfg.cls_token:
      assert relative_gap([out.last_hidden_state[:, 0].numpy()], [seen.pooled_BxD]) < TOLERANCE


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_swiglu", "dinov2_registers", "dinov3", "dinov3_gated"])
def test_what_is_in_memory_is_read_as_what_is_in_a_file(tmp_path, kind):
  """transformers 5 has other names for its modules than for the arrays in files."""
  config, model, options = HF[kind]
  model = randomised(getattr(transformers, model)(getattr(transformers, config)(**SMALL, **options)))
  model.save_pretrained(tmp_path / "folder")
  torch.save(model.state_dict(), tmp_path / "memory.pth")
  cfg, params = imported(read(tmp_path / "folder"))
  memory = read(tmp_path / "memory.pth")
  again = encoder_from(memory.items[choose_item(memory)], cfg, memory.layout)
  assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


TIMM = {
  "ijepa": ("vit_huge_patch14_gap_224", {}),
  "fc_norm": ("vit_huge_patch14_gap_224", {"fc_norm": True}),
  "dino": ("vit_small_patch16_224", {}),
  "dinov2": ("vit_small_patch14_dinov2", {}),
  "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {}),
  "dinov2_swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 4.0}),
  "dinov3": ("vit_small_patch16_dinov3", {}),
  "dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", {}),
  "dinov3_gated": ("vit_small_plus_patch16_dinov3_qkvb", {}),
}


@pytest.mark.parametrize("kind", TIMM)
def test_every_layer_of_timms_models_agrees(tmp_path, kind):
  timm = whole("timm")
  name, options = TIMM[kind]
  small = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 32, "patch_size": 8, "num_classes": 0}
  # Where the image size is given, positions are resized as they are everywhere in timm.
  model = randomised(timm.create_model(name, dynamic_img_size=True, **small, **options))
  write_safetensors(tmp_path / "x.safetensors", {k: x.numpy() for k, x in model.state_dict().items()}, {})
  found = read(tmp_path / "x.safetensors")
  found = dataclasses.replace(found, config={"num_attention_heads": 2})
  cfg, params = imported(found, 32)
  for grid_hw in GRIDS if kind not in ("ijepa", "fc_norm") else GRIDS[:1]:
    images, theirs = pictures(grid_hw, cfg.patch_size), []
    keep = lambda _, __, out, kept=theirs: kept.append(out.numpy())
    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    with torch.no_grad():
      out = model.forward_features(torch.from_numpy(channels_first(images)))
      pooled = model.forward_head(out, pre_logits=True)
    for hook in hooks:
      hook.remove()
    ours, seen = our_layers(cfg, params, images)
    prefix = int(cfg.cls_token) + cfg.num_registers
    assert relative_gap([*theirs, out[:, prefix:].numpy()], ours) < TOLERANCE, grid_hw
    if kind in ("ijepa", "fc_norm", "dino", "dinov2"):
      assert relative_gap([pooled.numpy()], [seen.pooled_BxD]) < TOLERANCE


@pytest.mark.parametrize("kind", ["ijepa", "fc_norm", "dino", "dinov2", "dinov2_registers", "dinov2_swiglu"])
def test_what_is_written_with_timms_names_is_loaded_there(tmp_path, kind):
  timm = whole("timm")
  name, options = TIMM[kind]
  small = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 32, "patch_size": 8, "num_classes": 0}
  make = lambda seed: randomised(timm.create_model(name, **small, **options), seed)
  model, other, images = make(0), make(1), torch.from_numpy(channels_first(pictures((4, 4), 8)))
  write_safetensors(tmp_path / "x.safetensors", {k: x.numpy() for k, x in model.state_dict().items()}, {})
  found = dataclasses.replace(read(tmp_path / "x.safetensors"), config={"num_attention_heads": 2})
  cfg, params = imported(found, 32)
  tensors = encoder_to(params, cfg, "timm")
  other.load_state_dict({key: torch.from_numpy(x) for key, x in tensors.items()}, strict=True)
  with torch.no_grad():
    assert relative_gap([model(images).numpy()], [other(images).numpy()]) < TOLERANCE


# ---------------------------------------------------------------- ResNets


def resnets():
  torchvision = whole("torchvision")
  build_ = torchvision.models.resnet
  return {
    "50": build_.ResNet(build_.Bottleneck, [3, 4, 6, 3]),
    "18": build_.ResNet(build_.BasicBlock, [2, 2, 2, 2]),
  }


def with_statistics(model):
  randomised(model)
  for name, buffer in model.named_buffers():
    if name.endswith("running_var"):
      buffer.data = 0.5 + torch.rand(buffer.shape, generator=torch.Generator().manual_seed(0))
    elif name.endswith("running_mean"):
      buffer.data = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)) / 10
  return model.eval()


@pytest.mark.parametrize("variant", ["18", "50"])
@pytest.mark.parametrize("prefix", ["", "module.encoder_q.", "backbone."])
def test_resnets_of_torchvision_agree(tmp_path, variant, prefix):
  """VICReg's and Barlow Twins' file, MoCo's, Lightning's; heads are left out by name."""
  model = with_statistics(resnets()[variant])
  tensors = {prefix + key: x.numpy() for key, x in model.state_dict().items()}
  heads = {"fc.weight", "fc.bias"} if not prefix else set()
  write_safetensors(tmp_path / "x.safetensors", tensors, {})
  found = read(tmp_path / "x.safetensors")
  assert "fc.*" in found.rest or not heads
  told = describe(found, "encoder")
  cfg = ResNetConfig(**told.settings)
  assert cfg.variant == variant and cfg.stem == "imagenet" and told.channels == 3
  params, averages = resnet_from(found.items["encoder"], cfg, found.layout)
  images = np.random.default_rng(0).standard_normal((2, 64, 96, 3)).astype(np.float32)
  ours = jax.jit(cfg.make(3).apply)({"params": params, "batch_stats": averages}, images)
  with torch.no_grad():
    x = model.maxpool(model.relu(model.bn1(model.conv1(torch.from_numpy(channels_first(images))))))
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
      x = layer(x)
  theirs = x.flatten(2).transpose(1, 2).numpy()
  assert relative_gap([theirs, theirs.mean(1)], [ours.tokens_BxNxD, ours.pooled_BxD]) < TOLERANCE
  back = resnet_to(params, averages, cfg, "resnet")
  wanted = {k: x for k, x in model.state_dict().items() if not k.startswith("fc.") and "num_batches" not in k}
  assert back.keys() == wanted.keys() and all(np.array_equal(back[k], wanted[k].numpy()) for k in back)


@pytest.mark.parametrize("variant", ["18", "50"])
def test_transformers_loads_the_resnet_that_is_written_and_computes_the_same(tmp_path, variant):
  cfg, rng = ResNetConfig(variant=variant, stem="imagenet", image_size=64), np.random.default_rng(0)
  variables = jax.eval_shape(cfg.make(3).init, jax.random.key(0), pictures((8, 8), 8))
  fill = lambda path, x: random_array(rng, "norm.weight" if path[-1].key in ("scale", "var") else path[-1].key, x.shape)
  variables = jax.tree_util.tree_map_with_path(fill, variables)
  variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
  trees = {"encoder": flatten(variables["params"]), "batch_stats": flatten(variables["batch_stats"])}
  write_ours(tmp_path / "ours.safetensors", trees, {"encoder": to_dict(cfg), "data": {"channels": 3}})
  import_encoder(str(tmp_path / "ours.safetensors"), str(tmp_path / "run"))
  export_weights(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", license="apache-2.0")
  model, info = transformers.ResNetModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
  lacking = {key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")}
  assert not lacking and not info["unexpected_keys"]
  images = pictures((8, 10), 8)
  ours = jax.jit(cfg.make(3).apply)(variables, images)
  with torch.no_grad():
    theirs = model.eval()(torch.from_numpy(channels_first(images))).pooler_output[:, :, 0, 0].numpy()
  assert relative_gap([theirs], [ours.pooled_BxD]) < TOLERANCE


@pytest.mark.parametrize("variant", ["18", "50"])
def test_resnets_of_transformers_agree(tmp_path, variant):
  kind = {
    "18": ("basic", [2, 2, 2, 2], [64, 128, 256, 512]),
    "50": ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
  }
  layer_type, depths, sizes = kind[variant]
  config = transformers.ResNetConfig(layer_type=layer_type, depths=depths, hidden_sizes=sizes)
  model = with_statistics(transformers.ResNetModel(config))
  model.save_pretrained(tmp_path)
  found = read(tmp_path)
  cfg = ResNetConfig(**describe(found, "encoder").settings)
  params, averages = resnet_from(found.items["encoder"], cfg, found.layout)
  images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
  ours = jax.jit(cfg.make(3).apply)({"params": params, "batch_stats": averages}, images)
  with torch.no_grad():
    theirs = model(torch.from_numpy(channels_first(images))).pooler_output[:, :, 0, 0].numpy()
  assert relative_gap([theirs], [ours.pooled_BxD]) < TOLERANCE
