"""`bench against`: the same weights, images and directions have the same loss in PyTorch, so the same work is timed."""

import pytest

from jepa_jax.bench import against

VIT = {"width": 32, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
CROPS = {"num": 2, "size_px": 32, "scale": (0.3, 1.0)}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("method", "views", "size"),
  [
    ("lejepa", {"global_crops": CROPS, "local_crops": CROPS | {"num": 3, "size_px": 16}}, VIT),
    ("lejepa_resnet18", {"global_crops": CROPS | {"size_px": 16}}, {"width": 8}),
    ("mmcr", {"global_crops": CROPS | {"size_px": 16}}, {"width": 8, "stem": "imagenet"}),
  ],
)
def test_losses_of_one_set_of_weights_agree_and_both_are_timed(monkeypatch, method, views, size):
  pytest.importorskip("torch")
  monkeypatch.setitem(against.VIEWS, method, views)
  monkeypatch.setitem(against.PROJECTORS, method, {"hidden": (24,), "out": 12})
  (row,) = against.run(method, batch_size=6, steps=2, **size)["rows"]
  assert row["method"] == method and row["loss_difference"] < 1e-4
  assert row["step_ms"] > 0 and row["torch_ms"] > 0
  low, high = row["torch_quartiles"]
  assert low <= row["torch_over_ours"] <= high


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"methods": "lejepa,simclr"}, "no 'simclr' here; there are ijepa, lejepa, lejepa_resnet18, mmcr"),
    ({"batch_size": 1}, "batch_size=1 must be at least 2"),
    ({"steps": 0}, "steps=0 at least 1"),
  ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    against.run(**arguments)
