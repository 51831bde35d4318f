"""CLIP's train step in PyTorch, with its own layers, fused attention and fused AdamW, and open_clip's form of the loss:
what ours is timed against.

Legend: B pairs, L tokens, D width, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jepa_jax.bench.torch_multiview import ViT
from jepa_jax.bench.torch_step import EPSILON, Block, Encoder, adamw, device_name, load, wait
from jepa_jax.models.vit import ViTSize


class Text(nn.Module):
  """ids (B, L) and the place of each text's end -> (B, D): blocks that look back, the end's token."""

  def __init__(self, size: ViTSize, vocab_size: int, length: int):
    super().__init__()
    self.token_embed = nn.Parameter(torch.zeros(vocab_size, size.width))
    self.pos_embed = nn.Parameter(torch.zeros(length, size.width))
    self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
    self.norm = nn.LayerNorm(size.width, EPSILON)
    self.register_buffer("seen", torch.ones(length, length, dtype=torch.bool).tril(), persistent=False)

  def forward(self, ids_BxL, end_B):
    x = F.embedding(ids_BxL, self.token_embed) + self.pos_embed
    for block in self.blocks:
      x = block(x, self.seen)
    return self.norm(x[torch.arange(len(x), device=x.device), end_B])


def text_tensors(flat: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
  """Returns the parameters of our text tower ("blocks/attn/qkv/kernel", ...) by the names of `Text`."""
  found = {name: np.asarray(flat[name]) for name in ("token_embed", "pos_embed")}
  found |= {"norm.weight": flat["norm/scale"], "norm.bias": flat["norm/bias"]}
  for i in range(depth):
    for ours in ("norm1", "norm2"):
      found |= {f"blocks.{i}.{ours}.weight": flat[f"blocks/{ours}/scale"][i]}
      found |= {f"blocks.{i}.{ours}.bias": flat[f"blocks/{ours}/bias"][i]}
    for ours, num_in in (("attn/qkv", 1), ("attn/proj", 2), ("mlp/fc1", 1), ("mlp/fc2", 1)):
      kernel, bias = (np.asarray(flat[f"blocks/{ours}/{leaf}"][i]) for leaf in ("kernel", "bias"))
      name = f"blocks.{i}.{ours.replace('/', '.')}"
      found |= {
        f"{name}.weight": kernel.reshape(int(np.prod(kernel.shape[:num_in])), -1).T,
        f"{name}.bias": bias.ravel(),
      }
  return found


class PairStep:
  """Both towers, their linear heads, the temperature and AdamW; `__call__` makes a step and returns its loss.

  On a GPU matrix products are bfloat16 by autocast, on a CPU float32; the loss is float32.
  """

  def __init__(self, image: Encoder, text: Text, heads: Sequence[nn.Linear], log_scale: float, lr: float, decay: float):
    self.device = device_name()
    self.image, self.text = ViT(image, {}).to(self.device), text.to(self.device)
    self.heads = nn.ModuleList(heads).to(self.device)
    self.scale = nn.ParameterDict({"log": nn.Parameter(torch.tensor(log_scale))}).to(self.device)
    self.optimiser = adamw((self.image, self.text, self.heads, self.scale), lr, decay)

  def compile(self) -> None:
    """Compiles both towers with torch.compile, at their first call."""
    self.image, self.text = torch.compile(self.image), torch.compile(self.text)

  def put(self, images_BxHxWxC: np.ndarray, ids_BxL: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Returns images, ids and the places of the ends on the device; ids hold -1 after the end."""
    images = torch.from_numpy(np.array(images_BxHxWxC)).permute(0, 3, 1, 2).contiguous()
    ids = torch.from_numpy(np.array(ids_BxL)).long()
    return tuple(x.to(self.device) for x in (images, ids.clamp(min=0), (ids >= 0).sum(1) - 1))

  def loss(self, images, ids, ends) -> torch.Tensor:
    """Returns the loss of this batch."""
    with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
      image, text = self.heads[0](self.image(images)), self.heads[1](self.text(ids, ends))
    image, text = (F.normalize(z.float(), dim=-1) for z in (image, text))
    logits_BxB = self.scale["log"].exp() * image @ text.T
    own_B = torch.arange(len(logits_BxB), device=logits_BxB.device)
    return (F.cross_entropy(logits_BxB, own_B) + F.cross_entropy(logits_BxB.T, own_B)) / 2

  def __call__(self, images, ids, ends) -> float:
    """Makes one step; returns its loss, when all of it is done."""
    loss = self.loss(images, ids, ends)
    self.optimiser.zero_grad()
    loss.backward()
    self.optimiser.step()
    return wait(loss).item()


def linear(kernel: np.ndarray, bias: np.ndarray) -> nn.Linear:
  """Returns a layer with our weights (in, out)."""
  layer = nn.Linear(*kernel.shape)
  return load(layer, {"weight": kernel.T, "bias": bias})  # type: ignore[return-value]
