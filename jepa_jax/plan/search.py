"""Which mesh, remat and number of microbatches: compile the candidates that could win, keep the fastest that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from jepa_jax.config import Config, changed_everywhere, encoders
from jepa_jax.plan.chips import Topology
from jepa_jax.sharding import MeshConfig

MICROBATCHES = (2, 4, 8)
TENSORS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One point of the search, and the overrides that reproduce it."""

  mesh: MeshConfig
  remat: str
  microbatch: int
  batch_size: int

  def apply(self, cfg: Config) -> Config:
    encoder = changed_everywhere(cfg.encoder, "remat", lambda path, old: self.remat)
    return dataclasses.replace(
      cfg, mesh=self.mesh, encoder=encoder, microbatch=self.microbatch, batch_size=self.batch_size
    )

  def overrides(self, cfg: Config) -> list[str]:
    """Returns the command-line settings that turn cfg into this candidate."""
    m = self.mesh
    settings = {
      "mesh.data": (m.data, None),
      "mesh.fsdp": (m.fsdp, None),
      "mesh.tensor": (m.tensor, None),
      "encoder.remat": (self.remat, getattr(cfg.encoder, "remat", "none")),
      "microbatch": (self.microbatch, cfg.microbatch),
      "batch_size": (self.batch_size, cfg.batch_size),
    }
    return [f"--config.{key}={value}" for key, (value, old) in settings.items() if value != old]


def meshes(num_devices: int, num_slices: int, num_heads: int, batch_size: int) -> Iterator[MeshConfig]:
  """Yields data x fsdp x tensor over the devices, least splitting first; slices differ in `data` only.

  `tensor` divides the heads, `fsdp` is a power of two, and the batch divides over data x fsdp.
  """
  for tensor in TENSORS:
    fsdp = 1
    while num_devices % (tensor * fsdp) == 0 and fsdp <= num_devices // num_slices // tensor:
      data = num_devices // (tensor * fsdp)
      if num_heads % tensor == 0 and batch_size % (data * fsdp) == 0 and data % num_slices == 0:
        yield MeshConfig(data, fsdp, tensor)
      fsdp *= 2


def search(
  cfg: Config,
  topology: Topology,
  num_devices: int,
  plan_one: Callable[[Config], dict],
  per_chip_batches: tuple[int, ...],
  max_candidates: int,
  say: Callable[[str], None],
) -> tuple[list[dict], dict | None]:
  """Returns (rows of what was compiled, the recommended row or None); plan_one compiles one config.

  The global batch stays the config's, for it is part of the experiment, unless batches per chip are given. Left out as
  dominated: remat where the same mesh fits without it; microbatches where the whole batch fits with remat; more fsdp
  once the estimate has risen with it; tensor parallelism where anything fits without it. A time per image decides.
  """
  batches = [b * topology.num_chips for b in per_chip_batches] or [cfg.batch_size]
  _check_batches(batches, num_devices, cfg, topology)
  rows: list[dict] = []
  for batch_size in batches:
    best_ms, last, tensor_of_last = None, None, 0
    for mesh in meshes(num_devices, topology.num_slices, cfg.encoder.num_heads_to_split, batch_size):
      if mesh.tensor != tensor_of_last:
        last, tensor_of_last = None, mesh.tensor
      if mesh.tensor > 1 and best_ms is not None:
        break
      if last is not None and best_ms is not None and last > best_ms:
        continue  # the estimate rises with fsdp
      for candidate in _ladder(cfg, mesh, batch_size):
        if len(rows) >= max_candidates:
          say(f"stopped after --max-candidates={max_candidates}")
          return rows, _recommend(rows)
        row = _try(cfg, candidate, plan_one, len(rows) + 1, say)
        rows.append(row)
        if row["fits"]:
          last = row["step_ms"] or 0.0
          best_ms = last if best_ms is None else min(best_ms, last)
        if row["fits"] or not row["state_fits"]:  # neither remat nor parts make the state smaller
          break
  return rows, _recommend(rows)


def _check_batches(batches: list[int], num_devices: int, cfg: Config, topology: Topology) -> None:
  for batch_size in batches:
    if not list(meshes(num_devices, topology.num_slices, cfg.encoder.num_heads_to_split, batch_size)):
      low = batch_size // num_devices * num_devices
      near = " or ".join(str(b) for b in (low, low + num_devices) if b)
      raise ValueError(
        f"batch_size={batch_size} divides over no mesh of {num_devices} devices with tensor in {TENSORS}; "
        f"the nearest that always does: {near}"
      )


def _ladder(cfg: Config, mesh: MeshConfig, batch_size: int) -> Iterator[Candidate]:
  """Yields what to try on one mesh until something fits: from fastest to smallest."""
  own = getattr(cfg.encoder, "remat", None)
  remats = [*(["none"] if own in (None, "none") else []), *(["matmuls", "block"] if own else [])]
  for remat in remats:
    yield Candidate(mesh, remat, 1, batch_size)
  if not any(encoder.uses_batch_statistics for _, encoder in encoders(cfg)):
    for parts in MICROBATCHES:
      if batch_size % (mesh.data * mesh.fsdp * parts) == 0:
        yield Candidate(mesh, remats[-1], parts, batch_size)


def _try(cfg: Config, candidate: Candidate, plan_one, number: int, say) -> dict:
  m = candidate.mesh
  mesh = f"data={m.data} x fsdp={m.fsdp} x tensor={m.tensor}"
  say(f"[{number}] {mesh}, remat={candidate.remat}, microbatch={candidate.microbatch}, batch={candidate.batch_size}")
  plan = plan_one(candidate.apply(cfg))
  memory, estimate = plan["memory"], plan["estimate"]
  step_ms = estimate["step_ms"] if estimate else None
  verdict = "does not fit" if memory["fits"] is False else "fits"
  say(f"    {verdict}: {memory['total_bytes'] / 2**30:.2f} GiB, compiled in {plan['compile_s']:.0f} s")
  return {
    "mesh": mesh,
    "remat": candidate.remat,
    "microbatch": candidate.microbatch,
    "batch_size": candidate.batch_size,
    "batch_per_chip": plan["batch_per_chip"],
    "total_bytes": memory["total_bytes"],
    "fits": memory["fits"] is not False,
    "state_fits": not memory["hbm_bytes"] or memory["arguments_bytes"] <= memory["hbm_bytes"],
    "step_ms": step_ms,
    "images_per_s_per_chip": 1e3 * plan["batch_per_chip"] / step_ms if step_ms else None,
    "collectives_share": estimate["collectives_share"] if estimate else None,
    "compile_s": plan["compile_s"],
    "overrides": candidate.overrides(cfg),
  }


def _recommend(rows: list[dict]) -> dict | None:
  """The least time per image among what fits; without an estimate (CPU) the least memory."""
  fitting = [row for row in rows if row["fits"]]
  key = lambda row: (-(row["images_per_s_per_chip"] or 0.0), row["total_bytes"])
  return min(fitting, key=key, default=None)
