"""NVIDIA GPUs that are not here: devices to compile for, and what JAX would otherwise ask a GPU of this machine.

The numbers of a card are those that XLA keeps for the same purpose (openxla/xla, xla/backends/gpu/target_config/specs,
read in November 2026). Everything private of JAX that this needs stands in this file; tested with JAX 0.10.2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from jepa_jax.models import attention

_CUDNN = (9, 10, 0)
# Without a GPU nothing can be tuned, and an untuned Triton product ends the process: products are cuBLAS's.
_FLAG = "--xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA asks of a card: numbers of one of its cores (streaming multiprocessors), bytes, and its clock in GHz."""

  description: str
  capability: tuple[int, int]
  cores: int
  fpus_per_core: int
  shared_bytes: int
  l2_bytes: int
  memory_bytes: int
  memory_gb_s: float
  clock_ghz: float


GPUS = {
  "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 41943040, 85100068864, 2039.04, 1.41),
  "a100-40": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 167936, 41943040, 42331013120, 1555.2, 1.41),
  "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 52428800, 84942979072, 3352.32, 1.98),
  "h200": Gpu("NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 233472, 52428800, 151397597184, 4800.0, 1.98),
  "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 233472, 132644864, 191514411008, 7672.32, 1.965),
}


def gpu_devices(name: str, count: int) -> list[Any]:
  """Returns `count` devices of a card on one host, for compiling only. ValueError without JAX's CUDA plugin."""
  if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
    raise ValueError(
      f"--topology={name}:{count} needs JAX's compiler for NVIDIA GPUs (5 GB, no GPU): "
      f'pip install "jax-cuda12-plugin[with-cuda]=={jax.__version__}"'
    )
  if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
  text = _target_config(GPUS[name])
  return topologies.get_topology_desc(name, "cuda", target_config=text, topology=f"1x1x{count}").devices


def _target_config(gpu: Gpu) -> str:
  """Returns XLA's GpuTargetConfigProto as text."""
  major, minor = gpu.capability
  version = ".".join(map(str, _CUDNN))
  features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_bytes}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {round(gpu.memory_gb_s * 1e9)}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "{version}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} patch: {_CUDNN[2]} }}
device_description_str: "{gpu.description}"
"""


@contextlib.contextmanager
def as_on(name: str) -> Iterator[None]:
  """Within, attention is chosen and lowered as on this card: JAX asks a GPU of this machine for its version."""
  from jax._src.cudnn import fused_attention_stablehlo as lowering

  capability = GPUS[name].capability
  parsed = lambda text: tuple(int(part) for part in text.split("."))
  answers = {
    "check_cudnn_version": lambda: _CUDNN[0] * 10_000 + _CUDNN[1] * 100 + _CUDNN[2],
    "check_compute_capability": lambda wanted: capability >= parsed(wanted),
    "is_cuda_compute_capability_equal": lambda wanted: capability == parsed(wanted),
  }
  with attention.compiled_for(capability), mock.patch.multiple(lowering, **answers):
    yield
