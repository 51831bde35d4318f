"""The train steps of LeJEPA and MMCR in PyTorch, with its own layers, fused attention, fused AdamW and the formulas of
the papers: what ours are timed against.

Legend: B images, V views, N patches, D width, F features, E width of an embedding, M slices, T knots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jepa_jax.bench.torch_step import Encoder, adamw, device_name, wait

NORM = {"eps": 1e-5, "momentum": 0.1}


class ViT(nn.Module):
  """Images (B, C, H, W) -> the mean of the patch tokens (B, D); `resize` maps the position embedding to other grids."""

  def __init__(self, network: Encoder, resize: Mapping[int, np.ndarray]):
    super().__init__()
    self.network = network
    network.pos_embed.requires_grad_(True)
    for num, matrix_NxP in resize.items():
      self.register_buffer(f"resize_{num}", torch.from_numpy(matrix_NxP.copy()))

  def forward(self, images):
    net = self.network
    x = net.patch_embed["proj"](images).flatten(2).transpose(1, 2)
    pos_1xPxD = net.pos_embed
    if x.shape[1] != pos_1xPxD.shape[1]:
      pos_1xPxD = getattr(self, f"resize_{x.shape[1]}") @ pos_1xPxD
    x = x + pos_1xPxD
    for block in net.blocks:
      x = block(x)
    return net.norm(x).mean(1)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions."""

  def __init__(self, width_in: int, width: int, stride: int):
    super().__init__()
    self.conv1, self.conv2 = conv(width_in, width, 3, stride), conv(width, width, 3, 1)
    self.norm1, self.norm2 = nn.BatchNorm2d(width, **NORM), nn.BatchNorm2d(width, **NORM)
    if stride > 1 or width_in != width:
      self.shortcut, self.shortcut_norm = conv(width_in, width, 1, stride), nn.BatchNorm2d(width, **NORM)

  def forward(self, x):
    out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
    return F.relu(out + (self.shortcut_norm(self.shortcut(x)) if hasattr(self, "shortcut") else x))


class ResNet(nn.Module):
  """ResNet of basic blocks with the CIFAR or ImageNet stem: images -> the mean of the last map (B, F)."""

  def __init__(self, stage_sizes: Sequence[int], width: int, stem: str, channels: int):
    super().__init__()
    self.pool = stem == "imagenet"
    self.stem = conv(channels, width, 7, 2) if self.pool else conv(channels, width, 3, 1)
    self.stem_norm, width_in, self.names = nn.BatchNorm2d(width, **NORM), width, []
    for stage, num_blocks in enumerate(stage_sizes):
      for i in range(num_blocks):
        self.names.append(f"stage{stage}_block{i}")
        self.add_module(self.names[-1], BasicBlock(width_in, width * 2**stage, 2 if stage and not i else 1))
        width_in = width * 2**stage

  def forward(self, images):
    x = F.relu(self.stem_norm(self.stem(images)))
    x = F.max_pool2d(x, 3, 2, 1) if self.pool else x
    for name in self.names:
      x = getattr(self, name)(x)
    return x.mean((2, 3))


class Projector(nn.Module):
  """Linear layers, BatchNorm and ReLU between them."""

  def __init__(self, widths: Sequence[int]):
    super().__init__()
    last = len(widths) - 2
    for i, (width_in, width) in enumerate(zip(widths, widths[1:])):
      self.add_module(f"layers_{i}", nn.Linear(width_in, width, bias=i == last))
      if i < last:
        self.add_module(f"norms_{i}", nn.BatchNorm1d(width, **NORM))
    self.num_hidden = last

  def forward(self, x):
    for i in range(self.num_hidden):
      x = F.relu(getattr(self, f"norms_{i}")(getattr(self, f"layers_{i}")(x)))
    return getattr(self, f"layers_{self.num_hidden}")(x)


