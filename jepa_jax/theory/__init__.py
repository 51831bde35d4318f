"""Theory: bounds, spectra and fits, as functions."""

from jepa_jax.losses import nuclear_norm_bound
from jepa_jax.theory.bounds import alignment_flatness, embedding_metrics, pretraining_percent_error, uniformity
from jepa_jax.theory.gaussian import energy_distance, sliced_epps_pulley
from jepa_jax.theory.information import (
  log_sphere_area,
  log_von_mises_fisher,
  mutual_information_bound,
  sphere_entropy,
)
from jepa_jax.theory.lidar import lidar
from jepa_jax.theory.marchenko_pastur import mean_root_eigenvalue, uniform_percent_error
from jepa_jax.theory.online import information_terms
from jepa_jax.theory.spectrum import feature_std, rankme

__all__ = [
  "alignment_flatness",
  "embedding_metrics",
  "energy_distance",
  "feature_std",
  "information_terms",
  "lidar",
  "log_sphere_area",
  "log_von_mises_fisher",
  "mean_root_eigenvalue",
  "mutual_information_bound",
  "nuclear_norm_bound",
  "pretraining_percent_error",
  "rankme",
  "sliced_epps_pulley",
  "sphere_entropy",
  "uniform_percent_error",
  "uniformity",
]
