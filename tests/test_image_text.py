"""Image and text on the one loop: exact on any mesh and in parts, it learns, is evaluated, and may be frozen."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jepa_jax.config import build_config
from jepa_jax.evaluate import evaluate
from jepa_jax.models import TextConfig
from jepa_jax.objectives.image_text import _drawn, bounded
from jepa_jax.runs import open_run
from jepa_jax.sharding import MeshConfig
from jepa_jax.step import numbers
from jepa_jax.telemetry import read_metrics
from jepa_jax.train import Start, train
from jepa_jax.views import Views
from tests.tiny import TINY, VIT, run_steps, start_of, tiny_batch, tiny_experiment, tiny_values

CAPTIONS = {"train": "random words", "per_image": 3, "length": 8, "vocab_size": 300}
COMMON = {
  "projector": {"hidden": (), "out": 8, "norm": "none"},
  "text": {"width": 16, "depth": 2, "num_heads": 2},
  "views": {"global_crops": {"num": 1, "size_px": 16, "scale": (0.5, 1.0)}},
}
METHODS = {
  "clip": {"name": "clip"},
  "clip in chunks, 2 captions": {"name": "clip", "chunk": 8, "captions": 2},
  "siglip": {"name": "siglip", "sigreg": 0.02},
  "mmcr_pairs": {"name": "mmcr_pairs", "captions": 2},
  "cross_modal": {"name": "cross_modal", "predictor": {"hidden": (16,), "out": 8}},
}
SGD = {"optim__name": "sgd", "optim__lr": 0.05, "optim__warmup": "0steps"}


def values(**changes):
  """Returns the settings of a tiny CLIP with some changed."""
  data = TINY["data"] | {"captions": CAPTIONS}
  return tiny_values(**({"data": data, "objective": COMMON | {"name": "clip"}} | changes))


def experiment(method, mesh=None, num_devices=1, **changes):
  data = TINY["data"] | {"captions": CAPTIONS}
  return tiny_experiment(mesh, num_devices, **({"data": data, "objective": COMMON | METHODS[method]} | changes))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_and_microbatches_give_the_parameters_of_one_and_the_loss_falls_on_a_fixed_batch(method):
  """Captions are drawn, branches dropped and losses taken as if there were one device and one part."""
  text = COMMON["text"] | {"drop_path": 0.3}
  changes = SGD | {"objective": COMMON | METHODS[method] | {"text": text}}
  changes |= {"total": "30steps", "probe__spectrum_every": 30}
  run = experiment(method, **changes)
  compiled = run.compile()
  one, history = run_steps(run, 3, compiled)
  many, other = run_steps(experiment(method, MeshConfig(data=2, fsdp=4), 8, microbatch=2, **changes), 3)
  np.testing.assert_allclose([r["loss"] for r in other], [r["loss"] for r in history], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  state, batch, rows = start_of(run), tiny_batch(run), []
  for _ in range(30):
    state, metrics = compiled(state, batch, run.key)
    rows.append(numbers(metrics))
  assert np.mean([r["loss"] for r in rows[-5:]]) < np.mean([r["loss"] for r in rows[:5]])
  assert rows[-1]["rankme"] > 1 and rows[-1]["rankme_text"] > 1 and 0 <= rows[-1]["modality_gap"] <= 2
  assert 0 < rows[-1]["full_captions"] < 100


def test_captions_are_drawn_from_those_an_image_has_without_repeats_and_by_its_key_alone():
  ids = np.full((4, 3, 5), -1)
  ids[:, :, 0] = np.arange(12).reshape(4, 3)
  ids[1, 2] = -1
  keys = jax.random.split(jax.random.key(0), 400)
  drawn = jax.vmap(lambda key: _drawn(jax.random.split(key, 4), jnp.asarray(ids), 2))(keys)[..., 0]
  assert drawn.shape == (400, 4, 2) and (drawn[:, :, 0] != drawn[:, :, 1]).all() and drawn.min() >= 0
  counts = np.bincount(np.asarray(drawn).ravel(), minlength=12) / 400
  np.testing.assert_allclose(counts[[0, 1, 2, 3, 4]], [2 / 3, 2 / 3, 2 / 3, 1, 1], atol=0.1)
  assert counts[5] == 0
  repeated = _drawn(jax.random.split(keys[0], 4), jnp.asarray(ids), 3)[1, :, 0]
  assert sorted(set(np.asarray(repeated))) == [3, 4]  # of two, three are drawn: one twice


@pytest.mark.parametrize("pool", ["eos", "mean"])
def test_a_text_is_what_it_is_whatever_pads_it_and_no_text_is_zero(pool):
  net = TextConfig(width=16, depth=2, num_heads=2, pool=pool).make(300, 8)
  ids = np.array([[1, 5, 7, 2, -1, -1, -1, -1], [1, 9, 2, -1, -1, -1, -1, -1], [-1] * 8])
  out, variables = net.init_with_output(jax.random.key(0), ids)
  short = net.apply(variables, ids[:1, :4]).pooled_BxD
  np.testing.assert_allclose(out.pooled_BxD[:1], short, atol=1e-6)
  assert np.abs(out.pooled_BxD[2]).max() == 0 and np.isfinite(out.pooled_BxD).all()
  changed = net.apply(variables, np.array([[1, 6, 7, 2, -1, -1, -1, -1]])).pooled_BxD
  assert np.abs(changed - out.pooled_BxD[:1]).max() > 1e-6
  with pytest.raises(ValueError, match="L up to 8"):
    net.apply(variables, np.zeros((1, 9), np.int32))


def test_causal_attention_looks_back_only_with_every_implementation():
  from jepa_jax.models.attention import attend

  q, k, v = (np.random.RandomState(i).randn(2, 6, 2, 4).astype(np.float32) for i in range(3))
  ahead = k.copy()
  ahead[:, 4:] += 1
  for kind in ("xla", "plain"):
    run = lambda k, kind=kind: attend(q, k, v, None, kind, causal=True)
    np.testing.assert_allclose(run(k)[:, :4], run(ahead)[:, :4], atol=1e-6)
    assert np.abs(run(k) - run(ahead))[:, 4:].max() > 1e-3
  grads = [
    jax.grad(lambda *a, kind=kind: jnp.sin(attend(*a, None, kind, causal=True)).sum(), (0, 1, 2))(q, k, v)
    for kind in ("xla", "plain")
  ]
  for a, b in zip(*grads, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_beyond_its_bound_a_number_only_hears_what_leads_back():
  for x, grad, expected in ((1.0, -1.0, -1.0), (3.0, -1.0, 0.0), (3.0, 1.0, 1.0)):
    value, pull = jax.vjp(lambda x: bounded(x, 2.0), jnp.float32(x))
    assert float(value) == min(x, 2) and float(pull(jnp.float32(grad))[0]) == expected


def test_temperature_bias_and_embeddings_do_not_decay():
  from jepa_jax.optim import decay_mask

  run = experiment("siglip")
  mask = decay_mask(run.abstract_state.params, run.objective.rules)
  assert not any((mask["logit_scale"], mask["logit_bias"], mask["text"]["token_embed"], mask["text"]["pos_embed"]))
  assert mask["text_head"]["layers_0"]["kernel"] and mask["text"]["blocks"]["mlp"]["fc1"]["kernel"]


# ------------------------------------------------------------------------------------------------ on real files
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """96 squares of 8 colours at 4 places, and what one would say of them; 32 more to test with."""
  folder = tmp_path_factory.mktemp("squares")
  colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
  colours |= {"yellow": (255, 255, 0), "pink": (255, 0, 255), "cyan": (0, 255, 255), "gray": (120, 120, 120)}
  rng, captions = np.random.RandomState(0), {}
  for split, number in (("train", 96), ("test", 32)):
    for i in range(number):
      colour, place = list(colours)[i % 8], i // 8 % 4
      pixels = rng.randint(0, 30, (16, 16, 3)).astype(np.uint8)
      y, x = divmod(place, 2)
      pixels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = colours[colour]
      path = folder / split / colour / f"{split}{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels).save(path)
      where = f"{('top', 'bottom')[y]} {('left', 'right')[x]}"
      captions[path.name] = [f"a {colour} square at the {where}", f"{where}: something {colour}"][: 1 + i % 2]
  (folder / "captions.json").write_text(json.dumps(captions))
  return folder


def squares(folder, **changes):
  data = {"source": "folder", "root": str(folder), "canvas_px": 16}
  data |= {"captions": {"train": "captions.json", "per_image": 2, "length": 40, "vocab_size": 400}}
  objective = COMMON | {"name": "clip", "views": COMMON["views"] | {"flip_p": 0.0, "global_crops": CROP}}
  own = {"data": data, "objective": objective, "encoder": VIT | {"patch_size": 4, "width": 32}}
  own |= {"total": "150steps", "batch_size": 32, "optim__lr": 3e-3, "evals": {"names": ("retrieval",)}}
  return build_config(tiny_values(**(own | {"checkpoint__every": "75steps"} | changes)))


CROP = {"num": 1, "size_px": 16, "scale": (0.9, 1.0)}


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "clip"
  train(squares(folder), workdir)
  return workdir


def test_it_learns_what_the_captions_say_and_retrieves_held_out_images(trained):
  asked = {"evals.zero_shot.templates": "('a {} square.',)"}  # as the captions speak, which is all that it has read
  found = evaluate(trained, overrides=asked, names=("retrieval", "zero_shot", "knn"), show=False)
  scores, detail = found.row, found.details[found.this]
  assert scores["t2i R@5"] > 80 and scores["i2t R@5"] > 80  # colours, not places, are learned so soon; chance: 16
  assert scores["zero-shot"] > 60 and scores["class names in vocabulary"] == 100  # chance: 12.5
  assert detail["mean R"]["texts"] == 48 and detail["mean R"]["t2i_same_text_r1"] >= scores["t2i R@1"]
  assert {"knn"} == set(found.rows["raw pixels"])  # no text tower there
  # Every kept metric of the loss has been written.
  assert {"r1_image_to_text", "scale", "pair_cosine", "modality_gap"} <= set(read_metrics(trained)[-1])


def test_the_tokenizer_lies_in_the_workdir_and_in_the_checkpoint(trained, folder):
  run = open_run(trained)
  assert (trained / "tokenizer.json").read_text() == run.meta["tokenizer"] == run.tokenizer.json
  assert run.meta["data"]["tokenizer"] == run.tokenizer.digest


def test_another_tokenizer_is_refused_and_its_own_is_taken(trained, folder, tmp_path):
  import shutil

  from jepa_jax.data.tokenizer import train_tokenizer

  workdir = shutil.copytree(trained, tmp_path / "run")
  other = tmp_path / "other.json"
  other.write_text(train_tokenizer(["another text"], 300).json)
  longer = {"total": "152steps"}
  captions = squares(folder).data.captions
  with_ = lambda path: dataclasses.asdict(captions) | {"tokenizer": str(path)}
  data = {"source": "folder", "root": str(folder), "canvas_px": 16}
  start = Start(accept_change=True)
  with pytest.raises(ValueError, match=r"learned the ids of the tokenizer .*tokenizer\.json"):
    train(squares(folder, data=data | {"captions": with_(other)}, **longer), workdir, start)
  train(squares(folder, data=data | {"captions": with_(workdir / "tokenizer.json")}, **longer), workdir, start)
  with pytest.raises(ValueError, match="learned the ids of the tokenizer"):
    cfg = squares(folder, data=data | {"captions": with_(other)}, **longer)
    train(cfg, tmp_path / "new", Start(init_from=str(trained), init_what="text"))


def test_a_frozen_tower_comes_from_somewhere_and_stays_what_it_is(trained, folder, tmp_path):
  frozen = {"objective": COMMON | {"name": "clip", "image_lr": 0.0, "views": COMMON["views"]}, "total": "3steps"}
  with pytest.raises(ValueError, match="encoder is frozen .* --init-from=WORKDIR --init-what=encoder"):
    train(squares(folder, **frozen), tmp_path / "nowhere")
  state = train(squares(folder, **frozen, optim__weight_decay=0.5), tmp_path / "lit", Start(init_from=str(trained)))
  before = open_run(trained)
  theirs = before.networks(before.experiment())
  for a, b in zip(jax.tree.leaves(theirs["params"]["encoder"]), jax.tree.leaves(state.params["encoder"]), strict=True):
    np.testing.assert_array_equal(a, b)
  sizes = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  trained_size = sizes({k: v for k, v in state.params.items() if k != "encoder"})
  assert sizes(state.opt_state) < 2 * trained_size + 100  # Adam's moments of the rest alone


def test_a_run_does_not_go_on_with_a_tower_thawed(trained, folder, tmp_path):
  frozen = squares(folder, objective__image_lr=0.0, total="2steps", checkpoint__every="2steps")
  train(frozen, tmp_path / "lit", Start(init_from=str(trained)))
  thawed = squares(folder, total="4steps", checkpoint__every="2steps")
  with pytest.raises(ValueError, match="image_lr=1.0, and it was 0.0 up to step 2 .* --init-what=everything"):
    train(thawed, tmp_path / "lit", Start(accept_change=True))


def test_a_frozen_tower_with_batchnorm_uses_the_averages_it_came_with():
  resnet = {"name": "resnet", "variant": "18", "stem": "cifar", "width": 8, "image_size": 16}
  run = experiment("clip", encoder=resnet, objective=COMMON | {"name": "clip", "image_lr": 0.0})
  before = jax.device_get(start_of(run))
  after, _ = run_steps(run, 1)
  leaves = lambda state: jax.tree.leaves((state.params["encoder"], state.model_state["encoder"]))
  for a, b in zip(leaves(before), leaves(after), strict=True):
    np.testing.assert_array_equal(a, b)

  def features(rows):
    images = Views((jnp.asarray(np.random.RandomState(0).randn(8, 1, 16, 16, 1)[rows], jnp.float32),), ())
    return run.objective.encode_image(before.params, before.model_state, images, None)[0][0]

  # With the statistics of the batch, what an image is would depend on the others.
  np.testing.assert_allclose(features([0, 1, 2])[0], features([0, 5, 7])[0], rtol=1e-5, atol=1e-6)


def test_a_slower_tower_moves_by_its_multiple():
  sgd = SGD | {"optim__weight_decay": 0.0}
  plain = experiment("clip", **sgd)
  slow = experiment("clip", **(sgd | {"objective": COMMON | {"name": "clip", "text_lr": 0.25}}))
  start, moved = start_of(plain).params, []
  start = jax.device_get(start)
  for run in (plain, slow):
    state, _ = run_steps(run, 1)
    moved.append(jax.tree.map(lambda a, b: np.asarray(b) - a, start, jax.device_get(state.params)))
  for a, b in zip(jax.tree.leaves(moved[0]["text"]), jax.tree.leaves(moved[1]["text"]), strict=True):
    np.testing.assert_allclose(0.25 * a, b, atol=1e-7)
  for a, b in zip(jax.tree.leaves(moved[0]["encoder"]), jax.tree.leaves(moved[1]["encoder"]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"objective": COMMON | {"name": "clip", "captions": 0}}, "captions=0 must be at least 1"),
    ({"objective": COMMON | {"name": "clip", "temperature": 0.0}}, "temperature=0.0 lies in"),
    ({"objective": COMMON | {"name": "clip", "sigreg": 1.0}}, r"sigreg=1.0 lies in \[0, 1\)"),
    ({"objective": COMMON | {"name": "clip", "text_lr": -1.0}}, "0 or more"),
    ({"objective": COMMON | {"name": "cross_modal", "sigreg": 0.0}}, "every embedding becomes the same"),
    ({"objective": COMMON | {"name": "cross_modal", "predictor": {"hidden": (8,), "out": 4}}}, "predictor.out=4"),
    ({"objective": COMMON | {"name": "siglip", "scale": 0.0}}, "scale=0.0 must be positive"),
    ({"objective": COMMON | {"name": "clip", "text": {"width": 10, "num_heads": 4}}}, "not divisible by num_heads"),
    ({"objective": COMMON | {"name": "clip", "views": TINY["objective"]["views"]}}, "a pair is one view and its text"),
  ],
)
def test_settings_that_cannot_be_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    build_config(values(**changes))


def test_a_method_of_captions_says_where_they_are_missing_or_too_few():
  with pytest.raises(ValueError, match="clip learns from captions: say in data.captions.train"):
    tiny_experiment(objective=COMMON | {"name": "clip"})
  with pytest.raises(ValueError, match="objective.captions=4, and data.captions.per_image=3"):
    experiment("clip", objective=COMMON | {"name": "clip", "captions": 4})


def test_more_captions_than_any_image_has_are_refused_before_anything_is_made(folder, tmp_path):
  cfg = squares(folder, objective__captions=3, data__captions__per_image=3)
  with pytest.raises(ValueError, match="objective.captions=3, and no image has more than 2: draw 2 or fewer"):
    train(cfg, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_vision_transformer_with_drop_path_works_too():
  state, history = run_steps(experiment("clip", encoder=VIT | {"drop_path": 0.2}, microbatch=2), 1)
  assert np.isfinite(history[0]["loss"])
