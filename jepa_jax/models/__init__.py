"""Networks. The only room that imports flax; the others see settings, `init` / `apply` and EncoderOutput."""

from jepa_jax.models.attentive import AttentiveHead, make_attentive_head
from jepa_jax.models.encoder import count_params, make_encoder
from jepa_jax.models.interface import (
  CONDITIONINGS,
  EncoderConfig,
  EncoderOutput,
  PredictorConfig,
  ProjectorConfig,
  check_divisible_by_patch,
)
from jepa_jax.models.position import sincos_position_embedding
from jepa_jax.models.predictor import Predictor, make_predictor
from jepa_jax.models.projector import make_projector

__all__ = [
  "CONDITIONINGS",
  "AttentiveHead",
  "EncoderConfig",
  "EncoderOutput",
  "Predictor",
  "PredictorConfig",
  "ProjectorConfig",
  "check_divisible_by_patch",
  "count_params",
  "make_attentive_head",
  "make_encoder",
  "make_predictor",
  "make_projector",
  "sincos_position_embedding",
]
