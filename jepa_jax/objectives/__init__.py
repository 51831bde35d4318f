"""One file per method: a new one is its file, a line in METHODS and a config."""

from __future__ import annotations

from typing import Any

from jepa_jax.models import Encoder
from jepa_jax.objectives.base import Aux as Aux
from jepa_jax.objectives.base import Imagines as Imagines
from jepa_jax.objectives.base import Network as Network
from jepa_jax.objectives.base import Objective as Objective
from jepa_jax.objectives.base import Predicts as Predicts
from jepa_jax.objectives.ijepa import IJEPA, IJEPAConfig
from jepa_jax.objectives.iwm import IWM, IWMConfig
from jepa_jax.objectives.lejepa import LeJEPA, LeJEPAConfig
from jepa_jax.objectives.mmcr import MMCR, MMCRConfig
from jepa_jax.views import Pixels

METHODS: dict[type, Any] = {  # settings, told apart by their `name` -> objective(settings, encoder, pixels)
  LeJEPAConfig: LeJEPA,
  IJEPAConfig: IJEPA,
  IWMConfig: IWM,
  MMCRConfig: MMCR,
}


def make_objective(cfg: Any, encoder: Encoder, pixels: Pixels) -> Objective:
  """Returns the objective that cfg describes, on this encoder, for images of these pixels."""
  return METHODS[type(cfg)](cfg, encoder.make(pixels.channels), pixels)
