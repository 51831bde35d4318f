"""What the other rooms see of a network: its settings and its output.

Legend: B images, N patches (or positions of the last feature map), D width of the encoder, F probe width.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp


class EncoderOutput(NamedTuple):
  """All float32. `tokens` is None where a network has no positions; class and register tokens are never in it."""

  pooled_BxD: jax.Array
  tokens_BxNxD: jax.Array | None
  probe_BxF: jax.Array


@dataclasses.dataclass(frozen=True)
class ViTSize:
  width: int
  depth: int
  num_heads: int
  mlp_dim: int


VIT_SIZES: dict[str, ViTSize] = {
  "tiny": ViTSize(192, 12, 3, 768),
  "small": ViTSize(384, 12, 6, 1536),
  "base": ViTSize(768, 12, 12, 3072),
  "large": ViTSize(1024, 24, 16, 4096),
  "huge": ViTSize(1280, 32, 16, 5120),
  "giant": ViTSize(1408, 40, 16, 6144),
}

# ResNet name -> blocks per stage.
RESNET_STAGES: dict[str, tuple[int, ...]] = {"18": (2, 2, 2, 2), "50": (3, 4, 6, 3)}

# Fields read by each kind, besides kind, image_size, channels and compute_dtype, which all read. Setting another one
# is an error: a setting that nobody reads is a wrong experiment.
_FIELDS_READ: dict[str, frozenset[str]] = {
  "vit": frozenset(
    {"variant", "patch_size", "num_registers", "cls_token", "pool", "drop_path", "pos_embed", "init", "scan", "remat"}
    | {"width", "depth", "num_heads", "mlp_dim", "probe_layers"}
  ),
  "resnet": frozenset({"variant", "stem", "width", "remat"}),
  "convnet": frozenset({"widths"}),
  "mlp": frozenset({"widths"}),
}
_FIELDS_COMMON = frozenset({"kind", "image_size", "channels", "compute_dtype"})
_DEFAULT_WIDTHS = {"convnet": (32, 64, 128, 256), "mlp": (512, 512, 256)}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Settings of an encoder; a field that the chosen kind does not read must keep its default.

  Attributes:
    kind: "vit", "resnet", "convnet" (no batch statistics, fast on CPU) or "mlp".
    variant: ViT: tiny, small, base, large, huge, giant. ResNet: "18" or "50".
    image_size: native image side in px. ViT: fixes the grid of the position embedding; other sizes are interpolated.
    patch_size: side of a patch in px (ViT).
    channels: image channels.
    num_registers: extra learned tokens that take part in attention and are dropped from the output (ViT).
    cls_token: prepend a class token (ViT).
    pool: what `pooled` is: "mean" of the patch tokens or the "cls" token, after the final norm (ViT).
    drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first (ViT).
    pos_embed: "learned" (a parameter) or "sincos" (a constant, I-JEPA's order) (ViT).
    init: of the matrices: "normal" (standard deviation .02, the papers') or "fan_in" (1 / sqrt(inputs); for narrow
      networks) (ViT, and the predictor of one).
    scan: one compiled block for all depths, parameters stacked along axis 0 (ViT).
    remat: "block" recomputes each block in the backward pass instead of storing its activations (ViT, ResNet).
    stem: "imagenet" (7x7 stride 2 and max-pool) or "cifar" (3x3 stride 1) (ResNet).
    width, depth, num_heads, mlp_dim: override the variant where not 0 (ViT; ResNet reads width, native 64).
    widths: one per stage (convnet) or hidden layer (mlp); () is (32, 64, 128, 256) or (512, 512, 256).
    probe_layers: `probe` joins the pooled vectors of this many last layers, each through the final norm (ViT).
    compute_dtype: "auto" (bfloat16 on accelerators, float32 on CPU), "float32" or "bfloat16".
  """

  kind: str = "vit"
  variant: str = "small"
  image_size: int = 224
  patch_size: int = 16
  channels: int = 3
  num_registers: int = 0
  cls_token: bool = False
  pool: str = "mean"
  drop_path: float = 0.0
  pos_embed: str = "learned"
  init: str = "normal"
  scan: bool = True
  remat: str = "none"
  stem: str = "imagenet"
  width: int = 0
  depth: int = 0
  num_heads: int = 0
  mlp_dim: int = 0
  widths: tuple[int, ...] = ()
  probe_layers: int = 2
  compute_dtype: str = "auto"

  def __post_init__(self):
    require_choice("kind", self.kind, tuple(_FIELDS_READ))
    require_choice("compute_dtype", self.compute_dtype, _DTYPES)
    self._check_unread_fields()
    for name in ("image_size", "channels"):
      _require_at_least(name, getattr(self, name), 1)
    for name in ("num_registers", "width", "depth", "num_heads", "mlp_dim"):
      _require_at_least(name, getattr(self, name), 0)
    if any(w < 1 for w in self.widths):
      raise ValueError(f"widths must be positive, got {self.widths}")
    if self.kind == "vit":
      self._check_vit()
    elif self.kind == "resnet":
      require_choice("variant", self.variant, tuple(RESNET_STAGES))
      require_choice("stem", self.stem, ("imagenet", "cifar"))
      require_choice("remat", self.remat, ("none", "block"))

  def _check_unread_fields(self):
    read = _FIELDS_READ[self.kind] | _FIELDS_COMMON
    for field in dataclasses.fields(self):
      if field.name not in read and getattr(self, field.name) != field.default:
        readers = [kind for kind, names in _FIELDS_READ.items() if field.name in names]
        raise ValueError(
          f"encoder kind={self.kind!r} does not read {field.name}={getattr(self, field.name)!r}; leave it out, or "
          f"set kind to one of {readers}"
        )

  def _check_vit(self):
    require_choice("variant", self.variant, tuple(VIT_SIZES))
    require_choice("pool", self.pool, ("mean", "cls"))
    require_choice("pos_embed", self.pos_embed, ("learned", "sincos"))
    require_choice("init", self.init, ("normal", "fan_in"))
    require_choice("remat", self.remat, ("none", "block"))
    _require_at_least("patch_size", self.patch_size, 1)
    check_divisible_by_patch("image_size", self.image_size, self.patch_size)
    size = self.vit_size
    check_heads(size.width, size.num_heads)
    if self.pos_embed == "sincos" and size.width % 4:
      raise ValueError(f"pos_embed='sincos' needs a width divisible by 4, got width={size.width}")
    if self.pool == "cls" and not self.cls_token:
      raise ValueError("pool='cls' needs cls_token=True (or set pool='mean')")
    if not 0.0 <= self.drop_path < 1.0:
      raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
    if not 1 <= self.probe_layers <= size.depth:
      raise ValueError(f"probe_layers must be between 1 and the depth {size.depth}, got {self.probe_layers}")

  @property
  def vit_size(self) -> ViTSize:
    """The variant's size with the overrides applied; mlp_dim follows an overridden width at 4 times."""
    base = VIT_SIZES[self.variant]
    width = self.width or base.width
    return ViTSize(
      width=width,
      depth=self.depth or base.depth,
      num_heads=self.num_heads or base.num_heads,
      mlp_dim=self.mlp_dim or (4 * width if self.width else base.mlp_dim),
    )

  @property
  def layer_widths(self) -> tuple[int, ...]:
    """Widths of a convnet's stages or an MLP's layers."""
    return self.widths or _DEFAULT_WIDTHS[self.kind]

  @property
  def output_dim(self) -> int:
    """D, the width of `pooled` (and of each token)."""
    if self.kind == "vit":
      return self.vit_size.width
    if self.kind == "resnet":
      return (self.width or 64) * 8 * (4 if self.variant == "50" else 1)
    return self.layer_widths[-1]

  @property
  def probe_dim(self) -> int:
    """F, the width of `probe`."""
    return self.output_dim * (self.probe_layers if self.kind == "vit" else 1)

  @property
  def uses_batch_statistics(self) -> bool:
    """True where the output of one image depends on the rest of the batch (BatchNorm): accumulation must refuse it."""
    return self.kind == "resnet"


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
  """Settings of the projector: an MLP, hidden layers with normalisation and ReLU, then a plain linear layer.

  Attributes:
    hidden: widths of the hidden layers; () leaves one linear layer.
    out: width of the embedding.
    norm: of the hidden layers: "batch" (statistics of the whole batch it is given), "layer" or "none".
    compute_dtype: as in EncoderConfig; statistics are always float32.
  """

  hidden: tuple[int, ...] = (2048, 2048)
  out: int = 512
  norm: str = "batch"
  compute_dtype: str = "auto"

  def __post_init__(self):
    require_choice("norm", self.norm, ("batch", "layer", "none"))
    require_choice("compute_dtype", self.compute_dtype, _DTYPES)
    _require_at_least("out", self.out, 1)
    if any(w < 1 for w in self.hidden):
      raise ValueError(f"hidden widths must be positive, got {self.hidden}")


