"""A plan says before anything runs what a run would find out: memory, collectives, and input that cannot work."""

import dataclasses
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jepa_jax import experiment, plan
from jepa_jax.plan import report
from jepa_jax.plan.chips import CHIPS, EXAMPLES, parse_topology
from jepa_jax.plan.compile import _read_refusal, compile_step, get_devices, plan_experiment, prepare, state_bytes
from jepa_jax.plan.hlo import collectives
from jepa_jax.sharding import MeshConfig, make_mesh
from tests.test_train import write_config
from tests.tiny import TINY, VIT, tiny_config, tiny_experiment, tiny_values

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason='pip install "jax[tpu]"')
# A batch whose images, as uint8 (the smallest form in which they could travel), outweigh every parameter.
IMAGES = {
  "batch_size": 32,
  "data": TINY["data"] | {"canvas_px": 32},
  "encoder": VIT | {"remat": "block"},
  "probe": {"spectrum_every": 50},
}


def images_bytes(cfg) -> int:
  return cfg.batch_size * cfg.data.canvas_px**2 * cfg.data.channels


def largest_bytes(planned) -> int:
  return max(row["largest_bytes"] for row in planned["collectives"])


# --- topologies ---


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_a_topology(text):
  topology = parse_topology(text)
  assert topology.name == text and topology.num_chips == np.prod([int(s) for s in text.split(":")[1].split("x")])


def test_other_names_of_a_chip_and_several_slices():
  assert parse_topology("v5litepod:4x4") == parse_topology("V5E:4x4")
  assert parse_topology("tpu7x:2x2x1").chip is CHIPS["7x"]
  two = parse_topology("v5e:16x16", 2)
  assert two.num_chips == 512 and two.name == "2 x v5e:16x16"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v6p:4x4", "unknown chip 'v6p'; did you mean v6e\\? Known: v4, v5e, v5p, v6e, 7x, a100, .*, cpu; for example"),
    ("v5e", "write the chip and its sides, for example v5e:4x4"),
    ("v5e:4*4", "write the chip and its sides"),
    ("v5e:0x4", "write the chip and its sides"),
    ("v4:4x4", "3-D torus, so write 3 sides, for example v4:4x4x4"),
    ("v5e:4x4x4", "2-D torus"),
    ("v5e:3x5", "nearest: v5e:4x4"),
    ("v5e:32x32", "1024 chips, but a slice of v5e has at most 256; take several with --num-slices"),
    ("cpu:2x4", "for example cpu:8"),
  ],
)
def test_topology_that_does_not_exist_is_an_error_with_the_nearest(text, message):
  with pytest.raises(ValueError, match=message):
    parse_topology(text)


def test_slices_are_counted_from_one_and_only_for_chips():
  with pytest.raises(ValueError, match="at least 1"):
    parse_topology("v5e:4x4", 0)
  with pytest.raises(ValueError, match="one slice"):
    parse_topology("cpu:8", 2)


def test_more_fake_devices_than_the_process_started_with_is_an_error():
  with pytest.raises(ValueError, match="force_host_platform_device_count=64"):
    get_devices(parse_topology("cpu:64"))


@needs_libtpu
@pytest.mark.parametrize("text", [e for e in EXAMPLES if e[0] in "v7"] + ["v5e:1x1", "v4:2x2x1"])
def test_libtpu_has_a_layout_for_every_example(text):
  topology = parse_topology(text)
  devices = get_devices(topology)
  assert topology.chip and len(devices) == topology.num_chips * topology.chip.devices and devices[0].platform == "tpu"


@needs_libtpu
def test_devices_of_two_slices_say_which_slice_is_theirs():
  devices = get_devices(parse_topology("v5e:2x2", 2))
  assert sorted(d.slice_index for d in devices) == [0] * 4 + [1] * 4


@needs_libtpu
@pytest.mark.parametrize(("text", "data", "fsdp"), [("v6e:16x16", 32, 8), ("v5p:4x4x8", 64, 2), ("v4:4x4x4", 32, 2)])
def test_mesh_may_split_a_side_of_the_torus(text, data, fsdp):
  mesh = make_mesh(MeshConfig(data, fsdp), get_devices(parse_topology(text)))
  assert (mesh.shape["data"], mesh.shape["fsdp"]) == (data, fsdp)


@needs_libtpu
def test_an_experiment_on_chips_that_are_not_here_computes_nothing_on_them():
  run = plan_experiment(tiny_config(mesh__fsdp=2), get_devices(parse_topology("v5e:2x2")), 64, 10)
  assert {d.platform for x in jax.tree.leaves(run.shardings) for d in x.device_set} == {"tpu"}


