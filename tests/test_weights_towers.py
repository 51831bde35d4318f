"""Image towers of CLIP and SigLIP alone, and ViTs whose queries, keys and values have no bias: as in transformers."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.evaluate import evaluate
from jepa_jax.runs import open_run
from jepa_jax.weights.command import import_weights, inspect_weights
from jepa_jax.weights.convert import encoder_to
from jepa_jax.weights.encoders import import_encoder, with_canvas
from jepa_jax.weights.files import read, write_safetensors
from jepa_jax.weights.names import respelt
from tests.test_weights import ENCODER, random_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DIGITS = {"data.source": "digits", "data.canvas_px": "16", "data.max_train": "64"}
SIZE = dict(
  hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)
MODELS = {
  "CLIP": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZE)),
  "CLIP, projected": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SIZE)),
  "SigLIP": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZE)),
  "SigLIP, no head": lambda: transformers.SiglipVisionModel(
    transformers.SiglipVisionConfig(**SIZE, vision_use_head=False)
  ),
  "ViT, no bias": lambda: transformers.ViTModel(
    transformers.ViTConfig(**SIZE, qkv_bias=False), add_pooling_layer=False
  ),
  "DINOv2, no bias": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZE, mlp_ratio=2, qkv_bias=False)),
}


def folder_of(name, path):
  """Returns (the model with random weights, the folder that transformers wrote)."""
  model, generator = MODELS[name](), torch.Generator().manual_seed(0)
  for key, parameter in model.named_parameters():
    scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
    shift = 1.0 if "norm" in key and key.endswith("weight") else 0.0
    parameter.data = shift + scale * torch.randn(parameter.shape, generator=generator)
  model.eval().save_pretrained(path)
  return model, path


def theirs(name, model, images):
  with torch.no_grad():
    out = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
  if name == "SigLIP, no head":
    return out.last_hidden_state.mean(1).numpy()
  if name == "CLIP, projected":
    return model.vision_model.post_layernorm(out.last_hidden_state[:, 0]).detach().numpy()
  pooled = getattr(out, "pooler_output", None)
  return (out.last_hidden_state[:, 0] if pooled is None else pooled).numpy()


def tensors_of(model):
  return {key: x.numpy() for key, x in model.state_dict().items()}


def pooled(workdir, images):
  run = open_run(workdir)
  experiment = run.experiment()
  network, variables = experiment.objective.networks()["image"], run.variables(experiment, "image")["image"]
  return np.asarray(network.apply_fn(variables, jnp.asarray(images)).pooled_BxD)


def pictures(side=16, channels=3):
  return np.random.default_rng(0).standard_normal((3, side, side, channels), np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers(name, tmp_path):
  model, folder = folder_of(name, tmp_path / "theirs")
  about = import_encoder(str(folder), str(tmp_path / "run"))
  assert about["assumed"] == [] and (about["encoder"].get("pool") == "map") == (name == "SigLIP")
  wanted = theirs(name, model, pictures())
  np.testing.assert_allclose(pooled(tmp_path / "run", pictures()), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_tower_is_evaluated_and_what_lies_beside_it_is_told(tmp_path):
  _, folder = folder_of("CLIP, projected", tmp_path / "theirs")
  about = import_encoder(str(folder), str(tmp_path / "run"))
  assert about["family"] == "the image tower of CLIP" and "visual_projection.weight" in about["not read"]
  found = evaluate(tmp_path / "run", overrides=DIGITS, names=("knn",), baselines=False, show=False)
  assert found.row["knn"] > 15  # chance is 10, of 512 images give or take 1.3


@pytest.mark.parametrize("prefix", ["model.", "vision_tower.", "model.vision_tower.vision_model.", "_orig_mod.module."])
def test_a_tower_is_found_below_any_prefix_and_the_rest_is_listed(prefix, tmp_path):
  """As LLaVA, wrappers and one's own modules have it; a file alone, whose heads and activation are said."""
  model, _ = folder_of("CLIP", tmp_path / "theirs")
  beside = {"classifier.weight": np.ones((2, 32), np.float32), "language.lm_head.weight": np.ones((4, 4), np.float32)}
  tensors = {prefix + key: x for key, x in tensors_of(model).items()}
  write_safetensors(tmp_path / "x.safetensors", tensors | beside, {})
  own = {"encoder.num_heads": "4", "encoder.activation": "quick_gelu", "encoder.norm_epsilon": "1e-5"}
  about = import_encoder(str(tmp_path / "x.safetensors"), str(tmp_path / "run"), own)
  assert {"classifier.weight", "language.lm_head.weight"} <= set(about["not read"])
  wanted = theirs("CLIP", model, pictures())
  np.testing.assert_allclose(pooled(tmp_path / "run", pictures()), wanted, atol=1e-5 * np.abs(wanted).max())


