"""Published weights in one command: evaluated on own images, compared, started from; and given back."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from jepa_jax import __main__
from jepa_jax.models import ViTConfig
from jepa_jax.runs import load_encoder, open_run
from jepa_jax.weights import encoders
from jepa_jax.weights.card import UNKNOWN, model_card
from jepa_jax.weights.comparison import compare_encoders, linear_cka, mutual_neighbours
from jepa_jax.weights.convert import encoder_to
from jepa_jax.weights.describe import choose_item, describe
from jepa_jax.weights.encoders import import_encoder, workdir_for
from jepa_jax.weights.export import export_weights, hf_config
from jepa_jax.weights.files import read, write_safetensors
from jepa_jax.weights.hub import push_folder
from tests.test_weights import prefixed, random_params, same

CLS = ViTConfig(image_size=16, patch_size=4, width=32, depth=2, num_heads=2, cls_token=True, pool="cls")
HEADS = "--config.encoder.num_heads=2"
KINDS = {  # what transformers has: one ViT of ours for each of its classes
  "IJepaModel": {"cls_token": False, "pool": "mean", "pos_embed": "sincos"},
  "ViTModel": {},
  "Dinov2Model": {"layer_scale": 1e-5},
  "Dinov2WithRegistersModel": {"layer_scale": 1e-5, "num_registers": 3},
  "DINOv3ViTModel": {"layer_scale": 1e-5, "num_registers": 2, "pos_embed": "rope", "norm_epsilon": 1e-5},
  "Dinov2Model, gated": {"layer_scale": 1e-5, "activation": "swiglu", "mlp_dim": 88},
  "DINOv3ViTModel, gated": {"layer_scale": 1e-5, "pos_embed": "rope", "activation": "swiglu", "norm_epsilon": 1e-5},
}


def seeded(cfg, seed):
  """Random parameters, other ones for another seed."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x * rng.choice(np.float32([-1, 1]), x.shape), random_params(cfg))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with weights of two ViTs and with pictures of two classes, which colour tells apart."""
  folder, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
  for seed, name in enumerate(("a", "b")):
    tensors = prefixed(encoder_to(seeded(CLS, seed), CLS, "timm"), "backbone.model.")
    write_safetensors(folder / f"{name}.safetensors", tensors | {"head.weight": np.ones((2, 2), np.float32)}, {})
  for label, colour in enumerate(((200, 40, 40), (40, 40, 200))):
    (folder / "pictures" / f"class{label}").mkdir(parents=True)
    for i in range(20):
      noise = rng.integers(-30, 30, (24, 24, 3)) + np.array(colour)
      Image.fromarray(noise.astype(np.uint8)).save(folder / "pictures" / f"class{label}" / f"{i:02}.png")
  return folder


def main(*arguments):
  return __main__.main([str(a) for a in arguments])


def of_folder(place):
  data = {"source": "folder", "root": place / "pictures", "train": ".", "held_out": 0.25}
  return [f"--config.data.{name}={value}" for name, value in data.items()]


@pytest.mark.slow
def test_weights_are_evaluated_in_one_command_and_imported_once(place, monkeypatch, capsys):
  monkeypatch.chdir(place)
  command = ("eval", "--weights=a.safetensors", "--evals=knn", "--config.evals.knn.k=3", HEADS, *of_folder(place))
  assert main(*command) == 0
  said = capsys.readouterr().out
  assert "a ViT with class token" in said and "head.*" in said and "100.0" in said
  workdir = place / "workdirs" / "a"
  run = open_run(workdir)
  assert run.meta["imported"]["encoder_only"] and run.step == 0
  card = model_card(run, "hf")
  assert "| features | kNN |" in card and "100.0" in card and "held-out images (folder)" in card
  before = (workdir / "config.json").read_text()
  assert main(*command, "--no-baselines") == 0 and (workdir / "config.json").read_text() == before
  # The encoder is the one of the file, and what else it may be used for follows.
  _, variables, cfg = load_encoder(workdir)
  assert same(
    encoder_to(jax.device_get(variables["params"]), cfg.encoder, "timm"), encoder_to(seeded(CLS, 0), CLS, "timm")
  )
  assert main("eval", "--weights=b.safetensors", f"--workdir={workdir}", HEADS, *of_folder(place)) == 2
  assert "holds a.safetensors, encoder as it was then; nothing was changed" in capsys.readouterr().err
  assert main("eval", "--weights=a.safetensors", "--config.encoder.num_heads=4", *of_folder(place)) == 2
  assert "num_heads" in capsys.readouterr().err


