"""CLIP under the names of OpenAI and open_clip: both towers compute what open_clip does with these weights."""

import json
import types

import numpy as np
import pytest

from jepa_jax.config import build_config
from jepa_jax.weights import pairs
from jepa_jax.weights.command import inspect_weights
from jepa_jax.weights.files import read, write_safetensors
from tests.checkpoints import random_array
from tests.test_weights_pairs import config, embeddings

torch = pytest.importorskip("torch")
# Of 300 ids the largest ends a text: open_clip looks for it by its size.
VOCAB, LENGTH, END = 300, 10, 299
MODEL = {
  "embed_dim": 16,
  "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 16},
  "text_cfg": {"context_length": LENGTH, "vocab_size": VOCAB, "width": 24, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick_gelu"])
def model(request):
  try:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
  except (ImportError, RuntimeError, OSError) as error:
    pytest.skip(f"open_clip cannot be imported: {error}")
  made = CLIP(
    MODEL["embed_dim"], CLIPVisionCfg(**MODEL["vision_cfg"]), CLIPTextCfg(**MODEL["text_cfg"]), quick_gelu=request.param
  )
  rng = np.random.default_rng(0)
  for name, parameter in made.named_parameters():
    if name != "logit_scale":
      called = name.replace("ln_", "norm_")
      parameter.data = torch.from_numpy(np.asarray(random_array(rng, called, tuple(parameter.shape))))
  return types.SimpleNamespace(net=made.eval(), quick=request.param)


def tensors_of(net):
  return {key: x.numpy() for key, x in net.state_dict().items()}


def folder_of(model, path):
  path.mkdir()
  document = {"model_cfg": MODEL | {"quick_gelu": model.quick}, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6]}}
  (path / "open_clip_config.json").write_text(json.dumps(document))
  write_safetensors(path / "open_clip_model.safetensors", tensors_of(model.net), {})
  return path


def test_both_towers_embed_as_in_open_clip(model, tmp_path):
  folder = folder_of(model, tmp_path / "clip")
  cfg = build_config(config(folder))
  assert cfg.encoder.activation == cfg.objective.text.activation == ("quick_gelu" if model.quick else "gelu")
  assert (cfg.encoder.size.num_heads, cfg.objective.text.size.num_heads) == (4, 2)
  rng = np.random.default_rng(1)
  images, ids = rng.standard_normal((4, 16, 16, 3), np.float32), rng.integers(3, END, (4, LENGTH))
  lengths = np.array([3, 5, 8, LENGTH])
  ids[np.arange(4), lengths - 1] = END
  inside = np.arange(LENGTH) < lengths[:, None]
  with torch.no_grad():
    pixels, words = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(np.where(inside, ids, 0))
    wanted = [
      f(x, normalize=True).numpy() for f, x in ((model.net.encode_image, pixels), (model.net.encode_text, words))
    ]
  found = read(folder)
  params = pairs.pair_from(found.items["encoder"], cfg)
  for ours, theirs in zip(embeddings(cfg, params, images, np.where(inside, ids, -1)), wanted, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert found.config["data"] == {"mean": [0.4, 0.5, 0.6], "std": [0.26862954, 0.26130258, 0.27577711]}


def test_a_file_alone_says_what_is_assumed_and_prefixes_are_none_of_the_names(model, tmp_path):
  tensors = tensors_of(model.net) | {"context_length": np.array(10)}  # OpenAI's have a few numbers
  below = {key if key.startswith(("visual", "logit")) else f"text.{key}": x for key, x in tensors.items()}
  for name, own in {"flat": tensors, "apart": below}.items():
    write_safetensors(tmp_path / f"{name}.safetensors", own, {})
    told = inspect_weights(str(tmp_path / f"{name}.safetensors"))
    assert told["layout"] == "clip" and told["encoder"]["activation"] == "quick_gelu"
    assert any("quick_gelu, OpenAI's" in line for line in told["assumed"])
  torch.save({"state_dict": {f"module.{k}": torch.from_numpy(x) for k, x in tensors.items()}}, tmp_path / "epoch.pt")
  assert inspect_weights(str(tmp_path / "epoch.pt"))["layout"] == "clip"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"vision_cfg": {"timm_model_name": "vit_base"}}, "timm_model_name is none of CLIP's own"),
    ({"text_cfg": {"hf_model_name": "roberta"}}, "hf_model_name is none of CLIP's own"),
    ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "a tower is none of CLIP's own"),
  ],
)
def test_towers_of_another_kind_are_refused(tmp_path, change, message):
  (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": change}))
  with pytest.raises(ValueError, match=message):
    read(tmp_path)
