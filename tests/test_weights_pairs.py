"""CLIPModel and SiglipModel of transformers: read, every embedding the same, written and loaded there again."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from jepa_jax.config import build_config
from jepa_jax.data.tokenizer import train_tokenizer
from jepa_jax.evaluate import evaluate
from jepa_jax.experiment import make_experiment
from jepa_jax.models import ConvNetConfig
from jepa_jax.objectives.mmcr_pairs import MMCRPairsConfig
from jepa_jax.runs import open_run
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.train import train
from jepa_jax.weights import pairs
from jepa_jax.weights.command import export_weights, import_weights, inspect_weights
from tests.tiny import tiny_values

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH, VOCAB = 12, 300
VIEWS = {"global_crops": {"num": 1, "size_px": 16, "scale": (0.5, 1.0)}}


def models():
  """{name: a model with random weights, none of them where a fresh network has zeros or ones}."""
  tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
  text = tower | dict(vocab_size=VOCAB, max_position_embeddings=LENGTH, bos_token_id=2, eos_token_id=1, pad_token_id=0)
  vision = tower | dict(image_size=16, patch_size=8)
  clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
  siglip = transformers.SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=vision)
  made = {"clip": transformers.CLIPModel(clip), "siglip": transformers.SiglipModel(siglip)}
  generator = torch.Generator().manual_seed(0)
  for model in made.values():
    for name, parameter in model.named_parameters():
      scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
      shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
      parameter.data = shift + scale * torch.randn(parameter.shape, generator=generator)
  return {name: model.eval() for name, model in made.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """{name: (model, the folder that transformers wrote, with a tokenizer)}."""
  found = {}
  for name, model in models().items():
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(train_tokenizer(["a dog in the snow"], VOCAB).json)
    found[name] = model, folder
  return found


def config(folder, **changes):
  """Returns the settings that `weights inspect` says the folder fits."""
  told = inspect_weights(str(folder))
  captions = {"train": "random words", "per_image": 2} | told["data.captions"]
  data = {"source": "synthetic", "canvas_px": 16, "max_train": 64, "captions": captions}
  objective = told["objective"] | {"text": told["objective.text"], "views": VIEWS}
  own = {"data": data, "encoder": told["encoder"], "objective": objective, "evals": {"names": ("retrieval",)}}
  return tiny_values(**(own | changes))


def images_and_ids():
  rng = np.random.default_rng(0)
  images = rng.standard_normal((5, 16, 16, 3), np.float32)
  ids = rng.integers(3, VOCAB, (5, LENGTH))
  ids[:, 0] = 2
  lengths = np.array([3, 5, 7, 9, LENGTH])
  ids[np.arange(5), lengths - 1] = 1
  return images, np.where(np.arange(LENGTH) < lengths[:, None], ids, -1)


def embeddings(cfg, params, images, ids):
  """Returns unit embeddings of both towers."""
  objective = make_experiment(cfg, make_mesh(MeshConfig(), jax.devices()[:1]), 64, 10).objective
  variables, networks = objective.variables(params, {}, None), objective.networks()
  found = [
    networks[f"{t}_embedding"].apply_fn(variables[f"{t}_embedding"], x)
    for t, x in (("image", images), ("text", ids[:, None]))
  ]
  return [np.asarray(out.pooled_BxD / np.linalg.norm(out.pooled_BxD, axis=1, keepdims=True)) for out in found]


def theirs(model, images, ids, pad):
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    out = model(input_ids=torch.from_numpy(np.where(ids < 0, pad, ids)), pixel_values=pixels)
  return [x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (out.image_embeds, out.text_embeds)]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_both_towers_embed_as_in_transformers(folders, name):
  model, folder = folders[name]
  cfg, (images, ids) = build_config(config(folder)), images_and_ids()
  assert cfg.objective.name == name and cfg.encoder.size.num_heads == 4
  tensors = {key: x.numpy() for key, x in model.state_dict().items()}
  params = pairs.pair_from(tensors, cfg)
  # What stands after a text: nothing that CLIP's looks at, SigLIP's padding.
  pad = 0 if name == "clip" else cfg.objective.text.pad_id
  for ours, other in zip(embeddings(cfg, params, images, ids), theirs(model, images, ids, pad), strict=True):
    np.testing.assert_allclose(ours, other, atol=1e-5)
  back = pairs.pair_to(params, cfg)
  params = pairs.pair_from(back, cfg)
  for ours, other in zip(embeddings(cfg, params, images, ids), theirs(model, images, ids, pad), strict=True):
    np.testing.assert_allclose(ours, other, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_folder_becomes_a_run_that_is_evaluated_trained_and_given_back(folders, name, tmp_path):
  model, folder = folders[name]
  values, workdir = config(folder), tmp_path / "run"
  file = tmp_path / "config.py"
  file.write_text(
    f"def get_config(): return {json.dumps(values)!r} and __import__('json').loads({json.dumps(values)!r})\n"
  )
  found = import_weights(str(folder), str(file), str(workdir), num_classes=10)
  assert {"params/encoder", "params/text", "params/logit_scale"} <= set(found["used"])
  run = open_run(workdir)
  assert json.loads(run.tokenizer.json) == json.loads((folder / "tokenizer.json").read_text())
  assert "mean R" in evaluate(workdir, show=False).row
  export_weights(str(workdir), str(tmp_path / "back"), "hf")
  again = type(model).from_pretrained(tmp_path / "back").eval()
  images, ids = images_and_ids()
  for one, other in zip(theirs(model, images, ids, 1), theirs(again, images, ids, 1), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
  with pytest.raises(ValueError, match="learned the ids of the tokenizer"):  # not one trained on these captions
    train(build_config(values), workdir)


def test_settings_that_no_shape_shows_are_those_of_config_json(folders, tmp_path):
  _, folder = folders["clip"]
  for change, message in (
    ({"encoder__activation": "gelu"}, "encoder.activation: the checkpoint has quick_gelu, the config gelu"),
    ({"encoder__num_heads": 2}, "encoder.num_heads: the checkpoint has 4, the config 2"),
    ({"encoder__pool": "mean"}, "encoder.pool: the checkpoint has cls, the config mean"),
    ({"objective__text__num_heads": 2}, "objective.text.num_heads: the checkpoint has 4, the config 2"),
    ({"objective__text__activation": "gelu"}, "objective.text.activation: the checkpoint has quick_gelu"),
    ({"objective__text__pool": "mean"}, "objective.text.pool: the checkpoint has eos, the config mean"),
    ({"objective__text__norm_epsilon": 1e-3}, "objective.text.norm_epsilon: the checkpoint has 1e-05"),
    ({"objective__name": "siglip"}, "weights of a CLIP: set objective.name='clip'"),
    ({"objective__projector__out": 8}, "image_head: .* wanted; set objective.projector.out"),
  ):
    file = tmp_path / "config.py"
    values = config(folder, **change)
    file.write_text(f"def get_config(): return __import__('json').loads({json.dumps(values)!r})\n")
    with pytest.raises(ValueError, match=message):
      import_weights(str(folder), str(file), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_their_models_have_no_place_for_is_not_written(folders):
  model, folder = folders["clip"]
  cfg = build_config(config(folder))
  params = pairs.pair_from({key: x.numpy() for key, x in model.state_dict().items()}, cfg)
  replace = dataclasses.replace
  of = lambda **changes: {"objective": replace(cfg.objective, **changes)}
  convnet = ConvNetConfig(image_size=16, widths=(4,))
  for changes, message in (
    ({"encoder": convnet}, "encoder name='convnet': the image tower of these models is a ViT; use --layout jepa_jax"),
    ({"objective": MMCRPairsConfig(cfg.objective.views, cfg.objective.projector)}, "'mmcr_pairs' is neither CLIP nor"),
    ({"encoder": replace(cfg.encoder, pool="mean")}, "encoder.pool='mean', and a CLIPModel has 'cls'"),
    ({"encoder": replace(cfg.encoder, norm_embeddings=False)}, "norm_embeddings=False, and a CLIPModel has True"),
    (of(text=replace(cfg.objective.text, pool="mean")), "objective.text.pool='mean', and a CLIPModel has 'eos'"),
    (
      of(projector=replace(cfg.objective.projector, last_norm="batch")),
      "last_norm='batch', and a CLIPModel",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      pairs.check_exportable(replace(cfg, **changes))
  wide = dict(params, image_head={"layers_0": {"kernel": np.ones((32, 24), np.float32), "bias": np.arange(24.0)}})
  with pytest.raises(ValueError, match="projections have no bias, and this run's, of 32 features to 24, cannot be"):
    pairs.pair_to(wide, cfg)


def test_biases_of_the_projections_are_written_into_the_norms_before_them(folders, tmp_path):
  """What training gives: the embeddings stay, though the model has no place for the biases."""
  model, folder = folders["clip"]
  cfg = build_config(config(folder))
  params = pairs.pair_from({key: x.numpy() for key, x in model.state_dict().items()}, cfg)
  for i, head in enumerate(("image_head", "text_head")):
    params[head]["layers_0"]["bias"] = np.random.RandomState(i).randn(24).astype(np.float32)
  images, ids = images_and_ids()
  expected = embeddings(cfg, params, images, ids)
  tensors = pairs.pair_to(params, cfg)
  again = type(model)(model.config).eval()
  again.load_state_dict({key: torch.from_numpy(np.array(x)) for key, x in tensors.items()}, strict=False)
  for one, other in zip(expected, theirs(again, images, ids, 1), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
