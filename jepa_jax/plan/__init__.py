"""Does a config fit hardware that one does not have, and what would its step move? Compiled here, run nowhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax

from jepa_jax.config import Config, load_config, without_recomputation
from jepa_jax.experiment import Experiment
from jepa_jax.plan import compare as comparison
from jepa_jax.plan import report
from jepa_jax.plan.chips import EXAMPLES, Topology, parse_topology
from jepa_jax.plan.compile import as_on, compile_step, get_devices, plan_experiment, prepare
from jepa_jax.plan.evaluation import evaluation_plan, render_evaluation
from jepa_jax.plan.search import search

__all__ = ["DESCRIPTION", "add_arguments", "make_plan", "render", "run"]

DESCRIPTION = "Compile a config's train step for chips that are not here: does it fit, what does it move."


def add_arguments(parser: Any) -> None:
  """Adds the arguments of `run`, and --json, to an argparse parser."""
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a config file; its data are not read")
  parser.add_argument("--topology", required=True, help=f"chip and sides: {', '.join(EXAMPLES)} (fake devices)")
  parser.add_argument("--num-slices", type=int, default=1, help="slices of that topology, connected by the DCN")
  parser.add_argument(
    "--num-train",
    type=int,
    default=1_281_167,
    help="training images, for the schedules (default: ImageNet-1k's)",
  )
  parser.add_argument("--num-classes", type=int, default=1000, help="classes of the probe (default: %(default)s)")
  parser.add_argument("--search", action="store_true", help="try meshes, remat and microbatches, and recommend one")
  parser.add_argument(
    "--per-chip-batch", default="", metavar="8,16", help="with --search: try these batches per chip, not the config's"
  )
  parser.add_argument("--max-candidates", type=int, default=12, help="with --search: compile at most so many")
  parser.add_argument(
    "--compare", default="", metavar="'KEY=VALUE ...'", help="beside it the plan with these settings, and the ratios"
  )
  parser.add_argument("--eval", action="store_true", help="what an evaluation of the config will hold and take")
  parser.add_argument("--num-test", type=int, default=50_000, help="with --eval: test images (default: %(default)s)")
  parser.add_argument("--json", action="store_true", help="print JSON")


def run(
  config: str,
  topology: str,
  overrides: Mapping[str, str] | None = None,
  num_slices: int = 1,
  num_train: int = 1_281_167,
  num_classes: int = 1000,
  search: bool = False,
  per_chip_batch: str = "",
  max_candidates: int = 12,
  compare: str = "",
  eval: bool = False,
  num_test: int = 50_000,
) -> dict:
  """Returns the plan of a config file, for JSON; with `search` the table of candidates and a recommendation, with
  `eval` what its evaluation will hold and take, with `compare` this plan beside that with other settings.

  ValueError before anything is compiled: an unknown topology, a mesh that does not multiply out, a batch that does not
  divide, no libtpu.
  """
  where = parse_topology(topology, num_slices)
  cfg = load_config(config, overrides)
  if compare and (eval or search):
    raise ValueError("--compare compares two plans of a step: leave out --search and --eval")
  if eval:
    return evaluation_plan(prepare(cfg, where)[0], where, num_train, num_test, num_classes)
  if search:
    batches = _read_batches(per_chip_batch)
    return _search(cfg, where, num_train, num_classes, batches, max_candidates)
  if per_chip_batch:
    raise ValueError("--per-chip-batch is for --search; without it set --config.batch_size")
  if not compare:
    return make_plan(cfg, where, num_train, num_classes)
  settings = comparison.read_settings(compare)
  other = load_config(config, {**(overrides or {}), **settings})
  devices = get_devices(where)
  for each in (cfg, other):  # what cannot be is said of both before one is compiled
    with as_on(where):
      plan_experiment(prepare(each, where)[0], devices, num_train, num_classes)
  plans = [make_plan(each, where, num_train, num_classes, devices) for each in (cfg, other)]
  return comparison.compare(*plans, settings)


def render(plan: dict) -> str:
  """Returns a plan, a search, a comparison or the plan of an evaluation as text."""
  if "evaluation" in plan:
    return render_evaluation(plan)
  return comparison.render(plan) if "plans" in plan else report.render(plan)


def make_plan(
  cfg: Config, topology: Topology, num_train: int = 1_281_167, num_classes: int = 1000, devices: list[Any] | None = None
) -> dict:
  """Returns everything that `render` prints: memory, FLOPs, collectives, the estimate, the largest parameters."""
  devices = get_devices(topology) if devices is None else devices
  with as_on(topology):
    return _make_plan(cfg, topology, num_train, num_classes, devices)


def _make_plan(cfg: Config, topology: Topology, num_train: int, num_classes: int, devices: list[Any]) -> dict:
  cfg, notes = prepare(cfg, topology)
  experiment = plan_experiment(cfg, devices, num_train, num_classes)
  flops = experiment.matrix_flops()
  compiled = compile_step(experiment, topology)
  memory = report.memory_report(experiment, compiled, topology)
  rows = report.collectives_report(compiled.collectives, topology.chip)
  notes += _chip_notes(topology)
  return {
    "config": cfg.name,
    "topology": topology.name,
    "num_chips": topology.num_chips,
    "num_devices": len(devices),
    "mesh": _mesh_text(experiment),
    "batch_size": cfg.batch_size,
    "batch_per_chip": cfg.batch_size / topology.num_chips,
    "memory": memory,
    "flops": _flops_report(cfg, flops, devices, num_train, num_classes),
    "memory_traffic_bytes": compiled.traffic,
    "roofline": compiled.roofline,
    "largest_kernels": compiled.largest_kernels,
    "collectives": rows,
    "estimate": report.estimate(flops, compiled, rows, topology, memory),
    "largest_parameters": report.largest_parameters(experiment),
    "compile_s": compiled.compile_s,
    "notes": notes,
    "jax": jax.__version__,
  }


def _chip_notes(topology: Topology) -> list[str]:
  chip, notes = topology.chip, []
  if chip and chip.devices > 1:
    notes.append(f"{chip.name} has {chip.devices} devices per chip, which share its memory and links")
  if chip and topology.num_slices > 1 and chip.dcn_gb_s is None:
    notes.append(f"no DCN bandwidth is published per {chip.name} chip: what goes between slices is not in the estimate")
  return notes


def _flops_report(cfg: Config, flops: int, devices: list[Any], num_train: int, num_classes: int) -> dict:
  needed, plain = flops, without_recomputation(cfg)
  if plain != cfg:
    needed = plan_experiment(plain, devices, num_train, num_classes).matrix_flops()
  return {
    "per_step": flops,
    "per_image": flops / cfg.batch_size,
    "per_step_without_recomputation": needed,
    "recomputed_share": 1 - needed / flops,
  }


def _mesh_text(experiment: Experiment) -> str:
  return " x ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items())


def _read_batches(text: str) -> tuple[int, ...]:
  try:
    batches = tuple(int(part) for part in text.split(",") if part)
  except ValueError:
    batches = (0,)
  if any(b < 1 for b in batches):
    raise ValueError(f"--per-chip-batch={text}: write positive whole numbers, for example 8,16,32")
  return batches


def _search(cfg, topology, num_train, num_classes, batches, max_candidates) -> dict:
  devices = get_devices(topology)
  cfg, notes = prepare(cfg, topology)
  plan_one = lambda cfg: make_plan(cfg, topology, num_train, num_classes, devices)
  say = lambda line: print(line, file=sys.stderr, flush=True)
  rows, best = search(cfg, topology, len(devices), plan_one, batches, max_candidates, say)
  return {
    "config": cfg.name,
    "topology": topology.name,
    "notes": notes,
    "candidates": rows,
    "recommended": best,
  }
