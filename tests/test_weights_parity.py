"""Our ViT and PyTorch's compute the same: every layer's output, in float32, from the same weights."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from jepa_jax.models import PredictorConfig, ViTConfig, make_predictor, sincos_position_embedding
from jepa_jax.weights.convert import encoder_from, predictor_from
from jepa_jax.weights.describe import describe
from jepa_jax.weights.files import read
from tests.checkpoints import ENCODER, PREDICTOR, meta_encoder, meta_predictor, random_array

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch_vit = pytest.importorskip("tests.torch_vit")

TOLERANCE = 1e-5
# Several widths, depths, head counts, hidden widths, patches, and the channels of their images.
SIZES = [
  ViTConfig(image_size=16, patch_size=4, width=32, depth=3, num_heads=4, scan=False, pos_embed="sincos"),
  ViTConfig(image_size=28, patch_size=14, width=48, depth=2, num_heads=3, mlp_dim=80, scan=False, pos_embed="sincos"),
  ViTConfig(image_size=24, patch_size=8, width=64, depth=4, num_heads=1, scan=False, pos_embed="sincos"),
  ViTConfig(image_size=32, patch_size=16, width=192, depth=2, num_heads=3, scan=False, pos_embed="learned"),
]
CHANNELS = [3, 3, 1, 3]


def hf_config(cfg, channels=3, **changes):
  size = cfg.size
  fields = dict(
    hidden_size=size.width,
    num_hidden_layers=size.depth,
    num_attention_heads=size.num_heads,
    intermediate_size=size.mlp_dim,
    image_size=cfg.image_size,
    patch_size=cfg.patch_size,
    num_channels=channels,
    layer_norm_eps=1e-6,
  )
  return transformers.IJepaConfig(**(fields | changes))


def hf_model(cfg, seed=0, **changes):
  """A Hugging Face model with random biases and norms, too; its position embedding is what `cfg` says."""
  model = transformers.IJepaModel(hf_config(cfg, **changes)).eval()
  rng, grid = np.random.default_rng(seed), cfg.image_size // cfg.patch_size
  constant = torch.from_numpy(sincos_position_embedding((grid, grid), cfg.size.width)[None])
  for name, parameter in model.named_parameters():
    fixed = name == "embeddings.position_embeddings" and cfg.pos_embed == "sincos"
    parameter.data = constant if fixed else torch.from_numpy(random_array(rng, name, parameter.shape))
  return model


def tensors_of(model):
  return {key: value.numpy() for key, value in model.state_dict().items()}


def pictures(cfg, size_px=None, batch=2, channels=3):
  size = size_px or cfg.image_size
  return np.random.default_rng(1).standard_normal((batch, size, size, channels)).astype(np.float32)


def hf_layers(model, images_BxHxWxC, **options):
  """[patches with their position, block 1, ..., block L, normed tokens]."""
  with torch.no_grad():
    out = model(torch.from_numpy(images_BxHxWxC.transpose(0, 3, 1, 2)), output_hidden_states=True, **options)
  return [h.numpy() for h in (*out.hidden_states, out.last_hidden_state)]


def our_layers(cfg, params, images_BxHxWxC):
  """The same of ours, prefix tokens included: the blocks one by one, so that each one's output can be looked at."""
  cfg = dataclasses.replace(cfg, scan=False)
  module = cfg.make(images_BxHxWxC.shape[-1])
  seen = lambda child, method: str(child.name).startswith("blocks_") and method == "__call__"
  apply = lambda p, x: module.apply({"params": p}, x, capture_intermediates=seen, mutable=["intermediates"])
  out, captured = jax.jit(apply)(params, images_BxHxWxC)
  blocks = [captured["intermediates"][f"blocks_{i}"]["__call__"][0][0] for i in range(cfg.size.depth)]
  return [np.asarray(h) for h in (*blocks, out.tokens_BxNxD)], out


def gaps(a, b):
  """The largest difference of each pair of arrays."""
  return [float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True)]


def channels_first(images_BxHxWxC):
  return np.ascontiguousarray(images_BxHxWxC.transpose(0, 3, 1, 2))


# ---------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize(
  ("cfg", "channels"), [*zip(SIZES, CHANNELS)], ids=[f"p{c.patch_size}-{c.size.width}x{c.size.depth}" for c in SIZES]
)
def test_every_layer_of_hugging_faces_ijepa_agrees(cfg, channels):
  model, images = hf_model(cfg, channels=channels), pictures(cfg, channels=channels)
  ours, _ = our_layers(cfg, encoder_from(tensors_of(model), cfg, "hf", channels=channels), images)
  theirs = hf_layers(model, images)
  assert len(ours) == cfg.size.depth + 1
  assert max(gaps(theirs[1:], ours)) < TOLERANCE


def test_stacked_blocks_compute_the_same_and_so_do_the_names_of_transformers_4():
  cfg = dataclasses.replace(SIZES[0], scan=True)
  model, images = hf_model(cfg), pictures(cfg)
  params = encoder_from(tensors_of(model), cfg, "hf")
  tokens = jax.jit(cfg.make(3).apply)({"params": params}, images).tokens_BxNxD
  assert gaps([hf_layers(model, images)[-1]], [tokens])[0] < TOLERANCE
  before = encoder_from({name_in_transformers_4(key): x for key, x in tensors_of(model).items()}, cfg, "hf")
  assert jax.tree.all(jax.tree.map(np.array_equal, params, before))


def name_in_transformers_4(key):
  for new, old in {
    r"^layers\.": "encoder.layer.",
    r"attention\.([qkv])_proj": lambda m: "attention.attention." + {"q": "query", "k": "key", "v": "value"}[m[1]],
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
  }.items():
    key = re.sub(new, old, key)
  return key


