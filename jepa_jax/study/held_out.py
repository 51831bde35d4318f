"""Embeddings of held-out images as a run's loss sees them, and how far they are from a Gaussian."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jepa_jax.data import open_images, put_batch, train_batches
from jepa_jax.losses import epps_pulley, lejepa, slice_directions
from jepa_jax.objectives import without_pull
from jepa_jax.runs import open_run
from jepa_jax.sharding import batch_sharding
from jepa_jax.streams import stream
from jepa_jax.theory import energy_distance, lidar, rankme, sliced_epps_pulley
from jepa_jax.views import example_keys

NUM_IMAGES = 1024
COLUMNS = {"sliced": "EP, all slices", "energy": "energy distance", "embedding_rank": "RankMe of z"}


def embeddings(folder: Path, num_images: int = NUM_IMAGES) -> np.ndarray:
  """Returns z_NxVxD of the newest checkpoint for views of test images, float32; N is a multiple of the batch.

  Views are drawn as in training, and a projector's BatchNorm takes the statistics of the batch, as in training.
  Only for methods with one encoder and one projector.
  """
  run = open_run(folder)
  experiment = run.experiment()
  objective, cfg = without_pull(experiment.objective), run.cfg
  held = open_images(cfg.data, "test")
  networks = run.networks(experiment)

  @jax.jit
  def embed(networks, batch, key):
    keys_B = example_keys(key, batch["index"])
    views, state = objective.views(keys_B, batch), networks["state"]
    (pooled_BxVxF, _), _ = objective.encode(networks["params"], state, networks["target"], views, keys_B)
    return objective.project(networks["params"], state, pooled_BxVxF)[0]

  size = min(cfg.batch_size, len(held))
  batches, found = train_batches(held, size, cfg.seed), []
  key = stream(experiment.key, "held out")
  with jax.set_mesh(experiment.mesh):
    for _ in range(max(1, min(num_images, len(held)) // size)):
      batch = put_batch(next(batches), batch_sharding(experiment.mesh))
      found.append(np.asarray(embed(networks, batch, key)))
  batches.close()
  return np.concatenate(found)


def gaussianity(folder: Path) -> dict[str, float]:
  """Returns how far the embeddings of held-out images are from N(0, I): one view per image, the mean over all views.

  "sliced" is SIGReg with infinitely many directions (near 1.06 for a Gaussian, .409 N at a collapse), "energy" the
  energy distance, which nothing is trained on; "embedding_rank" the RankMe of the embeddings.
  """
  z_VxNxD = embeddings(folder).swapaxes(0, 1)
  of_views = {"sliced": sliced_epps_pulley, "energy": energy_distance, "embedding_rank": lambda z: float(rankme(z))}
  return {name: float(np.mean([of(z_NxD) for z_NxD in z_VxNxD])) for name, of in of_views.items()}


GAUSSIANITY = COLUMNS, gaussianity  # what stands in a table, and how it is measured


def losses_and_ranks(folder: Path) -> dict[str, float]:
  """Returns LeJEPA's loss and its terms for held-out images, "held_loss", "held_inv", "held_sigreg", and "lidar"."""
  cfg, z_BxVxD = open_run(folder).cfg.objective, embeddings(folder)
  directions_DxM = slice_directions(jax.random.key(1), z_BxVxD.shape[-1], cfg.num_slices, cfg.directions)
  statistic = lambda x: epps_pulley(x, cfg.t_max, cfg.num_knots)
  loss, terms = lejepa(z_BxVxD.swapaxes(0, 1), directions_DxM, cfg.views.global_crops.num, cfg.lam, statistic)
  held = {"held_loss": loss} | {f"held_{name}": value for name, value in terms.items()}
  return {name: float(value) for name, value in held.items()} | {"lidar": lidar(z_BxVxD)}