def test_settings_of_the_weights_and_of_the_evaluation_are_told_apart(place, monkeypatch, capsys):
  monkeypatch.chdir(place)
  for flag, message in {
    "--follow": "--weights are one checkpoint",
    "--config.optim.lr=1": "only data.* and evals.* change",
    "--item=teacher": "no encoder 'teacher'; choose by --item: encoder",
  }.items():
    assert main("eval", "--weights=a.safetensors", flag, *of_folder(place)) == 2
    assert message in capsys.readouterr().err
  assert main("eval", *of_folder(place)) == 2 and "--workdir is missing" in capsys.readouterr().err
  assert not (place / "nothing").exists()


def test_what_an_encoder_alone_does_not_read_is_an_error(place, tmp_path):
  with pytest.raises(ValueError, match="--config.optim.lr: of an encoder alone only encoder, data.mean, .* can be set"):
    import_encoder(str(place / "a.safetensors"), str(tmp_path / "run"), {"optim.lr": "1"})
  assert not (tmp_path / "run").exists()


def test_where_weights_go_is_their_name():
  for source, name in {
    "x/IN1K-vit.h.14-300e.pth.tar": "IN1K-vit.h.14-300e",
    "facebook/dinov2-small": "dinov2-small",
    "a b.safetensors": "a-b",
    "folder/": "folder",
    "last.ckpt": "last",
  }.items():
    assert workdir_for(source) == f"workdirs/{name}"


def test_a_run_starts_from_them_and_none_goes_on(place, tmp_path, monkeypatch, capsys):
  from tests.test_weights_command import config_file
  from tests.tiny import TINY

  workdir = tmp_path / "a"
  import_encoder(str(place / "a.safetensors"), str(workdir), {"encoder.num_heads": "2"})
  encoder = {"name": "vit"} | {n: getattr(CLS, n) for n in ("image_size", "patch_size", "width", "depth", "num_heads")}
  values = TINY | {"encoder": encoder | {"cls_token": True, "pool": "cls"}, "total": "2steps"}
  values["data"] = {"source": "synthetic", "canvas_px": 16, "max_train": 64}
  values["objective"] = TINY["objective"] | {"views": {"global_crops": {"num": 2, "size_px": 16, "scale": (0.3, 1.0)}}}
  config = config_file(tmp_path, values)
  assert main("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--init-from={workdir}") == 0
  assert main("train", f"--config={config}", f"--workdir={workdir}", "--accept-config-change") == 2
  assert "an encoder alone, which no run goes on from" in capsys.readouterr().err
  # The same in one command: the weights are imported on the way.
  monkeypatch.chdir(tmp_path)
  start = f"--init-from=weights:{place / 'a.safetensors'}"
  assert main("train", f"--config={config}", f"--workdir={tmp_path / 'other'}", start) == 0
  assert open_run(tmp_path / "other").meta["started_from"]["workdir"] == str(tmp_path / "workdirs" / "a")
  # What the network has no place for is an error, unless it is allowed by name.
  more = {key: np.asarray(x) for key, x in read(place / "a.safetensors").items["encoder"].items()}
  write_safetensors(tmp_path / "more.safetensors", more | {"extra.weight": np.ones((2, 2), np.float32)}, {})
  start = ("train", f"--config={config}", f"--workdir={tmp_path / 'third'}")
  source = f"--init-from=weights:{tmp_path / 'more.safetensors'}"
  assert main(*start, source) == 2 and "not used: extra.weight" in capsys.readouterr().err
  assert main(*start, source, "--ignore=extra.*", "--item=encoder") == 0
  for command in (start, ("eval", f"--workdir={workdir}")):
    assert main(*command, "--ignore=extra.*") == 2
    assert "--item and --ignore say what to take from a file of weights" in capsys.readouterr().err


