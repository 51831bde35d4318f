"""Time and memory of the protocols on features, at the size of ImageNet: random clusters, memory-mapped float16.

Legend: N images, F features, C classes, Q queries, B images of a block.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jepa_jax.evals.blocks import MEMORY_GB
from jepa_jax.evals.fewshot import few_shot
from jepa_jax.evals.knn import knn_accuracy
from jepa_jax.evals.linear import linear_probe
from jepa_jax.sharding import MeshConfig, make_mesh

DESCRIPTION = (
  "Time and peak memory of kNN, the linear probe and few-shot on random clusters, by default ImageNet's size."
)

PROTOCOLS: dict[str, Callable] = {"knn": knn_accuracy, "linear": linear_probe, "fewshot": few_shot}
_NOISE = 4.0  # deviation of an image from its class's mean, whose features have deviation 1: kNN errs, but not on all
_BLOCK = 2**14


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`, under their own names."""
  parser.add_argument("--images", type=int, default=1_281_167, help="training images N")
  parser.add_argument("--width", type=int, default=384, help="features F")
  parser.add_argument("--classes", type=int, default=1000, help="classes C")
  parser.add_argument("--queries", type=int, default=50_000, help="test images Q")
  parser.add_argument("--memory-gb", type=float, default=MEMORY_GB, help="what a protocol may hold")
  parser.add_argument("--protocols", nargs="+", default=("knn", "linear"), choices=tuple(PROTOCOLS), help="what to run")
  parser.add_argument("--folder", help="where the features lie meanwhile (default: the system's temporary folder)")


def run(
  images: int = 1_281_167,
  width: int = 384,
  classes: int = 1000,
  queries: int = 50_000,
  memory_gb: float = MEMORY_GB,
  protocols: Sequence[str] = ("knn", "linear"),
  folder: str | None = None,
) -> dict:
  """Returns seconds, accuracy and peak memory of every protocol, as a dict that JSON can hold; progress to stderr.

  peak_resident_gb is the largest resident memory of the process so far, pages of the memory-mapped files included,
  which the system takes back when it needs them; anonymous_gb is what the process holds itself when a protocol has
  ended, None where the system does not tell.
  """
  if min(images, queries) < 1 or width < 2 or classes < 2:
    raise ValueError("images and queries must be at least 1, width and classes at least 2")
  mesh = make_mesh(MeshConfig(), jax.local_devices()) if len(jax.local_devices()) > 1 else None
  device = jax.devices()[0]
  result = {"images": images, "width": width, "classes": classes, "queries": queries, "memory_gb": memory_gb}
  result |= {"platform": device.platform, "num_devices": len(jax.local_devices()), "jax_version": jax.__version__}
  with tempfile.TemporaryDirectory(dir=folder) as place:
    began_s = time.monotonic()
    train = clusters(Path(place) / "train.f16", images, width, classes, seed=1)
    test = clusters(Path(place) / "test.f16", queries, width, classes, seed=2)
    result |= {"making_s": _since(began_s), "start": _memory()}
    for name in protocols:
      options = {"memory_gb": memory_gb, "report": lambda line: print(line, file=sys.stderr, flush=True)}
      result[name] = _measure(name, (*train, *test, classes), options | ({} if name == "fewshot" else {"mesh": mesh}))
    del train, test
  return result


def clusters(path: Path, num_images: int, width: int, num_classes: int, seed: int) -> tuple[np.memmap, np.ndarray]:
  """Returns (features (N, F), a read-only float16 memory map of `path`; labels (N,)), one Gaussian for each class.

  The classes' means are the same whatever the seed; no more than a block is in memory.
  """
  mean_CxF = np.random.default_rng(0).standard_normal((num_classes, width), np.float32)
  rng = np.random.default_rng(seed)
  y_N = (np.arange(num_images) % num_classes).astype(np.int32)  # every class has its share, so few_shot can draw
  with open(path, "wb") as file:
    for start in range(0, num_images, _BLOCK):
      y_B = y_N[start : start + _BLOCK]
      noise_BxF = _NOISE * rng.standard_normal((len(y_B), width), np.float32)
      file.write((mean_CxF[y_B] + noise_BxF).astype(np.float16).tobytes())
  return np.memmap(path, np.float16, "r", shape=(num_images, width)), y_N


def _measure(name: str, arrays: tuple, options: dict) -> dict:
  began_s = time.monotonic()
  outcome = PROTOCOLS[name](*arrays, **options)
  measured = {"seconds": _since(began_s)}
  gc.collect()
  measured |= _memory()
  if name == "linear":
    rates = {"learning_rate": outcome.selected.learning_rate, "by_rate": outcome.validation_by_lr}
    return measured | {"accuracy": outcome.accuracy, "train_accuracy": outcome.train_accuracy} | rates
  return measured | {"accuracy": outcome}


def _since(began_s: float) -> float:
  return round(time.monotonic() - began_s, 1)


def _memory() -> dict[str, float | None]:
  """Returns the peak of the resident memory and the anonymous memory held now, in GB."""
  unit = 1 if sys.platform == "darwin" else 1024
  peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
  return {"peak_resident_gb": round(peak_gb, 2), "anonymous_gb": _anonymous_gb()}


def _anonymous_gb() -> float | None:
  try:
    lines = Path("/proc/self/status").read_text().splitlines()
  except OSError:
    return None
  return next((round(int(line.split()[1]) * 1024 / 1e9, 2) for line in lines if line.startswith("RssAnon")), None)
