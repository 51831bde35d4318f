"""Config files are strict: whatever is wrong in one is said before anything is computed, the right key beside it."""

import dataclasses
from pathlib import Path

import pytest

from jepa_jax.bench import fuzz
from jepa_jax.config import build_config, difference, encoders, load_config, to_dict, variants, without_recomputation
from jepa_jax.duration import Duration
from tests.tiny import tiny_config, tiny_values

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_builds_and_survives_the_round_trip_through_json(path):
  names = [load_config(f"{path}:{variant}") for variant in variants(path)] or [load_config(path)]
  for cfg in names:
    assert cfg.name.startswith(path.stem)
    assert build_config(to_dict(cfg)) == cfg
  assert len({cfg.name for cfg in names}) == len(names)
  assert load_config(path) == names[0]  # without a variant the first


def test_a_variant_that_a_file_does_not_have_is_an_error_that_lists_those_there_are():
  file = next(path for path in CONFIGS if path.stem == "lejepa_imagenet")
  assert load_config(f"{file}:vitl").encoder.variant == "large"
  with pytest.raises(ValueError, match=r"has no 'vitx', but vitb, vitl, vith, vitg; did you mean 'vit"):
    load_config(f"{file}:vitx")
  with pytest.raises(ValueError, match="holds one experiment; leave out :vitl"):
    load_config(f"{file.parent / 'lejepa_digits.py'}:vitl")


@pytest.mark.parametrize(
  "key, right",
  [
    ("optim__weight_decy", "config.optim.weight_decay"),
    ("bach_size", "config.batch_size"),
    ("objective__lamb", "config.objective.lam"),
    ("objective__views__global_crops__size", "config.objective.views.global_crops.size_px"),
    ("weight_decay", "config.optim.weight_decay"),  # right name, wrong group
    ("encoder__patch", "config.encoder.patch_size"),
  ],
)
def test_unknown_key_is_an_error_that_names_the_nearest_right_one(key, right):
  with pytest.raises(ValueError, match=f"is not a setting; did you mean {right}"):
    tiny_config(**{key: 1})


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("batch_size", "many", "config.batch_size takes int"),
    ("batch_size", 2.5, "config.batch_size takes int"),
    ("batch_size", True, "config.batch_size takes int"),
    ("optim__lr", "fast", "config.optim.lr takes float"),
    ("log__tensorboard", 1, "config.log.tensorboard takes true or false"),
    ("total", "100", "not a duration"),
    ("total", "1e30steps", "too long: steps are counted up to 2,147,483,647"),
    ("optim__lr", float("inf"), "config.optim.lr takes a finite number, not inf"),
    ("batch_size", 0, "batch_size=0: a batch has at least 1 image"),
    ("batch_size", -4, "batch_size=-4"),
    ("objective__views__global_crops__ratio", (1e9, 1e9), "ratio is .*0.01 <= low <= high <= 100"),
    ("optim__weight_decay", float("nan"), "config.optim.weight_decay takes a finite number, not nan"),
    ("data__mean", (float("nan"),) * 3, r"config.data.mean\[0\] takes a finite number"),
    ("optim__lr", 10**400, "takes a finite number"),
    ("total", 100, "not a duration"),
    ("objective__views__global_crops__size_px", 10**6, "a crop has a side of at most 8,192 px"),
    ("seed", -1, "seed=-1 must lie between 0 and 4,294,967,295"),
    ("seed", 2**32, "must lie between 0 and 4,294,967,295"),
    ("encoder", 3, "config.encoder is a group of settings with a name of convnet, mixer, mlp, resnet, vit"),
    (
      "encoder",
      {"image_size": 16},
      "config.encoder.name is missing: set it to one of convnet, mixer, mlp, resnet, vit",
    ),
    ("encoder__name", "vti", "must be one of convnet, mixer, mlp, resnet, vit; did you mean 'vit'"),
    ("encoder__pool", "men", "config.encoder.pool is 'men', but must be one of mean, cls"),
    ("encoder__widths", (3, 4), "config.encoder.widths is not a setting"),
    ("objective__views__global_crops__scale", 0.3, r"takes a list such as \(1, 2\)"),
    ("objective__views__global_crops__scale", (0.1, 0.2, 0.3), "takes 2 values, not 3"),
    ("objective__name", "lejpa", "did you mean 'lejepa'"),
    ("optim__name", "adam", "must be one of adamw, sgd, lars"),
    ("objective__lam", 1.5, "lam=1.5 must lie in"),
    ("encoder__image_size", 20, "nearest that are: 16 or 24"),
    ("checkpoint__every", "0steps", "must be positive"),
    ("log__every", "0steps", "must be positive"),
    ("optim__weight_decay", -3.0, "weight_decay=-3.0 must be 0"),
    ("optim__momentum", 0.5, "adamw with a cosine schedule does not read momentum"),
    ("probe__spectrum_every", -1, "must be 0 .never. or more"),
    ("evals__knn__k", 0, "config.evals.knn: k = 0: every k must be 1 or more"),
    ("evals__fewshot__shots", (), "config.evals.fewshot: .*at least one"),
    ("evals__mrr__bank", 64, "evals.mrr is set, but evals.names=knn,linear,fewshot asks for nothing that reads it"),
    ("evals__tuning__epochs", 3, "evals.tuning is set, but .* ask for attentive or fine_tuning or predictor_tuning"),
    ("evals__names", ("knn", "lineer"), "unknown evaluation 'lineer'; choose from .*did you mean 'linear'"),
    ("evals__precision", "half", "must be one of auto, float16, float32"),
    ("evals__memory_gb", 0.0, "memory_gb positive"),
    ("data__name", "cifar10", "source 'synthetic' does not read it; tfds does"),
    ("data__mean", (0.5, 0.5, 0.5), r"data.mean is .* but data.channels is 1; give one number per channel"),
  ],
)
def test_value_of_the_wrong_type_or_range_is_an_error_that_says_where(key, value, message):
  with pytest.raises(ValueError, match=message):
    tiny_config(**{key: value})


