"""Ablations: variants are runs of the one loop, resumed, refused where settings differ; tables and figures."""

import itertools
import json
import math

import numpy as np
import pytest

import jepa_jax.__main__ as cli
from jepa_jax.config import load_config
from jepa_jax.runs import open_run
from jepa_jax.study import (
  ablation,
  choices,
  collapse,
  equivariance,
  few_images,
  figures,
  held_out,
  selection,
  slices,
  statistic,
  variants,
)
from jepa_jax.study.tables import Result
from tests.test_ijepa import ENCODER, IJEPA
from tests.test_iwm import IWM
from tests.test_neighbour_methods import METHODS
from tests.tiny import MLP, TINY, tiny_values


def write_config(folder, **changes):
  values = tiny_values(**({"encoder": ENCODER, "objective": IJEPA, "total": "2steps"} | changes))
  path = folder / "ijepa_tiny.py"
  path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict({values!r})\n")
  return str(path)


def test_vary_reads_values_and_changes_that_go_together():
  two = ablation.parse_vary("optim.lr=1e-3|3e-3")
  assert [v.overrides for v in two] == [(("optim.lr", "1e-3"),), (("optim.lr", "3e-3"),)]
  (both,) = ablation.parse_vary("_=a=1&b=(1, 2)")
  assert both.overrides == (("a", "1"), ("b", "(1, 2)"))
  with pytest.raises(ValueError, match="write a setting and its values"):
    ablation.parse_vary("optim.lr")


def test_every_switch_of_the_collapse_study_builds(tmp_path):
  for method, switches in collapse.SWITCHES.items():
    objective = IJEPA if method == "ijepa" else {"name": method, **METHODS[method]}
    path = write_config(tmp_path, objective=objective)
    all_variants = [variants.Variant(name, tuple(s.items())) for name, s in switches.items()]
    built = variants.configs(path, all_variants, [0], {})
    assert len(built) == len(switches) and len(set(built.values())) >= len(switches) - 1
  path = write_config(tmp_path)
  with pytest.raises(ValueError, match="variant 'x': .*did you mean"):
    variants.configs(path, [variants.Variant("x", (("objective.targt", "online"),))], [0], {})


@pytest.mark.slow
def test_collapse_study_trains_evaluates_resumes_and_draws(tmp_path, monkeypatch):
  path, folder = write_config(tmp_path), tmp_path / "study"
  shared = {"probe.spectrum_every": "1"}
  first = collapse.run(path, str(folder), "I-JEPA|no EMA", [0], shared)
  assert first["table"].count("\n") == 3 and (folder / "collapse.png").stat().st_size > 10_000
  saved = json.loads((folder / "no_EMA-seed0" / variants.RESULT).read_text())
  assert saved["config"]["objective"]["target"] == "online" and saved["result"]["steps"] == 2
  monkeypatch.setattr(variants, "train", lambda *_: pytest.fail("trained again"))
  assert collapse.run(path, str(folder), "I-JEPA|no EMA", [0], shared) == first
  moved = shared | {"data.num_threads": "3", "log.every": "100%", "evals.names": "('knn', 'linear', 'attentive')"}
  assert collapse.run(path, str(folder), "I-JEPA|no EMA", [0], moved) == first  # none of it is of what was measured
  for changed in ({"optim.lr": "1e-4"}, {"evals.knn.k": "3"}):
    with pytest.raises(ValueError, match=rf"result.json is of other settings:\n  {next(iter(changed))}: .* -> "):
      collapse.run(path, str(folder), "I-JEPA", [0], shared | changed)


def test_collapse_study_refuses_what_it_cannot_switch(tmp_path):
  with pytest.raises(ValueError, match="none of: I-JEPA"):
    collapse.run(write_config(tmp_path), str(tmp_path), only="nothing")
  path = write_config(tmp_path, objective=tiny_values()["objective"])
  with pytest.raises(ValueError, match="lejepa has no switches here; ijepa, byol, mocov3, dino have"):
    collapse.run(path, str(tmp_path))


