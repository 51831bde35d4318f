"""The numbers of a plan, and its text. Times are a roofline: published peaks, nothing overlapped, no latency."""

from __future__ import annotations

import jax

from jepa_jax.experiment import Experiment
from jepa_jax.plan.chips import Chip, Topology
from jepa_jax.plan.compile import Compiled, state_bytes
from jepa_jax.plan.hlo import Collective, by_kind
from jepa_jax.sharding import local_bytes, path_name

ESTIMATE = (
  "A roofline estimate, not a promise: matrix FLOPs at the chip's peak, bytes at its published bandwidths with all "
  "links busy, no latency, no overlap. Only a run on the chips measures."
)


def largest_parameters(run: Experiment, num_rows: int = 10) -> list[dict]:
  """Returns name, shape, sharding and bytes per device of the parameters with the most scalars."""
  leaves = jax.tree_util.tree_leaves_with_path(run.abstract_state.params)
  leaves.sort(key=lambda item: -item[1].size)
  return [
    {
      "name": path_name(path),
      "shape": list(leaf.shape),
      "sharding": [str(axes) if axes else None for axes in leaf.sharding.spec],
      "bytes_per_device": local_bytes(leaf),
    }
    for path, leaf in leaves[:num_rows]
  ]


def memory_report(run: Experiment, compiled: Compiled, topology: Topology) -> dict:
  """Returns whether the step fits (None on CPU) and its bytes per device, part by part where the compiler told."""
  chip, memory = topology.chip, compiled.memory
  hbm_bytes = chip.device_bytes if chip else None
  if memory is None:
    assert compiled.refused
    used, available = compiled.refused
    return {
      "fits": False,
      "hbm_bytes": int(available),
      "total_bytes": int(used),
      "arguments_bytes": state_bytes(run),
    }
  return {
    "fits": memory.total <= hbm_bytes if hbm_bytes else None,
    "hbm_bytes": hbm_bytes,
    "total_bytes": memory.total,
    "arguments_bytes": memory.arguments,
    "outputs_bytes": memory.outputs,
    "temporaries_bytes": memory.temporaries,
    "program_bytes": memory.program,
  }


def collectives_report(found: list[Collective], chip: Chip | None) -> list[dict]:
  """Returns one row per kind of collective and link: sites, runs, bytes, and the time its link would take at best."""
  rows = []
  for (kind, link, every_step), group in by_kind(found).items():
    row = {
      "kind": kind,
      "link": link,
      "every_step": every_step,
      "sites": len(group),
      "runs": sum(c.runs for c in group),
      "largest_bytes": max(c.largest_bytes for c in group),
      "total_bytes": sum(c.runs * c.bytes for c in group),
      "sent_bytes": round(sum(c.runs * c.sent_bytes for c in group)),
      "ms": None,
    }
    bandwidth = _gb_s(chip, link) if chip else None
    if bandwidth:
      row["ms"] = row["sent_bytes"] / (bandwidth * 1e9) * 1e3
    if any(c.unknown_loop for c in group):
      row["note"] = "inside loops whose length the program does not say: counted once"
    rows.append(row)
  return rows


def _gb_s(chip: Chip, link: str) -> float | None:
  """What one device can send: half of the ICI's two directions, or its share of the host's network."""
  total = chip.ici_gb_s / 2 if link == "ici" else chip.dcn_gb_s
  return total / chip.devices if total else None


def estimate(flops: int, compiled: Compiled, rows: list[dict], topology: Topology, memory: dict) -> dict | None:
  """Returns milliseconds of matrix units, memory and collectives, and the collectives' share; None on CPU.

  Memory traffic of a TPU is at least: arguments read, outputs written, temporaries written and read once. Of a GPU it
  is that of all kernels, and kernels_ms is their sum, each as long as its bytes or its FLOPs take.
  """
  chip = topology.chip
  if chip is None or compiled.memory is None:
    return None
  m = compiled.memory
  compute_ms = flops / (topology.num_chips * chip.peak_tflop_s * 1e12) * 1e3
  hbm_ms = (2 * m.arguments + 2 * m.temporaries) / (chip.hbm_gb_s / chip.devices * 1e9) * 1e3
  regular = [row for row in rows if row["every_step"]]
  ici_ms = sum(row["ms"] or 0.0 for row in regular if row["link"] == "ici")
  dcn_ms = sum(row["ms"] or 0.0 for row in regular if row["link"] == "dcn")
  kernels_ms = max(compute_ms, hbm_ms)
  if compiled.roofline is not None:
    kernels_ms = sum(row["ms"] for row in compiled.roofline)
    hbm_ms = sum(row["gb"] for row in compiled.roofline) / chip.hbm_gb_s * 1e3
  step_ms = kernels_ms + ici_ms + dcn_ms
  return {
    "kernels_ms": kernels_ms,
    "compute_ms": compute_ms,
    "hbm_ms": hbm_ms,
    "ici_ms": ici_ms,
    "dcn_ms": dcn_ms,
    "step_ms": step_ms,
    "collectives_share": (ici_ms + dcn_ms) / step_ms,
    "what": ESTIMATE,
  }