@pytest.mark.slow
def test_two_encoders_are_compared_on_the_same_images(place, monkeypatch):
  monkeypatch.chdir(place)
  for name in "ab":
    import_encoder(f"{name}.safetensors", f"workdirs/{name}-2", {"encoder.num_heads": "2"})
  found = compare_encoders("workdirs/a-2", "workdirs/b-2", "pictures", held_out=0.25)
  assert found["images"] == 40 and found["classes"] == 2
  assert found["a-2"]["knn"] == found["b-2"]["knn"] == 100 and 0 < found["cka"] < 1
  itself = compare_encoders("workdirs/a-2", "workdirs/a-2", "pictures", held_out=0.25)
  assert itself["cka"] == 1 and itself["mutual_neighbours"] == 100
  # A file is what its workdir holds, where it has been imported: with the heads that were said then.
  import_encoder("a.safetensors", "workdirs/a", {"encoder.num_heads": "2"})
  again = compare_encoders("a.safetensors", "workdirs/a-2", "pictures", held_out=0.25)
  assert again["cka"] == 1 and any("num_heads" in line for line in again["a.safetensors"]["assumed"])


def test_cka_does_not_see_rotations_factors_and_shifts_and_is_small_for_strangers():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((500, 8))
  turned = 3 * x @ np.linalg.qr(rng.standard_normal((8, 8)))[0] + 5
  np.testing.assert_allclose(linear_cka(x, turned), 1, rtol=1e-9)
  assert linear_cka(x, rng.standard_normal((500, 8))) < 0.1
  # Against the definition: HSIC of the centred Gram matrices.
  y, centre = rng.standard_normal((500, 5)), np.eye(500) - 1 / 500
  k, g = (centre @ z @ z.T @ centre for z in (x, y))
  np.testing.assert_allclose(linear_cka(x, y), (k * g).sum() / np.sqrt((k * k).sum() * (g * g).sum()), rtol=1e-9)
  assert mutual_neighbours(x, turned - 5) == 1 and mutual_neighbours(x, rng.standard_normal((500, 8))) < 0.1


def test_nothing_of_an_evaluation_stays_for_the_next_and_without_images_there_is_none(place, tmp_path, capsys):
  weights, workdir = f"--weights={place / 'a.safetensors'}", tmp_path / "run"
  assert main("eval", weights, f"--workdir={workdir}", HEADS) == 2
  assert "are evaluated on your images: --config.data.source=folder" in capsys.readouterr().err
  small = ("--config.data.max_train=8", "--config.evals.view_px=8", "--evals=knn", "--config.evals.knn.k=2")
  assert main("eval", weights, f"--workdir={workdir}", HEADS, *of_folder(place), *small, "--no-baselines") == 0
  config = json.loads((workdir / "config.json").read_text())
  assert config["data"]["source"] == "synthetic" and config["data"]["max_train"] == config["evals"]["view_px"] == 0


def test_a_file_that_was_written_anew_is_another_one(tmp_path):
  """Under the same name and of the same size, as a latest.pth."""
  write = lambda seed: write_safetensors(
    tmp_path / f"{seed}.safetensors", encoder_to(seeded(CLS, seed), CLS, "timm"), {}
  )
  heads, latest = {"encoder.num_heads": "2"}, tmp_path / "latest.safetensors"
  for seed in (0, 1):
    write(seed)
  (tmp_path / "0.safetensors").rename(latest)
  import_encoder(str(latest), str(tmp_path / "run"), heads)
  import_encoder(str(latest), str(tmp_path / "run"), heads)
  (tmp_path / "1.safetensors").rename(latest)
  with pytest.raises(ValueError, match="as it was then; nothing was changed"):
    import_encoder(str(latest), str(tmp_path / "run"), heads)


