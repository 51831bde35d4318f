"""Configs by their names, encoders by theirs, and what a wheel holds."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import jepa_jax.__main__ as cli
from jepa_jax import shipped
from jepa_jax.config import build_config, load_config, to_dict, variants
from tests.tiny import TINY, VIT, tiny_values

ROOT = Path(__file__).resolve().parent.parent


def test_a_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("lejepa_digits", "lejepa_digits.py", "configs/lejepa_digits.py"):
    assert load_config(name).name == "lejepa_digits"
  assert load_config("lejepa_imagenet:vitl").encoder.size.width == 1024
  assert variants("lejepa_imagenet")[0] == "vitb"


def test_a_file_of_ones_own_goes_before_one_that_comes_with_the_project(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "lejepa_digits.py").write_text(f"def get_config():\n  return {TINY!r}\n")  # a plain dict will do
  assert load_config("lejepa_digits.py").name == "tiny"


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("lejepa_digit", "did you mean 'lejepa_digits'"),
    ("nowhere/lejepa_digits.py", "there is no such file"),
    (".", "it is a folder"),
  ],
)
def test_what_is_no_config_is_answered_with_a_near_name(name, message):
  with pytest.raises(ValueError, match=message):
    shipped.find_config(name)


def test_every_config_is_listed_with_a_line_and_its_variants(capsys):
  assert cli.main(["configs"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert {line.split()[0].split(":")[0] for line in lines} == {path.stem for path in (ROOT / "configs").glob("*.py")}
  assert any(line.startswith("lejepa_imagenet:vitb|vitl|vith|vitg") for line in lines)
  assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)


def test_a_config_is_printed_without_a_workdir_and_a_run_needs_one(capsys):
  assert cli.main(["train", "--config=lejepa_digits", "--print-config"]) == 0
  assert '"lejepa_digits"' in capsys.readouterr().out
  assert cli.main(["train", "--config=lejepa_digits"]) == cli.INPUT_ERROR
  assert "--workdir=workdirs/lejepa_digits" in capsys.readouterr().err


# ---------------------------------------------------------------- encoders and methods by name


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("vit_base", {"name": "vit", "variant": "base", "patch_size": 16}),
    ("ViT-Ti/4", {"name": "vit", "variant": "tiny", "patch_size": 4}),
    ("vit_g/8", {"name": "vit", "variant": "giant", "patch_size": 8}),
    ("resnet18", {"name": "resnet", "variant": "18"}),
    ("ResNet-50", {"name": "resnet", "variant": "50"}),
    ("mlp", {"name": "mlp"}),
  ],
)
def test_an_encoder_is_named_as_papers_do(text, expected):
  found = to_dict(load_config("lejepa_cifar10", {"encoder": text}).encoder)  # its file has a ConvNet with widths
  assert {key: found[key] for key in expected} == expected and found["image_size"] == 32


def test_a_name_says_the_sizes_and_what_is_typed_besides_stands():
  values = tiny_values(encoder=VIT | {"num_registers": 3})
  named = build_config(values, {"encoder": "vit_tiny"}).encoder
  assert named.size == (192, 12, 3, 768) and (named.patch_size, named.num_registers) == (8, 3)
  typed = build_config(values, {"encoder": "vit_tiny/4", "encoder.depth": "3", "encoder.patch_size": "2"}).encoder
  assert (typed.size.width, typed.size.depth, typed.patch_size) == (192, 3, 2)
  assert build_config(values, {"encoder": "vit"}).encoder.width == VIT["width"]


def test_a_method_is_named_too():
  assert build_config(tiny_values(), {"objective": "vicreg", "objective.views.local_crops.num": "0"}).objective.variance


@pytest.mark.parametrize("text", ["vit_enormous", "resnet19", "vit/x", "convnet/4", "transformer", ""])
def test_a_name_that_there_is_not_is_answered_with_those_that_there_are(text):
  with pytest.raises(ValueError, match=r"--config.encoder=.*choose from .*vit_small.*resnet_18"):
    build_config(tiny_values(), {"encoder": text})


# ---------------------------------------------------------------- the wheel


def test_the_list_of_packages_is_that_of_the_folders():
  listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
  folders = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "jepa_jax").rglob("*.py")}
  assert set(listed) == folders | {"jepa_jax.configs"}


@pytest.mark.slow
def test_a_wheel_holds_the_configs_and_the_command(tmp_path):
  try:
    setuptools = int(importlib.metadata.version("setuptools").split(".")[0])
  except importlib.metadata.PackageNotFoundError:
    setuptools = 0
  if setuptools < 77:  # as pyproject.toml asks; without a network it must be here
    pytest.skip("builds with the setuptools of this environment, which is too old")
  for name in ("jepa_jax", "configs"):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, tmp_path / name)
  command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "dist"]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  (wheel,) = (tmp_path / "dist").glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    assert {f"jepa_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} <= set(names)
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "jepa-jax = jepa_jax.__main__:console" in archive.read(entry).decode()
    archive.extractall(tmp_path / "installed")
  script = "from jepa_jax import shipped; print(len(shipped.shipped()), shipped.FOLDER)"
  found = subprocess.run(
    [sys.executable, "-c", script],
    cwd=tmp_path / "dist",
    env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
    capture_output=True,
    text=True,
  )
  assert found.stdout.split() == [str(len(shipped.shipped())), str(tmp_path / "installed" / "jepa_jax" / "configs")]