def render(plan: dict) -> str:
  """Returns a plan, or a search, as text."""
  if "candidates" in plan:
    return _render_search(plan)
  f = plan["flops"]
  lines = [
    f"{plan['config']} on {plan['topology']}: {plan['num_chips']} chips, mesh {plan['mesh']}, "
    f"batch {plan['batch_size']} ({plan['batch_per_chip']:g} per chip)",
    *plan["notes"],
    "",
    *_render_memory(plan["memory"]),
    f"matrix FLOPs        {f['per_step']:.4g} per step, {f['per_image']:.4g} per image (with its views); "
    f"{f['recomputed_share']:.0%} of them recomputed",
    *_render_traffic(plan["memory_traffic_bytes"]),
    *_render_roofline(plan["roofline"]),
    *_render_largest(plan["largest_kernels"]),
    "",
    "collectives         link   sites   runs   largest MB     total MB      sent MB        ms",
  ]
  for r in plan["collectives"]:
    when = "" if r["every_step"] else "  only on some steps"
    ms = "-" if r["ms"] is None else f"{r['ms']:.3f}"
    lines.append(
      f"  {r['kind']:19s}{r['link']:4s}{r['sites']:7d}{r['runs']:7d}{r['largest_bytes'] / 1e6:13.3f}"
      f"{r['total_bytes'] / 1e6:13.2f}{r['sent_bytes'] / 1e6:13.2f}{ms:>10s}{when}"
    )
  lines += ["", *_render_estimate(plan["estimate"]), "largest parameters"]
  for p in plan["largest_parameters"]:
    shape, spec = "x".join(map(str, p["shape"])), ", ".join(a or "-" for a in p["sharding"])
    lines.append(f"  {p['name']:36s} {shape:18s} {p['bytes_per_device'] / 1e6:9.3f} MB per device  ({spec})")
  return "\n".join([*lines, "", f"compiled in {plan['compile_s']:.0f} s"])


_PARTS = ("arguments", "outputs", "temporaries", "program")


def _render_memory(m: dict) -> list[str]:
  verdict = {True: "fits", False: "DOES NOT FIT", None: "no limit known for fake CPU devices"}[m["fits"]]
  limit = f" of {m['hbm_bytes'] / 2**30:g}" if m["hbm_bytes"] else ""
  parts = {name: m[f"{name}_bytes"] for name in _PARTS if f"{name}_bytes" in m}
  return [
    f"memory per device   {verdict}: {m['total_bytes'] / 2**30:.3f}{limit} GiB",
    "                    " + ", ".join(f"{name} {value / 2**30:.3f}" for name, value in parts.items()),
  ]


def _render_traffic(t: dict | None) -> list[str]:
  """Bytes that kernels of one device read and write in a step."""
  if t is None:
    return []
  parts = [f"{name} {value / t['total']:.0%}" for name, value in t.items() if name != "total"]
  return [f"memory traffic      {t['total'] / 1e9:.3f} GB per device and step: {', '.join(parts)}"]


def _render_roofline(rows: list[dict] | None) -> list[str]:
  if rows is None:
    return []
  lines = ["kernels                        number         GB      TFLOP         ms"]
  for row in [*rows, {"category": "all", **{k: sum(r[k] for r in rows) for k in ("kernels", "gb", "tflop", "ms")}}]:
    lines.append(f"  {row['category']:29s}{row['kernels']:6d}{row['gb']:11.3f}{row['tflop']:11.3f}{row['ms']:11.3f}")
  return ["", *lines]


def _render_largest(rows: list[dict] | None) -> list[str]:
  if rows is None:
    return []
  lines = [f"  {r['kernels']:6d}{r['gb']:11.3f}{r['ms']:11.3f}  {r['opcode']:12s}  {r['op_name']}" for r in rows]
  return ["", "largest kernels: number, GB, ms", *lines]


def _render_estimate(e: dict | None) -> list[str]:
  if e is None:
    return []
  return [
    f"estimate            kernels {e['kernels_ms']:.3f} (compute {e['compute_ms']:.3f}, memory {e['hbm_ms']:.3f}) "
    f"+ ici {e['ici_ms']:.3f} + dcn {e['dcn_ms']:.3f} = {e['step_ms']:.3f} ms per step; "
    f"collectives {e['collectives_share']:.0%}",
    f"  {e['what']}",
    "",
  ]


def _render_search(plan: dict) -> str:
  rows = ["mesh                            remat  parts  batch/chip      GiB    fits    ms/step   images/s/chip"]
  for c in plan["candidates"]:
    numbers = f"{c['step_ms']:10.2f}{c['images_per_s_per_chip']:16.1f}" if c["step_ms"] else f"{'-':>10s}{'-':>16s}"
    rows.append(
      f"{c['mesh']:32s}{c['remat']:7s}{c['microbatch']:5d}{c['batch_per_chip']:12g}{c['total_bytes'] / 2**30:9.2f}"
      f"{'yes' if c['fits'] else 'no':>8s} {numbers}"
    )
  best = plan["recommended"]
  last = f"recommended: {' '.join(best['overrides'])}" if best else "nothing fits: take more chips, or larger ones"
  return "\n".join([f"{plan['config']} on {plan['topology']}", *plan["notes"], "", *rows, "", last, ESTIMATE])