def test_what_optax_computes_to_find_moments_is_computed_outside_of_the_mesh(monkeypatch):
  """Inside, it would be computed on the mesh's devices, and those of a plan can compute nothing."""
  seen, shardings = [], experiment.state_shardings
  watch = lambda *args: (seen.append(jax.sharding.get_abstract_mesh().empty), shardings(*args))[1]
  monkeypatch.setattr(experiment, "state_shardings", watch)
  plan_experiment(tiny_config(name="not made before"), jax.devices(), 64, 10)
  assert seen == [True]


@needs_libtpu
def test_slices_differ_along_data_only():
  devices = get_devices(parse_topology("v5e:2x2", 2))
  slices = np.vectorize(lambda d: d.slice_index)(make_mesh(MeshConfig(4, 2), devices).devices)
  np.testing.assert_array_equal(slices[:, 0, 0], [0, 0, 1, 1])
  assert (slices == slices[:, :1, :1]).all()
  with pytest.raises(ValueError, match="only `data` may reach over the 2 slices"):
    make_mesh(MeshConfig(1, 8), devices)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match='pip install "jax\\[tpu\\]"'):
    get_devices(parse_topology("v5e:2x2"))


# --- input that cannot work, before any compilation ---


@pytest.fixture
def config(tmp_path):
  return str(write_config(tmp_path / "tiny.py", tiny_values()))


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"mesh.fsdp": "3"}, "does not multiply out to the 8 devices"),
    ({"batch_size": "20"}, "the nearest: 16 or 24"),
    ({"batch_size": "4"}, "the nearest: 8"),
    ({"encoder.widht": "16"}, "did you mean config.encoder.width"),
  ],
)
def test_bad_mesh_batch_or_setting_is_an_error_before_compiling(config, overrides, message, monkeypatch):
  monkeypatch.setattr(plan, "compile_step", lambda *_: pytest.fail("compiled"))
  with pytest.raises(ValueError, match=message):
    plan.run(config, "cpu:8", overrides)


def test_batches_to_search_must_be_numbers_and_belong_to_the_search(config):
  with pytest.raises(ValueError, match="for example 8,16,32"):
    plan.run(config, "cpu:8", search=True, per_chip_batch="8,many")
  with pytest.raises(ValueError, match="is for --search"):
    plan.run(config, "cpu:8", per_chip_batch="8")


# --- reading a program ---


def test_collective_in_a_scan_counts_as_often_as_it_runs():
  mesh = make_mesh(MeshConfig(data=8))

  def body(carry, w):
    y = jax.lax.with_sharding_constraint(carry @ w, NamedSharding(mesh, P("data")))
    return y - y.mean(0), None

  step = jax.jit(lambda x, w: jax.lax.scan(body, x, w)[0])
  x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
  w = jax.ShapeDtypeStruct((5, 4, 4), jnp.float32, sharding=NamedSharding(mesh, P()))
  found = collectives(step.lower(x, w).compile().as_text(), 8)
  assert [(c.kind, c.runs, c.bytes, c.group, c.every_step) for c in found] == [("all-reduce", 5, 4 * 4, 8, True)]
  assert found[0].sent_bytes == 2 * 7 / 8 * 16


TPU_TEXT = """HloModule jit_step
%all-reduce-scatter.1 (input: bf16[8,4]) -> bf16[2,4] {
  %all-reduce.1 = bf16[8,4]{1,0} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%start (p: f32[2,4]) -> f32[8,4] {
  %all-gather.1 = f32[8,4]{1,0:T(8,128)} all-gather(%p), channel_id=9, replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]) {'b'}, dimensions={0}
}
%done (p: f32[2,4]) -> f32[8,4] {
  %all-gather.2 = f32[8,4]{1,0:T(8,128)} all-gather(%p), channel_id=9, replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]) {'b'}, dimensions={0}
}
%condition (t: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
%body (t: (s32[])) -> (s32[]) {
  %f1 = f32[8,4] fusion(%x), kind=kCustom, calls=%start
  %f2 = f32[8,4] fusion(%x), kind=kCustom, calls=%done
  %f3 = bf16[2,4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
%sometimes (t: f32[]) -> f32[] {
  %cp = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%t), channel_id=11, source_target_pairs={{0,1},{1,0}}
}
%never (t: f32[]) -> f32[] {
  ROOT %t = f32[] parameter(0)
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[]) while(%init), condition=%condition, body=%body
  %c = f32[] conditional(%p, %a, %b), branch_computations={%sometimes, %never}
  %s = (bf16[100]{0}, u32[], token[]) send(%g, %t), channel_id=2, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %r = (bf16[100]{0}, u32[], token[]) recv(%t), channel_id=3, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %ar = (f32[3]{0}, f32[5]{0}) all-reduce(%u, %v), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
}
"""  # noqa: E501


