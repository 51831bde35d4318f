"""The search compiles what could win, leaves out what is dominated, and recommends the fastest that fits."""

import pytest

from jepa_jax import plan
from jepa_jax.plan.chips import parse_topology
from jepa_jax.plan.search import meshes, search
from jepa_jax.sharding import MeshConfig
from tests.test_train import write_config
from tests.tiny import TINY, tiny_config, tiny_values


def fake_plan(memory_gib, step_ms, state_gib=lambda cfg: 1):
  """Stands in for a compilation: memory (of 16) and time as functions of the config."""

  def plan_one(cfg):
    total = memory_gib(cfg)
    return {
      "memory": {"fits": total <= 16, "total_bytes": total, "arguments_bytes": state_gib(cfg), "hbm_bytes": 16},
      "estimate": {"step_ms": step_ms(cfg), "collectives_share": 0.1} if total <= 16 else None,
      "batch_per_chip": cfg.batch_size / 8,
      "compile_s": 0.0,
    }

  return plan_one


def run_search(plan_one, per_chip_batches=(), max_candidates=99, **changes):
  said = []
  cfg = tiny_config(**changes)
  return *search(cfg, parse_topology("cpu:8"), 8, plan_one, per_chip_batches, max_candidates, said.append), said


def test_meshes_multiply_out_and_slices_differ_in_data_only():
  for m in meshes(16, 2, 6, 64):
    assert m.data * m.fsdp * m.tensor == 16 and m.data % 2 == 0 and 6 % m.tensor == 0
  assert MeshConfig(8, 1, 2) in meshes(16, 2, 6, 64) and MeshConfig(1, 16, 1) not in meshes(16, 2, 6, 64)
  assert all(m.data * m.fsdp <= 8 for m in meshes(16, 1, 4, 8)), "the batch of 8 has to divide"


def test_where_everything_fits_the_fastest_wins_and_remat_is_never_tried():
  rows, best, said = run_search(fake_plan(lambda cfg: 1, lambda cfg: 10 / (1 + (cfg.mesh.fsdp == 2))))
  assert {row["remat"] for row in rows} == {"matmuls"} and all("tensor=1" in row["mesh"] for row in rows)
  assert best and "fsdp=2" in best["mesh"] and "--config.mesh.fsdp=2" in best["overrides"]
  assert len([line for line in said if line.startswith("[")]) == len(rows)
  assert not any("fsdp=8" in row["mesh"] for row in rows), "the estimate had risen at fsdp=4"


def test_what_does_not_fit_tries_remat_then_microbatches():
  memory_gib = lambda cfg: (40 if cfg.encoder.remat == "matmuls" else 20) / cfg.microbatch
  rows, best, _ = run_search(fake_plan(memory_gib, lambda _: 1))
  first = [(row["remat"], row["microbatch"], row["fits"]) for row in rows[:3]]
  assert first == [("matmuls", 1, False), ("block", 1, False), ("block", 2, True)]
  assert best and {"--config.encoder.remat=block", "--config.microbatch=2"} <= set(best["overrides"])


def test_a_config_that_recomputes_nothing_is_tried_so_first():
  memory_gib = lambda cfg: {"none": 40, "matmuls": 20, "block": 10}[cfg.encoder.remat]
  rows, best, _ = run_search(fake_plan(memory_gib, lambda _: 1), encoder__remat="none")
  assert [row["remat"] for row in rows[:3]] == ["none", "matmuls", "block"] and best


def test_where_the_state_alone_does_not_fit_only_the_mesh_can_help():
  split = lambda cfg: 40 / (cfg.mesh.fsdp * cfg.mesh.tensor)
  rows, best, _ = run_search(fake_plan(split, lambda _: 1, split))
  assert [(row["remat"], row["fits"]) for row in rows[:3]] == [
    ("matmuls", False),
    ("matmuls", False),
    ("matmuls", True),
  ]
  assert best and "fsdp=4" in rows[2]["mesh"]


def test_where_nothing_fits_tensor_parallelism_is_tried_and_nothing_is_recommended():
  rows, best, _ = run_search(fake_plan(lambda cfg: 99, lambda _: 1))
  assert best is None and any("tensor=2" in row["mesh"] for row in rows)
  text = plan.render({"config": "tiny", "topology": "cpu:8", "notes": [], "candidates": rows, "recommended": best})
  assert "nothing fits" in text


def test_search_keeps_the_batch_unless_others_are_given_and_stops_at_the_limit():
  rows, _, _ = run_search(fake_plan(lambda cfg: 1, lambda _: 1))
  assert {row["batch_size"] for row in rows} == {TINY["batch_size"]}
  rows, best, said = run_search(fake_plan(lambda cfg: 1, lambda _: 1), (2, 4), max_candidates=5)
  assert len(rows) == 5 and "--max-candidates=5" in said[-1]
  assert best and best["batch_per_chip"] == 4, "the same time for twice the images"


def test_search_refuses_a_batch_that_divides_over_no_mesh():
  with pytest.raises(ValueError, match="the nearest that always does: 16 or 24"):
    run_search(fake_plan(lambda cfg: 1, lambda _: 1), batch_size=17)


@pytest.mark.slow
def test_search_of_a_real_step_on_fake_devices(tmp_path):
  config = str(write_config(tmp_path / "tiny.py", tiny_values()))
  result = plan.run(config, "cpu:8", search=True, max_candidates=1)
  assert len(result["candidates"]) == 1 and result["recommended"]["total_bytes"] > 0
  assert "recommended: --config.mesh.data=8" in plan.render(result)
