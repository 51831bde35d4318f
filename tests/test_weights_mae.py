"""MAE whole: what is published, encoder and decoder, predicts here what it predicts in transformers, and goes on."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jepa_jax import losses
from jepa_jax.config import build_config
from jepa_jax.experiment import make_experiment
from jepa_jax.models import sincos_position_embedding
from jepa_jax.objectives import Predicts
from jepa_jax.objectives.mae import patches_of
from jepa_jax.runs import open_run
from jepa_jax.sharding import make_mesh
from jepa_jax.views import Masks
from jepa_jax.weights.command import import_weights, inspect_weights
from jepa_jax.weights.convert import flatten
from jepa_jax.weights.files import read, write_safetensors
from tests.checkpoints import random_array
from tests.test_weights_command import config_file
from tests.test_weights_parity import channels_first

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
DECODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OPTIONS = {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "mask_ratio": 0.5, "norm_pix_loss": True}
MAE = {
  "name": "mae",
  "total": "1ep",
  "batch_size": 8,
  "data": {"source": "synthetic", "canvas_px": 32, "max_train": 64},
  "encoder": {
    "name": "vit",
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "cls_token": True,
    "pool": "cls",
    "pos_filter": "torch",
    "remat": "none",
  },
  "objective": {
    "name": "mae",
    "views": {"global_crops": {"num": 1, "size_px": 32, "scale": (0.2, 1.0)}},
    "predictor": {"depth": 2, "width": 16, "num_heads": 4},
    "mask_ratio": 0.5,
  },
  "optim": {"lr": 1e-3},
}


@pytest.fixture(scope="module")
def model():
  config = transformers.ViTMAEConfig(**SIZES, **{f"decoder_{key}": x for key, x in DECODER.items()}, **OPTIONS)
  model, rng = transformers.ViTMAEForPreTraining(config), np.random.default_rng(0)
  for name, parameter in model.named_parameters():
    parameter.data = torch.from_numpy(random_array(rng, name, tuple(parameter.shape)))
  # A constant in the published files; in a new model of transformers 5 it is zero, and stays so.
  constant = np.pad(sincos_position_embedding((4, 4), DECODER["hidden_size"]), ((1, 0), (0, 0)))
  model.decoder.decoder_pos_embed.data = torch.from_numpy(constant[None])
  return model.eval()


def metas_names(state_dict):
  """The names of the original code and of its files, from those that transformers has in memory."""
  new = {}
  for key, x in state_dict.items():
    key = re.sub(r"^vit\.layers\.|^vit\.encoder\.layer\.", "blocks.", key)
    key = re.sub(r"^vit\.embeddings\.(cls_token|mask_token)$", r"\1", key)
    key = key.replace("vit.embeddings.position_embeddings", "pos_embed").replace("vit.layernorm.", "norm.")
    key = key.replace("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj.")
    key = key.removeprefix("decoder.").replace("decoder_layers.", "decoder_blocks.")
    key = key.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
    new[key.replace("attention.o_proj", "attn.proj")] = x.numpy()
  for key in [key for key in new if ".attention.q_proj." in key]:
    parts = [new.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
    new[key.replace("attention.q_proj", "attn.qkv")] = np.concatenate(parts)
  return new


def saved(model, folder, kind):
  """The model in a file or folder: as transformers 5 writes it, with the names that 4 has and the hub, or Meta's."""
  if kind == "meta":
    torch.save(
      {"model": {k: torch.from_numpy(x) for k, x in metas_names(model.state_dict()).items()}}, folder / "x.pth"
    )
    return folder / "x.pth"
  model.save_pretrained(folder / kind)
  if kind == "transformers 4":
    file = folder / kind / "model.safetensors"
    tensors = {key.replace("decoder_encoder.layer.", "decoder_layers."): x for key, x in load_file(file).items()}
    assert any(".decoder_layers.0." in key for key in tensors)
    file.unlink()
    write_safetensors(file, tensors, {"format": "pt"})
  return folder / kind