def test_loops_branches_asynchronous_pieces_and_slices_of_a_tpu_program():
  found = {(c.kind, c.link): c for c in collectives(TPU_TEXT, 8, num_slices=2)}
  assert len(found) == 5
  gather, scatter = found["all-gather", "ici"], found["reduce-scatter", "ici"]
  assert (gather.runs, gather.bytes, gather.group, gather.sent_bytes) == (12, 128, 4, 96)
  assert (scatter.runs, scatter.bytes, scatter.group, scatter.sent_bytes) == (12, 64, 4, 48)
  permute = found["collective-permute", "ici"]
  assert (permute.runs, permute.bytes, permute.every_step) == (1, 16, False)
  reduce, between = found["all-reduce", "ici"], found["all-reduce", "dcn"]
  assert (reduce.largest_bytes, reduce.bytes, reduce.group) == (20, 32, 4)
  assert (between.bytes, between.group, between.sent_bytes) == (200, 2, 200)


def test_estimate_divides_bytes_by_half_the_published_bandwidth():
  found = collectives(TPU_TEXT, 8, num_slices=2)
  rows = {(r["kind"], r["link"]): r for r in report.collectives_report(found, CHIPS["v5e"])}
  assert rows["all-gather", "ici"]["ms"] == pytest.approx(12 * 96 / 200e9 * 1e3, rel=1e-3)
  big = [dataclasses.replace(c, bytes=10**9, largest_bytes=10**9) for c in found]
  rows = {(r["kind"], r["link"]): r for r in report.collectives_report(big, CHIPS["v5e"])}
  assert rows["all-gather", "ici"]["ms"] == pytest.approx(12 * 0.75 * 5, rel=1e-3)  # 1 GB at 200 GB/s: 5 ms
  assert rows["all-reduce", "dcn"]["ms"] == pytest.approx(320, rel=1e-3)  # 1 GB at 25 Gb/s


def test_refusal_of_the_compiler_is_read():
  message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
  assert _read_refusal(message) == (20.5 * 2**30, 15.75 * 2**30)
  message = "the total memory required for HLO temporaries (79.00G) exceeds available HBM (15.75G)."
  assert _read_refusal(message) == (79 * 2**30, 15.75 * 2**30)
  assert _read_refusal("INTERNAL: something else") is None


# --- plans of the real step ---


@pytest.fixture(scope="module")
def planned():
  cfg = tiny_config(mesh={"data": 2, "fsdp": 2, "tensor": 2}, **IMAGES)
  return cfg, plan.make_plan(cfg, parse_topology("cpu:8"), 64, 10)


@pytest.mark.slow
def test_no_collective_carries_a_batch_of_images(planned):
  cfg, planned = planned
  assert 0 < largest_bytes(planned) < images_bytes(cfg)


def test_plan_is_as_recorded(planned):
  """What does not depend on the compiler: bytes of the arguments, FLOPs, shardings."""
  _, planned = planned
  golden = Path(__file__).parent / "golden" / "plan_tiny.txt"
  keys = ("name", "shape", "sharding")
  lines = [
    f"mesh {planned['mesh']}, batch {planned['batch_size']}",
    f"arguments {planned['memory']['arguments_bytes']} bytes per device",
    f"matrix FLOPs {planned['flops']['per_step']}, without recomputation "
    f"{planned['flops']['per_step_without_recomputation']}",
    *(" ".join(str(p[k]) for k in keys) for p in planned["largest_parameters"]),
  ]
  text = "\n".join(lines) + "\n"
  if os.environ.get("UPDATE_GOLDEN"):
    golden.write_text(text)
  assert text == golden.read_text()


def test_report_says_what_fits_cannot_be_known_on_fake_devices(planned):
  text = plan.render(planned[1])
  assert "no limit known" in text and "blocks/mlp/fc1/kernel" in text and "all-reduce" in text
  planned = planned[1]
  assert planned["estimate"] is None and planned["memory"]["fits"] is None


@pytest.mark.slow
def test_bytes_per_device_do_not_grow_with_devices_at_a_fixed_batch_per_device():
  def local(num_devices, **mesh):
    run = tiny_experiment(MeshConfig(**mesh), num_devices, batch_size=4 * num_devices)
    memory = compile_step(run, parse_topology(f"cpu:{num_devices}")).memory
    assert memory and 0 <= state_bytes(run) - memory.arguments <= 8 * 4  # `index` is not read: XLA drops it
    return memory

  two, eight = local(2), local(8)
  assert eight.arguments == two.arguments
  assert eight.temporaries <= 1.05 * two.temporaries


def test_bytes_of_the_state_per_device_fall_with_fsdp():
  whole, split = (state_bytes(tiny_experiment(MeshConfig(fsdp=fsdp), 8)) for fsdp in (1, 8))
  assert split < 0.5 * whole


