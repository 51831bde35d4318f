"""Networks below any prefix: one is found by itself, of several one is asked for; DINOv2's names."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jepa_jax.weights.convert import encoder_from, encoder_to
from jepa_jax.weights.describe import choose_item, describe
from jepa_jax.weights.files import find_networks, read, write_safetensors
from tests.checkpoints import ENCODER
from tests.test_weights import prefixed, random_params, same

CLS = dataclasses.replace(ENCODER, pos_embed="learned", cls_token=True)
PARAMS = random_params(CLS)
GOOD = encoder_to(PARAMS, CLS, "timm")
HEAD = {"projector.0.weight": np.ones((4, 4), np.float32), "criterion.t": np.ones(3, np.float32)}


def written(tmp_path, tensors):
  write_safetensors(tmp_path / "x.safetensors", tensors, {})
  return read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
  "prefix",
  ["", "backbone.", "module._orig_mod.backbone.", "state.student.backbone.model.", "a.b.c.d.e."],
)
def test_one_network_is_found_below_any_prefix(tmp_path, prefix):
  found = written(tmp_path, prefixed(GOOD, prefix) | (HEAD if prefix else {}))
  assert found.layout == "timm" and list(found.items) == ["encoder"]
  assert same(encoder_from(found.items[choose_item(found)], CLS, found.layout), PARAMS)
  assert found.rest == (("criterion.*", "projector.*") if prefix else ())


def test_of_two_networks_one_is_asked_for(tmp_path):
  other = random_params(CLS)
  other["norm"]["scale"] = other["norm"]["scale"] + 1
  both = prefixed(GOOD, "student.backbone.") | prefixed(encoder_to(other, CLS, "timm"), "teacher.backbone.") | HEAD
  found = written(tmp_path, both)
  with pytest.raises(ValueError, match="several encoders; choose by --item: student.backbone, teacher.backbone"):
    choose_item(found)
  assert same(encoder_from(found.items[choose_item(found, "teacher.backbone")], CLS, "timm"), other)


def test_a_network_inside_of_another_is_cut_out():
  found, beside = find_networks({"encoder": GOOD | prefixed(GOOD, "ema.")})
  assert found.keys() == {"encoder", "ema"} and not beside
  assert all(tensors.keys() == GOOD.keys() for tensors in found.values())


def test_what_holds_no_vit_stays_as_it_is():
  assert find_networks({"encoder": HEAD}) == ({"encoder": HEAD}, ())


def test_dinov2s_registers_have_no_positions(tmp_path):
  """Its names for them, its mask token, the class token's position in row 0: folded as the network adds them."""
  cfg = dataclasses.replace(CLS, num_registers=4)
  params = random_params(cfg)
  tensors = encoder_to(params, cfg, "timm")
  rng, width = np.random.default_rng(0), cfg.size.width
  row = rng.standard_normal((1, 1, width)).astype(np.float32)
  theirs = {**tensors, "cls_token": tensors["cls_token"] - row}
  theirs["pos_embed"] = np.concatenate([row, tensors["pos_embed"]], axis=1)
  theirs["register_tokens"] = theirs.pop("reg_token")
  theirs["mask_token"] = np.zeros((1, width), np.float32)
  found = written(tmp_path, theirs)
  assert found.rest == ("mask_token",)
  back = encoder_from(found.items["encoder"], cfg, found.layout)
  np.testing.assert_allclose(back["cls_token"], params["cls_token"], atol=1e-6)
  assert same(back | {"cls_token": 0}, params | {"cls_token": 0})
  told = describe(found, "encoder").settings
  assert told["num_registers"] == 4 and told["image_size"] == cfg.image_size