def conv(width_in: int, width: int, kernel_px: int, stride: int) -> nn.Conv2d:
  """Returns a convolution without bias, padded as torch pads."""
  return nn.Conv2d(width_in, width, kernel_px, stride, kernel_px // 2, bias=False)


def load_flax(network: nn.Module, flat: Mapping[str, np.ndarray]) -> None:
  """Loads parameters named as ours ("stage0_block0/conv1/kernel"); all of the network's, or a KeyError."""
  state = {}
  for name, x in flat.items():
    *path, leaf = name.split("/")
    x = np.asarray(x, np.float32)
    if leaf == "kernel":
      x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    state[".".join([*path, "bias" if leaf == "bias" else "weight"])] = torch.from_numpy(x.copy())
  missing, unexpected = network.load_state_dict(state, strict=False)
  left = [name for name in missing if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
  if left or unexpected:
    raise KeyError(f"not given: {left}; not wanted: {unexpected}")


class MultiViewStep:
  """Encoder, projector and AdamW; `__call__` makes a step on images by size and returns its loss.

  On a GPU matrix products are bfloat16 by autocast, on a CPU float32; the loss is float32.
  """

  def __init__(self, encoder: nn.Module, projector: nn.Module, loss: Callable, lr: float, weight_decay: float):
    self.device, self.loss_fn = device_name(), loss
    self.encoder, self.projector = encoder.to(self.device), projector.to(self.device)
    if isinstance(encoder, ResNet):
      self.encoder = self.encoder.to(memory_format=torch.channels_last)
    self.optimiser = adamw((self.encoder, self.projector), lr, weight_decay)

  def compile(self) -> None:
    """Compiles both networks and the loss with torch.compile, at their first call."""
    self.encoder, self.projector, self.loss_fn = map(torch.compile, (self.encoder, self.projector, self.loss_fn))

  def put(self, groups: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Returns (B, V, H, W, C) images as (B V, C, H, W) on the device, and keeps the number of views of each size."""
    self.num_views = [x.shape[1] for x in groups]
    flat = [torch.from_numpy(np.array(x)).flatten(0, 1).permute(0, 3, 1, 2).to(self.device) for x in groups]
    of_convolutions = isinstance(getattr(self.encoder, "_orig_mod", self.encoder), ResNet)
    return [x.contiguous(memory_format=torch.channels_last) if of_convolutions else x.contiguous() for x in flat]

  def loss(self, images: Sequence[torch.Tensor], *given) -> torch.Tensor:
    """Returns the loss of this batch; `given` goes to the method's own (directions that are not drawn here)."""
    with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
      features = [self.encoder(x) for x in images]
      views = [x.view(-1, num, x.shape[-1]) for x, num in zip(features, self.num_views, strict=True)]
      x_BxVxF = torch.cat(views, 1)
      z = self.projector(x_BxVxF.flatten(0, 1)).float()
    return self.loss_fn(z.view(*x_BxVxF.shape[:2], -1), *given)

  def __call__(self, images: Sequence[torch.Tensor]) -> float:
    """Makes one step; returns its loss, when all of it is done."""
    loss = self.loss(images)
    self.optimiser.zero_grad()
    loss.backward()
    self.optimiser.step()
    return wait(loss).item()


def lejepa(num_global: int, lam: float, num_slices: int, t_max: float, num_knots: int) -> Callable:
  """Returns LeJEPA's loss of z_BxVxE, SIGReg by its formula: a sine and a cosine for each sample, slice and knot."""

  def loss(z_BxVxE, directions_ExM=None):
    z_VxBxE = z_BxVxE.transpose(0, 1)
    invariance = (z_VxBxE[:num_global].mean(0) - z_VxBxE).square().mean()
    if directions_ExM is None:
      directions_ExM = F.normalize(torch.randn(z_VxBxE.shape[-1], num_slices, device=z_VxBxE.device), dim=0)
    return (1 - lam) * invariance + lam * sigreg(z_VxBxE, directions_ExM, t_max, num_knots)

  return loss


def sigreg(z_NxE, directions_ExM, t_max: float, num_knots: int):
  """Returns SIGReg of the samples (..., N, E) along these directions."""
  t_T = torch.linspace(0, t_max, num_knots, device=z_NxE.device)
  gaussian_T = (-t_T.square() / 2).exp()
  x_NxMxT = (z_NxE @ directions_ExM)[..., None] * t_T
  distance_MxT = (x_NxMxT.cos().mean(-3) - gaussian_T).square() + x_NxMxT.sin().mean(-3).square()
  return (z_NxE.shape[-2] * 2 * torch.trapezoid(distance_MxT * gaussian_T, t_T, dim=-1)).mean()


def mmcr(z_BxVxE):
  """Returns MMCR's loss: less the nuclear norm of the mean unit views."""
  return -torch.linalg.matrix_norm(F.normalize(z_BxVxE, dim=-1).mean(1), "nuc")