def test_guesses_can_be_corrected_and_of_two_towers_one_is_asked_for(tmp_path):
  model, _ = folder_of("CLIP", tmp_path / "theirs")
  other = {key: x + 1 for key, x in model.state_dict().items()}
  torch.save({"model": model.state_dict(), "ema": other}, tmp_path / "both.pt")
  own = {"encoder.num_heads": "4"}
  about = import_encoder(str(tmp_path / "both.pt"), str(tmp_path / "run"), own, item="model")
  assert about["encoder"]["num_heads"] == 4 and "quick_gelu" in " ".join(about["assumed"])
  wanted = theirs("CLIP", model, pictures())
  np.testing.assert_allclose(pooled(tmp_path / "run", pictures()), wanted, atol=1e-5 * np.abs(wanted).max())


def test_positions_are_resized_as_in_transformers(tmp_path):
  model, folder = folder_of("SigLIP", tmp_path / "theirs")
  import_encoder(str(folder), str(tmp_path / "run"))
  pixels = torch.from_numpy(pictures(24).transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    wanted = model(pixels, interpolate_pos_encoding=True).pooler_output.numpy()
  np.testing.assert_allclose(pooled(tmp_path / "run", pictures(24)), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_grey_tower_asks_for_its_mean_and_reads_one_channel(tmp_path):
  transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZE, num_channels=1)).save_pretrained(
    tmp_path / "x"
  )
  with pytest.raises(ValueError, match="reads 1 channels, and the file does not say how they were normalised"):
    import_encoder(str(tmp_path / "x"), str(tmp_path / "run"))
  grey = {"data.mean": "(0.5,)", "data.std": "(0.5,)"}
  import_encoder(str(tmp_path / "x"), str(tmp_path / "run"), grey)
  assert pooled(tmp_path / "run", pictures(channels=1)).shape == (3, 32)


def test_biases_that_config_json_speaks_of_are_not_made_up(tmp_path):
  config = transformers.ViTConfig(**SIZE)
  transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "theirs")
  found = tensors_of(transformers.ViTModel(config, add_pooling_layer=False))
  (tmp_path / "theirs" / "model.safetensors").unlink()
  kept = {key: x for key, x in found.items() if not key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}
  assert len(kept) == len(found) - 6
  write_safetensors(tmp_path / "theirs" / "model.safetensors", kept, {})
  with pytest.raises(ValueError, match="config.json has qkv_bias=true, and encoder has no bias of a query"):
    import_encoder(str(tmp_path / "theirs"), str(tmp_path / "run"))


def test_a_file_alone_says_what_is_assumed(tmp_path):
  _, folder = folder_of("SigLIP", tmp_path / "theirs")
  (folder / "config.json").unlink()
  told = inspect_weights(str(folder))
  assert told["family"] == "the image tower of SigLIP" and "no array shows them" in told["assumed"][0]