Conditioning = Literal["none", "feature", "sequence"]
CONDITIONINGS = get_args(Conditioning)


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
  """Settings of I-JEPA's and IWM's predictor, a narrow ViT over context tokens and mask tokens.

  Attributes:
    depth: number of blocks; 0 is no predictor at all: every target is predicted by the mean of the context tokens.
    width: of its tokens, in and out of which linear layers lead.
    num_heads: 0 takes the encoder's number, as the paper does (24 wide at ViT-L and H: slow on accelerators).
    conditioning: how IWM tells it the action (arXiv 2403.00504): "feature" (joined to every mask token with its
      position, then three layers back to the width; context tokens hear of it only through attention), "sequence" (a
      token per number of the action) or "none".
    remat, compute_dtype: as in EncoderConfig.
  """

  depth: int = 6
  width: int = 384
  num_heads: int = 0
  conditioning: Conditioning = "none"
  remat: str = "none"
  compute_dtype: str = "auto"

  def __post_init__(self):
    _require_at_least("depth", self.depth, 0)
    _require_at_least("num_heads", self.num_heads, 0)
    if self.width < 4 or self.width % 4:
      raise ValueError(f"width={self.width} of the predictor must be a multiple of 4: its positions are 2-D sin-cos")
    require_choice("conditioning", self.conditioning, CONDITIONINGS)
    require_choice("remat", self.remat, ("none", "block"))
    require_choice("compute_dtype", self.compute_dtype, _DTYPES)


