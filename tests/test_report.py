"""The page about runs: what it says is in their files, it needs no network, and it says what is wrong."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import socket
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

import jepa_jax.__main__ as cli
from jepa_jax import curves
from jepa_jax.evaluate import evaluate
from jepa_jax.report import command, page, pictures
from jepa_jax.report.facts import Facts, Table, names_of, read_facts
from jepa_jax.report.worries import worries
from jepa_jax.train import train
from tests.tiny import VIT, tiny_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two short runs on digits, one of them evaluated."""
  root = tmp_path_factory.mktemp("runs")
  data = {"source": "digits", "canvas_px": 16, "channels": 1, "mean": (0.3,), "std": (0.35,), "max_train": 200}
  for name, rate in (("first", 1e-2), ("second", 1e-3)):
    cfg = tiny_config(data=data, encoder=VIT, total="3steps", optim__lr=rate, log__views=2)
    train(cfg, root / name)
  evaluate(root / "first", names=("knn",), show=False)
  return root / "first", root / "second"


# ---------------------------------------------------------------- what is drawn


def test_a_smoothed_straight_line_is_itself_and_noise_becomes_less():
  line = np.linspace(3, 9, 500)
  np.testing.assert_allclose(curves.smoothed(line), line, rtol=1e-12)
  noise = np.random.default_rng(0).standard_normal(1000)
  assert curves.smoothed(noise).std() < 0.35 and curves.smoothed(noise[:3]).shape == (3,)


def test_a_thinned_line_keeps_its_highest_and_lowest_points():
  values = np.zeros(10_000)
  values[[17, 5003]] = 1e3, -1e3
  steps, kept = curves.thinned(np.arange(10_000), values)
  assert len(steps) <= 600 and kept.max() == 1e3 and kept.min() == -1e3 and (np.diff(steps) > 0).all()


def test_every_metric_but_counters_has_its_frame_and_what_all_have_stands_first():
  rows = {
    "a": [{"step": 1, "loss": 1.0, "sigreg": 2.0, "bad_images": 0.0}],
    "b": [{"step": 1, "loss": 1.0, "inv": 1.0}],
  }
  assert [panel.keys[0] for panel in curves.panels_of(rows)] == ["loss", "sigreg", "inv"]


