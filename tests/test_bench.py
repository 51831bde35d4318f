"""The benches report what they claim to measure."""

import json

import numpy as np
import pytest

import jepa_jax.__main__ as cli
from jepa_jax.bench import step
from tests.test_train import write_config
from tests.tiny import MLP, VIT, tiny_config, tiny_values

IJEPA = {
  "name": "ijepa",
  "views": {"global_crops": {"num": 1, "size_px": 16, "scale": (0.3, 1.0)}},
  "masks": {"kind": "random"},
  "predictor": {"width": 16, "depth": 2},
}
REMAT_IJEPA = IJEPA | {"predictor": {"width": 16, "depth": 2, "remat": "block"}}


def test_bench_sigreg_prints_both_times_and_their_ratio(capsys):
  assert cli.main(["bench", "sigreg", "--num-samples=64", "--num-slices=32", "--dim=16", "--repeats=2"]) == 0
  result = json.loads(capsys.readouterr().out)
  for part in result.values():
    if isinstance(part, dict) and "speedup" in part:
      assert part["fast_ms"] > 0 and part["direct_ms"] > 0
  assert "speedup" in json.dumps(result)


@pytest.mark.slow
def test_flops_of_a_step_count_every_block_and_every_view():
  """Twice the depth adds exactly as much again as the blocks had: a scanned block is not counted once."""
  flops = [step.model_flops(tiny_config(encoder=VIT | {"depth": depth})) for depth in (2, 4, 6)]
  assert flops[2] - flops[1] == flops[1] - flops[0] > 0.2 * flops[0]
  one, four = (step.model_flops(tiny_config(encoder=VIT, batch_size=b)) for b in (16, 64))
  assert 3 < four / one < 4.2


@pytest.mark.slow
@pytest.mark.parametrize(
  ("plain", "recomputing"),
  [
    ({"encoder": VIT}, {"encoder": VIT | {"remat": "block"}, "microbatch": 4}),
    ({"encoder": VIT, "objective": IJEPA}, {"encoder": VIT | {"remat": "block"}, "objective": REMAT_IJEPA}),
  ],
  ids=["lejepa", "ijepa"],
)
def test_work_that_is_done_twice_to_save_memory_does_not_count(plain, recomputing):
  assert step.model_flops(tiny_config(**plain)) == step.model_flops(tiny_config(**recomputing))


@pytest.mark.slow
def test_bench_step_reports_rate_and_share_of_peak(tmp_path):
  settings = tiny_values(encoder=MLP, objective__views__local_crops__num=0, data__canvas_px=256)  # beyond a uint8
  config = write_config(tmp_path / "tiny.py", settings)
  result = step.run(str(config), steps=2)
  assert result["images_per_s"] == pytest.approx(16 / result["step_ms"] * 1e3, rel=0.01)
  assert 0 < result["share_of_peak"] < 1 and np.isfinite(result["loss"])
  assert result["gb_per_step"] > 16 * 256 * 256 / 1e9  # the batch is read


def test_bench_data_reads_the_same_pictures_from_every_source(capsys):
  assert cli.main(["bench", "data", "--images=6", "--canvas-px=64", "--repeats=1", "--files=30"]) == 0
  result = json.loads(capsys.readouterr().out)
  assert set(result["sources"]) == {"array_record", "folder", "npz", "parquet", "webdataset"}
  assert all(row["per_s"] > 0 for row in result["sources"].values())
  assert result["decode"]["psnr_db"] > 30 and result["listing"]["files"] == 30


def test_bench_data_refuses_counts_that_cannot_be(capsys):
  assert cli.main(["bench", "data", "--images=1"]) == 2
  assert "images=1 is at least 2" in capsys.readouterr().err
