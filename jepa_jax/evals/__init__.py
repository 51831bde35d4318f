"""One file per protocol, on plain feature arrays or on networks; `EvalConfig` says which ones a run uses."""

from __future__ import annotations

import dataclasses

from jepa_jax.evals.attentive import attentive_probe, token_width
from jepa_jax.evals.fewshot import few_shot
from jepa_jax.evals.knn import knn_accuracy
from jepa_jax.evals.linear import linear_probe
from jepa_jax.evals.mrr import OPERATIONS, mean_reciprocal_ranks
from jepa_jax.evals.predictor_tuning import check_networks, grouped, tune_multitask, tune_predictor
from jepa_jax.evals.table import cell_text, format_table, markdown_table, print_table, shots_columns
from jepa_jax.evals.tuning import Task, Tuned, TuningData, TuningSettings, tune
from jepa_jax.losses.retrieval import DISTANCES

EVALS = ("knn", "linear", "fewshot", "ijepa", "attentive", "mrr", "predictor_tuning")
OF_FEATURES = ("knn", "linear", "fewshot", "ijepa")  # need no more than every image's features, once
DEFAULT_EVALS = ("knn", "linear", "fewshot")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Protocols and their options. `view_px` = 0 evaluates at the encoder's own image size.

  Of the protocols that tune networks ("attentive", "predictor_tuning"), see `TuningSettings`: tuning_lrs (several: the
  best on held-out training images), tuning_epochs, tuning_batch, tuning_weight_decay. tuning_groups: the group of each
  class, (0, 0, 1) for a, b | c: a second label set, on which the predictor is tuned alone and together with the first.
  Of "mrr": so many images, each with a bank of so many pictures, of which mrr_chunk at a time go through the networks
  for mrr_batch images at a time; mrr_distance is "l2" (over the patch tokens) or "cosine" (of their means).
  """

  evals: tuple[str, ...] = DEFAULT_EVALS
  batch_size: int = 256
  view_px: int = 0
  crop_fraction: float = 1.0
  features: str = "probe"  # of the linear probes: "probe" (last two layers of a ViT, concatenated) or "pooled"
  knn_k: int = 20
  knn_temperature: float = 0.07
  shots: tuple[int, ...] = (1, 5, 10)
  draws: int = 10
  seed: int = 0
  tuning_lrs: tuple[float, ...] = (1e-3,)
  tuning_epochs: int = 20
  tuning_batch: int = 128
  tuning_weight_decay: float = 0.05
  tuning_groups: tuple[int, ...] = ()
  mrr_images: int = 64
  mrr_bank: int = 256
  mrr_chunk: int = 64
  mrr_batch: int = 8
  mrr_distance: str = "l2"

  def __post_init__(self):
    check_evals(self.evals)
    for name in ("batch_size", "knn_k", "draws", "mrr_images", "mrr_bank", "mrr_chunk", "mrr_batch"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if self.view_px < 0 or not 0 < self.crop_fraction <= 1 or self.knn_temperature <= 0:
      raise ValueError("view_px is 0 or more, crop_fraction in (0, 1], knn_temperature positive")
    if not self.shots or min(self.shots) < 1:
      raise ValueError(f"shots={self.shots}: give at least one number of labels per class, all 1 or more")
    if self.features not in ("probe", "pooled"):
      raise ValueError(f'features={self.features!r} must be "probe" or "pooled"')
    if self.mrr_distance not in DISTANCES:
      raise ValueError(f"mrr_distance={self.mrr_distance!r} must be one of {', '.join(DISTANCES)}")
    _ = self.tuning  # checks itself
    if self.tuning_groups:
      check_groups(self.tuning_groups)

  @property
  def asked(self) -> tuple[str, ...]:
    """The protocols to run: predictor tuning brings those that its accuracies are read against."""
    beside = ("linear", "attentive") if "predictor_tuning" in self.evals else ()
    return tuple(dict.fromkeys((*self.evals, *beside)))

  @property
  def tuning(self) -> TuningSettings:
    return TuningSettings(self.tuning_lrs, self.tuning_epochs, self.tuning_batch, self.tuning_weight_decay, self.seed)


def check_groups(groups: tuple[int, ...], num_classes: int | None = None) -> None:
  """Raises a ValueError unless every class has a group, and these are 0 to G - 1, all in use, and at least two."""
  if num_classes is not None and len(groups) != num_classes:
    raise ValueError(f"tuning_groups has {len(groups)} entries for {num_classes} classes: give the group of each class")
  used = sorted(set(groups))
  if len(used) < 2 or used != list(range(len(used))):
    raise ValueError(f"tuning_groups uses the groups {used}: number them from 0 without gaps, at least 0 and 1")


def check_evals(names: tuple[str, ...]) -> None:
  """Raises a ValueError that lists the known protocols where a name is none of them."""
  for name in names:
    if name not in EVALS:
      raise ValueError(f"unknown evaluation {name!r}; choose from {', '.join(EVALS)}")


__all__ = [
  "EVALS",
  "OF_FEATURES",
  "OPERATIONS",
  "EvalConfig",
  "Task",
  "Tuned",
  "TuningData",
  "TuningSettings",
  "attentive_probe",
  "cell_text",
  "check_evals",
  "check_groups",
  "check_networks",
  "few_shot",
  "format_table",
  "grouped",
  "knn_accuracy",
  "linear_probe",
  "markdown_table",
  "mean_reciprocal_ranks",
  "print_table",
  "shots_columns",
  "token_width",
  "tune",
  "tune_multitask",
  "tune_predictor",
]
