"""The study of image-text losses, its rates chosen on dev; the picture of what is found; the bench with PyTorch."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from jepa_jax.bench import clip as bench
from jepa_jax.show import retrieval
from jepa_jax.study import multimodal
from jepa_jax.study.rates import best_rate
from jepa_jax.study.tables import Result
from tests.test_image_text import folder, squares, trained

__all__ = ["folder", "trained"]  # fixtures


def result(loss, batch, rate, seed, score):
  return Result(multimodal.variant(loss, batch, 8, rate).name, seed, 1, {"mean R": score}, 0.0)


def test_the_rate_with_the_highest_recall_on_dev_is_chosen_and_one_that_diverged_is_not():
  rows = [result("clip", 16, rate, 0, score) for rate, score in ((1e-3, 5.0), (3e-3, 7.0), (1e-2, float("nan")))]
  name_of = {rate: multimodal.variant("clip", 16, 8, rate).name for rate in (1e-3, 3e-3, 1e-2)}
  assert best_rate(rows, name_of, "mean R", "clip") == 3e-3
  with pytest.raises(ValueError, match="clip, 16: every rate diverged"):
    best_rate(rows, {1e-2: name_of[1e-2]}, "mean R", "clip, 16")


def test_the_table_has_a_row_for_each_loss_batch_and_width_at_its_rate():
  rows = [result("clip", 16, 1e-3, seed, score) for seed, score in ((0, 5.0), (1, 7.0))] + [
    result("siglip", 16, 1e-2, 0, 3.0)
  ]
  text = multimodal.table(rows, {("clip", 16, 8): 1e-3, ("siglip", 16, 8): 1e-2}, (3e-4, 1e-3, 1e-2))
  assert "| clip | 16 | 8 | 0.001 | 6.0 ± 1.0 |" in text and "| siglip | 16 | 8 | 0.01 (the edge) | 3.0 |" in text


@pytest.mark.slow
def test_the_study_chooses_on_one_split_and_reports_another(folder, tmp_path):
  shutil.copytree(folder / "train", folder / "dev", ignore=shutil.ignore_patterns("train0.png"))
  config = tmp_path / "config.py"
  cfg = squares(folder, total="1ep", checkpoint__every="1ep")
  from jepa_jax.config import to_dict

  config.write_text(f"def get_config(): return {to_dict(cfg)!r}\n")
  options = dict(losses=("mmcr_pairs",), batches=(32,), widths=(8,), rates=(1e-3, 3e-3), seeds=(0, 1))
  asked = multimodal.run(str(config), str(tmp_path / "study"), "dev", dry_run=True, **options)
  assert "2 cells" in asked["forecast"] and "and 1 more" in asked["forecast"]
  found = multimodal.run(str(config), str(tmp_path / "study"), "dev", **options)
  assert {r.variant.split(",")[0] for r in found["results"]} == {"mmcr_pairs"} and len(found["results"]) == 2
  files = {path.name for path in (tmp_path / "study").iterdir() if path.is_file()}
  assert {"multimodal.csv", "multimodal.md", "multimodal.png", "dev.csv"} <= files
  assert len(list((tmp_path / "study").glob("*/dev.json"))) == 2
  assert len(list((tmp_path / "study").glob("*/test.json"))) == 2
  assert multimodal.run(str(config), str(tmp_path / "study"), "dev", **options)["table"] == found["table"]
  for split in ("test", "train"):
    with pytest.raises(ValueError, match=f"is the {split} split: rates are chosen on another one"):
      multimodal.run(str(config), str(tmp_path / "other"), split, **options)
  with pytest.raises(ValueError, match="the study sets it itself"):
    multimodal.run(str(config), str(tmp_path / "other"), "dev", overrides={"optim.lr": "1e-3"})
  with pytest.raises(ValueError, match="each name one at least"):
    multimodal.run(str(config), str(tmp_path / "other"), "dev", seeds=())
  with pytest.raises(ValueError, match="nowhere is no folder"):  # before anything is trained
    multimodal.run(str(config), str(tmp_path / "other"), "nowhere", **options)
  with pytest.raises(ValueError, match="give epochs"):
    multimodal.run(str(config), str(tmp_path / "other"), "dev", overrides={"total": "5steps"})


def test_the_picture_frames_what_belongs_together(trained, tmp_path):
  found = retrieval.run(trained, images=3, out=tmp_path / "picture.png")
  pixels = np.asarray(Image.open(found["picture"]).convert("RGB"))
  green = (np.abs(pixels.astype(int) - (0x1A, 0x7F, 0x37)).max(-1) < 3).sum()
  assert found["images"] == 32 and found["t2i_r5"] > 80 and green > 500
  with pytest.raises(ValueError, match="ask for fewer"):
    retrieval.run(trained, images=17, out=tmp_path / "none.png")


def test_similarities_are_of_the_captions_that_there_are():
  text = np.zeros((2, 2, 3))
  text[0, 0], text[1, 0], text[1, 1] = [2, 0, 0], [0, 3, 0], [0, 1, 1]
  similar, owner, place = retrieval.similarities(np.eye(3)[:2], text)
  assert owner.tolist() == [0, 1, 1] and place.tolist() == [0, 0, 1]
  np.testing.assert_allclose(similar, [[1, 0], [0, 1], [0, 0.5**0.5]], atol=1e-6)


def test_the_bench_of_the_losses_says_time_memory_and_difference():
  found = bench.run(steps=0, pairs=256, dim=16, chunk=64, repeats=1)
  assert [row["loss"] for row in found["losses"]] == ["clip", "siglip"]
  for row in found["losses"]:
    assert row["memory_over_whole"] < 0.6 and row["relative_difference"] < 1e-4


@pytest.mark.slow
def test_the_bench_starts_both_steps_from_the_same_loss():
  pytest.importorskip("torch")
  small = {"image_size": 32, "width": 32, "depth": 2, "num_heads": 2}
  found = bench.run(batch_size=4, steps=1, pairs=16, dim=8, chunk=8, repeats=1, **small)
  assert found["step"]["loss_difference"] < 1e-5 and found["step"]["torch_over_ours"] > 0


def test_counts_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match="batch_size=1 is at least 2"):
    bench.run(batch_size=1)
