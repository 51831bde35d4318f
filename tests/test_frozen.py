"""A frozen encoder that sees every image once, before the first step."""

from __future__ import annotations

import io
import os

import jax
import numpy as np
import pytest

from jepa_jax.config import build_config
from jepa_jax.experiment import make_experiment
from jepa_jax.sharding import MeshConfig, make_mesh
from jepa_jax.telemetry import read_metrics
from jepa_jax.train import Start, train
from tests.test_image_text import CAPTIONS, COMMON, SGD
from tests.tiny import TINY, tiny_values

DATA = TINY["data"] | {"captions": CAPTIONS}
# The view that evaluation sees, and nothing drawn.
WHOLE = {"global_crops": {"num": 1, "size_px": 16, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}, "flip_p": 0.0}
FROZEN = COMMON | {"name": "clip", "image_lr": 0.0, "views": WHOLE}


def config(once: bool, **changes):
  objective = FROZEN | {"features_once": once}
  return build_config(tiny_values(**({"data": DATA, "objective": objective, "total": "4steps"} | SGD | changes)))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("start")
  train(build_config(tiny_values(data=DATA, objective=COMMON | {"name": "clip"}, total="1steps")), workdir)
  return Start(init_from=str(workdir))


def losses_of(workdir):
  return [line["loss"] for line in read_metrics(workdir)]


def test_features_made_once_give_the_losses_of_features_made_in_every_step(start, tmp_path):
  """Where views are those of evaluation; on one device, and on eight that share the weights and the batch."""
  train(config(False), tmp_path / "anew", start)
  train(config(True), tmp_path / "once", start)
  np.testing.assert_allclose(losses_of(tmp_path / "once"), losses_of(tmp_path / "anew"), rtol=1e-6)
  train(config(True, mesh={"data": 2, "fsdp": 4}, microbatch=2), tmp_path / "eight", start)
  np.testing.assert_allclose(losses_of(tmp_path / "eight"), losses_of(tmp_path / "anew"), rtol=2e-5)


def test_the_encoder_is_no_part_of_the_step():
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  once, anew = (make_experiment(config(once), mesh, 64, 10) for once in (True, False))
  assert set(once.abstract_batch) - set(anew.abstract_batch) == {"image_pooled", "image_probe"}
  flops = lambda run: run.compile().cost_analysis()["flops"]
  text_only = flops(make_experiment(config(True, encoder=TINY["encoder"] | {"depth": 6}), mesh, 64, 10))
  assert flops(once) < 0.8 * flops(anew)
  assert text_only == pytest.approx(flops(once), rel=0.01)  # however deep the encoder is


def test_features_are_kept_for_the_next_start(start, tmp_path):
  workdir = tmp_path / "run"
  train(config(True, total="2steps"), workdir, start)
  (folder,) = (workdir / "features").glob("frozen-*")
  before = os.stat(folder).st_mtime_ns
  train(config(True, total="4steps"), workdir, Start(accept_change=True))
  assert os.stat(folder).st_mtime_ns == before and len(list((workdir / "features").glob("frozen-*"))) == 1
  assert len(losses_of(workdir)) == 4


def test_another_view_is_refused_where_it_would_change_the_features(start, tmp_path):
  train(config(True, total="2steps"), tmp_path, start)
  with pytest.raises(ValueError, match="evals.crop_fraction=0.5, and up to step 2 .* keep that"):
    train(config(True, total="4steps", evals__crop_fraction=0.5), tmp_path, Start(accept_change=True))


def test_only_a_frozen_encoder_sees_its_images_once():
  with pytest.raises(ValueError, match="features_once=True, and image_lr=1.0 trains .* image_lr=0"):
    config(True, objective=FROZEN | {"features_once": True, "image_lr": 1.0})


def test_rows_of_an_image_that_does_not_decode_are_those_of_its_stand_in(start, tmp_path):
  """Features belong to the index in the row, which is the stand-in's; their order is no matter."""
  from PIL import Image

  rng, folder = np.random.default_rng(0), tmp_path / "images" / "train"
  folder.mkdir(parents=True)
  captions = {}
  for i in range(32):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(buffer, "png")
    (folder / f"{i:02}.png").write_bytes(b"no image" if i in (0, 7) else buffer.getvalue())
    captions[f"{i:02}.png"] = ["a dog", "a cat in a tree"]
  data = {name: DATA[name] for name in ("canvas_px", "channels", "mean", "std")} | {"source": "folder"}
  lines = "\n".join(["image,caption", *(f"train/{name},{text}" for name, own in captions.items() for text in own)])
  (tmp_path / "images" / "captions.csv").write_text(lines)
  data |= {"root": str(tmp_path / "images"), "max_bad_share": 0.9}
  data |= {"captions": {"train": "captions.csv", "length": 8, "vocab_size": 300}}
  train(config(False, data=data), tmp_path / "anew", start)
  train(config(True, data=data), tmp_path / "once", start)
  np.testing.assert_allclose(losses_of(tmp_path / "once"), losses_of(tmp_path / "anew"), rtol=1e-6)
