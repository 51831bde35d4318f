"""Runs of version 0.2.0 (format 1) are evaluated, shown, exported, started from; old_runs/make_format1.py made them."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jepa_jax import runs, verify
from jepa_jax.config import build_config, to_dict
from jepa_jax.evals import EvalConfig
from jepa_jax.evaluate import evaluate
from jepa_jax.runs import load_encoder, open_run, read_config
from jepa_jax.train import Start, train
from jepa_jax.upgrade import _evals
from jepa_jax.workdir import read_json, write_json

ARCHIVE = Path(__file__).parent / "old_runs" / "format1.tar.xz"
METHODS = ("lejepa", "mmcr", "ijepa", "iwm")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
  folder = tmp_path_factory.mktemp("old_runs")
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(folder, filter="data")
  return folder


@pytest.fixture(scope="module")
def expected(old):
  return json.loads((old / "expected.json").read_text())


@pytest.mark.parametrize("name", METHODS)
def test_the_encoder_gives_the_features_that_it_gave(old, expected, name):
  apply_fn, params, cfg = load_encoder(old / name)
  images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, cfg.data.channels), np.uint8)
  np.testing.assert_allclose(apply_fn(params, images).pooled_BxD, expected[name]["pooled"], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "names"), [("lejepa", ("knn",)), ("mmcr", ("knn", "linear"))])
def test_probes_give_the_accuracies_that_they_gave(old, expected, name, names):
  rows = evaluate(old / name, names=names, overrides={"evals.knn.k": "5"}, show=False).rows
  this = f"{name}, step 4"
  for row in ("raw pixels", this):  # the random encoder is drawn from a named stream now
    before = {column: expected[name]["rows"][row][column] for column in names}
    assert rows[row] == pytest.approx(before, abs=0.2)  # one of 512 images may fall otherwise


@pytest.mark.slow
def test_a_world_model_is_evaluated_whole(old, expected):
  found = evaluate(old / "iwm", names=("knn", "mrr"), show=False, baselines=False)
  before = expected["iwm"]["rows"]["iwm, step 4"]
  assert found.row.keys() == {column for column in before if column == "knn" or column.startswith("MRR")}
  assert found.row["knn"] == pytest.approx(before["knn"], abs=0.2)
  assert found.row["MRR"] == pytest.approx(before["MRR"], abs=1)  # other jitters are drawn; the model knows nothing yet


def test_settings_keep_their_meaning(old):
  iwm = open_run(old / "iwm").cfg
  assert (iwm.encoder.name, iwm.encoder.patch_size, iwm.data.mean) == ("vit", 4, (0.5, 0.4, 0.3))
  # what has options and was not asked for is asked for now: options that nobody reads are refused
  assert (iwm.evals.names, iwm.evals.knn.k) == (("knn", "mrr", "predictor_tuning"), 5)
  assert (iwm.evals.mrr.bank, iwm.evals.tuning.epochs, iwm.evals.tuning.learning_rates) == (16, 1, (3e-3,))
  assert open_run(old / "mmcr").cfg.encoder.width == 2
  assert read_config(old / "lejepa") == open_run(old / "lejepa").cfg


@pytest.mark.parametrize(
  ("method", "old", "new"),
  [
    # what its evaluation refuses for this method nobody could have read
    ("lejepa", {"evals": ("knn",), "tuning_epochs": 5, "mrr_bank": 16}, {"names": ["knn"]}),
    ("ijepa", {"evals": ("knn",), "mrr_bank": 16}, {"names": ["knn"]}),
    ("ijepa", {"evals": ("knn",), "tuning_epochs": 5}, {"names": ["knn", "predictor_tuning"], "tuning": {"epochs": 5}}),
    ("lejepa", {"evals": ("attentive",), "tuning_epochs": 5}, {"names": ["attentive"], "tuning": {"epochs": 5}}),
    ("mmcr", {"evals": ("knn",), "features": "pooled"}, {"names": ["knn"]}),
    ("mmcr", {"evals": ("fewshot",), "features": "pooled"}, {"names": ["fewshot"], "fewshot": {"features": "pooled"}}),
    (
      "iwm",
      {"evals": ("predictor_tuning",), "features": "pooled"},
      {"names": ["predictor_tuning"], "linear": {"features": "pooled"}},
    ),
  ],
)
def test_options_go_to_the_protocols_that_can_read_them(method, old, new):
  assert _evals(old, method) == new
  assert EvalConfig(names=tuple(new["names"]))  # known names


def test_an_override_that_left_a_setting_unread_still_loads(old, tmp_path):
  values = read_json(old / "lejepa" / "config.json")
  values["data"] |= {"source": "npz", "root": "/data", "name": "cifar10"}  # a TFDS config pointed at .npz files
  write_json(tmp_path / "config.json", values)
  assert read_config(tmp_path).data.name == ""


@pytest.mark.slow
def test_pictures_and_exports_are_made(old, tmp_path):
  from jepa_jax.show import predictions, world_model
  from jepa_jax.weights.command import export_weights
  from jepa_jax.weights.files import read

  assert predictions.run(old / "ijepa", images=1, gallery=8, out=tmp_path / "p.png")["step"] == 4
  assert world_model.run(old / "iwm", images=1, steps_per_dimension=3, out=tmp_path / "w.png")["step"] == 4
  export_weights(str(old / "lejepa"), str(tmp_path / "weights.safetensors"), "jepa_jax")
  assert read(tmp_path / "weights.safetensors").config["encoder"]["name"] == "vit"


@pytest.mark.slow
def test_an_old_run_is_not_resumed_but_can_be_started_from(old, tmp_path):
  cfg = open_run(old / "lejepa").cfg
  with pytest.raises(ValueError, match="--init-from=.*--init-what=everything"):
    train(cfg, old / "lejepa")
  longer = build_config(to_dict(cfg) | {"total": "2steps"})
  train(longer, tmp_path / "new", Start(init_from=str(old / "lejepa"), init_what="everything"))
  meta = open_run(tmp_path / "new").meta
  assert (meta["format"], meta["started_from"]["step"], meta["started_from"]["what"]) == (2, 4, "everything")


def test_a_newer_format_is_refused_with_the_version_that_reads_it(old, tmp_path, monkeypatch):
  meta = runs.checkpoint.read_meta(old / "lejepa", 4)
  later = meta | {"format": 7, "jepa_jax": {"version": "9.1.0", "commit": "abc"}}
  monkeypatch.setattr(runs.checkpoint, "read_meta", lambda *_: later)
  with pytest.raises(ValueError, match=r"format 7.*reads up to 2.*version 9\.1\.0, commit abc"):
    open_run(old / "lejepa")


def test_old_checkpoints_have_no_checksums_and_are_not_called_damaged(old):
  found = verify.run(str(old / "lejepa"))
  assert found["whole"] and all("has no checksums" in text for text in found["checkpoints"].values())
