"""The bench times what it says: two steps that are one and the same, in JAX and in PyTorch."""

import json

import pytest

from jepa_jax.bench import masking

TINY = {"image_size": 32, "patch_size": 4, "width": 32, "depth": 2, "num_heads": 2}
PREDICTOR = {"width": 16, "depth": 1}


@pytest.fixture(scope="module")
def result():
  return masking.run(batch_size=4, steps=3, keep="0.25", predictor=PREDICTOR, **TINY)


@pytest.mark.slow
def test_every_share_has_a_row_and_the_method_its_own(result):
  share, official = result["rows"]
  assert (share["masks"], share["context_patches"], share["predictor"]) == ("random 0.25", 16, "1 x 64 tokens")
  assert official["masks"] == "official" and official["predictor"].startswith("4 x ")
  for row in result["rows"]:
    assert row["images_per_s"] == pytest.approx(4e3 / row["step_ms"], rel=0.1)
  json.dumps(result)


def test_flops_rise_with_the_share_by_what_the_context_encoder_and_the_predictors_ends_need(result):
  """Forward and backward are 3 times: 24 D^2 + 4 S D per token and block."""

  def context_encoder(kept, width=32, depth=2):
    return 3 * depth * kept * (24 * width**2 + 4 * kept * width)

  small, large = (masking.step_flops(masking.masked_config(f"random {s}", 4, PREDICTOR, **TINY)) for s in (0.25, 0.5))
  # A token that is kept goes into the predictor through a (D, P) matrix instead of out of it through another.
  assert large - small == 4 * (context_encoder(32) - context_encoder(16))
  assert result["rows"][0]["matrix_flops"] == small


def test_pytorch_makes_the_same_steps(result):
  """Four steps of each variant, one after the other on one state: the losses stay equal, so the updates do."""
  pytest.importorskip("torch")
  assert result["torch"]
  assert all(row["loss_difference"] < 1e-5 and row["torch_ms"] > 0 for row in result["rows"])


@pytest.mark.parametrize("keep", ["0", "1.5", "half", "0.1,,0.2"])
def test_a_share_that_is_none_is_refused(keep):
  with pytest.raises(ValueError, match="shares between 0 and 1"):
    masking.run(keep=keep)


def test_counts_below_one_are_refused():
  with pytest.raises(ValueError, match="at least 1"):
    masking.run(steps=0)
