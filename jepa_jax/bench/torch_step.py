"""The train step of I-JEPA in PyTorch, eager, with its own layers, fused attention and fused AdamW: what ours is timed
against.

Legend: B images, N patches, K context patches, M target blocks, T patches of a block (padded), D width, S sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jepa_jax.models.vit import ViTSize

EPSILON, TARGET_EPSILON = 1e-6, 1e-5  # of all LayerNorms; of the one on the targets


class Attention(nn.Module):
  """Multi-head self-attention; see_BxSxS says which tokens are seen, None: all."""

  def __init__(self, width: int, num_heads: int):
    super().__init__()
    self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

  def forward(self, x_BxSxD, seen_Bx1x1xS=None):
    batch, length, width = x_BxSxD.shape
    q, k, v = self.qkv(x_BxSxD).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_Bx1x1xS)
    return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
  """One pre-norm block."""

  def __init__(self, size: ViTSize):
    super().__init__()
    self.norm1, self.norm2 = (nn.LayerNorm(size.width, EPSILON) for _ in range(2))
    self.attn = Attention(size.width, size.num_heads)
    self.mlp = nn.ModuleDict({"fc1": nn.Linear(size.width, size.mlp_dim), "fc2": nn.Linear(size.mlp_dim, size.width)})

  def forward(self, x, seen=None):
    x = x + self.attn(self.norm1(x), seen)
    return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Encoder(nn.Module):
  """Images (B, C, H, W), and which patches to keep -> tokens. Parameters have the names of Meta's checkpoints."""

  def __init__(self, size: ViTSize, patch_size: int, channels: int, num_patches: int):
    super().__init__()
    self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, size.width, patch_size, patch_size)})
    self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, size.width), requires_grad=False)
    self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
    self.norm = nn.LayerNorm(size.width, EPSILON)

  def forward(self, images_BxCxHxW, keep_BxK=None):
    x = self.patch_embed["proj"](images_BxCxHxW).flatten(2).transpose(1, 2) + self.pos_embed
    if keep_BxK is not None:
      x = gather(x, keep_BxK)
    for block in self.blocks:
      x = block(x)
    return self.norm(x)


class Predictor(nn.Module):
  """Context tokens and the places of the targets -> predicted tokens (B, M, T, D); each block is a sequence."""

  def __init__(self, size: ViTSize, encoder_width: int, num_patches: int):
    super().__init__()
    self.predictor_embed = nn.Linear(encoder_width, size.width)
    self.mask_token = nn.Parameter(torch.zeros(1, 1, size.width))
    self.predictor_pos_embed = nn.Parameter(torch.zeros(1, num_patches, size.width), requires_grad=False)
    self.predictor_blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
    self.predictor_norm = nn.LayerNorm(size.width, EPSILON)
    self.predictor_proj = nn.Linear(size.width, encoder_width)

  def forward(self, context_BxKxD, context_BxK, targets_BxMxT, seen=None):
    (batch, num_blocks, _), num_context = targets_BxMxT.shape, context_BxK.shape[1]
    position = self.predictor_pos_embed[0]
    x = (self.predictor_embed(context_BxKxD) + position[context_BxK])[:, None].expand(-1, num_blocks, -1, -1)
    x = torch.cat([x, self.mask_token + position[targets_BxMxT]], dim=2).flatten(0, 1)
    for block in self.predictor_blocks:
      x = block(x, seen)
    x = self.predictor_proj(self.predictor_norm(x[:, num_context:]))
    return x.view(batch, num_blocks, *x.shape[1:])


