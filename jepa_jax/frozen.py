"""Features of an encoder that stays as it is: made once, kept in the workdir, and joined to the rows of every batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jepa_jax import distributed
from jepa_jax.data import ImageSet
from jepa_jax.data.pipeline import Rows
from jepa_jax.evals.features import digest, make_features, read_features, weights_digest
from jepa_jax.experiment import Experiment
from jepa_jax.objectives import FROZEN_FEATURES
from jepa_jax.sharding import MeshConfig, make_mesh, replicated
from jepa_jax.step import TrainState
from jepa_jax.subjects import network_features, seen_of_images
from jepa_jax.workdir import FEATURES

log = logging.getLogger(__name__)


def join_features(run: Experiment, state: TrainState, images: ImageSet, workdir: Path) -> Callable[[Rows], Rows] | None:
  """Returns a function that adds to rows of `images` what the frozen encoder of `state` makes of them, float32; None
  for an objective whose batches hold no such columns.

  The features are those of the evaluation's view, and lie in <workdir>/features until their images, view or weights
  change. Every process makes a part of them, and reads all. ValueError where there is no room.
  """
  if not FROZEN_FEATURES.keys() & run.abstract_batch.keys():
    return None
  variables = run.objective.variables(state.params, state.model_state, state.target)["image"]
  whole = jax.jit(lambda tree: tree, out_shardings=replicated(run.mesh))(variables)
  local = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)
  cfg = run.cfg
  about = [seen_of_images(cfg, run.objective, images), weights_digest(local)]
  folder = workdir / FEATURES / f"frozen-{digest(about)}"
  features_fn = network_features("image", run, cfg.view_hw, cfg.evals.crop_fraction)
  mesh = make_mesh(MeshConfig(), jax.local_devices())
  made = make_features(
    *(folder, "frozen encoder, train", features_fn, jax.device_put(local, replicated(mesh)), images, mesh),
    *(cfg.evals.batch_size, False, cfg.evals.memory_gb),
  )
  if not distributed.is_primary():
    made = read_features(folder)
  log.info("Every batch holds what the frozen encoder makes of its images: %d of them, in %s", len(made.index), folder)
  place = np.full(len(images), -1, np.int32)
  place[made.index] = np.arange(len(made.index))

  def join(rows: Rows) -> Rows:
    at = place[rows["index"]]
    if (at < 0).any():
      raise ValueError(
        f"image number {rows['index'][at < 0][0]} decodes, and did not when the features of the frozen encoder were "
        f"made: remove {folder}, and they are made again"
      )
    return rows | {column: getattr(made, field)[at] for column, field in FROZEN_FEATURES.items()}

  return join
