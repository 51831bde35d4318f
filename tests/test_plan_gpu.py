"""A plan for NVIDIA GPUs: cards, what is refused, what a product takes, and, with JAX's plugin, whole programs."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import plan
from jepa_jax.flops import matrix_flops
from jepa_jax.models import attention
from jepa_jax.plan import gpus, products
from jepa_jax.plan.chips import CHIPS, parse_topology
from jepa_jax.plan.compile import as_on, get_devices
from jepa_jax.plan.traffic import kernels, roofline
from tests.tiny import tiny_config

PLUGIN = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12")
needs_plugin = pytest.mark.skipif(not PLUGIN, reason='pip install "jax-cuda12-plugin[with-cuda]"')


def test_a_host_of_gpus_is_one_number():
  topology = parse_topology("H100:8")
  assert topology.chip is CHIPS["h100"] and topology.num_chips == 8 and topology.name == "h100:8"


@pytest.mark.parametrize(
  ("text", "slices", "message"),
  [
    ("h100", 1, "write the chip and its sides, for example h100:1"),
    ("h100:2x4", 1, "write one number up to 8, for example h100:1"),
    ("h100:16", 1, "on one host, connected by NVLink: write one number up to 8"),
    ("h100:8", 2, "no --num-slices"),
    ("h10:8", 1, "unknown chip 'h10'; did you mean h100\\? Known: .*a100.*b200"),
  ],
)
def test_what_is_no_host_of_gpus_is_refused_with_an_example(text, slices, message):
  with pytest.raises(ValueError, match=message):
    parse_topology(text, slices)


def test_without_the_compiler_the_line_that_installs_it_is_said(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    ValueError, match=rf'h200:8 needs .*pip install "jax-cuda12-plugin\[with-cuda\]=={jax.__version__}"'
  ):
    get_devices(parse_topology("h200:8"))


def test_attention_is_chosen_for_the_card_and_not_for_this_machine():
  q = jax.ShapeDtypeStruct((2, 50, 3, 64), jnp.bfloat16)
  assert attention.cudnn_refusal(q)
  with as_on(parse_topology("h100:1")):
    assert attention.cudnn_refusal(q) is None
  with as_on(parse_topology("cpu:1")):
    assert attention.cudnn_refusal(q)
  with attention.compiled_for((7, 0)):
    assert "compute capability 8" in attention.cudnn_refusal(q)
  assert attention.cudnn_refusal(q)


def test_a_product_of_a_program_has_the_flops_of_the_function():
  def step(x_BxNxD, w_DxF):
    return jnp.sum(jax.lax.map(lambda x_NxD: jnp.tanh(x_NxD @ w_DxF) @ w_DxF.T, x_BxNxD) ** 2)

  shapes = jax.ShapeDtypeStruct((5, 24, 16), jnp.float32), jax.ShapeDtypeStruct((16, 40), jnp.float32)
  grad = jax.grad(step, argnums=(0, 1))
  text = jax.jit(grad).lower(*shapes).compile().as_text()
  assert sum(k.flops * k.runs for k in kernels(text, with_flops=True)) == matrix_flops(grad, *shapes)


def array(name: str, shape: str) -> str:
  return f"%{name} = {shape} parameter(0)"


def call(target: str, out: str, config: str = "") -> str:
  return f'%y = ({out}, u8[4194304]{{0}}) custom-call(%a, %b), custom_call_target="{target}"{config}'


GEMM = (
  ', backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
  '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}'
)
CONV = ", window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
IMAGE, KERNEL, GRAD = "f32[8,28,28,3]{3,2,1,0}", "f32[3,3,3,64]{3,2,1,0}", "f32[8,28,28,64]{3,2,1,0}"
Q, K = "bf16[4,56,6,64]{3,2,1,0}", "bf16[4,48,6,64]{3,2,1,0}"
OF_CONVOLUTION, OF_PRODUCT = 2 * 8 * 28 * 28 * 64 * 27, 2 * 4 * 6 * 56 * 48 * 64


@pytest.mark.parametrize(
  ("line", "a", "b", "flops"),
  [
    (call("__cublas$gemm", "bf16[6,64,16]", GEMM), "bf16[6,32,64]", "bf16[6,32,16]", 2 * 6 * 64 * 16 * 32),
    (call("__cudnn$convForward", GRAD, CONV), IMAGE, KERNEL, OF_CONVOLUTION),
    (call("__cudnn$convBackwardInput", IMAGE, CONV), GRAD, KERNEL, OF_CONVOLUTION),
    (call("__cudnn$convBackwardFilter", KERNEL, CONV), IMAGE, GRAD, OF_CONVOLUTION),
    (call("__cudnn$fmhaSoftmax", Q), Q, K, 2 * OF_PRODUCT),
    (call("__cudnn$fmhaSoftmaxBackward", Q), Q, K, 5 * OF_PRODUCT),
    (call("__cublas$gemm", "bf16[6,64,16]"), "bf16[6,32,64]", "bf16[6,32,16]", 0),  # what is contracted is not said
    (call("topk", "f32[6]"), "f32[6]", "f32[6]", 0),
  ],
)
def test_calls_of_libraries_have_the_flops_of_what_they_compute(line, a, b, flops):
  assert products.flops("custom-call", line, [array("a", a), array("b", b)]) == flops


def test_a_kernel_takes_what_the_slower_of_bytes_and_products_takes():
  text = jax.jit(jnp.dot).lower(*[jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 2).compile().as_text()
  gb, tflop = 3 * 4 * 256**2 / 1e9, 2 * 256**3 / 1e12
  (row,) = roofline(kernels(text, with_flops=True), gb_per_s=1e-9, tflop_per_s=1e9)
  assert row["ms"] == pytest.approx(1e12 * gb) and (row["kernels"], row["gb"]) == (1, pytest.approx(gb))
  (row,) = roofline(kernels(text, with_flops=True), gb_per_s=1e9, tflop_per_s=1e-9)
  assert row["ms"] == pytest.approx(1e12 * tflop)


@needs_plugin
@pytest.mark.parametrize("name", gpus.GPUS)
def test_xla_takes_the_description_of_every_card(name):
  devices = get_devices(parse_topology(f"{name}:2"))
  assert len(devices) == 2 and devices[0].platform == "gpu"


@needs_plugin
@pytest.mark.slow
def test_a_step_for_a_card_uses_its_attention_and_fits(tmp_path):
  cfg = tiny_config(encoder__width=64, encoder__num_heads=2, encoder__compute_dtype="bfloat16")
  planned = plan.make_plan(cfg, parse_topology("h100:2"), 64, 10)
  rows = {row["category"]: row for row in planned["roofline"]}
  assert planned["memory"]["fits"] and planned["memory"]["hbm_bytes"] == gpus.GPUS["h100"].memory_bytes
  assert rows["attention"]["tflop"] > 0 and "__cublas" not in plan.render(planned)
  total = sum(row["tflop"] for row in planned["roofline"])
  np.testing.assert_allclose(2 * total, planned["flops"]["per_step"] / 1e12, rtol=0.25)
  assert planned["estimate"]["step_ms"] > 0 and any(row["kind"] == "all-reduce" for row in planned["collectives"])
