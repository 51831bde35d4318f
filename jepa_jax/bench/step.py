"""Images/s of a config's train step on this machine, and its share of the matrix rate that this machine reaches."""

from __future__ import annotations

import argparse
import dataclasses

import jax

from jepa_jax.config import Config, load_config, without_recomputation
from jepa_jax.experiment import Experiment, make_experiment, timed_step_s
from jepa_jax.flops import matrix_peak
from jepa_jax.plan.traffic import kernels, traffic
from jepa_jax.sharding import make_mesh

DESCRIPTION = "Images/s of a config's train step, and its share of the measured matrix peak."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument(
    "--config", required=True, metavar="FILE[:VARIANT]", help="a config file; its data are not read, only its shapes"
  )
  parser.add_argument("--batch-size", type=int, default=0, help="global batch (default: the config's)")
  parser.add_argument("--steps", type=int, default=20, help="timed steps, after two to warm up")


def run(config: str, batch_size: int = 0, steps: int = 20) -> dict:
  """Returns median step time in ms, images/s, FLOPs and bytes per step and the share of the measured peak, for JSON.

  FLOPs are those of `model_flops`: matrix products of the views, forward and backward. The peak is that of a square
  matrix product, measured in the same run: float32 on CPU, else bfloat16. Bytes are what the kernels of one device read
  and write, told from the compiled program (`plan.traffic`).
  """
  cfg = load_config(config)
  cfg = dataclasses.replace(cfg, batch_size=batch_size or cfg.batch_size)
  experiment = _experiment(cfg)
  compiled = experiment.compile()
  step_s, metrics = timed_step_s(experiment, compiled, steps)
  flops, peak = model_flops(cfg), matrix_peak()
  gigabytes = traffic(kernels(compiled.as_text()))["total"] / 1e9
  device = jax.devices()[0]
  return {
    "config": cfg.name,
    "batch_size": cfg.batch_size,
    "step_ms": round(1e3 * step_s, 2),
    "images_per_s": round(cfg.batch_size / step_s, 1),
    "tflop_per_step": round(flops / 1e12, 4),
    "tflop_per_s": round(flops / step_s / 1e12, 3),
    "measured_peak_tflop_per_s": round(peak / 1e12, 3),
    "share_of_peak": round(flops / step_s / peak, 6),
    "gb_per_step": round(gigabytes, 4),
    "gb_per_s": round(gigabytes / step_s, 2),
    "loss": float(metrics["loss"]),
    "device": f"{jax.device_count()} x {device.device_kind}",
    "jax": jax.__version__,
  }


def model_flops(cfg: Config) -> int:
  """Returns the matrix FLOPs of one step without what is computed twice to save memory (remat, microbatches)."""
  return _experiment(without_recomputation(cfg)).matrix_flops()


def _experiment(cfg: Config) -> Experiment:
  return make_experiment(
    cfg, make_mesh(cfg.mesh), num_train=100 * cfg.batch_size, num_classes=getattr(cfg.objective, "num_classes", 10)
  )
