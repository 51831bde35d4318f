"""One file per protocol, on plain feature arrays; `EvalConfig` says which ones a run uses."""

from __future__ import annotations

import dataclasses

from jepa_jax.evals.fewshot import few_shot
from jepa_jax.evals.knn import knn_accuracy
from jepa_jax.evals.linear import linear_probe
from jepa_jax.evals.table import cell_text, format_table, markdown_table, print_table, shots_columns

EVALS = ("knn", "linear", "fewshot", "ijepa")
DEFAULT_EVALS = ("knn", "linear", "fewshot")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Protocols and their options. `view_px` = 0 evaluates at the encoder's own image size."""

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

  def __post_init__(self):
    check_evals(self.evals)
    for name in ("batch_size", "knn_k", "draws"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if self.view_px < 0 or not 0 < self.crop_fraction <= 1 or self.knn_temperature <= 0:
      raise ValueError("view_px is 0 or more, crop_fraction in (0, 1], knn_temperature positive")
    if not self.shots or min(self.shots) < 1:
      raise ValueError(f"shots={self.shots}: give at least one number of labels per class, all 1 or more")
    if self.features not in ("probe", "pooled"):
      raise ValueError(f'features={self.features!r} must be "probe" or "pooled"')


def check_evals(names: tuple[str, ...]) -> None:
  """Raises a ValueError that lists the known protocols where a name is none of them."""
  for name in names:
    if name not in EVALS:
      raise ValueError(f"unknown evaluation {name!r}; choose from {', '.join(EVALS)}")


__all__ = [
  "cell_text",
  "EVALS",
  "EvalConfig",
  "check_evals",
  "few_shot",
  "format_table",
  "knn_accuracy",
  "linear_probe",
  "markdown_table",
  "print_table",
  "shots_columns",
]
