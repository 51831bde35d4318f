"""LeJEPA learns from real images: its features beat pixels and its own random initialisation, without a label."""

import pytest

from jepa_jax.config import load_config
from jepa_jax.evaluate import evaluate
from jepa_jax.subjects import PIXELS, RANDOM
from jepa_jax.train import train


@pytest.mark.slow
@pytest.mark.optimised
def test_digits_config_in_small_beats_pixels_and_the_random_encoder_with_few_labels(tmp_path):
  overrides = {
    "total": "200steps",
    "encoder.widths": "(16,32,64)",
    "objective.views.global_crops.size_px": "16",
    "encoder.image_size": "16",
    "evals.names": "('knn','fewshot')",
    "log.tensorboard": "false",
  }
  train(load_config("configs/lejepa_digits.py", overrides), tmp_path)
  rows = evaluate(tmp_path).rows
  learned = rows.pop("lejepa, step 200")
  for column in ("shots_5", "shots_10"):
    assert learned[column][0] > rows[PIXELS][column][0] + 1
    assert learned[column][0] > rows[RANDOM][column][0] + 3
  assert learned["knn"] > rows[RANDOM]["knn"]