def iwm_config(folder):
  data = TINY["data"] | {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
  return write_config(folder, encoder=ENCODER, data=data, objective=IWM)


def test_every_cell_of_the_equivariance_study_builds_and_has_its_own_actions(tmp_path):
  grid = itertools.product(("none", "feature", "sequence"), (1, 2), equivariance.STRENGTHS)
  cells = [equivariance.variant(*cell) for cell in grid]
  built = variants.configs(iwm_config(tmp_path), cells, [0], {})
  objectives = {v.name: cfg.objective for (v, _), cfg in built.items()}
  assert len(objectives) == 18
  jitter, strong = objectives["feature, 1 deep, jitter"], objectives["sequence, 2 deep, strong"]
  assert jitter.source.grayscale_p == jitter.source.blur_p[0] == jitter.source.solarize_p[0] == 0
  assert (strong.predictor.conditioning, strong.predictor.depth) == ("sequence", 2)
  assert strong.source.brightness == strong.views.color.brightness == 2 * jitter.source.brightness
  assert strong.source.grayscale_p == IWM["source"]["grayscale_p"]


@pytest.mark.slow
def test_equivariance_study_measures_draws_and_resumes(tmp_path, monkeypatch):
  path, folder = iwm_config(tmp_path), tmp_path / "study"
  sizes = {"evals.mrr.images": "4", "evals.mrr.bank": "8", "evals.mrr.chunk": "8", "data.max_train": "32"}
  options = dict(depths=[1], strengths=["jitter"], conditioning=["none", "feature"], seeds=[0])
  options |= dict(evals=("mrr", "linear"), overrides=sizes)
  first = equivariance.run(path, str(folder), **options)
  assert first["table"].count("\n") == 3 and (folder / "equivariance.png").stat().st_size > 10_000
  none = [line for line in first["table"].split("\n") if line.startswith("| none")]
  assert all(f"| {first['blind_mrr']:.1f} " in line for line in none) and len(none) == 1
  monkeypatch.setattr(variants, "train", lambda *_: pytest.fail("trained again"))
  assert equivariance.run(path, str(folder), **options) == first


def test_rank_correlation_is_over_the_cells_that_have_both_and_of_what_differs():
  means = [{"MRR jitter": float(i), "linear": 9.0 - i, "predictor": 5.0} for i in range(3)]
  means[0]["attentive"] = 4.0
  assert equivariance.rank_correlations(means) == {"linear": -1.0}


def test_a_run_that_diverged_leaves_a_gap_in_the_figure(tmp_path):
  scores = {("none", 1, s): [{"MRR jitter": 2.0, "linear": 40.0 + i}] for i, s in enumerate(("jitter", "strong"))}
  scores |= {("feature", 1, s): [{"MRR jitter": 9.0, "linear": 38.0}, {}] for s in ("jitter", "strong")}
  figures.draw_equivariance(tmp_path / "equivariance.png", scores, {"linear": -0.5}, "MRR jitter", 2.4)
  assert (tmp_path / "equivariance.png").stat().st_size > 10_000


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"conditioning": ["film"]}, "--conditioning: film is none of none, feature, sequence"),
    ({"strengths": ["weak"]}, "--strengths: weak is none of jitter, destructive, strong"),
    ({"evals": ("linear",)}, "must hold mrr"),
  ],
)
def test_equivariance_study_refuses_what_it_does_not_know(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    equivariance.run(iwm_config(tmp_path), str(tmp_path), **options)
  with pytest.raises(ValueError, match="only IWM's predictor"):
    equivariance.run(write_config(tmp_path), str(tmp_path))


def lejepa_config(folder):
  changes = {"optim": {"lr": 1e-2, "warmup": "0steps"}, "total": "4steps", "encoder": MLP}
  views = {name: value for name, value in TINY["objective"]["views"].items() if name != "local_crops"}
  return write_config(folder, objective=TINY["objective"] | {"views": views}, **changes)


@pytest.mark.slow
def test_an_older_table_in_the_folder_is_not_taken_for_the_one_just_written(tmp_path):
  """File names are digests: the largest is any of them, not the newest."""
  runs = variants.configs(lejepa_config(tmp_path), [variants.Variant("x")], [0], {})
  older = tmp_path / "x-seed0" / "evals" / "9-zzzzzzzzzz.json"
  older.parent.mkdir(parents=True)
  detail = {"linear": {"selected": {"accuracy": -1.0}}}
  older.write_text(json.dumps({"rows": {"lejepa, step 2": {"linear": -1.0}}, "details": {"lejepa, step 2": detail}}))
  (result,) = variants.run_variants(runs, tmp_path, ["linear"])
  assert result.score("linear_val") >= 0 and result.score("linear") >= 0


def test_selection_correlates_loss_with_probe_over_the_grid(tmp_path):
  """A made-up world in which loss / lam^0.4 predicts perfectly and the plain loss does not."""
  rows = []
  for lam, lr in itertools.product([0.01, 0.1], [0.001, 0.01, 0.1]):
    quality = 10 * lr - lam
    losses = {"loss": lam**0.4 * (2 - quality), "sigreg": 1.0 + lam, "inv": 1.0 + lr}
    rows.append({"lam": lam, "lr": lr, **losses, "linear": 50 + quality, "knn": 40 + quality})
  rhos = selection.correlations(rows, alpha=0.4)
  assert rhos["loss / lam^0.4"] == {"linear": 1.0, "knn": 1.0} and rhos["loss, within one lam"]["linear"] == 1.0
  assert rhos["loss"]["linear"] < 1 and rhos["inv"]["linear"] < 0
  twice = [row for row in rows for _ in range(2)]  # both halves hold the whole grid
  assert selection.judged_alpha(twice)["first"] == {"alpha": 0.4, "there": 1.0, "other_half": 1.0}
  extra = {"held_loss": 1.0, "held_inv": 1.0, "held_sigreg": 1.0, "rankme": math.nan, "online": 50.0}
  rivals = selection.correlations([row | extra | {"lidar": row["linear"]} for row in rows], alpha=0.4)
  assert rivals["LiDAR of the embeddings"]["linear"] == 1.0 and "RankMe of the features" not in rivals
  figures.draw_selection(tmp_path / "selection.png", rows, selection.scores(rows, 0.4), rhos)
  assert (tmp_path / "selection.png").stat().st_size > 10_000
  with pytest.raises(ValueError, match="widen --lam or --lr"):
    selection.correlations(rows[:1], 0.4)


@pytest.mark.slow
def test_selection_trains_leaves_out_what_diverged_and_resumes(tmp_path, monkeypatch, capsys):
  command = ["study", "selection", f"--config={lejepa_config(tmp_path)}", f"--workdir={tmp_path}/study"]
  command += ["--lam=0.02,0.1", "--lr=1e-3,1e30"]
  assert cli.main(command) == 0
  printed = capsys.readouterr().out
  assert "| loss / lam^0.4 |" in printed and "Diverged, and left out: lam 0.02 lr 1e+30, lam 0.1 lr 1e+30" in printed
  assert (tmp_path / "study" / "selection.csv").read_text().count("\n") == 5
  monkeypatch.setattr(variants, "train", lambda *_: pytest.fail("trained again"))
  assert cli.main(command) == 0 and capsys.readouterr().out == printed


def test_selection_refuses_what_is_no_lejepa(tmp_path):
  with pytest.raises(ValueError, match="lam are LeJEPA's"):
    selection.run(write_config(tmp_path), str(tmp_path))


@pytest.mark.slow
def test_the_studies_of_slices_and_statistics_train_measure_draw_and_resume(tmp_path, monkeypatch):
  path = lejepa_config(tmp_path)
  shared = {"batch_size": "16", "evals.names": "('knn', 'linear')"}
  first = slices.run(path, str(tmp_path / "slices"), "16 redrawn|4096 fixed", [0], overrides=shared)
  assert first["table"].count("\n") == 3 and "EP, all slices" in first["table"]
  assert (tmp_path / "slices" / "slices.png").stat().st_size > 10_000
  asked = {"only": "visreg", "seeds": [0], "collapsed": True, "overrides": shared}
  second = statistic.run(path, str(tmp_path / "statistic"), **asked)
  assert [result.variant for result in second["results"]] == ["invariance alone", "visreg, from it"]
  kept = json.loads((tmp_path / "statistic" / "visreg_from_it-seed0" / "result.json").read_text())
  assert kept["init_from"] == "invariance_alone-seed0, step 4" and kept["init_what"] == "everything"
  assert open_run(tmp_path / "statistic" / "visreg_from_it-seed0").meta["started_from"]["what"] == "everything"
  scores = second["results"][1].scores
  assert scores["energy"] > 0 and scores["sliced"] > 0 and scores["step_ms"] > 0
  for name in ("statistic.png", "pushes.png", "gradients.png"):
    assert (tmp_path / "statistic" / name).stat().st_size > 10_000
  monkeypatch.setattr(variants, "train", lambda *_: pytest.fail("trained again"))
  monkeypatch.setattr(held_out, "embeddings", lambda *_: pytest.fail("measured again"))
  assert statistic.run(path, str(tmp_path / "statistic"), **asked)["table"] == second["table"]


def test_every_regulariser_is_given_the_lam_with_which_it_pushes_as_hard(tmp_path):
  base = load_config(lejepa_config(tmp_path))
  of = lambda name, factor=1.0: float(dict(statistic.variant(base, name, factor).overrides)["objective.lam"])
  assert of("epps_pulley") == pytest.approx(base.objective.lam)
  for name in ("moments", "cramer_von_mises", "vicreg"):
    lam, push = of(name), statistic.push(base, name, 0.5)
    same = base.objective.lam / (1 - base.objective.lam) * statistic.push(base, "epps_pulley", 0.5)
    assert lam / (1 - lam) * push == pytest.approx(same, rel=1e-4)
  three = of("moments", 3.0)
  assert three / (1 - three) == pytest.approx(3 * of("moments") / (1 - of("moments")), rel=1e-4)


def test_a_dry_run_says_the_cells_and_their_time_and_trains_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(variants, "train", lambda *_: pytest.fail("trained"))
  text = slices.render(slices.run(lejepa_config(tmp_path), str(tmp_path / "x"), "16 redrawn|16 fixed", [0, 1], True))
  assert "16 fixed, seed 1: 4 steps, about" in text and "4 cells, about" in text
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  ("run", "message"),
  [
    (lambda path: slices.run(path, "x", only="17 fixed"), "17 fixed is none of: 16 redrawn"),
    (lambda path: statistic.run(path, "x", factors=[0.0]), "give numbers above 0"),
  ],
)
def test_the_studies_of_lejepas_claims_refuse_what_they_do_not_know(tmp_path, run, message):
  with pytest.raises(ValueError, match=message):
    run(lejepa_config(tmp_path))
  with pytest.raises(ValueError, match="the claims are LeJEPA's"):
    slices.run(write_config(tmp_path), "x")


