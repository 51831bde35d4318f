"""The pixels that weights want: what transformers' and timm's folders say of mean, size, cut and filter."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import open_images
from jepa_jax.evaluate import eval_config
from jepa_jax.models import ViTConfig
from jepa_jax.runs import open_run
from jepa_jax.views import Pixels, center_view
from jepa_jax.weights.convert import encoder_to
from jepa_jax.weights.encoders import import_encoder
from jepa_jax.weights.export import export_weights
from jepa_jax.weights.files import write_folder
from jepa_jax.weights.pixels import pixels_of
from tests.test_weights import random_params

ENCODER = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=4, cls_token=True, pool="cls")
CLIP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True, "resample": 3}
BIT = {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True, "resample": 2}
OLD = {"size": 32, "crop_size": 24, "do_center_crop": True}  # before transformers 4.24
SQUASHED = {"size": {"height": 16, "width": 16}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
TIMM = {
  "mean": [0.5, 0.4, 0.3],
  "std": [0.2] * 3,
  "input_size": [3, 24, 24],
  "crop_pct": 0.8,
  "interpolation": "bilinear",
}


def view(size_px, crop_fraction, interpolation):
  return {"size_px": size_px, "crop_fraction": crop_fraction, "interpolation": interpolation}


@pytest.mark.parametrize(
  ("document", "wanted"),
  [
    (CLIP, view(24, 1.0, "bicubic")),
    (BIT, view(24, 0.75, "bilinear")),
    (OLD, view(24, 0.75, "bicubic")),
    (SQUASHED, view(16, 1.0, "bilinear")),
    (BIT | {"do_center_crop": False}, view(32, 1.0, "bilinear")),
    (BIT | {"resample": 1}, view(24, 0.75, "bicubic")),
    ({"size": 32, "crop_pct": 0.875}, view(32, 32 / 36, "bicubic")),  # ConvNext's processor, of ResNets
    ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, view(384, 1.0, "bicubic")),
    ({"do_resize": False, "size": 3}, {}),
    ({"size": {"height": 16, "width": 32}}, {}),
    ({"size": {"shortest_edge": "big"}}, {}),
    ({}, {}),
  ],
)
def test_a_view_is_that_of_transformers(tmp_path, document, wanted):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(document))
  found = pixels_of(tmp_path, {})
  assert found["view"] == wanted
  noted = " ".join(found["notes"])
  size = document.get("size", 0)
  squashed = isinstance(size, dict) and "height" in size
  squashed |= wanted == view(384, 1.0, "bicubic")  # so large, ConvNext's processor cuts nothing off
  assert ("squashes" in noted) == squashed and ("lanczos" in noted) == (document.get("resample") == 1)
  assert bool(noted) or wanted  # what is not followed is said


@pytest.mark.parametrize(
  ("document", "mean", "std"),
  [
    ({"do_normalize": False}, 0, 1),
    ({"do_normalize": False, "do_rescale": False}, 0, 1 / 255),
    ({"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}, 0.5, 0.25),
    ({"rescale_factor": 0.00392156862745098, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 0.5, 0.5),
  ],
)
def test_mean_and_std_are_those_of_pixels_in_0_1(tmp_path, document, mean, std):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(document))
  found = pixels_of(tmp_path, {})["data"]
  np.testing.assert_allclose([found["mean"], found["std"]], [[mean] * 3, [std] * 3], rtol=1e-6)


def test_a_view_is_what_pillow_makes_of_a_picture_as_transformers_does(tmp_path):
  """A picture of 48 x 64 scaled and cut as the document says, against what the imported run's view shows."""
  write_folder(tmp_path / "x", encoder_to(random_params(ENCODER), ENCODER, "hf"), {"preprocessor_config.json": BIT})
  import_encoder(str(tmp_path / "x"), str(tmp_path / "run"), {"encoder.num_heads": "4"})
  cfg = open_run(tmp_path / "run").cfg
  at = np.stack(np.meshgrid(np.linspace(0, 6, 64), np.linspace(0, 4, 48)), -1)
  picture = (127 + 60 * np.sin(at[..., 0]) + 60 * np.cos(at[..., 1]))[..., None].repeat(3, -1).astype(np.uint8)
  scaled = Image.fromarray(picture).resize((43, 32), Image.Resampling.BILINEAR)  # the shorter side has 32 px
  wanted = np.asarray(scaled, np.float32)[4:28, 9:33] / 255
  wanted = (wanted - cfg.data.mean) / cfg.data.std
  (tmp_path / "pictures" / "all").mkdir(parents=True)
  Image.fromarray(picture).save(tmp_path / "pictures" / "all" / "0.png")
  on = {"data.source": "folder", "data.root": str(tmp_path), "data.test": "pictures"}
  batch = open_images(eval_config(cfg, on, ("knn",)).data, "test").read(np.array([0]))
  pixels = Pixels(cfg.data.mean, cfg.data.std)
  ours = center_view(batch, cfg.view_hw, pixels, cfg.evals.crop_fraction, cfg.objective.views.interpolation)
  assert np.abs(np.asarray(ours[0]) - wanted).mean() < 0.03


