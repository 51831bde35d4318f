"""What an evaluation will hold and take, said before: by arithmetic, nothing is compiled or read."""

from __future__ import annotations

import math

import jax

from jepa_jax.config import Config
from jepa_jax.data import abstract_batch, row_columns
from jepa_jax.evals import PIXEL_PX
from jepa_jax.flops import matrix_flops, matrix_peak
from jepa_jax.objectives import first_variables, make_objective
from jepa_jax.plan.chips import Topology
from jepa_jax.views import Pixels, center_view


def evaluation_plan(cfg: Config, topology: Topology, num_train: int, num_test: int, num_classes: int) -> dict:
  """Returns per row of the table: FLOPs, bytes of its features, and times at the matrix rate of the chips or, for CPU
  devices, of this machine. Decoding is not in it: it has the host's own rate."""
  chip = topology.chip
  rate = chip.peak_tflop_s * 1e12 * topology.num_chips if chip else matrix_peak() / jax.device_count()
  num_images, channels = num_train + num_test, cfg.data.channels
  pixels = {"pooled": math.prod(min(side, PIXEL_PX) for side in cfg.view_hw) * channels}
  widths = {"pooled": cfg.encoder.output_dim} | (
    {"probe": cfg.encoder.probe_dim} if cfg.encoder.probe_dim != cfg.encoder.output_dim else {}
  )
  flops = _flops_per_image(cfg)
  rows = {
    "raw pixels": _row(cfg, pixels, 0, num_images, num_train, num_test, num_classes, rate),
    "random encoder": _row(cfg, widths, flops, num_images, num_train, num_test, num_classes, rate),
    f"{cfg.objective.name}, a checkpoint": _row(cfg, widths, flops, num_images, num_train, num_test, num_classes, rate),
  }
  return {
    "config": cfg.name,
    "topology": topology.name,
    "images": {"train": num_train, "test": num_test, "classes": num_classes},
    "tflop_per_s": rate / 1e12,
    "memory_gb": cfg.evals.memory_gb,
    "flops_per_image": flops,
    "evaluation": rows,
    "not_counted": [name for name in cfg.evals.asked if name not in ("knn", "linear")],
  }


def _flops_per_image(cfg: Config) -> int:
  pixels = Pixels(cfg.data.mean, cfg.data.std)
  objective = make_objective(cfg.objective, cfg.encoder, pixels, cfg.data.captions)
  size_hw, batch = cfg.view_hw, abstract_batch(row_columns(cfg.data), 8)

  def features(variables, batch):
    views = center_view(batch, size_hw, pixels, cfg.evals.crop_fraction, objective.interpolation)
    return objective.networks()["image"].apply_fn(variables, views)

  init = lambda key, batch: first_variables(objective, key, batch)["image"]
  variables = jax.eval_shape(init, jax.random.key(0), batch)
  return matrix_flops(features, variables, batch) // 8


def _row(cfg, widths, flops, num_images, num_train, num_test, num_classes, rate) -> dict:
  single = 4 * sum(widths.values()) * num_images
  half = cfg.evals.in_half(single)
  asked, took = cfg.evals.asked, {"features": flops * num_images}
  if "knn" in asked:
    took["knn"] = 2 * num_train * num_test * widths["pooled"]
  if "linear" in asked:
    took["linear"] = _linear_flops(asked["linear"], widths, num_train, num_test, num_classes)
  return {
    "features_bytes": single // 2 if half else single,
    "precision": "float16" if half else "float32",
    "flops": took,
    "seconds": {name: x / rate for name, x in took.items()},
  }


def _linear_flops(linear, widths, num_train: int, num_test: int, num_classes: int) -> int:
  """Forward and backward of every step of both trainings, and the scoring of all images once."""
  width = widths.get(linear.features, widths["pooled"])
  selected = min(num_train, linear.selection_images)
  num_rates = len(linear.learning_rates) * len(linear.weight_decays)
  steps = lambda images, most: min(most, max(linear.min_steps, linear.epochs * max(images // linear.batch_size, 1)))
  kept = math.ceil((1 - linear.validation_fraction) * selected)
  trained = num_rates * steps(kept, linear.selection_steps) + steps(num_train, linear.max_steps)
  product = 2 * width * num_classes
  return product * (2 * trained * linear.batch_size + num_rates * (selected - kept) + num_train + num_test)


def render_evaluation(plan: dict) -> str:
  """Returns the plan of an evaluation as text."""
  images = plan["images"]
  lines = [
    f"Evaluation of {plan['config']} on {plan['topology']}: {images['train']:,} training and {images['test']:,} test "
    f"images, {images['classes']:,} classes; {plan['flops_per_image'] / 1e9:.3g} GFLOP per image",
    f"probes hold at most {plan['memory_gb']:g} GB (config.evals.memory_gb); features lie on disk:",
    "",
    f"  {'row':28s}{'features':>12s}{'precision':>11s}   at {plan['tflop_per_s']:.3g} TFLOP/s",
  ]
  for name, row in plan["evaluation"].items():
    times = ", ".join(f"{what} {_time(seconds)}" for what, seconds in row["seconds"].items() if seconds)
    lines.append(f"  {name:28s}{row['features_bytes'] / 1e9:9.2f} GB{row['precision']:>11s}   {times}")
  on_disk = [row["features_bytes"] / 1e9 for row in plan["evaluation"].values()]
  lines.append(f"  {'all rows':28s}{sum(on_disk):9.2f} GB on disk; {on_disk[-1]:.2f} GB with --no-baselines")
  if plan["not_counted"]:
    lines.append(f"not counted: {', '.join(plan['not_counted'])}")
  lines.append("Times are matrix products at that rate: a lower bound. Decoding the images comes on top.")
  return "\n".join(lines)


def _time(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
