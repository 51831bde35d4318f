"""The study of the spectrum: every method on one config, equal tokens, rates chosen; and what pushes at a collapse."""

from __future__ import annotations

import re

import pytest

from jepa_jax.config import load_config
from jepa_jax.study import push, spectrum, variants
from tests.test_dense_tables import OVERRIDES as MAPS
from tests.test_dense_tables import write_set
from tests.tiny import VIT, tiny_values

VIEWS = {"global_crops": {"num": 4, "size_px": 16, "scale": (0.3, 1.0)}}
SIZED = VIT | {"patch_size": 4}
COLOR = {"data__channels": 3, "data__mean": (0.5,) * 3, "data__std": (0.5,) * 3, "data__max_train": 48}


def config(folder, **changes):
  values = tiny_values(**({"objective__views": VIEWS, "encoder": SIZED, "total": "2ep"} | COLOR | changes))
  path = folder / "lejepa_tiny.py"
  path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict({values!r})\n")
  return str(path)


def test_tokens_count_what_encoder_and_teacher_see(tmp_path):
  path = config(tmp_path)
  base = load_config(path)
  of = {name: load_config(path, settings) for name, settings in spectrum.methods(base, 10).items()}
  found = {name: spectrum.tokens(cfg) for name, cfg in of.items()}
  assert found["LeJEPA"] == found["MMCR"] == found["VICReg"] == 4 * 16
  assert found["SimCLR"] == 2 * 16 and found["BYOL"] == found["MoCo v3"] == 4 * 16  # both networks
  assert found["DINO"] == 2 * 16 + 4 * 4 + 2 * 16
  assert found["MAE"] == 4  # a quarter of 16
  assert found["I-JEPA"] == 16 + 4  # the target encoder sees all, the other one the context
  assert spectrum._epochs(base, of["MAE"]) == 32 and spectrum._epochs(base, of["SimCLR"]) == 4


def test_masked_methods_see_plain_crops_and_small_ones_divide_into_patches(tmp_path):
  color = {"blur_p": (0.5,), "solarize_p": (0.2,), "p": 0.8, "brightness": 0.4, "grayscale_p": 0.2}
  encoder = SIZED | {"image_size": 28, "patch_size": 4}
  path = config(tmp_path, objective__views__color=color, encoder=encoder)
  of = {name: load_config(path, s).objective.views for name, s in spectrum.methods(load_config(path), 10).items()}
  for name in ("MAE", "I-JEPA", "IWM, invariant"):
    assert of[name].color.blur_p == of[name].color.solarize_p == (0.0,), name
  assert of["VICReg"].color.blur_p == (0.5,) and of["DINO"].local_crops.size_px == 12