def test_weights_that_are_imported_keep_their_pixels_and_that_is_said(tmp_path):
  _, folder = folder_of("SigLIP", tmp_path / "theirs")
  import_encoder(str(folder), str(tmp_path / "run"))
  view = {"size": {"height": 12, "width": 12}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
  (folder / "preprocessor_config.json").write_text(json.dumps(view))
  again = import_encoder(str(folder), str(tmp_path / "run"))
  assert "view 16 x 16 px of 19, bicubic" in again["pixels"]  # as it was made
  for changed in ("data.mean=", "data.std=", "view_px=0", "crop_fraction=0.875", "interpolation=bicubic"):
    assert sum(changed in note for note in again["notes"]) == 1, changed
  seen = with_canvas({"evals.view_px": "8"}, str(tmp_path / "run"))
  assert seen["data.canvas_px"] == "10" and with_canvas({"data.seed": "1"}, "nowhere") == {"data.seed": "1"}


@pytest.mark.parametrize(
  ("shapes", "message"),
  [
    ({"encoder.layers.0.self_attn.qkv.weight": (24, 8)}, "no network in a layout"),
    ({"embeddings.patch_embedding.weight": (8, 48)}, "no convolution: SigLIP 2's towers"),
  ],
)
def test_towers_of_another_kind_are_named(tmp_path, shapes, message):
  """BLIP's has one array for query, key and value; SigLIP 2's for any aspect ratio a matrix for its patches."""
  tower = {"embeddings.patch_embedding.weight": (8, 3, 4, 4), "embeddings.position_embedding.weight": (16, 8)}
  tower |= {"encoder.layers.0.layer_norm1.weight": (8,), "encoder.layers.0.mlp.fc1.bias": (32,)}
  tower |= {} if "qkv" in str(shapes) else {"encoder.layers.0.self_attn.q_proj.weight": (8, 8)}
  for prefix in ("", "vision_model."):
    tensors = {prefix + key: np.ones(shape, np.float32) for key, shape in (tower | shapes).items()}
    write_safetensors(tmp_path / f"{prefix}x.safetensors", tensors, {})
    with pytest.raises(ValueError, match=message):
      inspect_weights(str(tmp_path / f"{prefix}x.safetensors"))


@pytest.mark.parametrize("layout", ["timm", "meta"])
def test_biases_are_zero_where_no_block_has_one_and_a_fault_where_some_have(layout):
  encoder = dataclasses.replace(ENCODER, cls_token=layout == "timm", pool="cls" if layout == "timm" else "mean")
  tensors = encoder_to(random_params(encoder), encoder, layout)
  none = respelt(layout, {key: x for key, x in tensors.items() if not key.endswith("qkv.bias")})
  assert none.keys() == tensors.keys() and not none["blocks.1.attn.qkv.bias"].any()
  lost = "blocks.1.attn.qkv.bias"
  assert lost not in respelt(layout, {key: x for key, x in tensors.items() if key != lost})


def test_one_bias_that_is_missing_is_a_fault_and_not_a_zero(tmp_path):
  config = transformers.ViTConfig(**SIZE)
  transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "theirs")
  found = read(tmp_path / "theirs").items["encoder"]
  (tmp_path / "theirs" / "model.safetensors").unlink()
  lost = "encoder.layer.1.attention.attention.key.bias"
  write_safetensors(tmp_path / "theirs" / "model.safetensors", {k: x for k, x in found.items() if k != lost}, {})
  with pytest.raises(ValueError, match=f"missing in the checkpoint: {lost}"):
    import_encoder(str(tmp_path / "theirs"), str(tmp_path / "run"))


def test_a_method_with_a_text_tower_is_told_that_there_is_none(tmp_path):
  _, folder = folder_of("CLIP", tmp_path / "theirs")
  sizes = dict(width=32, depth=2, num_heads=4, mlp_dim=64, image_size=16, patch_size=4, cls_token=True)
  sizes |= dict(pool="cls", norm_embeddings=True, activation="quick_gelu", norm_epsilon=1e-5)
  size = {"encoder.name": "vit"} | {f"encoder.{key}": str(value) for key, value in sizes.items()}
  with pytest.raises(ValueError, match="holds an image tower and no text tower, which objective.name='mmcr_pairs' has"):
    import_weights(str(folder), "clip_flickr8k", str(tmp_path / "run"), size)
