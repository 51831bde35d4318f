"""Every config's parameters with shape, weight decay and sharding, against a recorded text.

A change that moves a parameter, its decay or its place on the mesh shows as a difference here. If it is meant:
UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py, and the commit says why.
"""

import os
from pathlib import Path

import jax
import pytest

from jepa_jax.config import load_config, variants
from jepa_jax.experiment import make_experiment
from jepa_jax.optim import decay_mask
from jepa_jax.sharding import MeshConfig, make_mesh, path_name

ROOT = Path(__file__).parent
FILES = sorted((ROOT.parent / "configs").glob("*.py"))
CONFIGS = [f"{path}:{variant}" if variant else str(path) for path in FILES for variant in variants(path) or ("",)]


def describe(cfg) -> str:
  run = make_experiment(cfg, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), num_train=100_000, num_classes=10)
  params = run.abstract_state.params
  decay = jax.tree.leaves(decay_mask(params, run.objective.rules))
  lines = [f"{run.total_steps} steps for 100,000 images; mesh data=2 x fsdp=2 x tensor=2"]
  for (name, leaf), decayed in zip(jax.tree_util.tree_leaves_with_path(params), decay, strict=True):
    spec = ", ".join(str(s) for s in leaf.sharding.spec)
    lines.append(f"{path_name(name):44s} {str(leaf.shape):22s} {'decay' if decayed else '-':6s} ({spec})")
  return "\n".join(lines) + "\n"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda name: Path(name).name)
def test_parameters_decay_and_sharding_are_as_recorded(config):
  cfg = load_config(config)
  golden = ROOT / "golden" / f"{cfg.name}.txt"
  text = describe(cfg)
  if os.environ.get("UPDATE_GOLDEN"):
    golden.parent.mkdir(exist_ok=True)
    golden.write_text(text)
  assert golden.exists(), f"no golden text for {config}: run UPDATE_GOLDEN=1 python -m pytest {Path(__file__).name}"
  assert text == golden.read_text()