@pytest.mark.slow
def test_few_images_beside_a_general_encoder_frozen_and_continued(tmp_path, monkeypatch):
  path, general = lejepa_config(tmp_path), tmp_path / "general"
  assert cli.main(["train", f"--config={path}", f"--workdir={general}", "--config.seed=3"]) == 0
  arms, sizes = ("scratch", "frozen", "continued", "supervised"), [32, 48]
  first = few_images.run(path, str(tmp_path / "few"), str(general), sizes, arms, [0])
  assert first["table"].count("\n") == 3 and (tmp_path / "few" / "few_images.png").stat().st_size > 10_000
  rows = (tmp_path / "few" / "few_images.csv").read_text().splitlines()
  assert rows[0] == "arm,images,seed,linear,knn" and len(rows) == 9
  meta = open_run(tmp_path / "few" / "continued_32-seed0").meta
  assert str(general) in json.dumps(meta["started_from"])
  monkeypatch.setattr(variants, "train", lambda *_: pytest.fail("trained again"))
  monkeypatch.setattr(few_images, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
  assert few_images.run(path, str(tmp_path / "few"), str(general), sizes, arms, [0]) == first


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"arms": ["linear"]}, "--arms: linear is none of scratch, frozen"),
    ({}, "--general is empty, and frozen, continued starts? from it"),
    ({"arms": ["scratch"], "images": [8]}, "give at least one batch, 16 images"),
    ({"arms": ["scratch"], "images": [32], "overrides": {"total": "2ep"}}, "give steps: --config.total=1000steps"),
  ],
)
def test_few_images_refuses_what_cannot_be_compared(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    few_images.run(lejepa_config(tmp_path), str(tmp_path / "x"), **options)


def test_every_choice_builds_and_differs_from_the_config(tmp_path):
  path = write_config(tmp_path, objective=TINY["objective"], total="2ep", encoder=TINY["encoder"])
  base = load_config(path)
  changes = choices.variants_of(base)
  built = variants.configs(path, [variants.Variant(n, tuple(c.items())) for n, c in changes.items()], [0], {})
  assert {v.name for (v, _), cfg in built.items() if cfg == base} == {choices.BASE}
  assert {"drop path .1", "weight average .99", "batch 32", "stop-gradient on the centre"} <= changes.keys()
  again = choices.variants_of(load_config(path, {"encoder.drop_path": "0.1", "objective.lam": "0.3"}))
  assert "drop path .1" not in again and "lam 0.6" in again and "lam 1.2" not in again
  with pytest.raises(ValueError, match="another batch would see other images"):
    choices.run(lejepa_config(tmp_path), str(tmp_path / "x"))


def cells(**values):
  return [Result(n, s, 1, {"linear_val": v}, 0.0) for n, of in values.items() for s, v in enumerate(of)]


def test_a_choice_counts_where_it_moves_the_probe_beyond_chance():
  base = {choices.BASE: (50.0, 51.0)}
  said = choices.judge(cells(**base, a=(51.0, 51.6), b=(60.0, 60.8), c=(46.0, 40.0), d=(50.2, 51.3))).splitlines()
  assert len(said) == 2 and said[1].startswith("b: +9.9 points")
  assert "no choice moves it beyond chance" in choices.judge(cells(**base, a=(50.4, 50.9)))
  assert "a: diverged in 1 of 2 runs" in choices.judge(cells(**base, a=(math.nan, 51.0), b=(50.0, 50.2)))
  one_seed, no_base = {choices.BASE: (90.0,), "a": (10.0,)}, {choices.BASE: (math.nan, 9.0), "a": (1.0, 2.0)}
  for lone in (base, one_seed, no_base):
    assert "Nothing more can be said" in choices.judge(cells(**lone))


def test_pure_noise_is_called_an_effect_in_about_one_study_in_twenty():
  rng, found = np.random.default_rng(0), 0
  for _ in range(200):
    rows = {name: rng.standard_normal(2) for name in (choices.BASE, *map(str, range(15)))}
    found += "no choice moves it" not in choices.judge(cells(**rows))
  assert found < 25


def test_another_general_encoder_is_not_taken_for_the_one_that_a_run_started_from(tmp_path):
  path, shared = lejepa_config(tmp_path), {"total": "1steps"}
  for name, seed in (("one", 1), ("two", 2)):
    options = [f"--workdir={tmp_path / name}", f"--config.seed={seed}", "--config.total=1steps"]
    assert cli.main(["train", f"--config={path}", *options]) == 0
  few, rest = str(tmp_path / "few"), ([32], ["continued"], [0], False, shared)
  go = lambda name: few_images.run(path, few, str(tmp_path / name), *rest)
  go("one")
  with pytest.raises(ValueError, match=r"of other settings:\n  init_from: .*one, step 1 -> .*two, step 1"):
    go("two")
  with pytest.raises(ValueError, match="there are 4,096 training images"):
    few_images.run(path, few, "", [5000], ["scratch"], [0], False, shared)


def test_a_cell_that_cannot_be_built_is_named_before_anything_is_trained(tmp_path, monkeypatch):
  monkeypatch.setattr(variants, "train", lambda *_: pytest.fail("trained"))
  path = lejepa_config(tmp_path)
  with pytest.raises(ValueError, match="variant 'batch 64'.*leave it out with --only"):
    few = {"total": "4ep", "batch_size": "16", "data.max_train": "48"}
    choices.run(path, str(tmp_path / "x"), "batch 32|batch 64", [0], overrides=few)
