"""A ViT and I-JEPA's predictor in PyTorch: functions of a state dict in Meta's and timm's names, by the papers.

Legend: B images, N tokens, D width, H heads, P class and register tokens.
"""

import torch
import torch.nn.functional as F


def vit_layers(weights, images_BxCxHxW, num_heads):
  """[tokens with their position, after block 1, ..., after block L, after the final norm], as numpy arrays."""
  w = {key: torch.from_numpy(value) for key, value in weights.items()}
  kernel = w["patch_embed.proj.weight"]
  x = F.conv2d(torch.from_numpy(images_BxCxHxW), kernel, w["patch_embed.proj.bias"], stride=kernel.shape[-1])
  x = x.flatten(2).transpose(1, 2)
  prefix = [w[key].expand(len(x), -1, -1) for key in ("cls_token", "reg_token") if key in w]
  if w["pos_embed"].shape[1] == x.shape[1]:
    x = torch.cat([*prefix, x + w["pos_embed"]], dim=1)
  else:
    x = torch.cat([*prefix, x], dim=1) + w["pos_embed"]
  layers = [x, *blocks(w, "blocks", x, num_heads)]
  return [layer.numpy() for layer in (*layers, layer_norm(w, "norm", layers[-1]))]


def predict(weights, context_BxKxD, context_K, targets_T, num_heads):
  """The predicted tokens (B, T, D) of one target block; context_K and targets_T are places on the grid."""
  w = {key: torch.from_numpy(value) for key, value in weights.items()}
  pos_NxP = w["predictor_pos_embed"][0]
  x = linear(w, "predictor_embed", torch.from_numpy(context_BxKxD)) + pos_NxP[context_K]
  query = (w["mask_token"] + pos_NxP[targets_T]).expand(len(x), -1, -1)
  *_, x = blocks(w, "predictor_blocks", torch.cat([x, query], dim=1), num_heads)
  return linear(w, "predictor_proj", layer_norm(w, "predictor_norm", x[:, len(context_K) :])).numpy()


def blocks(w, name, x_BxNxD, num_heads):
  """The output of every pre-norm block; layer scale where the weights have it."""
  outputs, i, x = [], 0, x_BxNxD
  while f"{name}.{i}.norm1.weight" in w:
    at = f"{name}.{i}"
    x = x + w.get(f"{at}.ls1.gamma", 1) * attention(w, f"{at}.attn", layer_norm(w, f"{at}.norm1", x), num_heads)
    hidden = F.gelu(linear(w, f"{at}.mlp.fc1", layer_norm(w, f"{at}.norm2", x)))
    x = x + w.get(f"{at}.ls2.gamma", 1) * linear(w, f"{at}.mlp.fc2", hidden)
    outputs.append(x)
    i += 1
  return outputs


def attention(w, name, x_BxNxD, num_heads):
  """Rows of the joint kernel are query, key, value; within each, head by head."""
  heads = lambda t: t.unflatten(-1, (num_heads, -1)).transpose(1, 2)
  q, k, v = (heads(part) for part in linear(w, f"{name}.qkv", x_BxNxD).chunk(3, dim=-1))
  attended = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
  return linear(w, f"{name}.proj", attended.transpose(1, 2).flatten(2))


def linear(w, name, x):
  return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def layer_norm(w, name, x):
  return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)
