"""Projector: the MLP between the encoder's features and the embedding that the loss sees.

Legend: B rows (all views of the global batch), D width in, M hidden width, E embedding width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.choices import check_choices
from jepa_jax.models.interface import BIASES_AND_SCALES, RUNNING_AVERAGES, Dtype, gelu, require_at_least, resolve_dtype
from jepa_jax.models.linear import Linear
from jepa_jax.models.resnet import batch_norm
from jepa_jax.models.transformer import layer_norm
from jepa_jax.sharding import Rule, constrain

# torch's default for Linear, U(+-1/sqrt(fan_in)): what the published recipes of these projectors start from.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
  """Settings of the projector: an MLP, hidden layers with normalisation and activation, then a linear layer.

  Attributes:
    hidden: widths of the hidden layers; () leaves one linear layer.
    out: width of the embedding.
    norm: of the hidden layers: "batch" (statistics of the whole batch it is given), "layer" or "none".
    last_norm: of the embedding: "batch" is BatchNorm without scale and bias (SimSiam, MoCo v3), and no bias before it.
    activation: of the hidden layers; "gelu" in DINO.
    compute_dtype: as of an encoder; statistics are always float32.

  `sizes`: what another method, chosen by a flag, takes over; how a head is normalised is a method's own.
  """

  sizes: ClassVar[tuple[str, ...]] = ("hidden", "out", "compute_dtype")
  hidden: tuple[int, ...] = (2048, 2048)
  out: int = 512
  norm: Literal["batch", "layer", "none"] = "batch"
  last_norm: Literal["none", "batch"] = "none"
  activation: Literal["relu", "gelu"] = "relu"
  compute_dtype: Dtype = "auto"

  def __post_init__(self):
    check_choices(self)
    require_at_least("out", self.out, 1)
    if any(w < 1 for w in self.hidden):
      raise ValueError(f"hidden widths must be positive, got {self.hidden}")


class Projector(nn.Module):
  """(..., D) -> (..., E) float32: hidden layers `layers_i`, `norms_i`, ReLU, then a linear layer and BatchNorm or bias.

  BatchNorm takes its statistics over all leading axes of what it is given, in float32: give it all views of the global
  batch in one call. train=True normalises with them and needs mutable=["batch_stats"]; train=False uses the running
  ones.
  """

  rules = (
    Rule(r"kernel$", ("embed", "mlp"), decays=True),
    BIASES_AND_SCALES._replace(optional=True),  # one layer and BatchNorm without either have none
    RUNNING_AVERAGES,
  )

  hidden: tuple[int, ...]
  out: int
  norm: str = "batch"
  last_norm: str = "none"
  activation: str = "relu"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    leading = x.shape[:-1]
    x_BxD = x.reshape(-1, x.shape[-1])
    for i, width in enumerate(self.hidden):
      # A bias before BatchNorm is subtracted again with the mean.
      use_bias = self.norm != "batch"
      linear = Linear(width, self.dtype, _kernel_init, use_bias=use_bias, name=f"layers_{i}")
      x_BxD = constrain(linear(x_BxD), "batch", "mlp")
      if self.norm == "batch":
        x_BxD = batch_norm(train, self.dtype)(name=f"norms_{i}")(x_BxD)
      elif self.norm == "layer":
        x_BxD = layer_norm(f"norms_{i}", self.dtype)(x_BxD)
      x_BxD = gelu(x_BxD) if self.activation == "gelu" else nn.relu(x_BxD)
    use_bias = self.last_norm != "batch"
    last = Linear(self.out, self.dtype, _kernel_init, use_bias=use_bias, name=f"layers_{len(self.hidden)}")
    x_BxD = constrain(last(x_BxD), "batch", None).astype(jnp.float32)
    if self.last_norm == "batch":
      x_BxD = batch_norm(train, jnp.float32)(use_scale=False, use_bias=False, name="last_norm")(x_BxD)
    return x_BxD.reshape(*leading, self.out)


def make_projector(cfg: ProjectorConfig) -> Projector:
  """The projector of these settings."""
  layers = dict(hidden=cfg.hidden, out=cfg.out, norm=cfg.norm, last_norm=cfg.last_norm, activation=cfg.activation)
  return Projector(**layers, dtype=resolve_dtype(cfg.compute_dtype))
