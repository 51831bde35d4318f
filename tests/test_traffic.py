"""Bytes that a compiled step moves: each kernel reads its operands and writes its results, slices count as slices."""

import jax
import jax.numpy as jnp
import pytest

from jepa_jax.plan.traffic import CATEGORIES, kernels, traffic
from tests.tiny import tiny_experiment

F32 = 4


def text_of(fn, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(fn).lower(*arrays).compile().as_text()


def test_a_product_reads_both_and_writes_one():
  assert traffic(kernels(text_of(jnp.dot, (128, 64), (64, 32))))["total"] == F32 * (128 * 64 + 64 * 32 + 128 * 32)


def test_what_is_fused_is_read_and_written_once():
  assert traffic(kernels(text_of(lambda x: jnp.tanh(x * 2 + 1) * x, (256, 256))))["total"] == F32 * 2 * 256 * 256


def test_a_loop_counts_as_often_as_it_runs_and_of_what_it_slices_the_slices():
  width = 64

  def loop(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, weights)

  totals = {n: traffic(kernels(text_of(loop, (width, width), (n, width, width))))["total"] for n in (8, 16, 24)}
  per_run = (totals[16] - totals[8]) / 8
  assert totals[24] - totals[16] == totals[16] - totals[8]
  one = F32 * width * width  # x, w and the product, the copies of slices in and out; not the whole stacks
  assert 5 * one <= per_run <= 14 * one


HLO = """HloModule step

%fused_update (buffer: f32[10,100], new: f32[1,100], i: s32[]) -> f32[10,100] {
  %buffer = f32[10,100]{1,0} parameter(0)
  %new = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[10,100]{1,0} dynamic-update-slice(%buffer, %new, %i, %zero)
}

%fused_slice (stack: bf16[10,100], i: s32[]) -> bf16[1,100] {
  %stack = bf16[10,100]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %slice = bf16[1,100]{1,0} dynamic-slice(%stack, %i.1, %zero.1), dynamic_slice_sizes={1,100}
  ROOT %twice = bf16[1,100]{1,0} add(%slice, %slice)
}

ENTRY %main (a: f32[10,100], b: f32[1,100], c: bf16[10,100], i: s32[]) -> (f32[10,100], bf16[1,100]) {
  %a = f32[10,100]{1,0} parameter(0)
  %b = f32[1,100]{1,0} parameter(1)
  %c = bf16[10,100]{1,0} parameter(2)
  %i.2 = s32[] parameter(3)
  %stored = f32[10,100]{1,0} fusion(%a, %b, %i.2), calls=%fused_update, metadata={op_name="body/dynamic_update_slice"}
  %loaded = bf16[1,100]{1,0} fusion(%c, %i.2), calls=%fused_slice, metadata={op_name="blocks/norm1/add"}
  ROOT %out = (f32[10,100]{1,0}, bf16[1,100]{1,0}) tuple(%stored, %loaded)
}
"""


def test_what_is_written_in_place_or_sliced_counts_by_the_slice_and_goes_to_its_category():
  index = 4
  assert {(k.category, k.bytes) for k in kernels(HLO)} == {
    ("residuals", (400 + index) + 400),  # the new row and the index are read, a row is written
    ("norms", (200 + index) + 200),
  }


def test_what_stands_in_a_branch_is_left_out():
  """RankMe, say, on one step of fifty: as collectives in a branch are."""
  branch = lambda x, on: jax.lax.cond(on[0] > 0, lambda x: jnp.tanh(x @ x), lambda x: x, x)
  text = text_of(lambda x, on: (x * 2, branch(x, on)), (64, 64), (1,))
  in_branches = [k for k in kernels(text) if not k.every_step]
  assert in_branches and traffic(kernels(text))["total"] < sum(k.bytes for k in kernels(text))
  assert traffic(kernels(text))["total"] == sum(k.bytes for k in kernels(text) if k.every_step)


def test_the_room_that_a_library_works_in_is_not_written():
  call = '%p = (bf16[128,32]{1,0}, s8[33554432]{0}) custom-call(%a), custom_call_target="__cublas$gemm"'
  text = f"ENTRY %m (a: bf16[128,64]) -> bf16[2] {{\n  %a = bf16[128,64]{{1,0}} parameter(0)\n  {call}\n}}\n"
  assert [k.bytes for k in kernels(text)] == [2 * (128 * 64 + 128 * 32)]


def test_flops_are_read_of_nvidias_programs_only():
  """A TPU's program writes convolutions whose kernel has not the axes that its labels name."""
  line = "%p = bf16[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, window={size=1}"
  text = "ENTRY %m (a: bf16[8,2], b: bf16[8]) -> bf16[8,4] {\n  %a = bf16[8,2]{1,0} parameter(0)\n"
  text += f"  %b = bf16[8]{{0}} parameter(1)\n  {line}\n}}\n"
  assert [(k.opcode, k.flops) for k in kernels(text)] == [("convolution", 0)]
  with pytest.raises(IndexError):
    list(kernels(text, with_flops=True))


@pytest.mark.parametrize(
  "op_name, category",
  [
    (
      "jit(step)/transpose(jvp(ViT))/while/body/closed_call/checkpoint/blocks/attn/qkv/dot_general",
      "attention, products",
    ),
    ("jit(step)/jvp(ViT)/while/body/closed_call/blocks/attn/bhnk,bhmk->bhnm/dot_general", "attention"),
    ("jit(step)/jvp(ViT)/while/body/closed_call/blocks/norm2/rsqrt", "norms"),
    ("jit(step)/jvp(ViT)/while/body/closed_call/blocks/mlp/fc1/dot_general", "mlp"),
    ("jit(step)/jvp(ViT)/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice", "residuals"),
    ("jit(step)/jvp(ResNet)/stage1_block0/conv1/conv_general_dilated", "convolutions and batch norms"),
    ("jit(step)/mul", "rest"),
  ],
)
def test_categories_are_read_from_the_names_that_xla_keeps(op_name, category):
  instruction = f'  ROOT %n = f32[2]{{0}} negate(%a), metadata={{op_name="{op_name}"}}'
  line = f"ENTRY %m (a: f32[2]) -> f32[2] {{\n  %a = f32[2]{{0}} parameter(0)\n{instruction}\n}}\n"
  assert [(k.category, k.bytes) for k in kernels(line)] == [(category, 16)]


@pytest.mark.slow
def test_a_whole_step_is_told_apart():
  found = traffic(kernels(tiny_experiment().compile().as_text()))
  assert {"attention", "attention, products", "mlp", "norms", "residuals", "patches"} <= set(found)
  assert set(found) <= {name for name, _ in CATEGORIES} | {"rest", "total"}
  assert sum(v for k, v in found.items() if k != "total") == found["total"] > 0