def test_what_would_be_other_numbers_is_refused_or_told(tmp_path, place):
  with pytest.raises(ValueError, match="holds other files, and no run: choose another --workdir"):
    import_encoder(str(place / "a.safetensors"), str(place / "pictures"), {"encoder.num_heads": "2"})
  with pytest.raises(ValueError, match="--layout=hf: the names in .* are those of the layout timm"):
    import_encoder(str(place / "a.safetensors"), str(tmp_path / "run"), layout="hf")
  good = encoder_to(random_params(CLS), CLS, "timm")
  eva = {**good, "blocks.0.gamma_1": np.ones(32, np.float32)}
  no_positions = {key: x for key, x in good.items() if key != "pos_embed"}
  both = {**good, "fc_norm.weight": np.ones(32, np.float32), "fc_norm.bias": np.ones(32, np.float32)}
  both = {key: x for key, x in both.items() if not key.startswith("norm.")}
  periods = {"rope_embed.periods": np.float32(10000) ** (np.arange(4) / 4).astype(np.float32)}
  scales = {f"blocks.{i}.ls{j}.gamma": np.ones(32, np.float32) for i in range(2) for j in (1, 2)}
  rotary = no_positions | scales | {"storage_tokens": np.ones((1, 4, 32), np.float32)}
  for i, (tensors, message) in enumerate({
    "Eva networks with both rotary and added": eva,
    "no DINOv3: that kind is not read": no_positions,
    "a norm after the mean .fc_norm. beside a class token": both,
    "another base than DINOv3's 100": rotary | periods,
  }.items()):  # fmt: skip
    write_safetensors(tmp_path / f"{i}.safetensors", message, {})
    with pytest.raises(ValueError, match=tensors):
      import_encoder(str(tmp_path / f"{i}.safetensors"), str(tmp_path / f"run{i}"))
  # Heads by what the file says of them: periods, a quarter of a head's width; MoCo v3's twelve.
  periods = {"rope_embed.periods": np.float32(100) ** (np.arange(4) / 4).astype(np.float32)}
  write_safetensors(tmp_path / "rotary.safetensors", rotary | periods, {})
  found = read(tmp_path / "rotary.safetensors")
  assert describe(found, "encoder").settings["num_heads"] == 2 and not found.rest[0].startswith("blocks")
  moco = prefixed(good, "module.base_encoder.") | prefixed(good, "module.momentum_encoder.")
  write_safetensors(tmp_path / "moco.safetensors", moco, {})
  found = read(tmp_path / "moco.safetensors")
  about = describe(found, choose_item(found, next(name for name in found.items if "base" in name)))
  assert about.family == "MoCo v3" and about.settings["num_heads"] == 12


def test_files_of_ours_are_looked_at_as_those_of_others(tmp_path):
  from jepa_jax.config import to_dict
  from jepa_jax.weights.convert import flatten
  from jepa_jax.weights.files import write_ours

  flat = flatten(random_params(CLS))
  for name, change in {"NaN or infinite": lambda x: x * np.float32("nan"), "no floating-point": np.int32}.items():
    path = tmp_path / f"{name[:3]}.safetensors"
    write_ours(path, {"encoder": {key: change(x) for key, x in flat.items()}}, {"encoder": to_dict(CLS), "data": {}})
    with pytest.raises(ValueError, match=name):
      import_encoder(str(path), str(tmp_path / "run"))


# ---------------------------------------------------------------- given back