def test_missing_setting_is_named():
  values = tiny_values()
  del values["batch_size"]
  with pytest.raises(ValueError, match="config.batch_size is missing"):
    build_config(values)


def test_overrides_take_the_type_of_their_setting():
  overrides = {
    "optim.lr": "1",
    "total": "7ep",
    "log.tensorboard": "true",
    "objective.views.global_crops.scale": "(0.2,0.9)",
    "data.source": "folder",
    "data.root": "5",
    "objective.views.flip_p": "1e-1",
  }
  cfg = build_config(tiny_values(), overrides)
  assert cfg.optim.lr == 1.0 and isinstance(cfg.optim.lr, float)
  assert cfg.total == Duration(7, "ep")
  assert cfg.log.tensorboard is True
  assert cfg.objective.views.global_crops.scale == (0.2, 0.9)
  assert cfg.data.root == "5"
  assert cfg.objective.views.flip_p == 0.1
  with pytest.raises(ValueError, match="config.optim.lr takes float, not 'fast'"):
    build_config(tiny_values(), {"optim.lr": "fast"})
  with pytest.raises(ValueError, match="config.batch_size is a value, not a group"):
    build_config(tiny_values(), {"batch_size.x": "1"})


def test_difference_leaves_out_what_belongs_to_the_machine():
  old = to_dict(tiny_config())
  assert difference(old, to_dict(tiny_config(mesh__fsdp=2, log__every="9steps", data__num_threads=3))) == []
  lines = difference(old, to_dict(tiny_config(optim__lr=0.5, seed=3)))
  assert lines == ["optim.lr: 0.01 -> 0.5", "seed: 0 -> 3"]


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    tiny_config().batch_size = 3


@pytest.mark.parametrize(
  "text, steps", [("100ep", 1250), ("2.5epochs", 31), ("5000steps", 5000), ("1step", 1), ("2%", 20), ("1e3steps", 1000)]
)
def test_durations_in_epochs_steps_and_shares(text, steps):
  assert Duration.parse(text).steps(steps_per_epoch=12.5, total_steps=1000) == steps


@pytest.mark.parametrize("text", ["1000000steps", "1234567steps", "2.5ep", "0.001%", "1e6steps"])
def test_durations_keep_their_digits_in_the_saved_config(text):
  length = Duration.parse(text)
  assert Duration.parse(str(length)) == length


def test_share_of_nothing_is_an_error():
  with pytest.raises(ValueError, match="the total itself must be in epochs or steps"):
    Duration.parse("2%").steps(10)


def test_config_file_that_is_missing_lists_those_there_are(tmp_path):
  (tmp_path / "here.py").write_text("")
  with pytest.raises(ValueError, match="here.py"):
    load_config(tmp_path / "gone.py")
  with pytest.raises(ValueError, match="defines no get_config"):
    load_config(tmp_path / "here.py")


def test_options_of_a_protocol_that_another_one_brings_are_read():
  """predictor_tuning runs the linear and the attentive probe beside it."""
  evals = tiny_config(evals={"names": ("predictor_tuning",), "linear": {"epochs": 3}, "tuning": {"epochs": 2}}).evals
  assert list(evals.asked) == ["predictor_tuning", "linear", "attentive"]
  assert evals.asked["linear"].epochs == 3


def test_other_evaluations_by_an_override_leave_behind_the_options_of_those_that_are_not_asked_for():
  values = tiny_values(evals={"names": ("knn", "linear"), "linear": {"epochs": 3}, "knn": {"k": 7}})
  evals = build_config(values, {"evals.names": "('knn',)"}).evals
  assert evals.linear.epochs == 50 and evals.knn.k == 7
  assert build_config(values, {"evals.names": "knn, linear"}).evals.names == ("knn", "linear")
  with pytest.raises(ValueError, match="evals.linear is set, but evals.names=knn asks for nothing that reads it"):
    build_config(values, {"evals.names": "('knn',)", "evals.linear.epochs": "3"})


