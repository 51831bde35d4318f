"""Losses: pure functions on arrays, usable without the rest of jepa_jax (they need jax, numpy and scipy only)."""

from jepa_jax.losses.coding_rate import coding_rate, mcr2
from jepa_jax.losses.directions import slice_directions
from jepa_jax.losses.ecf import (
  COLLAPSE_PER_SAMPLE,
  EXPECTED_GAUSSIAN,
  collapse_per_sample,
  epps_pulley,
  epps_pulley_mean,
  epps_pulley_paper,
  expected_under_gaussian,
)
from jepa_jax.losses.lejepa import additive_from_lam, invariance, lam_from_additive, lam_from_bcs, lejepa
from jepa_jax.losses.mmcr import centroid_metrics, centroids, check_embeddings, mmcr
from jepa_jax.losses.neighbours import (
  barlow_twins,
  byol,
  dino,
  dino_centre,
  mae,
  moco_v3,
  nt_xent,
  patch_targets,
  vicreg,
)
from jepa_jax.losses.nuclear import nuclear_norm, nuclear_norm_bound
from jepa_jax.losses.pairs import clip, pair_geometry, pair_recalls, siglip
from jepa_jax.losses.prediction import block_mean, cosine, normalise_targets, prediction_error, prediction_loss
from jepa_jax.losses.regularisers import REGULARISERS, STATISTICS, vicreg_terms, visreg
from jepa_jax.losses.retrieval import blind_mrr, distances, reciprocal_ranks
from jepa_jax.losses.sigreg import epps_pulley_direct, pooled_views, sigreg, sigreg_plain, sliced
from jepa_jax.losses.univariate import (
  anderson_darling,
  cramer_von_mises,
  extended_jarque_bera,
  moments,
  shapiro_wilk,
  sliced_wasserstein,
  vasicek_entropy,
  vcreg,
  watson,
)

__all__ = [
  "COLLAPSE_PER_SAMPLE",
  "EXPECTED_GAUSSIAN",
  "REGULARISERS",
  "STATISTICS",
  "additive_from_lam",
  "anderson_darling",
  "barlow_twins",
  "blind_mrr",
  "block_mean",
  "byol",
  "centroid_metrics",
  "centroids",
  "check_embeddings",
  "clip",
  "coding_rate",
  "collapse_per_sample",
  "cosine",
  "cramer_von_mises",
  "dino",
  "dino_centre",
  "distances",
  "epps_pulley",
  "epps_pulley_direct",
  "epps_pulley_mean",
  "epps_pulley_paper",
  "expected_under_gaussian",
  "extended_jarque_bera",
  "invariance",
  "lam_from_additive",
  "lam_from_bcs",
  "lejepa",
  "mae",
  "mcr2",
  "mmcr",
  "moco_v3",
  "moments",
  "normalise_targets",
  "nt_xent",
  "nuclear_norm",
  "nuclear_norm_bound",
  "pair_geometry",
  "pair_recalls",
  "patch_targets",
  "pooled_views",
  "prediction_error",
  "prediction_loss",
  "reciprocal_ranks",
  "shapiro_wilk",
  "siglip",
  "sigreg",
  "sigreg_plain",
  "slice_directions",
  "sliced",
  "sliced_wasserstein",
  "vasicek_entropy",
  "vcreg",
  "vicreg",
  "vicreg_terms",
  "visreg",
  "watson",
]