class TorchStep:
  """The networks, AdamW and the moving average, from weights in Meta's layout; `__call__` makes a step.

  On a GPU matrix products are bfloat16 by autocast, on a CPU float32.
  """

  def __init__(
    self,
    encoder: tuple[ViTSize, Mapping[str, np.ndarray]],
    predictor: tuple[ViTSize, Mapping[str, np.ndarray]],
    lr: float,
    weight_decay: float,
    momentum: float,
  ):
    (size, encoder_tensors), (predictor_size, predictor_tensors) = encoder, predictor
    self.device, self.momentum = device_name(), momentum
    num_patches = encoder_tensors["pos_embed"].shape[1]
    _, channels, patch_size, _ = encoder_tensors["patch_embed.proj.weight"].shape
    self.encoder = load(Encoder(size, patch_size, channels, num_patches), encoder_tensors).to(self.device)
    self.predictor = load(Predictor(predictor_size, size.width, num_patches), predictor_tensors).to(self.device)
    self.target = copy.deepcopy(self.encoder)
    self.optimiser = adamw((self.encoder, self.predictor), lr, weight_decay)

  def compile(self) -> None:
    """Compiles the networks with torch.compile, at their first call; the weights stay the same."""
    self.encoder, self.target, self.predictor = map(torch.compile, (self.encoder, self.target, self.predictor))

  def put(self, images_BxHxWxC, masks) -> tuple:
    """Returns images and masks on the device; the sequence's mask is None where nothing is padded."""
    to = lambda x: torch.from_numpy(np.array(x)).to(self.device)
    context, targets, valid = (to(x) for x in (masks.context_BxK, masks.targets_BxMxT, masks.valid_BxMxT))
    seen = torch.cat([valid.new_ones(*valid.shape[:2], context.shape[1]), valid], dim=2).flatten(0, 1)[:, None, None]
    images_BxCxHxW = to(images_BxHxWxC).permute(0, 3, 1, 2).contiguous()
    return images_BxCxHxW, context.long(), targets.long(), valid, None if valid.all() else seen

  def __call__(self, images_BxCxHxW, context_BxK, targets_BxMxT, valid_BxMxT, seen) -> float:
    """Makes one step; returns its loss, when all of it is done."""
    with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
      with torch.no_grad():
        whole = self.target(images_BxCxHxW)
        whole = F.layer_norm(whole.float(), whole.shape[-1:], eps=TARGET_EPSILON)
        target = gather(whole, targets_BxMxT.flatten(1)).view(*targets_BxMxT.shape, -1)
      context = self.encoder(images_BxCxHxW, context_BxK)
      prediction = self.predictor(context, context_BxK, targets_BxMxT, seen)
    errors_BxMxT = F.smooth_l1_loss(prediction.float(), target, reduction="none").mean(-1)
    loss = ((errors_BxMxT * valid_BxMxT).sum(-1) / valid_BxMxT.sum(-1)).mean()
    self.optimiser.zero_grad()
    loss.backward()
    self.optimiser.step()
    with torch.no_grad():
      torch._foreach_lerp_(list(self.target.parameters()), list(self.encoder.parameters()), 1 - self.momentum)
    return wait(loss).item()


def gather(x_BxNxD: torch.Tensor, places_BxK: torch.Tensor) -> torch.Tensor:
  """Returns the tokens at these places."""
  return x_BxNxD.gather(1, places_BxK[:, :, None].expand(-1, -1, x_BxNxD.shape[-1]))


def adamw(networks: Iterable[nn.Module], lr: float, weight_decay: float) -> torch.optim.AdamW:
  """Returns fused AdamW of all that is trained; vectors (biases, norms) do not decay."""
  trained = [p for network in networks for p in network.parameters() if p.requires_grad]
  groups = [
    {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
    {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
  ]
  return torch.optim.AdamW(groups, lr=lr, fused=True)


def device_name() -> str:
  """Returns "cuda" where PyTorch has a GPU, else "cpu"."""
  return "cuda" if torch.cuda.is_available() else "cpu"


def wait(x: torch.Tensor) -> torch.Tensor:
  """Returns x when all that was asked of its device is done."""
  if x.is_cuda:
    torch.cuda.synchronize()
  return x


def set_threads(count: int) -> None:
  """Sets the number of threads of one operation."""
  torch.set_num_threads(count)


def versions() -> str:
  """Returns PyTorch's version and the device that it uses."""
  return f"{torch.__version__}, {device_name()}, {torch.get_num_threads()} threads"


def load(network: nn.Module, tensors: Mapping[str, np.ndarray]) -> nn.Module:
  """Returns the network with these tensors."""
  network.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()})
  return network