def test_another_encoder_by_an_override_leaves_the_settings_that_it_does_not_have():
  values = tiny_values(encoder={"name": "convnet", "image_size": 16, "widths": (8, 16)})
  vit = build_config(values, {"encoder.name": "vit", "encoder.patch_size": "8"}).encoder
  assert (vit.name, vit.image_size, vit.patch_size) == ("vit", 16, 8)
  with pytest.raises(ValueError, match="config.encoder.widths is not a setting"):
    build_config(values, {"encoder.name": "vit", "encoder.widths": "(3, 4)"})  # typed: the user's own fault


def test_another_method_by_an_override_keeps_what_means_the_same_in_both():
  """A weight `lam` of one method is no weight of another, though it has the name; what was typed counts."""
  from jepa_jax.objectives.barlow import BarlowConfig
  from jepa_jax.objectives.dino import DINOConfig
  from tests.test_image_text import COMMON, values

  base = tiny_values(objective__lam=0.7, objective__views__local_crops__num=0)
  barlow = build_config(base, {"objective.name": "barlow"}).objective
  assert barlow.lam == BarlowConfig.lam and barlow.projector.out == 8 and barlow.views.num_views == 2
  assert build_config(base, {"objective.name": "barlow", "objective.lam": "0.2"}).objective.lam == 0.2
  dino = build_config(base, {"objective.name": "dino"}).objective
  assert dino.projector == DINOConfig(dino.views).projector  # a default of its own
  normed = tiny_values(objective__projector__last_norm="batch", objective__views__local_crops__num=0)
  vicreg = build_config(normed, {"objective.name": "vicreg"}).objective.projector
  assert (vicreg.hidden, vicreg.out, vicreg.last_norm) == (
    (32,),
    8,
    "none",
  )  # how a head is normalised is a method's own
  changes = {"objective.name": "byol", "objective.predictor.out": "8", "objective.predictor.hidden": "(4,)"}
  assert build_config(base, changes).objective.predictor.hidden == (4,)
  assert build_config(base, {"objective.name": "lejepa"}).objective.lam == 0.7  # it is the file's own
  clip = values(objective=COMMON | {"name": "clip", "captions": 2, "temperature": 0.5, "text_lr": 0.1})
  siglip = build_config(clip, {"objective.name": "siglip"}).objective
  assert (siglip.captions, siglip.text_lr, siglip.text.width) == (2, 0.1, 16)


def test_another_source_by_an_override_leaves_the_settings_that_it_does_not_read():
  values = tiny_values(data={"source": "tfds", "name": "cifar10", "canvas_px": 16, "train": "train[:90%]"})
  data = build_config(values, {"data.source": "npz", "data.root": "/somewhere", "data.train": "a"}).data
  assert (data.source, data.name, data.train) == ("npz", "", "a")


def test_every_encoder_of_an_experiment_is_found_and_what_is_computed_twice_is_switched_off():
  cfg = tiny_config(encoder__remat="block", microbatch=2)
  assert [(path, encoder.name) for path, encoder in encoders(cfg)] == [("encoder", "vit")]
  plain = without_recomputation(cfg)
  assert (plain.encoder.remat, plain.microbatch) == ("none", 1) and plain.optim == cfg.optim


# ------------------------------------------------------------------------------------------------ whatever is written
@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:", r"config.py, line 1 is no config file in Python: SyntaxError"),
    ("import not_there", "no config file in Python: ModuleNotFoundError: No module named 'not_there'"),
    ("def get_config(): return [1]", r"get_config\(\) returns list, not an ml_collections.ConfigDict"),
    ("def get_config(): return {(1, 2): 3}", "its names are text"),
    ("lr = rate", "no config file in Python: NameError"),
  ],
)
def test_a_file_that_is_no_config_is_told_so(tmp_path, text, message):
  (tmp_path / "config.py").write_text(text)
  with pytest.raises(ValueError, match=message):
    load_config(tmp_path / "config.py")


def test_odd_settings_make_a_config_or_are_refused_by_name():
  """The long version is `bench fuzz`."""
  result = fuzz.run(cases=700, seed=0, networks_every=10**9)
  assert result["first_faults"] == [] and result["refused"] > 200 and result["accepted"] > 50


def test_the_fuzz_finds_what_ends_in_a_traceback_or_without_a_name(monkeypatch):
  def build(error):
    def fail(*_):
      raise error

    monkeypatch.setattr(fuzz, "build_config", fail)

  for error, message in (
    (TypeError("no"), "optim.lr=1: TypeError: no"),
    (ValueError("no"), "refused without its name"),
  ):
    build(error)
    with pytest.raises(fuzz.NotRefused, match=message):
      fuzz.try_one({"optim": {"lr": 0.1}}, "optim.lr", False, 1)


def test_lejepa_with_one_view_is_refused_unless_it_is_sigreg_alone():
  one = {"objective__views__global_crops__num": 1, "objective__views__local_crops__num": 0}
  with pytest.raises(ValueError, match="with one view there is nothing that should be alike"):
    build_config(tiny_values(**one))
  assert build_config(tiny_values(**one, objective__lam=1.0)).objective.views.num_views == 1


def test_config_typed_twice_is_told_so():
  with pytest.raises(ValueError, match="config.config is not a setting: leave out one of the two"):
    build_config(tiny_values(), {"config.objective.num_slices": "3"})
