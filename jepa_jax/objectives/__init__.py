"""One file per method: a new one is its file, its name in `_FILES` and a config."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jepa_jax.models import Encoder
from jepa_jax.objectives.base import FROZEN_FEATURES as FROZEN_FEATURES
from jepa_jax.objectives.base import Aux as Aux
from jepa_jax.objectives.base import Imagines as Imagines
from jepa_jax.objectives.base import Network as Network
from jepa_jax.objectives.base import Objective as Objective
from jepa_jax.objectives.base import Predicts as Predicts
from jepa_jax.objectives.pulled import Pulled as Pulled
from jepa_jax.objectives.pulled import without_pull as without_pull
from jepa_jax.views import Pixels

if TYPE_CHECKING:
  from jepa_jax.data import CaptionConfig

# Each ends with METHOD = (settings, objective).
_FILES = ("lejepa", "ijepa", "iwm", "mmcr", "vicreg", "mcr2", "simclr", "barlow", "byol", "mocov3", "dino", "mae")
_FILES += ("clip", "siglip", "mmcr_pairs", "cross_modal", "supervised")
# Settings, told apart by their `name` -> objective(settings, encoder, pixels).
METHODS: dict[type, Any] = dict(importlib.import_module(f"{__name__}.{file}").METHOD for file in _FILES)


def first_variables(objective: Objective, key: Any, batch: Any) -> Any:
  """Returns what the networks are applied to before the first step, {name: variables}; the average is a copy then."""
  params, state = objective.init(key, batch)
  return objective.variables(params, state, {name: params[name] for name in objective.averaged} or None)


def make_objective(cfg: Any, encoder: Encoder, pixels: Pixels, captions: CaptionConfig | None = None) -> Objective:
  """Returns the objective that cfg describes, on this encoder, for images of these pixels, with these captions."""
  method, network = METHODS[type(cfg)], encoder.make(pixels.channels)
  if not getattr(method, "reads_captions", False):
    return method(cfg, network, pixels)
  if captions is None or not captions.train:
    raise ValueError(f"{cfg.name} learns from captions: say in data.captions.train where those of the images are")
  return method(cfg, network, pixels, captions)