def test_live_curves_are_drawn_once_a_minute(tmp_path, monkeypatch):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
  clock, drawn = [0.0], []
  monkeypatch.setattr(curves.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(curves, "draw_curves", lambda *_: drawn.append(clock[0]))
  live = curves.LiveCurves(tmp_path, {})
  for clock[0] in (1.0, 59.0, 60.0, 61.0, 119.0, 121.0):
    live.update()
  assert drawn == [60.0, 121.0]


def test_a_picture_that_cannot_be_drawn_costs_no_run(tmp_path, monkeypatch, caplog):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
  monkeypatch.setattr(curves, "draw_curves", lambda *_: 1 / 0)
  curves.LiveCurves(tmp_path, {}).draw()
  assert "curves.png is not drawn: division by zero" in caplog.text


# ---------------------------------------------------------------- what to worry about


def facts(**changes):
  rows = [
    {"step": 10 * i, "loss": 1 / (1 + i), "rankme": 8.0, "feature_std": 0.5, "probe_accuracy": 50.0} for i in range(8)
  ]
  table = Table(70, {"random encoder": {"knn": 30.0}, "lejepa, step 70": {"knn": 60.0}}, 100, "70.json", 1.0, True)
  healthy = Facts(
    "run",
    None,
    tiny_config(),
    rows,
    (70,),
    70,
    {"step": 90.0, "compile": 10.0},
    {"commit": "abc"},
    {},
    (table,),
    "",
    (),
  )
  return dataclasses.replace(healthy, **changes)


def with_rows(**last):
  rows = [dict(row) for row in facts().rows]
  rows[-1].update(last)
  return {"rows": rows}


def test_a_healthy_run_gives_nothing_to_worry_about():
  assert worries(facts()) == []


@pytest.mark.parametrize(
  "changes",
  [
    {"cfg": tiny_config(batch_size=4, encoder=VIT | {"width": 512, "num_heads": 8}), **with_rows(rankme=3.9)},
    {"rows": [{"step": i, "loss": 1.0, "rankme": float("nan"), "skipped": float("nan")} for i in range(30)]},
    {"tables": (Table(70, {"raw pixels": {"knn": 90.0}}, 9, "", 1.0, True),)},
  ],
  ids=["a small batch", "numbers that are none", "the checkpoint's row is not there yet"],
)
def test_what_is_no_trouble_is_not_called_one(changes):
  assert not [line for line in worries(facts(**changes)) if "Collapse" in line or "knn" in line]


def test_tables_that_are_none_are_left_out(tmp_path, runs):
  for i, rows in enumerate(({}, [1], {"a": {}}, {"a": {"knn": "x"}}, {"a": 3})):
    path = runs[1] / "evals" / f"{i}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"step": 3, "rows": rows, "num_test": 5}))
  assert read_facts(runs[1], "second").tables == ()


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"rows": []}, "metrics.jsonl is missing or empty"),
    ({"ended": None}, "It has not ended: the last metrics are of step 70, the newest checkpoint is step 70"),
    (with_rows(rankme=1.2), "Collapse: the features use 1.2 of 16 directions"),
    (with_rows(rankme=3.0), "RankMe fell from 8 to 3"),
    (with_rows(feature_std=1e-5), "Collapse: features differ by 1e-05 between images"),
    (with_rows(bad_images=3.0), "3 images did not decode"),
    (with_rows(loss=float("nan")), "The loss was not finite in 1 of 8 lines, first at step 70"),
    (with_rows(skipped=2.0), "2 steps were skipped"),
    (with_rows(recompiles=1.0), "1 programs were compiled inside the loop"),
    ({"seconds": {"step": 100.0, "data_wait": 50.0}}, "Steps waited for images 33 % of their time"),
    ({"seconds": {"step": 400.0, "compile": 600.0}}, "Only 40 % of 17 minutes went into steps"),
    ({"seconds": {"step": 90.0, "lost": 120.0}}, "2.0 minutes of work were lost"),
    ({"written_by": {"commit": "abc-dirty"}}, "changes that are in no commit"),
    ({"tables": ()}, "It was not evaluated yet"),
    (
      {"tables": (Table(70, {"random encoder": {"knn": 60.0}, "a, step 70": {"knn": 60.3}}, 9, "", 1.0, True),)},
      "knn: 60.3, and the random encoder has 60.0",
    ),
    (
      {
        "tables": (
          Table(70, {"raw pixels": {"knn": 90.0}, "a, step 70": {"knn": 10.0}}, 9, "a", 1.0, True),
          facts().tables[0],
        )[::-1]
      },
      "knn: 10.0, and the raw pixels have 90.0",
    ),
    (
      {"rows": [{"step": i, "loss": 1.0, "probe_accuracy": 90.0 if i < 50 else 10.0} for i in range(100)]},
      "The online probe fell from 90 to 10 %",
    ),
    (
      {"rows": [{"step": i, "loss": 1.0 if i < 10 else 1e9} for i in range(100)]},
      "The loss ended higher than it began",
    ),
    ({"tables": (dataclasses.replace(facts().tables[0], complete=False),)}, "evaluation of step 70 is not finished"),
    (
      {"rows": [{"step": i, "loss": 1.0, "probe_accuracy": 50.0 + 20 * (i % 2)} for i in range(100)]},
      "The online probe jumps by 14",
    ),
    ({"rows": [{"step": i, "loss": 100.0 - i} for i in range(100)]}, "The loss was still falling"),
  ],
)
def test_each_worry_is_said(changes, said):
  assert any(said in line for line in worries(facts(**changes))), worries(facts(**changes))


# ---------------------------------------------------------------- the page


class Tags(html.parser.HTMLParser):
  """Collects what is opened and not closed, and every address."""

  def __init__(self):
    super().__init__()
    self.open, self.addresses, self.pictures = [], [], 0

  def handle_starttag(self, tag, attrs):
    self.pictures += tag in ("img", "svg")
    self.addresses += [value for name, value in attrs if name in ("src", "href")]
    if tag not in ("meta", "img", "br"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_one_page_says_what_was_run_and_needs_no_network(runs, tmp_path, capsys):
  out = tmp_path / "report.html"
  assert cli.main(["report", *map(str, runs), f"--out={out}", "--images=32", "--json"]) == 0
  said, text = json.loads(capsys.readouterr().out), out.read_text()
  assert said["bytes"] == len(text.encode()) < command.LARGEST_BYTES and said["left_out"] == {}
  tags = Tags()
  tags.feed(text)
  assert tags.open == [] and tags.pictures > 12
  assert all(address.startswith(("data:image/", "#")) for address in tags.addresses)
  for expected in ("What was run", "What to worry about", "Curves", "Evaluation", "Views, first", "Neighbours, second",
                   "Features of patches, first", "Spectrum of the features", "optim.lr", "0.01", "0.001"):  # fmt: skip
    assert expected in text, expected
  assert "<script" not in text


def test_images_that_are_gone_cost_their_sections_only(runs, tmp_path):
  typed = {"data.source": "folder", "data.root": str(tmp_path / "gone")}
  result = command.run([str(runs[0])], out=str(tmp_path / "r.html"), overrides=typed)
  assert "there is no such folder" in result["left_out"]["neighbours, spectrum, maps"]
  text = (tmp_path / "r.html").read_text()
  assert "Left out: neighbours" in text and "Neighbours of" not in text and "<h2>Curves</h2>" in text


def test_names_are_text_and_no_markup(runs, tmp_path):
  run = dataclasses.replace(read_facts(runs[0], "a<script>b"), workdir=runs[0])
  assert "<script" not in page.page([run], [], "now")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"workdirs": ["/nowhere/at/all"]}, "/nowhere/at/all does not exist; give the workdirs of runs"),
    ({"images": -1}, "--images=-1: how many held-out images"),
    ({"overrides": {"optim.lr": "1"}}, "--config.optim.lr: a report changes no run"),
  ],
)
def test_what_cannot_be_reported_is_named(runs, options, message):
  with pytest.raises(ValueError, match=message):
    command.run(**({"workdirs": [str(runs[0])]} | options))


