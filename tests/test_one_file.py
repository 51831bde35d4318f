"""A method and a protocol of one's own: one file each, one config, one line of registration each.

The package is copied, the files of tests/examples are put beside their kind and their names added to the two lists.
Then what the suite asks of the methods here is asked of them: train, resume, microbatches, eight devices, evaluation,
plan, a start from another run. The loop, the step and the evaluation are not touched.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "tests" / "examples"
PLACES = {
  "two_towers.py": "jepa_jax/objectives/two_towers.py",
  "pairs.py": "jepa_jax/evals/pairs.py",
  "two_towers_config.py": "configs/two_towers.py",
}
LINES = {"jepa_jax/objectives/__init__.py": '"supervised"', "jepa_jax/evals/__init__.py": '"predictor_tuning"'}
NEW = {"jepa_jax/objectives/__init__.py": '"two_towers"', "jepa_jax/evals/__init__.py": '"pairs"'}

# One process does what would be ten starts: each command is the command line's own.
SCRIPT = """
import shutil, sys
from jepa_jax.__main__ import main
run = lambda *args: main(list(args)) == 0 or sys.exit(f"failed: {args}")
config, out = "--config=configs/two_towers.py", sys.argv[1]
train = lambda name, *more: run("train", config, f"--workdir={out}/{name}", *more)
train("whole")
shutil.copytree(f"{out}/whole", f"{out}/resumed")
shutil.rmtree(f"{out}/resumed/checkpoints/4")
train("resumed")
train("sharded", "--config.microbatch=2", "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
train("from", f"--init-from={out}/whole", "--init-what=image,other", "--config.total=1steps")
run("eval", f"--workdir={out}/whole")
run("plan", config, "--topology=cpu:8", "--num-train=64", "--num-classes=10", "--json")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
  """A copy of the package with the two examples registered."""
  folder = tmp_path_factory.mktemp("package")
  for name in ("jepa_jax", "configs"):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
  for example, place in PLACES.items():
    shutil.copy(EXAMPLES / example, folder / place)
  for file, last in LINES.items():
    text = (folder / file).read_text()
    assert text.count(f"{last})") == 1, f"{file}: the list of files ends otherwise; see LINES"
    (folder / file).write_text(text.replace(f"{last})", f"{last}, {NEW[file]})"))
  return folder


@pytest.fixture(scope="module")
def out(package, tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  environment = os.environ | {
    "PYTHONPATH": str(package),
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
  }
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, str(folder)],
    cwd=package,
    env=environment,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
  (folder / "stdout.txt").write_text(done.stdout)
  return folder


def losses(folder: Path) -> list[float]:
  return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_registration_is_one_line_each(package):
  for file in LINES:
    before, after = ((root / file).read_text().splitlines() for root in (ROOT, package))
    assert len(before) == len(after) and sum(a != b for a, b in zip(before, after)) == 1


@pytest.mark.slow
def test_it_trains_resumes_and_is_the_same_in_parts_and_on_any_mesh(out):
  whole = losses(out / "whole")
  assert len(whole) == 4 and len(set(whole)) == 4
  assert losses(out / "resumed") == whole
  np.testing.assert_allclose(losses(out / "sharded"), whole, rtol=2e-4)


@pytest.mark.slow
def test_its_schedule_reads_progress_and_its_centre_moves(out):
  rows = [json.loads(line) for line in (out / "whole" / "metrics.jsonl").read_text().splitlines()]
  ratio = rows[2]["sharpness"] / rows[1]["sharpness"]
  assert ratio == pytest.approx(
    2, rel=0.05
  )  # from half of the steps on twice as sharp; the learned part moves a little
  assert rows[0]["centre_norm"] > 0 and len({row["centre_norm"] for row in rows}) == 4


@pytest.mark.slow
def test_both_towers_are_evaluated_by_both_protocols(out):
  table = json.loads((out / "whole" / "evals" / "4.json").read_text())
  assert {row: set(columns) for row, columns in table["rows"].items()} == {
    "raw pixels": {"knn"},
    "random encoder": {"knn", "pairs"},
    "two_towers, step 4": {"knn", "pairs"},
  }
  assert table["details"]["two_towers, step 4"]["pairs"] == {"top": 3, "images": 512}


@pytest.mark.slow
def test_it_is_planned_and_another_run_starts_from_its_towers(out):
  plan = json.loads(re.search(r"^\{.*^\}", (out / "stdout.txt").read_text(), re.S | re.M)[0])
  names = {row["name"] for row in plan["largest_parameters"]}
  assert any(name.startswith("image/") for name in names) and any(name.startswith("other/") for name in names)
  meta = json.loads((out / "from" / "checkpoints" / "1" / "meta" / "data.json").read_text())
  assert meta["started_from"]["what"] == "image,other"
