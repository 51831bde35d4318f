"""A config's train step, compiled ahead of time for chips that need not be here."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from jepa_jax.config import Config, changed_everywhere
from jepa_jax.experiment import Experiment, make_experiment
from jepa_jax.plan import gpus
from jepa_jax.plan.chips import Topology
from jepa_jax.plan.hlo import Collective, collectives
from jepa_jax.plan.traffic import kernels, largest_kernels, roofline, traffic
from jepa_jax.sharding import local_bytes, make_mesh

_FAKE = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device. `total` counts what is alive at once: arguments, new outputs, temporaries, the program itself."""

  arguments: int
  outputs: int  # without those written over arguments (the state is donated)
  temporaries: int
  program: int

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a compilation told. Where XLA found no room, memory is None and refused its (used, available) bytes."""

  memory: Memory | None
  collectives: list[Collective]
  compile_s: float
  traffic: dict[str, int] | None = None  # see `traffic.traffic`
  roofline: list[dict] | None = None  # of a GPU, see `traffic.roofline`
  largest_kernels: list[dict] | None = None
  refused: tuple[float, float] | None = None


def get_devices(topology: Topology) -> list[Any]:
  """Returns the devices of a topology, for compiling only.

  ValueError without libtpu, for more fake CPU devices than this process has, and for sides libtpu has no layout of.
  """
  jax.config.update("jax_platforms", "cpu")  # a chip that this machine may have is left alone
  if topology.chip is None:
    return _fake_devices(topology.num_chips)
  if topology.chip.is_gpu:
    return gpus.gpu_devices(topology.chip.name, topology.num_chips)
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(f'--topology={topology.name} needs libtpu, the compiler for TPUs: pip install "jax[tpu]"')
  _keep_to_this_machine()
  chip = topology.chip
  settings: dict[str, Any] = {"chip_config_name": chip.libtpu_config}
  if topology.num_slices > 1:
    settings["num_slices"] = topology.num_slices
  if topology.sides == (1, 1):  # one chip of a host; more on one host would not change the program
    settings["chips_per_host_bounds"] = (1, 1, 1)
  name = f"{chip.libtpu_name or chip.name}:{'x'.join(map(str, topology.sides))}"
  try:
    return topologies.get_topology_desc(name, "tpu", **settings).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"--topology={topology.name}: libtpu has no such layout: {error}") from error


def _keep_to_this_machine() -> None:
  """libtpu asks a metadata server about the machine, locks a file against a second process, and logs both: not here."""
  for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any that libtpu knows; the topology decides
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
  }.items():
    os.environ.setdefault(name, value)


def _fake_devices(count: int) -> list[Any]:
  if _FAKE not in os.environ.get("XLA_FLAGS", ""):
    with contextlib.suppress(RuntimeError):  # JAX has started already: with as many as it has
      jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise ValueError(
      f"--topology=cpu:{count}: this process has started with {len(devices)} CPU devices; set XLA_FLAGS={_FAKE}={count}"
    )
  return devices[:count]


def as_on(topology: Topology) -> contextlib.AbstractContextManager:
  """Returns a context in which networks are traced as they would be there, where they look at the machine at all."""
  chip = topology.chip
  return gpus.as_on(chip.name) if chip and chip.is_gpu else contextlib.nullcontext()


def prepare(cfg: Config, topology: Topology) -> tuple[Config, list[str]]:
  """Returns the config as it would run there, and what was changed: "auto" precision would look at this machine."""
  chip, notes = topology.chip, []
  if chip is None:
    return cfg, notes

  def name_dtype(path: str, old: str) -> str:
    if old == "auto":
      notes.append(f'{path}="auto" is bfloat16 on {chip.name}')
    return "bfloat16" if old == "auto" else old

  return changed_everywhere(cfg, "compute_dtype", name_dtype), notes


def plan_experiment(cfg: Config, devices: list[Any], num_train: int, num_classes: int) -> Experiment:
  """Returns the experiment on these devices; ValueError for a mesh or a batch that does not divide."""
  return make_experiment(cfg, make_mesh(cfg.mesh, devices), num_train, num_classes)


def state_bytes(run: Experiment) -> int:
  """Returns bytes of arguments per device: this device's shards of the state and of the batch. Exact, not compiled."""
  return sum(local_bytes(x) for x in jax.tree.leaves((run.abstract_state, run.abstract_batch)))


def compile_step(run: Experiment, topology: Topology) -> Compiled:
  """Compiles the train step; nothing is computed or allocated. A state that alone does not fit is not compiled."""
  start_s = time.perf_counter()
  if topology.chip and (state := state_bytes(run)) > topology.chip.device_bytes:
    return Compiled(None, [], 0.0, refused=(state, topology.chip.device_bytes))
  try:
    with _without_cache():
      program = run.compile()
  except jax.errors.JaxRuntimeError as error:
    if (refused := _read_refusal(str(error))) is None:
      raise
    return Compiled(None, [], time.perf_counter() - start_s, refused=refused)
  compile_s = time.perf_counter() - start_s
  stats = program.memory_analysis()
  memory = Memory(
    stats.argument_size_in_bytes,
    stats.output_size_in_bytes - stats.alias_size_in_bytes,
    stats.temp_size_in_bytes,
    stats.generated_code_size_in_bytes,
  )
  text, chip, of_gpu = program.as_text(), topology.chip, {}
  is_gpu = bool(chip and chip.is_gpu)
  found = list(kernels(text, with_flops=is_gpu))
  if chip and is_gpu:
    rates = chip.hbm_gb_s, chip.peak_tflop_s
    of_gpu = {"roofline": roofline(found, *rates), "largest_kernels": largest_kernels(found, *rates)}
  sent = collectives(text, run.mesh.size, topology.num_slices)
  return Compiled(memory, sent, compile_s, traffic(found), **of_gpu)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
  """Writes nothing to the compilation cache: a program for chips that are not here cannot be read back from it."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, float("inf"))
  try:
    yield
  finally:
    jax.config.update(name, before)


_REFUSALS = (
  r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
  r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",  # found before anything is placed
)


def _read_refusal(message: str) -> tuple[float, float] | None:
  """Returns (bytes needed at least, bytes there) where the compiler's message says that memory ran out."""
  unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  for match in filter(None, (re.search(pattern, message) for pattern in _REFUSALS)):
    return float(match[1]) * unit[match[2]], float(match[3]) * unit[match[4]]
  return None