@pytest.mark.slow
def test_plan_leaves_the_compilation_cache_as_it_was(monkeypatch):
  name = "jax_persistent_cache_min_compile_time_secs"
  before, inside = getattr(jax.config, name), []
  run = tiny_experiment()
  lower = lambda *args: inside.append(getattr(jax.config, name)) or run.step_fn.lower(*args)
  step_fn = type("Step", (), {"lower": staticmethod(lower)})
  monkeypatch.setattr("jepa_jax.plan.compile.collectives", lambda *args: [])
  compile_step(dataclasses.replace(run, step_fn=step_fn), parse_topology("cpu:1"))
  assert inside == [float("inf")] and getattr(jax.config, name) == before


def test_state_that_cannot_fit_is_not_compiled():
  chip = dataclasses.replace(CHIPS["v5e"], hbm_gib=1e-6)
  compiled = compile_step(tiny_experiment(), dataclasses.replace(parse_topology("v5e:2x2"), chip=chip))
  assert compiled.memory is None and compiled.refused and compiled.refused[0] > compiled.refused[1]


def test_precision_named_auto_is_that_of_the_chip_not_of_this_machine():
  cfg = tiny_config()
  there, notes = prepare(cfg, parse_topology("v5e:4x4"))
  assert there.encoder.compute_dtype == there.objective.projector.compute_dtype == "bfloat16" and len(notes) == 2
  assert prepare(cfg, parse_topology("cpu:8")) == (cfg, [])
  named = tiny_config(encoder=VIT | {"compute_dtype": "float32"})
  assert prepare(named, parse_topology("v5e:4x4"))[0].encoder.compute_dtype == "float32"


def test_what_the_estimate_leaves_out_is_said():
  assert "no DCN bandwidth" in plan._chip_notes(parse_topology("v4:4x4x4", 2))[0]
  assert "2 devices per chip" in plan._chip_notes(parse_topology("7x:2x2x1"))[0]
  assert plan._chip_notes(parse_topology("v5e:4x4", 2)) == []


def tpu_plan(topology, num_slices=1, **changes):
  cfg = tiny_config(**IMAGES | changes)
  return cfg, plan.make_plan(cfg, parse_topology(topology, num_slices), 2**23, 10)


@pytest.fixture(scope="module")
def on_tpu():
  return tpu_plan("v5e:2x2", mesh={"data": 2, "fsdp": 2}, batch_size=512)


@needs_libtpu
@pytest.mark.slow
def test_tpu_program_fits_and_moves_no_batch_of_images(on_tpu):
  cfg, planned = on_tpu
  assert planned["memory"]["fits"] and planned["memory"]["hbm_bytes"] == 16 * 2**30
  assert 0 < largest_bytes(planned) < images_bytes(cfg)
  gathers = [row for row in planned["collectives"] if row["kind"] == "all-gather" and row["every_step"]]
  assert sum(row["runs"] for row in gathers) > sum(row["sites"] for row in gathers), "weights are gathered per block"
  estimate = planned["estimate"]
  assert 0 < estimate["compute_ms"] < estimate["step_ms"] and 0 < estimate["collectives_share"] < 1
  assert "not a promise" in plan.render(planned)


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_a_verdict_not_a_crash():
  _, planned = tpu_plan("v5e:2x2", batch_size=2**22)
  memory, text = planned["memory"], plan.render(planned)
  assert memory["fits"] is False and memory["total_bytes"] > memory["hbm_bytes"] > 15 * 2**30
  assert "DOES NOT FIT" in text and planned["flops"]["per_step"] > 0 and planned["estimate"] is None


@needs_libtpu
@pytest.mark.slow
def test_bytes_per_chip_do_not_grow_with_chips_at_a_fixed_batch_per_chip(on_tpu):
  cfg, small = on_tpu
  _, large = tpu_plan("v5e:4x4", mesh={"data": 8, "fsdp": 2}, batch_size=4 * cfg.batch_size)
  assert large["memory"]["arguments_bytes"] <= small["memory"]["arguments_bytes"]
  # More chips need more room for their exchange; but not as much as the images of the others take, as bytes.
  others = images_bytes(cfg) // 4 * 15
  assert large["memory"]["temporaries_bytes"] - small["memory"]["temporaries_bytes"] < others
  per_image = [planned["flops"]["per_image"] for planned in (small, large)]
  assert per_image[1] == pytest.approx(per_image[0], rel=0.1)  # not equal: uniformity is a B x B product


@needs_libtpu
@pytest.mark.slow
def test_between_slices_only_sums_travel():
  cfg, planned = tpu_plan("v5e:2x2", num_slices=2, mesh={"data": 4, "fsdp": 2})
  between = [row for row in planned["collectives"] if row["link"] == "dcn" and row["every_step"]]
  assert {row["kind"] for row in between} == {"all-reduce"}
  assert max(row["largest_bytes"] for row in between) < images_bytes(cfg)
  assert planned["estimate"]["dcn_ms"] > 0
