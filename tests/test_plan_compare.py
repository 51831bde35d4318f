"""Two settings of one config, planned side by side."""

import pytest

from jepa_jax import plan
from tests.test_train import write_config
from tests.tiny import tiny_values


@pytest.fixture
def config(tmp_path):
  return str(write_config(tmp_path / "tiny.py", tiny_values()))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"compare": "remat"}, "no KEY=VALUE.*for example"),
    ({"compare": " "}, "is empty: write what differs"),
    ({"compare": "encoder.remta=none"}, "did you mean config.encoder.remat"),
    ({"compare": "encoder.remat=none", "search": True}, "leave out --search"),
  ],
)
def test_what_cannot_be_compared_is_an_error_before_compiling(config, options, message, monkeypatch):
  monkeypatch.setattr(plan, "compile_step", lambda *_: pytest.fail("compiled"))
  with pytest.raises(ValueError, match=message):
    plan.run(config, "cpu:8", **options)


def test_two_settings_stand_side_by_side_with_their_ratios(config, monkeypatch):
  def fake(cfg, *_):
    remat = cfg.encoder.remat == "block"
    memory = {"fits": True, "hbm_bytes": 2**34, "total_bytes": 2 ** (30 + (not remat)), "temporaries_bytes": 2**30}
    row = {"kind": "all-reduce", "link": "ici", "every_step": True, "sites": 3, "sent_bytes": 2e6}
    return {
      **{"config": "tiny", "topology": "cpu:8", "num_chips": 8, "mesh": "data=8", "batch_size": 8, "notes": ["a note"]},
      **{"memory": memory, "flops": {"per_step": 4e12 if remat else 3e12}, "memory_traffic_bytes": {"total": 5e9}},
      **{"roofline": None, "collectives": [row] if remat else [], "estimate": None, "compile_s": 1.0},
    }

  monkeypatch.setattr(plan, "make_plan", fake)
  found = plan.run(config, "cpu:8", compare="--config.encoder.remat=block")
  rows = {row["what"]: (row["first"], row["second"]) for row in found["rows"]}
  assert rows["memory, total"] == (2, 1) and rows["matrix FLOPs of a step"] == (3, 4)
  assert rows["all-reduce, ici: sent"] == (None, 2)
  text = plan.render(found)
  assert "second: with encoder.remat=block" in text and text.count("a note") == 1
  assert any(line.split()[-3:] == ["3.000", "4.000", "1.333"] for line in text.splitlines())
  assert any(line.split()[-3:] == ["-", "3", "-"] for line in text.splitlines())