@pytest.fixture(scope="module", params=["transformers 5", "transformers 4", "meta"])
def imported(request, model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("mae")
  source = saved(model, folder, request.param)
  result = import_weights(str(source), mae_file(folder), str(folder / "run"), num_classes=10)
  return source, result, open_run(folder / "run")


def test_loss_and_prediction_are_those_of_transformers(model, imported):
  """Parity through encoder, class token and decoder; what is visible is given to both."""
  _, result, run = imported
  assert result["used"] == {"params/encoder": "encoder" if "encoder" in result["used"].values() else "model"} | {
    "params/predictor": "decoder"
  }
  experiment = run.experiment()
  params = run.networks(experiment)["params"]
  rng = np.random.default_rng(1)
  images = rng.standard_normal((3, 32, 32, 3)).astype(np.float32)
  order_BxN = np.stack([rng.permutation(16) for _ in range(3)])
  seen_BxK, removed_BxT = np.sort(order_BxN[:, :8]), np.sort(order_BxN[:, 8:])
  noise = np.full((3, 16), 1.0, np.float32)
  np.put_along_axis(noise, seen_BxK, 0.0, axis=1)  # the lowest stay, in a stable order or another
  with torch.no_grad():
    out = model(torch.from_numpy(channels_first(images)), noise=torch.from_numpy(noise))
  masks = Masks(jnp.array(seen_BxK), jnp.array(removed_BxT)[:, None], jnp.ones((3, 1, 8), bool))
  objective = experiment.objective
  seen = objective.encoder.apply({"params": params["encoder"]}, images, keep_BxK=masks.context_BxK)
  ours_BxTxC = objective.predict(params, objective.context(seen), masks)[:, 0]
  theirs_BxTxC = np.take_along_axis(out.logits.numpy(), removed_BxT[:, :, None], axis=1)
  scale = np.abs(theirs_BxTxC).max()
  assert np.abs(theirs_BxTxC - ours_BxTxC).max() / scale < 1e-5
  targets = np.take_along_axis(np.array(losses.patch_targets(patches_of(images, 8))), removed_BxT[:, :, None], axis=1)
  ours, _ = losses.mae(ours_BxTxC, targets, jnp.ones((3, 8)))
  np.testing.assert_allclose(ours, float(out.loss), rtol=2e-5)


def test_the_class_token_reaches_the_decoder(imported):
  """Another class token, another prediction: it is read, and it learns."""
  run = imported[2]
  experiment = run.experiment()
  params, objective = run.networks(experiment)["params"], experiment.objective
  images = np.random.default_rng(2).standard_normal((2, 32, 32, 3)).astype(np.float32)
  seen = objective.encoder.apply({"params": params["encoder"]}, images)
  other = seen._replace(pooled_BxD=seen.pooled_BxD + 1)
  answers = [objective.predict(params, objective.context(x), objective.whole(2)) for x in (seen, other)]
  assert isinstance(objective, Predicts) and objective.context(seen).shape == (2, 17, 32)
  assert np.abs(answers[0] - answers[1]).max() > 1e-3


def test_inspect_lists_the_decoder_and_nothing_of_it_is_left_out(imported):
  told = inspect_weights(str(imported[0]))
  assert "a predictor, depth 2, width 16, mlp_dim 64, encoder_width 32, positions 16" in told["items"]["decoder"]
  assert told["family"].startswith("MAE") and not any("decoder" in name for name in told.get("not read", ()))


def test_without_predictor_the_decoder_begins_anew(model, tmp_path):
  source = saved(model, tmp_path, "meta")
  result = import_weights(str(source), mae_file(tmp_path), str(tmp_path / "run"), without_predictor=True)
  assert list(result["used"]) == ["params/encoder"]


def test_an_encoder_without_its_decoder_is_read_as_ever(model, tmp_path):
  """`mae_pretrain_vit_base.pth` has none; LeJEPA goes on from the encoder of the file that has one."""
  alone = {key: x for key, x in metas_names(model.state_dict()).items() if "decoder" not in key and key != "mask_token"}
  torch.save({"model": {key: torch.from_numpy(x) for key, x in alone.items()}}, tmp_path / "x.pth")
  found, whole = read(tmp_path / "x.pth"), read(saved(model, tmp_path, "transformers 5"))
  assert list(found.items) == ["model"] and list(whole.items) == ["encoder", "decoder"]
  assert flatten(found.items["model"]).keys() == alone.keys()


def test_a_decoder_whose_class_token_has_a_position_is_refused(model, tmp_path):
  tensors = metas_names(model.state_dict())
  tensors["decoder_pos_embed"] = tensors["decoder_pos_embed"] + 0.1
  write_safetensors(tmp_path / "x.safetensors", tensors, {})
  with pytest.raises(ValueError, match="decoder_pos_embed has a position of the class token"):
    read(tmp_path / "x.safetensors")


def test_config_of_a_class_token_that_is_not_read_is_refused():
  values = json.loads(json.dumps(MAE))
  values["encoder"]["pool"] = "mean"
  cfg = build_config(values)
  with pytest.raises(ValueError, match="encoder.pool='mean' leaves out the class token, which MAE's decoder reads"):
    make_experiment(cfg, make_mesh(cfg.mesh), 64, 10)


def mae_file(folder, **changes):
  return str(config_file(folder, MAE | changes))


def changed(tensors, by=1.0):
  return {key: x + np.float32(by) if "decoder_pred" in key else x for key, x in tensors.items()}


@pytest.mark.parametrize(
  "kinds", [("model", "model_ema"), ("student.", "teacher.")], ids=["two dicts", "two prefixes in one"]
)
def test_of_two_networks_in_a_file_each_has_its_own_decoder(model, tmp_path, kinds):
  tensors = metas_names(model.state_dict())
  both = dict(zip(kinds, (tensors, changed(tensors)), strict=True))
  as_torch = {kind: {key: torch.from_numpy(x) for key, x in own.items()} for kind, own in both.items()}
  if kinds[0].endswith("."):
    as_torch = {"state_dict": {kind + key: x for kind, own in as_torch.items() for key, x in own.items()}}
  torch.save(as_torch, tmp_path / "two.pth")
  config = mae_file(tmp_path)
  for kind, own in both.items():
    item = kind.rstrip(".")
    result = import_weights(str(tmp_path / "two.pth"), config, str(tmp_path / item), item=item)
    assert result["used"] == {"params/encoder": item, "params/predictor": f"{item}.decoder"}
    run = open_run(tmp_path / item)
    bias = run.networks(run.experiment())["params"]["predictor"]["proj"]["bias"]
    np.testing.assert_array_equal(bias, own["decoder_pred.bias"])


def test_what_no_array_of_a_decoder_shows_is_compared_with_config_json(model, tmp_path):
  source = saved(model, tmp_path, "transformers 5")
  objective = MAE["objective"] | {"predictor": MAE["objective"]["predictor"] | {"num_heads": 2}}
  with pytest.raises(ValueError, match="the decoder has 4 heads in config.json, and the config 2"):
    import_weights(str(source), mae_file(tmp_path, objective=objective), str(tmp_path / "a"))
  objective = MAE["objective"] | {"norm_pixels": False, "mask_ratio": 0.75}
  result = import_weights(str(source), mae_file(tmp_path, objective=objective), str(tmp_path / "b"))
  assert {
    "config.json has norm_pix_loss=True, the config False",
    "config.json has mask_ratio=0.5, the config 0.75",
  } <= {*result["notes"]}


@pytest.mark.parametrize("part", ["decoder_embed", "decoder_norm", "mask_token", "decoder_blocks.1."])
def test_a_decoder_of_which_a_part_is_missing_is_an_error_and_can_be_left_out(model, tmp_path, part):
  tensors = {key: x for key, x in metas_names(model.state_dict()).items() if not key.startswith(part)}
  write_safetensors(tmp_path / "x.safetensors", tensors, {})
  config = mae_file(tmp_path)
  with pytest.raises(ValueError, match=r"missing in the checkpoint: (predictor|mask)(.|\n)*--without-predictor"):
    import_weights(str(tmp_path / "x.safetensors"), config, str(tmp_path / "a"))
  assert inspect_weights(str(tmp_path / "x.safetensors"))["family"] == "MAE"
  result = import_weights(str(tmp_path / "x.safetensors"), config, str(tmp_path / "a"), ignore="decoder_*")
  assert list(result["used"]) == ["params/encoder"]


def test_a_new_model_of_transformers_5_whose_decoder_knows_no_places_is_named(model, tmp_path):
  tensors = metas_names(model.state_dict())
  tensors["decoder_pos_embed"] = np.zeros_like(tensors["decoder_pos_embed"])
  write_safetensors(tmp_path / "x.safetensors", tensors, {})
  with pytest.raises(ValueError, match="all zeros, as transformers 5 leaves it in a new ViTMAEForPreTraining"):
    import_weights(str(tmp_path / "x.safetensors"), mae_file(tmp_path), str(tmp_path / "a"))


def test_what_is_imported_is_what_a_pull_holds_on_to(model, tmp_path):
  """The workdir of an import is a start: its checkpoint of step 0 has the published encoder as the one to stay near."""
  source = saved(model, tmp_path, "meta")
  import_weights(str(source), mae_file(tmp_path, pull_to_start=1.0), str(tmp_path / "a"))
  run = open_run(tmp_path / "a")
  experiment = run.experiment()
  start = run.read({"state": {"start": experiment.abstract_state.model_state["start"]}})["state"]["start"]
  encoder = run.networks(experiment)["params"]["encoder"]
  jax.tree.map(np.testing.assert_array_equal, start, encoder)