def test_a_whole_processor_has_the_pixels_within(tmp_path):
  told = {"image_processor": CLIP | {"image_mean": 0.5, "image_std": [0.25] * 3}, "processor_class": "CLIPProcessor"}
  (tmp_path / "processor_config.json").write_text(json.dumps(told))
  found = pixels_of(tmp_path, {})
  assert found["data"] == {"mean": [0.5] * 3, "std": [0.25] * 3} and found["view"] == view(24, 1.0, "bicubic")


@pytest.mark.parametrize(
  "odd",
  [{"resample": [3]}, {"size": True}, {"size": 1e30}, {"size": [16, 16]}, {"rescale_factor": "x"}, {"crop_size": 99}],
)
def test_odd_values_are_left_out_and_that_is_said(tmp_path, odd):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(BIT | {"image_std": [1.0] * 3} | odd))
  assert pixels_of(tmp_path, {})["notes"]


def test_other_meanings_of_the_words_in_config_json_are_none_of_ours(tmp_path):
  config = {"data": "imagenet", "view": {"size_px": 8}, "notes": "mine", "model_args": {"num_heads": 4}}
  write_folder(tmp_path / "folder", encoder_to(random_params(ENCODER), ENCODER, "timm"), {"config.json": config})
  about = import_encoder(str(tmp_path / "folder"), str(tmp_path / "run"))
  assert about["encoder"]["num_heads"] == 4 and "view 32 x 32 px of 37" in about["pixels"]


@pytest.mark.parametrize("layout", ["hf", "jepa_jax"])
def test_a_run_that_is_written_and_read_again_shows_the_same(tmp_path, layout):
  write_folder(tmp_path / "x", encoder_to(random_params(ENCODER), ENCODER, "hf"), {"preprocessor_config.json": BIT})
  import_encoder(str(tmp_path / "x"), str(tmp_path / "run"), {"encoder.num_heads": "4"})
  to = tmp_path / ("hf" if layout == "hf" else "ours.safetensors")
  export_weights(str(tmp_path / "run"), str(to), layout)
  import_encoder(str(to), str(tmp_path / "again"))
  one, other = (open_run(tmp_path / name).cfg for name in ("run", "again"))
  assert (one.view_hw, one.evals.crop_fraction, one.data) == (other.view_hw, other.evals.crop_fraction, other.data)
  assert one.objective.views.interpolation == other.objective.views.interpolation == "bilinear"


def test_a_view_is_that_of_timm(tmp_path):
  assert pixels_of(tmp_path, {"pretrained_cfg": TIMM})["view"] == view(24, 0.8, "bilinear")
  assert pixels_of(tmp_path, TIMM | {"architecture": "vit"})["view"] == view(24, 0.8, "bilinear")  # before 2023
  assert pixels_of(tmp_path, {"pretrained_cfg": TIMM | {"crop_pct": None}})["view"]["crop_fraction"] == 24 / 27
  assert "no view of ours" in pixels_of(tmp_path, {"pretrained_cfg": TIMM | {"crop_pct": 1.1}})["notes"][0]
  assert pixels_of(tmp_path, {"pretrained_cfg": {"mean": [0.1]}})["data"] == {"mean": [0.1]}
  border = pixels_of(tmp_path, {"pretrained_cfg": TIMM | {"crop_mode": "border"}})
  assert "no cut of the middle" in border["notes"][0]
  with pytest.raises(ValueError, match="config.json: mean and std are no lists of numbers"):
    pixels_of(tmp_path, {"pretrained_cfg": {"mean": ["a"]}})


@pytest.mark.parametrize(
  ("documents", "layout", "mean", "seen"),
  [
    ({"config.json": {"pretrained_cfg": TIMM}}, "timm", (0.5, 0.4, 0.3), (24, 30, 0.8, "bilinear")),
    ({"preprocessor_config.json": SQUASHED}, "hf", (0.5, 0.5, 0.5), (16, 16, 1.0, "bilinear")),
    ({"preprocessor_config.json": CLIP | {"size": 30, "crop_size": 30}}, "hf", None, (32, 32, 1.0, "bicubic")),
    ({}, "timm", None, (32, 37, 0.875, "bicubic")),
  ],
)
def test_what_a_folder_says_is_how_its_weights_are_evaluated(tmp_path, documents, layout, mean, seen):
  write_folder(tmp_path / "folder", encoder_to(random_params(ENCODER), ENCODER, layout), documents)
  about = import_encoder(str(tmp_path / "folder"), str(tmp_path / "run"), {"encoder.num_heads": "4"})
  cfg = open_run(tmp_path / "run").cfg
  found = cfg.view_hw[0], cfg.data.canvas_px, cfg.evals.crop_fraction, cfg.objective.views.interpolation
  assert found == seen and cfg.encoder.image_size == 32
  assert np.allclose(cfg.data.mean, mean or (0.485, 0.456, 0.406))
  if "crop_size" in str(documents):
    assert "seen at 30 px, no whole number of patches of 8; here at 32" in " ".join(about["notes"])
