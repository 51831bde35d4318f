"""What the pictures share: their flags, held-out images in batches of one shape, ranks in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.data import row_batches
from jepa_jax.streams import stream
from jepa_jax.views import example_keys

ENDINGS = (".png", ".jpg", ".pdf", ".svg")
BATCH = 8  # images at a time


def add_arguments(parser: Any, images: int, seed: str, picture: str) -> None:
  """Adds the arguments of every picture: which run, how many images, what the seed chooses, the file's default name."""
  parser.add_argument("--workdir", required=True, metavar="DIR", help="the workdir of a run, or one of its checkpoints")
  parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
  parser.add_argument("--images", type=int, default=images, help="how many images are drawn (default: %(default)s)")
  parser.add_argument("--seed", type=int, default=0, help=f"chooses {seed} (default: %(default)s)")
  parser.add_argument("--out", default="", metavar="FILE", help=f"the picture (default: <workdir>/{picture})")


def batches(images: Any, index_B: np.ndarray, seed: int):
  """Yields (batch, keys, which rows are images asked for) of these images; see `data.row_batches`."""
  for wanted, batch, real_B in row_batches(images, index_B, BATCH):
    yield batch, example_keys(stream(jax.random.key(seed), "images"), jnp.asarray(wanted)), real_B


def picture_path(out: str | Path, usual: Path) -> Path:
  """Returns where the picture goes, its folder made; ValueError, before anything is computed, where it cannot be."""
  path = Path(out).expanduser() if str(out) else usual
  if path.suffix.lower() not in ENDINGS:
    raise ValueError(f"--out={out}: a picture ends in {', '.join(ENDINGS)}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"--out={out}: the folder {path.parent} cannot be made ({error.strerror})") from error
  return path


def picture(images: Any, row: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns the image of this row, (h, w, C), and its batch of one."""
  batch = images.read(np.array([row]))
  return batch["canvas"][0, : batch["height"][0], : batch["width"][0]], batch


def rank_numbers(rank_Q: np.ndarray, num_candidates: int) -> dict[str, float]:
  """Returns the median rank and the percentages of ranks 1 and up to 10, and what guessing gives."""
  top10_chance = 100 * min(10, num_candidates) / num_candidates
  return {
    "median_rank": float(np.median(rank_Q)),
    "median_rank_chance": (num_candidates + 1) / 2,
    "top1": rounded(100 * (rank_Q <= 1).mean()),
    "top1_chance": rounded(100 / num_candidates),
    "top10": rounded(100 * (rank_Q <= 10).mean()),
    "top10_chance": rounded(top10_chance),
  }


def rounded(x: float) -> float:
  """Returns x with four digits."""
  return float(f"{x:.4g}")
