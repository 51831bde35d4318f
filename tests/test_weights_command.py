"""python -m jepa_jax weights: import, evaluate, train on, export, and PyTorch reads what came out."""

import argparse
import copy
import json

import jax
import numpy as np
import pytest

from jepa_jax import checkpoint
from jepa_jax.config import build_config
from jepa_jax.experiment import make_experiment
from jepa_jax.runs import load_encoder
from jepa_jax.sharding import make_mesh
from jepa_jax.step import join_state
from jepa_jax.train import train
from jepa_jax.weights import command, export
from jepa_jax.weights.convert import encoder_from, encoder_to, flatten, predictor_from
from jepa_jax.weights.files import write_folder, write_ours, write_safetensors
from tests.checkpoints import ENCODER, PREDICTOR, meta_encoder, meta_predictor
from tests.tiny import TINY

NUM_CLASSES = 10
FIELDS = ("image_size", "patch_size", "width", "depth", "num_heads", "pos_embed")
NETWORK = {"name": "vit"} | {name: getattr(ENCODER, name) for name in FIELDS}
CROP = {"global_crops": {"num": 1, "size_px": 16, "scale": (0.3, 1.0)}}
CROPS = {"global_crops": CROP["global_crops"] | {"num": 2}}
PIXELS = {"channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
IJEPA = copy.deepcopy(TINY) | {
  "name": "tiny_ijepa",
  "total": "2steps",
  "data": {"source": "synthetic", "canvas_px": 16, "max_train": 64} | PIXELS,
  "encoder": NETWORK,
  "objective": {
    "name": "ijepa",
    "views": CROP,
    "masks": {"kind": "uniform"},
    "predictor": PREDICTOR,
  },
}


def weights(*arguments):
  """Runs the command as __main__ does: {"--config.a.b=c"} apart from what the parser knows."""
  parser = argparse.ArgumentParser()
  command.add_arguments(parser)
  args, rest = parser.parse_known_args([str(a) for a in arguments])
  overrides = dict(item.removeprefix("--config.").split("=", 1) for item in rest)
  result = command.run(overrides=overrides, **{k: v for k, v in vars(args).items() if k != "json"})
  assert json.loads(json.dumps(result)) and command.render(result)
  return result


def config_file(folder, values, name="config.py"):
  text = f"from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict({values!r})\n"
  (folder / name).write_text(text)
  return folder / name


def same(a, b):
  a, b = flatten(a), flatten(b)
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def whole_state(workdir, values):
  run = make_experiment(build_config(values), make_mesh(build_config(values).mesh), 64, NUM_CLASSES)
  state = run.abstract_state
  return join_state(**checkpoint.restore(workdir, 0, networks=state.networks, training=state.training))


def pictures(size_px=16):
  return np.random.default_rng(5).standard_normal((2, size_px, size_px, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """A run made from a file in Meta's layout: (its folder, {item: tensors}, what the command returned)."""
  torch = pytest.importorskip("torch")
  folder = tmp_path_factory.mktemp("imported")
  items = {"encoder": meta_encoder(seed=1), "target_encoder": meta_encoder(seed=2), "predictor": meta_predictor()}
  content = {name: {f"module.{k}": torch.from_numpy(x) for k, x in part.items()} for name, part in items.items()}
  torch.save(content | {"epoch": 3}, folder / "jepa.pth.tar")
  arguments = ("--config", config_file(folder, IJEPA), "--workdir", folder / "run", "--num-classes", NUM_CLASSES)
  return folder, items, weights("import", "--from", folder / "jepa.pth.tar", *arguments)


@pytest.mark.slow
def test_inspect_says_which_settings_a_file_fits(imported):
  folder, _, _ = imported
  found = weights("inspect", folder / "jepa.pth.tar")
  assert (found["layout"], found["item"], found["not read"]) == ("meta", "target_encoder", ["epoch"])
  assert {"image_size": 16, "patch_size": 4, "width": 32, "depth": 3, "mlp_dim": 128}.items() <= found[
    "encoder"
  ].items()
  assert found["data.channels"] == 3
  assert "a predictor, depth 2, width 16, mlp_dim 64, encoder_width 32, positions 16" in found["items"]["predictor"]


def test_import_puts_each_network_in_its_place_and_evaluation_takes_the_target(imported):
  folder, items, result = imported
  assert result["used"] == {
    "params/encoder": "encoder",
    "target/encoder": "target_encoder",
    "params/predictor": "predictor",
  }
  cfg = build_config(IJEPA).encoder
  state = whole_state(folder / "run", IJEPA)
  assert int(state.step) == 0
  assert same(state.params["encoder"], encoder_from(items["encoder"], cfg, "meta"))
  assert same(state.target["encoder"], encoder_from(items["target_encoder"], cfg, "meta"))
  predictor = predictor_from(items["predictor"], state.params["predictor"], cfg)
  assert same(state.params["predictor"], predictor) and state.target.keys() == {"encoder"}
  _, variables, loaded = load_encoder(folder / "run")
  assert same(variables["params"], state.target["encoder"]) and loaded == build_config(IJEPA)


def test_an_exported_folder_is_loaded_by_transformers_and_has_the_same_features(imported):
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  folder, _, _ = imported
  weights("export", "--workdir", folder / "run", "--to", folder / "hf", "--layout", "hf")
  model, info = transformers.IJepaModel.from_pretrained(folder / "hf", output_loading_info=True)
  assert not any(info.values()), info
  apply_fn, variables, _ = load_encoder(folder / "run")
  tokens = apply_fn(variables, pictures()).tokens_BxNxD
  with torch.no_grad():
    theirs = model.eval()(torch.from_numpy(np.ascontiguousarray(pictures().transpose(0, 3, 1, 2)))).last_hidden_state
  assert np.abs(theirs.numpy() - tokens).max() < 1e-5
  assert (model.config.layer_norm_eps, model.config.hidden_act) == (1e-6, "gelu")
  processor = json.loads((folder / "hf" / "preprocessor_config.json").read_text())
  assert (processor["image_mean"], processor["image_std"]) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
  found = weights("inspect", folder / "hf")
  assert found["encoder"]["num_heads"] == ENCODER.num_heads and "assumed" not in found and "notes" not in found
  with pytest.raises(ValueError, match="exists already and is not overwritten"):
    weights("export", "--workdir", folder / "run", "--to", folder / "hf", "--layout", "hf")


@pytest.mark.slow
def test_a_file_of_ours_carries_an_encoder_to_another_method_bit_by_bit(imported):
  folder, _, _ = imported
  file = folder / "ours.safetensors"
  weights("export", "--workdir", folder / "run", "--to", file, "--layout", "jepa_jax")
  values = copy.deepcopy(IJEPA) | {"name": "tiny_lejepa", "objective": TINY["objective"] | {"views": CROPS}}
  config = config_file(folder, values, "lejepa.py")
  arguments = ("--config", config, "--workdir", folder / "lejepa", "--num-classes", NUM_CLASSES)
  result = weights("import", "--from", file, *arguments, "--config.encoder.scan=False")
  assert result["used"] == {"params/encoder": "encoder"}
  (_, first, _), (_, second, cfg) = load_encoder(folder / "run"), load_encoder(folder / "lejepa")
  assert not cfg.encoder.scan and "blocks_2" in second["params"]
  again = folder / "again.safetensors"
  weights("export", "--workdir", folder / "lejepa", "--to", again, "--layout", "jepa_jax")
  arguments = ("--config", folder / "config.py", "--workdir", folder / "scanned", "--num-classes", NUM_CLASSES)
  weights("import", "--from", again, *arguments)
  assert same(load_encoder(folder / "scanned")[1], first)


@pytest.mark.slow
def test_training_goes_on_from_the_imported_step(imported, tmp_path):
  folder, items, _ = imported
  config = config_file(tmp_path, IJEPA)
  arguments = ("--config", config, "--workdir", tmp_path / "run", "--num-classes", NUM_CLASSES)
  weights("import", "--from", folder / "jepa.pth.tar", *arguments, "--item", "encoder")
  start = jax.device_get(whole_state(tmp_path / "run", IJEPA))
  assert same(start.params["encoder"], start.target["encoder"])
  state = train(build_config(IJEPA), tmp_path / "run")
  assert int(state.step) == 2
  moved = np.abs(state.params["encoder"]["norm"]["scale"] - start.params["encoder"]["norm"]["scale"])
  assert 0 < moved.max() < 0.1  # two steps of the optimiser away from what was imported
  with pytest.raises(ValueError, match="holds checkpoints"):
    weights("import", "--from", folder / "jepa.pth.tar", *arguments)
  other = ("--config", config, "--workdir", tmp_path / "other", "--num-classes", NUM_CLASSES + 1)
  weights("import", "--from", folder / "jepa.pth.tar", *other)
  with pytest.raises(ValueError, match=f"import them again with --num-classes={NUM_CLASSES}"):
    train(build_config(IJEPA), tmp_path / "other")


def test_a_file_that_does_not_fit_leaves_nothing_behind(imported, tmp_path):
  folder, _, _ = imported
  arguments = (
    "--from",
    folder / "jepa.pth.tar",
    "--config",
    config_file(tmp_path, IJEPA),
    "--workdir",
    tmp_path / "run",
  )
  with pytest.raises(ValueError, match="depth: the checkpoint has 3, the config 4"):
    weights("import", *arguments, "--config.encoder.depth=4")
  with pytest.raises(ValueError, match="predictor.*(\n.*)*--without-predictor"):
    weights("import", *arguments, "--config.objective.predictor.depth=1")
  with pytest.raises(ValueError, match="holds a ViT; set encoder.name='vit'"):
    values = copy.deepcopy(TINY) | {"encoder": {"name": "mlp", "image_size": 16, "widths": (8,)}}
    mlp = config_file(tmp_path, values, "mlp.py")
    weights("import", "--from", folder / "jepa.pth.tar", "--config", mlp, "--workdir", tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_folder_without_torch_and_a_predictor_of_ones_own(tmp_path):
  """safetensors need no torch; a predictor that does not come with the encoder begins at random, and that is said."""
  params = encoder_from(meta_encoder(), ENCODER, "meta")
  head = {"classifier.weight": np.zeros((3, 32), np.float32)}
  document = export.hf_config(build_config(IJEPA))
  documents = {"config.json": document, "preprocessor_config.json": {"image_mean": [0.1] * 3}}
  write_folder(tmp_path / "hf", encoder_to(params, ENCODER, "hf") | head, documents)
  arguments = ("--config", config_file(tmp_path, IJEPA), "--workdir", tmp_path / "run", "--ignore", "classifier.*")
  result = weights("import", "--from", tmp_path / "hf", *arguments, "--num-classes", NUM_CLASSES)
  assert result["used"] == {"params/encoder": "encoder", "target/encoder": "encoder"}
  assert "says mean (0.1, 0.1, 0.1)" in result["notes"][0]  # perhaps the library's default: no ground to refuse
  assert "no predictor" in result["notes"][1]


def test_what_cannot_work_is_refused_before_anything_is_read_or_written(imported, tmp_path):
  folder, _, _ = imported
  write_ours(tmp_path / "x.safetensors", {"encoder": {"a": np.ones(2, np.float32)}}, {"data": {"mean": (0.1,)}})
  import_ = ("import", "--config", config_file(tmp_path, IJEPA), "--workdir", tmp_path / "run", "--from")
  with pytest.raises(ValueError, match=r"--num-classes=0 must lie between 1 and"):
    weights(*import_, folder / "jepa.pth.tar", "--num-classes", 0)
  with pytest.raises(ValueError, match=r"data.mean: trained with \(0.1,\), the config has .*--config.data.mean="):
    weights(*import_, tmp_path / "x.safetensors")
  write_ours(tmp_path / "y.safetensors", {"encoder": {"a": np.ones(2, np.float32)}}, {})
  with pytest.raises(ValueError, match=r"nothing in the checkpoint is called heads\.\*"):
    weights(*import_, tmp_path / "y.safetensors", "--ignore", "heads.*")
  with pytest.raises(ValueError, match=r"--to=.*/ours: one file is written.*--to=.*ours\.safetensors"):
    weights("export", "--workdir", folder / "run", "--to", tmp_path / "ours", "--layout", "jepa_jax")
  assert not (tmp_path / "run").exists() and not (tmp_path / "ours").exists()


def test_batchnorms_statistics_are_as_strict_as_parameters(tmp_path):
  encoder = {"name": "resnet", "variant": "18", "width": 8, "stem": "cifar", "image_size": 16}
  values = copy.deepcopy(IJEPA) | {"encoder": encoder, "objective": TINY["objective"] | {"views": CROPS}}
  config = config_file(tmp_path, values)
  cfg = build_config(values)
  run = make_experiment(cfg, make_mesh(cfg.mesh), 64, NUM_CLASSES)
  params = {k: np.ones(x.shape, np.float32) for k, x in flatten(run.abstract_state.params["encoder"]).items()}
  write_ours(tmp_path / "x.safetensors", {"encoder": params}, {"encoder": encoder})
  with pytest.raises(
    ValueError,
    match="model_state/encoder of the checkpoint does not fit(.|\n)*missing in the checkpoint: stem_norm/mean",
  ):
    weights("import", "--from", tmp_path / "x.safetensors", "--config", config, "--workdir", tmp_path / "run")


def test_only_import_takes_settings(tmp_path):
  write_safetensors(tmp_path / "x.safetensors", meta_encoder(), {})
  with pytest.raises(ValueError, match="only `weights import` and `compare` read settings"):
    weights("inspect", tmp_path / "x.safetensors", "--config.encoder.depth=4")