def test_folders_that_transformers_wrote_are_read_with_and_without_a_head(tmp_path):
  cfg = SIZES[0]
  model = hf_model(cfg)
  model.save_pretrained(tmp_path / "plain")
  head = transformers.IJepaForImageClassification(hf_config(cfg))
  head.ijepa.load_state_dict(model.state_dict())
  head.save_pretrained(tmp_path / "head", max_shard_size="20KB")
  assert len(list((tmp_path / "head").glob("*.safetensors"))) > 1
  wanted = encoder_from(tensors_of(model), cfg, "hf")
  for name, ignore in {"plain": [], "head": ["classifier.*"]}.items():
    found = read(tmp_path / name)
    params = encoder_from(found.items["encoder"], cfg, found.layout, ignore)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, wanted))
    assert describe(found, "encoder").settings["num_heads"] == cfg.num_heads


def test_at_another_image_size_every_layer_agrees_given_the_same_positions():
  """Ours spreads the positions of a larger grid over the native one; Hugging Face, given these, computes the same."""
  cfg, size_px = SIZES[0], 24
  native, grid = (4, 4), (6, 6)
  model, images = hf_model(cfg), pictures(cfg, size_px)
  larger = hf_model(cfg, image_size=size_px)
  larger.embeddings.position_embeddings.data = torch.from_numpy(sincos_position_embedding(grid, 32, native)[None])
  ours, _ = our_layers(cfg, encoder_from(tensors_of(model), cfg, "hf"), images)
  assert max(gaps(hf_layers(larger, images)[1:], ours)) < TOLERANCE


def test_interpolating_a_constant_is_not_recomputing_it():
  """interpolate_pos_encoding=True takes a bicubic picture of sines and cosines: near to ours, but not the same."""
  cfg, size_px = SIZES[0], 24
  model, images = hf_model(cfg), pictures(cfg, size_px)
  ours, _ = our_layers(cfg, encoder_from(tensors_of(model), cfg, "hf"), images)
  theirs = hf_layers(model, images, interpolate_pos_encoding=True)[1:]
  assert 1e-2 < max(gaps(theirs, ours)) < 1


def test_an_interpolated_embedding_imported_at_the_new_size_agrees_in_every_layer():
  """The way to have exactly Hugging Face's interpolation: resize by torch, import as learned at the new size."""
  cfg = dataclasses.replace(SIZES[0], pos_embed="learned")
  at_24 = dataclasses.replace(cfg, image_size=24)
  model, images = hf_model(cfg), pictures(at_24)
  embedding = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 36, 32), 24, 24).detach().numpy()
  tensors = tensors_of(model) | {"embeddings.position_embeddings": embedding}
  ours, _ = our_layers(at_24, encoder_from(tensors, at_24, "hf"), images)
  theirs = hf_layers(model, images, interpolate_pos_encoding=True)
  assert max(gaps(theirs[1:], ours)) < TOLERANCE


# ---------------------------------------------------------------- Meta and timm


def test_every_layer_of_a_torch_vit_with_metas_names_agrees():
  weights, images = meta_encoder(ENCODER), pictures(ENCODER)
  ours, _ = our_layers(ENCODER, encoder_from(weights, ENCODER, "meta"), images)
  theirs = torch_vit.vit_layers(weights, channels_first(images), ENCODER.size.num_heads)
  assert max(gaps(theirs[1:], ours)) < TOLERANCE


def test_metas_predictor_predicts_the_same():
  weights, rng = meta_predictor(), np.random.default_rng(3)
  predictor = make_predictor(PredictorConfig(**PREDICTOR), ENCODER.make(3))
  context_BxKxD = rng.standard_normal((2, 6, 32)).astype(np.float32)
  context_K, blocks_MxT = np.array([0, 1, 4, 5, 9, 12]), np.array([[2, 3, 6], [10, 11, 14]])
  places = tuple(np.broadcast_to(x, (2, *x.shape)) for x in (context_K, blocks_MxT, np.ones((2, 3), bool)))
  apply = lambda p, x: predictor.apply({"params": p}, x, *places, grid_hw=(4, 4))
  like = jax.eval_shape(lambda x: predictor.init(jax.random.key(0), x, *places, grid_hw=(4, 4)), context_BxKxD)
  ours = jax.jit(apply)(predictor_from(weights, like["params"], ENCODER), context_BxKxD)
  theirs = [torch_vit.predict(weights, context_BxKxD, context_K, targets_T, 4) for targets_T in blocks_MxT]
  assert gaps([np.stack(theirs, axis=1)], [ours])[0] < TOLERANCE


@pytest.mark.parametrize("embed_class", [True, False], ids=["positions_of_all", "no_embed_class"])
def test_timms_class_token_registers_and_layer_scale_agree_in_every_layer(embed_class):
  cfg = dataclasses.replace(ENCODER, pos_embed="learned", cls_token=True, pool="cls", num_registers=2)
  scales = {f"blocks.{i}.ls{j}.gamma": (32,) for i in range(3) for j in (1, 2)}
  tokens = {"cls_token": (1, 1, 32), "reg_token": (1, 2, 32), "pos_embed": (1, 16 + 3 * embed_class, 32)}
  weights, images = meta_encoder(cfg, **tokens, **scales), pictures(cfg)
  ours, out = our_layers(cfg, encoder_from(weights, cfg, "timm"), images)
  theirs = torch_vit.vit_layers(weights, channels_first(images), 4)
  assert max(gaps(theirs[1:-1], ours[:-1])) < TOLERANCE
  assert max(gaps([theirs[-1][:, 3:], theirs[-1][:, 0]], [out.tokens_BxNxD, out.pooled_BxD])) < TOLERANCE
