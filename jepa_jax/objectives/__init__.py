"""One file per method; `make_objective` picks the one a config names."""

from __future__ import annotations

from jepa_jax.models import EncoderConfig, make_encoder
from jepa_jax.objectives.base import Aux, Objective
from jepa_jax.objectives.ijepa import IJEPA, IJEPAConfig
from jepa_jax.objectives.iwm import IWM, IWMConfig
from jepa_jax.objectives.lejepa import LeJEPA, LeJEPAConfig
from jepa_jax.objectives.mmcr import MMCR, MMCRConfig

ObjectiveConfig = LeJEPAConfig | IJEPAConfig | IWMConfig | MMCRConfig  # told apart by `name`
METHODS = {LeJEPAConfig: LeJEPA, IJEPAConfig: IJEPA, IWMConfig: IWM, MMCRConfig: MMCR}


def make_objective(cfg: ObjectiveConfig, encoder: EncoderConfig) -> Objective:
  """Returns the objective that cfg describes, on the given encoder."""
  average = getattr(cfg, "weight_average", 0)
  if average and encoder.uses_batch_statistics:
    raise ValueError(
      f"weight_average={average} with encoder kind={encoder.kind!r}: its BatchNorm statistics would be those of the "
      "weights, not of their average; set weight_average to 0 or choose an encoder without BatchNorm"
    )
  return METHODS[type(cfg)](cfg, make_encoder(encoder))


__all__ = [
  "METHODS",
  "IJEPA",
  "IWM",
  "MMCR",
  "Aux",
  "IJEPAConfig",
  "IWMConfig",
  "LeJEPA",
  "LeJEPAConfig",
  "MMCRConfig",
  "Objective",
  "ObjectiveConfig",
  "make_objective",
]