def test_what_cannot_be_compared_is_named(tmp_path):
  for changes, message in (
    ({"encoder": {"name": "mlp", "image_size": 16, "widths": (8,)}}, "methods that mask patches need a ViT"),
    ({"total": "5steps"}, "epochs are what is shared out"),
  ):
    with pytest.raises(ValueError, match=message):
      spectrum.run(config(tmp_path, **changes), str(tmp_path / "x"))
  with pytest.raises(ValueError, match="the study sets it itself"):
    spectrum.run(config(tmp_path), str(tmp_path / "x"), overrides={"optim.lr": "1e-3"})
  with pytest.raises(ValueError, match="SwAV is none of: MoCo v3"):
    spectrum.run(config(tmp_path), str(tmp_path / "x"), only="SwAV")
  with pytest.raises(ValueError, match="few_shot is none of fine_tuning, predictor_tuning"):
    spectrum.run(config(tmp_path), str(tmp_path / "x"), further=("few_shot",))
  for maps, message in (
    (["data.label_maps.set"], "write KEY=VALUE, such as --maps data.label_maps.set=camvid"),
    (["optim.lr=1"], "only data.* and evals.* change"),
    (["data.max_train=0"], "training and test images need label maps of the same classes; say which with"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      spectrum.run(config(tmp_path), str(tmp_path / "x"), maps=maps)


@pytest.mark.slow
def test_every_method_builds_and_one_is_trained_not_again_and_given_further_columns(tmp_path, monkeypatch):
  evals = {"names": ("linear", "attentive"), "tuning": {"epochs": 1, "batch_size": 32}}
  evals["linear"] = {"epochs": 1, "min_steps": 0, "learning_rates": (1e-3,)}
  path, folder = config(tmp_path, evals=evals, checkpoint__every="100%", log__every="50%"), tmp_path / "study"
  forecast = spectrum.run(path, str(folder), rates=[1e-3], seeds=[0], dry_run=True)["forecast"]
  assert "14 cells" in forecast and "MAE, lr 0.001, seed 0: 96 steps" in forecast
  asked = {"only": "IWM, invariant", "rates": [1e-3, 3e-3], "seeds": [0]}
  plain = spectrum.run(path, str(folder), **asked)["table"]
  head, _, random, iwm = plain.splitlines()
  assert random.startswith("| random encoder | - | - | - |") and iwm.startswith("| IWM, invariant | 6 | 120 | 0.00")
  assert "(the edge)" in iwm
  for name in ("spectrum.md", "spectrum.csv", "rates.csv", "spectrum.png"):
    assert (folder / name).stat().st_size > 0
  with monkeypatch.context() as patched:
    patched.setattr(variants, "train", lambda *_: pytest.fail("trained again"))
    assert spectrum.run(path, str(folder), **asked)["table"] == plain

  write_set(tmp_path / "maps", num=8)
  dense = {"steps": 2, "selection_steps": 1, "learning_rates": "(1e-2,)", "short_px": 16}
  maps = {**MAPS, **{f"evals.dense.{name}": value for name, value in dense.items()}, "data.root": tmp_path / "maps"}
  more = {"further": ("fine_tuning", "predictor_tuning"), "maps": [f"{key}={value}" for key, value in maps.items()]}
  rows = [split(row) for row in spectrum.run(path, str(folder), **asked, **more)["table"].splitlines()]
  assert rows[0][8:] == ["predictor tuned", "random predictor", "fine-tuned", "mIoU", "mIoU, odd", "RankMe"]
  assert rows[2][8:10] == ["-", "-"] and "-" not in rows[3][:13] + rows[2][10:13]  # a predictor has only one of them
  assert [row[:8] for row in (rows[0], *rows[2:])] == [split(row)[:8] for row in (head, random, iwm)]


def split(row):
  return [cell.strip() for cell in row.strip("|").split("|")]


def test_mmcr_pushes_at_a_collapse_and_mcr2_vicreg_and_simclr_less_and_less(tmp_path):
  """Closed forms for rows e + s w f: the nuclear norm has the slope sqrt(B), MCR2's rate 2 a B s, a = D / (2 B eps)."""
  batch, dim = 64, 32
  of = lambda name, s: push.pushes(push.LOSSES[name], [s], batch, dim)[0]
  assert of("MMCR", 1e-4) == pytest.approx(batch**0.5 / (batch * dim) ** 0.5, rel=1e-3)
  found = push.run(str(tmp_path), batch, dim)["table"].splitlines()[2:]
  slopes = {row.split(" | ")[0].strip("| "): float(row.split(" | ")[-1].strip("| ")) for row in found}
  assert abs(slopes.pop("MMCR")) < 0.02 and all(0.9 < slope < 1.05 for slope in slopes.values())
  # The rate of all 2 B rows has a = D / (2 B eps), where the first singular value is sqrt(2 B); R - Rc is pushed.
  a, s = dim / (2 * batch * 0.5), 1e-3
  whole = lambda s: a * 2 * batch * s / (1 + a * 2 * batch * s * s)
  assert of("MCR2, eps .5", s) == pytest.approx(whole(s), rel=0.05)
  assert (tmp_path / "push.png").stat().st_size > 10_000
  with pytest.raises(ValueError, match="there is a second direction"):
    push.run(str(tmp_path), 2, 1)
