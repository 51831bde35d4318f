"""What pushes embeddings apart at a collapse: each loss's gradient along a singular direction, against its strength.

B rows lie on one direction e and leave it by s w_i f, f orthogonal to e and w standard normal: s, the deviation along
f, is the second singular value over sqrt(B). Both views of an image are the same. No training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import losses
from jepa_jax.study import figures
from jepa_jax.study.tables import markdown, write_table

DESCRIPTION = "The gradients of MMCR, MCR2, VICReg, SimCLR and SIGReg along a singular direction near a collapse."
SCALES = np.geomspace(1e-4, 1, 33)
_SHOWN = (1e-4, 1e-3, 1e-2, 1e-1)
LOSSES: dict[str, Callable] = {
  "MMCR": lambda z: losses.mmcr(z, reduction="bound")[0],
  "MCR2, eps .5": lambda z: losses.mcr2(z)[0],
  "MCR2, eps .01": lambda z: losses.mcr2(z, 0.01)[0],
  "VICReg": lambda z: losses.vicreg(z)[0],
  "SimCLR, T .2": lambda z: losses.nt_xent(z, 0.2)[0],
  "SIGReg": lambda z: losses.sigreg(z.swapaxes(0, 1), jax.random.key(1), 256),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("--workdir", required=True, help="where push.csv, push.md and push.png go")
  parser.add_argument("--batch", type=int, default=64, help="rows B (default: %(default)s)")
  parser.add_argument("--dim", type=int, default=32, help="their width D (default: %(default)s)")


def run(workdir: str, batch: int = 64, dim: int = 32, overrides: Mapping[str, str] | None = None) -> dict:
  """Returns {"workdir", "table"}; writes push.csv, push.md and push.png. ValueError for sizes that have no second
  direction."""
  del overrides
  if batch < 4 or dim < 2:
    raise ValueError(f"--batch={batch} must be at least 4 and --dim={dim} at least 2: there is a second direction")
  folder = Path(workdir).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  for name, loss in LOSSES.items():
    rows += [
      {"loss": name, "scale": s, "push": x} for s, x in zip(SCALES, pushes(loss, SCALES, batch, dim), strict=True)
    ]
  write_table(folder / "push.csv", rows)
  figures.draw_pushes(
    folder / "push.png", [row | {"regulariser": row["loss"]} for row in rows], "of the second direction"
  )
  text = markdown(["loss", *(f"s = {s:g}" for s in _SHOWN), "slope near 0"], [_row(rows, name) for name in LOSSES])
  (folder / "push.md").write_text(text + "\n")
  return {"workdir": str(folder), "table": text}


def pushes(loss: Callable, scales: np.ndarray, batch: int, dim: int) -> list[float]:
  """Returns -dL/ds at each scale: how hard the loss asks for more of the second direction."""
  w_B = np.random.default_rng(0).standard_normal(batch)
  w_B = jnp.asarray((w_B - w_B.mean()) / w_B.std(), jnp.float32)
  first, second = jnp.eye(dim)[0], jnp.eye(dim)[1]

  def of(s: jax.Array) -> jax.Array:
    z_BxD = first + s * w_B[:, None] * second
    return -loss(jnp.stack([z_BxD, z_BxD], axis=1))

  slope_at = jax.jit(jax.grad(of))
  return [float(slope_at(jnp.float32(s))) for s in scales]


def slope(rows: list[dict], name: str) -> float:
  """Returns d log push / d log s over the two smallest decades: 0 is a push that stays, 1 one that vanishes with s."""
  own = [row for row in rows if row["loss"] == name and row["scale"] <= 1e-2 and row["push"] > 0]
  if len(own) < 3:
    return float("nan")
  return float(np.polyfit(np.log([r["scale"] for r in own]), np.log([r["push"] for r in own]), 1)[0])


def _row(rows: list[dict], name: str) -> list[str]:
  of = {row["scale"]: row["push"] for row in rows if row["loss"] == name}
  near = lambda s: of[min(of, key=lambda scale: abs(np.log(scale / s)))]
  return [name, *(f"{near(s):.3g}" for s in _SHOWN), f"{slope(rows, name):.2f}"]


def render(result: Mapping) -> str:
  """Returns the text that the command prints."""
  return f"{result['table']}\nTable and figure: {result['workdir']}"