_DTYPES = ("auto", "float32", "bfloat16")


def resolve_dtype(compute_dtype: str) -> jnp.dtype:
  """The dtype of matrix products; "auto" looks at this process's backend, so name it when compiling for another."""
  if compute_dtype == "auto":
    compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(compute_dtype)


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises ValueError with the list of choices, and the nearest one, unless value is among them."""
  if value in choices:
    return
  near = difflib.get_close_matches(str(value), choices, n=1)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  raise ValueError(f"unknown {name}={value!r}: choose one of {', '.join(map(repr, choices))}{hint}")


def check_heads(width: int, num_heads: int, whose: str = "") -> None:
  """Raises ValueError naming the nearest numbers of heads that work unless num_heads divides width."""
  if width % num_heads:
    divisors = [h for h in range(1, width + 1) if width % h == 0]
    nearest = sorted(divisors, key=lambda h: abs(h - num_heads))[:3]
    raise ValueError(
      f"{whose}width={width} is not divisible by num_heads={num_heads}; the nearest num_heads that work: "
      f"{sorted(nearest)}"
    )


def check_divisible_by_patch(name: str, size_px: int, patch_size: int) -> None:
  """Raises ValueError naming the nearest sizes that work unless size_px is a positive multiple of patch_size."""
  if size_px % patch_size == 0 and size_px > 0:
    return
  below = size_px // patch_size * patch_size
  sizes = " or ".join(str(s) for s in (below, below + patch_size) if s > 0)
  raise ValueError(f"{name}={size_px} is not divisible by patch_size={patch_size}; the nearest that are: {sizes}")


def check_channels(images_BxHxWxC: jax.Array, channels: int) -> None:
  """Raises ValueError unless the images have the configured number of channels."""
  if images_BxHxWxC.shape[-1] != channels:
    raise ValueError(
      f"the images have {images_BxHxWxC.shape[-1]} channels but the encoder was configured with channels={channels}; "
      "set channels to match the data"
    )


def _require_at_least(name: str, value: int, least: int) -> None:
  if value < least:
    raise ValueError(f"{name} must be at least {least}, got {value}")
