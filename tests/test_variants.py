"""Ablations: variants are runs of the one loop, resumed, refused where settings differ; tables and figures."""

import json

import pytest

from jepa_jax.study import ablation, collapse, variants
from tests.test_ijepa import ENCODER, IJEPA
from tests.tiny import tiny_values


def write_config(folder, **changes):
  values = tiny_values(**({"encoder": ENCODER, "objective": IJEPA, "total": "2steps"} | changes))
  path = folder / "ijepa_tiny.py"
  path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict({values!r})\n")
  return str(path)


def test_vary_reads_values_and_changes_that_go_together():
  two = ablation.parse_vary("optim.lr=1e-3|3e-3")
  assert [v.overrides for v in two] == [(("optim.lr", "1e-3"),), (("optim.lr", "3e-3"),)]
  (both,) = ablation.parse_vary("_=a=1&b=(1, 2)")
  assert both.overrides == (("a", "1"), ("b", "(1, 2)"))
  with pytest.raises(ValueError, match="write a setting and its values"):
    ablation.parse_vary("optim.lr")


def test_every_switch_of_the_collapse_study_builds(tmp_path):
  path = write_config(tmp_path)
  all_variants = [variants.Variant(name, tuple(s.items())) for name, s in collapse.SWITCHES.items()]
  assert len(variants.configs(path, all_variants, [0], {})) == len(collapse.SWITCHES)
  with pytest.raises(ValueError, match="variant 'x': .*did you mean"):
    variants.configs(path, [variants.Variant("x", (("objective.targt", "online"),))], [0], {})


def test_collapse_study_trains_evaluates_resumes_and_draws(tmp_path, monkeypatch):
  path, folder = write_config(tmp_path), tmp_path / "study"
  shared = {"probe.spectrum_every": "1"}
  first = collapse.run(path, str(folder), "I-JEPA|no EMA", [0], shared)
  assert first["table"].count("\n") == 3 and (folder / "collapse.png").stat().st_size > 10_000
  saved = json.loads((folder / "no_EMA-seed0" / variants.RESULT).read_text())
  assert saved["config"]["objective"]["target"] == "online" and saved["result"]["steps"] == 2
  monkeypatch.setattr(variants, "train", lambda *_: pytest.fail("trained again"))
  assert collapse.run(path, str(folder), "I-JEPA|no EMA", [0], shared) == first
  with pytest.raises(ValueError, match="result of other settings"):
    collapse.run(path, str(folder), "I-JEPA", [0], shared | {"optim.lr": "1e-4"})


def test_collapse_study_refuses_what_it_cannot_switch(tmp_path):
  with pytest.raises(ValueError, match="none of: I-JEPA"):
    collapse.run(write_config(tmp_path), str(tmp_path), only="nothing")
  path = write_config(tmp_path, objective=tiny_values()["objective"])
  with pytest.raises(ValueError, match="switches are those of I-JEPA"):
    collapse.run(path, str(tmp_path))
