"""Image towers of CLIP and SigLIP alone, and ViTs whose queries, keys and values have no bias: as in transformers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.evaluate import evaluate
from jepa_jax.runs import open_run
from jepa_jax.weights.command import import_weights, inspect_weights
from jepa_jax.weights.encoders import import_encoder
from jepa_jax.weights.files import read, write_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers(name, tmp_path):
  model, folder = folder_of(name, tmp_path / "theirs")
  about = import_encoder(str(folder), str(tmp_path / "run"))
  assert about["assumed"] == [] and about["encoder"].get("pool") != "map" or name == "SigLIP"
  run = open_run(tmp_path / "run")
  experiment = run.experiment()
  images = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
  ours = experiment.objective.networks()["image"].apply_fn(
    run.variables(experiment, "image")["image"], jnp.asarray(images)
  )
  wanted = theirs(name, model, images)
  np.testing.assert_allclose(ours.pooled_BxD, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_tower_is_evaluated_and_what_lies_beside_it_is_told(tmp_path):
  _, folder = folder_of("CLIP, projected", tmp_path / "theirs")
  about = import_encoder(str(folder), str(tmp_path / "run"))
  assert about["family"] == "the image tower of CLIP or SigLIP" and "visual_projection.weight" in about["not read"]
  asked = {"data.source": "digits", "data.canvas_px": "16", "data.max_train": "64"}
  found = evaluate(tmp_path / "run", overrides=asked, names=("knn",), baselines=False, show=False)
  assert 0 <= found.row["knn"] <= 100


def test_a_file_alone_says_what_is_assumed(tmp_path):
  _, folder = folder_of("SigLIP", tmp_path / "theirs")
  (folder / "config.json").unlink()
  told = inspect_weights(str(folder))
  assert told["family"] == "the image tower of SigLIP" and "no array shows them" in told["assumed"][0]


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
