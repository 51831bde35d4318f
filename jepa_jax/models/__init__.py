"""Networks. The only room that imports flax; the others see settings, `init` / `apply` and EncoderOutput."""

from jepa_jax.models.attentive import AttentiveHead as AttentiveHead
from jepa_jax.models.attentive import make_attentive_head as make_attentive_head
from jepa_jax.models.convnet import ConvNetConfig as ConvNetConfig
from jepa_jax.models.convnet import MLPConfig as MLPConfig
from jepa_jax.models.encoder import EncoderConfig as EncoderConfig
from jepa_jax.models.encoder import count_params as count_params
from jepa_jax.models.interface import Encoder as Encoder
from jepa_jax.models.interface import EncoderOutput as EncoderOutput
from jepa_jax.models.interface import check_divisible_by_patch as check_divisible_by_patch
from jepa_jax.models.mixer import MixerConfig as MixerConfig
from jepa_jax.models.position import sincos_position_embedding as sincos_position_embedding
from jepa_jax.models.predictor import CONDITIONINGS as CONDITIONINGS
from jepa_jax.models.predictor import Predictor as Predictor
from jepa_jax.models.predictor import PredictorConfig as PredictorConfig
from jepa_jax.models.predictor import make_predictor as make_predictor
from jepa_jax.models.projector import ProjectorConfig as ProjectorConfig
from jepa_jax.models.projector import make_projector as make_projector
from jepa_jax.models.resnet import ResNetConfig as ResNetConfig
from jepa_jax.models.text import TextConfig as TextConfig
from jepa_jax.models.transformer import first_blocks as first_blocks
from jepa_jax.models.vit import ViTConfig as ViTConfig