def test_a_folder_that_holds_no_run_is_named(tmp_path):
  with pytest.raises(ValueError, match="config"):
    command.run([str(tmp_path)])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
  paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
  assert names_of(paths) == ["a/run", "b/run", "b/other"] and names_of(paths[:1]) == ["run"]


# ---------------------------------------------------------------- pictures


def test_neighbours_of_separate_clusters_are_all_of_their_class():
  rng = np.random.default_rng(0)
  label_N = np.repeat([0, 1], 20)
  features = 0.1 * rng.standard_normal((40, 4)) + 5 * np.eye(4)[label_N]
  shown = [np.zeros((8, 8, 1), np.uint8)] * 40
  picture, agree = pictures.neighbours(pictures.Seen(shown, label_N, features.astype(np.float32), None))
  assert agree == 100.0 and picture.shape[2] == 3
  _, none = pictures.neighbours(pictures.Seen(shown, np.full(40, -1), features.astype(np.float32), None))
  assert np.isnan(none)


def test_maps_show_patches_that_are_alike_in_one_colour():
  rng = np.random.default_rng(0)
  kinds = rng.standard_normal((3, 8))
  tokens = np.stack([kinds[[0, 0, 1, 2]]] * 5).astype(np.float32)
  seen = pictures.Seen([np.zeros((8, 8, 3), np.uint8)] * 5, np.zeros(5), tokens[:, 0], tokens)
  picture = pictures.patch_maps(seen)
  cell = picture.shape[0] // 2
  below = picture[cell:, :cell]
  at = lambda y, x: below[int(y * cell), int(x * cell)].tolist()
  assert at(0.3, 0.3) == at(0.3, 0.7) != at(0.7, 0.3)
  assert pictures.patch_maps(seen._replace(tokens_MxTxD=None)) is None
  wide = np.stack([kinds[[0, 0, 0, 0, 1, 1, 1, 1]]] * 5).astype(np.float32)  # two rows of four, as a wide view has
  assert pictures.patch_maps(seen._replace(tokens_MxTxD=wide)) is None
  below = pictures.patch_maps(seen._replace(tokens_MxTxD=wide, view_hw=(16, 32)))[cell:, :cell]
  assert at(0.3, 0.2) == at(0.3, 0.8) != at(0.7, 0.2) == at(0.7, 0.8)


# ---------------------------------------------------------------- served


def test_the_page_is_served_on_this_machine_alone_and_made_anew(runs):
  live = command.Live([runs[0]], 0, None)
  server = command.make_server(live.html, 0)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f"http://127.0.0.1:{server.server_port}"
  try:
    with urllib.request.urlopen(address + "/") as answer:
      text = answer.read().decode()
    assert "What was run" in text and "http-equiv" not in text  # the run has ended: nothing to look for
    for path, host, status in (("/config.json", None, 404), ("/", "example.org", 403)):
      with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(address + path, headers={"Host": host} if host else {}))
      assert caught.value.code == status
    idle = socket.create_connection(server.server_address)  # says nothing; browsers open such ones ahead
    (runs[0] / "complete.json").rename(runs[0] / "kept.json")
    with urllib.request.urlopen(address + "/", timeout=60) as answer:
      assert 'http-equiv="refresh"' in answer.read().decode()
  finally:
    (runs[0] / "kept.json").rename(runs[0] / "complete.json")
    idle.close()
    server.shutdown()
    server.server_close()
  assert server.server_address[0] == "127.0.0.1"