def workdir_of(cfg, folder, seed=3):
  """A workdir with the random weights of this ViT, as our own file holds them; and the parameters."""
  from jepa_jax.config import to_dict
  from jepa_jax.weights.convert import flatten
  from jepa_jax.weights.files import write_ours

  params = seeded(cfg, seed)
  data = {"channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
  write_ours(folder / "ours.safetensors", {"encoder": flatten(params)}, {"encoder": to_dict(cfg), "data": data})
  import_encoder(str(folder / "ours.safetensors"), str(folder / "run"))
  return folder / "run", params


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_is_written_and_computes_the_same(tmp_path, kind):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  cfg = dataclasses.replace(CLS, **KINDS[kind])
  workdir, params = workdir_of(cfg, tmp_path)
  export_weights(str(workdir), str(tmp_path / "hf"), "hf", license="apache-2.0")
  name = kind.split(",")[0]
  model, info = getattr(transformers, name).from_pretrained(tmp_path / "hf", output_loading_info=True)
  assert {key.split(".")[0] for key in info["missing_keys"]} <= {"pooler"} and not info["unexpected_keys"]
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
  ours = jax.jit(cfg.make(3).apply)({"params": params}, images)
  skip = int(cfg.cls_token) + cfg.num_registers
  np.testing.assert_allclose(theirs[:, skip:], ours.tokens_BxNxD, atol=2e-5)
  # And read again it is what it was.
  again = encoders.import_encoder(str(tmp_path / "hf"), str(tmp_path / "again"))
  back = jax.device_get(load_encoder(tmp_path / "again").params["params"])
  assert same(back, params) and again["encoder"].get("activation", "gelu") == cfg.activation
  card = (tmp_path / "hf" / "README.md").read_text()
  assert card.startswith("---\nlicense: apache-2.0") and "mean (0.4, 0.5, 0.6)" in card


def test_what_transformers_does_not_have_is_refused_with_a_way_out(tmp_path):
  from jepa_jax.config import build_config
  from tests.tiny import TINY

  for changes, message in {
    ("num_registers", 2): "has no ViT with cls_token, num_registers",
    ("activation", "swiglu"): "ViTModel has none; use the layout timm",
  }.items():
    encoder = {"name": "vit", "image_size": 16, "patch_size": 4, "cls_token": True, "width": 32, "num_heads": 2}
    cfg = build_config(TINY | {"encoder": encoder | dict([changes])})
    with pytest.raises(ValueError, match=message):
      hf_config(cfg)


def test_a_program_runs_with_jax_alone_for_any_number_of_images(tmp_path):
  """In a process that cannot import this project, nor flax."""
  workdir, _ = workdir_of(CLS, tmp_path)
  export_weights(str(workdir), str(tmp_path / "encoder.stablehlo"), "stablehlo")
  images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
  np.save(tmp_path / "images.npy", images)
  code = (
    "import sys, json, numpy as np, jax, jax.export\n"
    "assert not {'flax', 'jepa_jax'} & set(sys.modules)\n"
    "f = jax.export.deserialize(bytearray(open('encoder.stablehlo', 'rb').read()))\n"
    "x = np.load('images.npy')\n"
    "np.savez('out.npz', five=f.call(x), two=f.call(x[:2]))\n"
    "print(json.dumps(list(f.platforms)))"
  )
  done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert json.loads(done.stdout) == ["cpu", "cuda", "tpu"]
  apply_fn, variables, _ = load_encoder(workdir)
  wanted = jax.jit(apply_fn)(variables, images).pooled_BxD
  with np.load(tmp_path / "out.npz") as out:
    np.testing.assert_allclose(out["five"], wanted, atol=1e-5)
    np.testing.assert_array_equal(out["two"].shape, (2, 32))


def test_nothing_is_pushed_without_a_licence_and_a_dry_run_sends_nothing(tmp_path):
  workdir, _ = workdir_of(CLS, tmp_path)
  export_weights(str(workdir), str(tmp_path / "hf"), "hf")
  assert f"license: {UNKNOWN}" in (tmp_path / "hf" / "README.md").read_text()
  with pytest.raises(ValueError, match="has no licence: write one in place of FILL-IN"):
    push_folder(str(tmp_path / "hf"), "me/mine", dry_run=True)
  export_weights(str(workdir), str(tmp_path / "licensed"), "hf", license="mit")
  found = push_folder(str(tmp_path / "licensed"), "me/mine", dry_run=True)
  assert found["sent"] is False and set(found["files"]) == {
    "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
  }  # fmt: skip
  with pytest.raises(ValueError, match="is no repository"):
    push_folder(str(tmp_path / "licensed"), "mine", dry_run=True)
  with pytest.raises(ValueError, match="is no folder of"):
    push_folder(str(tmp_path), "me/mine", dry_run=True)


def test_a_file_of_a_folder_is_read_with_its_config_and_a_workdir_is_told_from_weights(tmp_path):
  workdir, _ = workdir_of(CLS, tmp_path)
  export_weights(str(workdir), str(tmp_path / "hf"), "hf")
  found = read(tmp_path / "hf" / "model.safetensors")
  assert found.config["num_attention_heads"] == 2 and describe(found, "encoder").settings["num_heads"] == 2
  with pytest.raises(ValueError, match="is the workdir of a run, and no file of weights: name it by --workdir"):
    read(workdir)


def test_a_name_that_is_neither_here_nor_to_be_fetched_says_where_it_would_be(monkeypatch):
  hub = pytest.importorskip("huggingface_hub")

  def offline(*_, **__):
    raise OSError("no network")

  monkeypatch.setattr(hub, "snapshot_download", offline)
  with pytest.raises(
    ValueError, match=r"could not be fetched.*no network.*lies in .*a folder facebook/dinov2-small here"
  ):
    read("facebook/dinov2-small")
