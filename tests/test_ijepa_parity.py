"""I-JEPA against torch: encoder, predictor, loss, AdamW with its schedules and the moving average, over three steps.

The torch side is written from the paper and its published settings with torch's own layers, loss and optimiser. It
walks over the blocks one by one and never pads.
"""

import math

import jax
import numpy as np
import pytest

from tests.tiny import start_of, tiny_batch, tiny_experiment

torch = pytest.importorskip("torch")
F = torch.nn.functional

TOTAL, WARMUP, STRETCH = 20, 3, 1.25
LR, START_LR, FINAL_LR, DECAY, FINAL_DECAY = 1e-3, 2e-4, 1e-6, 0.04, 0.4
EMA = (0.9, 1.0)
HEADS, EPS = 2, 1e-6


def experiment(one_pass: bool):
  views = {"global_crops": {"num": 1, "size_px": 24, "scale": (0.3, 1.0)}}
  return tiny_experiment(
    total=f"{TOTAL}steps",
    data={"source": "synthetic", "canvas_px": 24, "channels": 1, "mean": (0.5,), "std": (0.5,), "max_train": 64},
    encoder={
      **{"name": "vit", "image_size": 24, "patch_size": 4, "width": 32, "depth": 2},
      **{"num_heads": HEADS, "pos_embed": "sincos"},
    },
    objective={
      "name": "ijepa",
      "views": views,
      "masks": {"kind": "uniform"},
      "predictor": {"width": 16, "depth": 2},
      "ema": EMA,
      "one_pass": one_pass,
    },
    optim={
      **{"lr": LR, "start_lr": START_LR / LR, "final_lr": FINAL_LR / LR, "warmup": f"{WARMUP}steps"},
      **{"weight_decay": DECAY, "final_weight_decay": FINAL_DECAY / DECAY, "ipe_scale": STRETCH},
    },
  )


def to_torch(tree):
  return jax.tree.map(lambda x: torch.tensor(np.asarray(x)), jax.device_get(tree))


def positions(side: int, width: int):
  """[x | y], each [sin, cos] of 10000^(-i / (width / 4))."""
  omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
  y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
  angles = [p.reshape(-1, 1) * omega for p in (x, y)]
  return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def norm(x, p):
  return F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], EPS)


def transformer(x, blocks, depth: int):
  for i in range(depth):
    p = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
    qkv = torch.einsum("bnd,dthk->tbhnk", norm(x, p["norm1"]), p["attn"]["qkv"]["kernel"])
    q, k, v = qkv + p["attn"]["qkv"]["bias"][:, None, :, None, :]
    heads = F.scaled_dot_product_attention(q, k, v)
    x = x + torch.einsum("bhnk,hkd->bnd", heads, p["attn"]["proj"]["kernel"]) + p["attn"]["proj"]["bias"]
    h = F.gelu(norm(x, p["norm2"]) @ p["mlp"]["fc1"]["kernel"] + p["mlp"]["fc1"]["bias"])
    x = x + h @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"]
  return x


def encode(params, images, keep=None):
  kernel = params["patch_embed"]["kernel"].permute(3, 2, 0, 1)
  x = F.conv2d(images.permute(0, 3, 1, 2), kernel, params["patch_embed"]["bias"], stride=kernel.shape[-1])
  side = x.shape[-1]
  x = x.flatten(2).transpose(1, 2) + positions(side, x.shape[1])
  if keep is not None:
    x = torch.stack([row[index] for row, index in zip(x, keep)])
  return norm(transformer(x, params["blocks"], 2), params["norm"])


def predict(p, context, context_at, target_at):
  """One image, one block: context (K, D), its places (K,), the block's places (T,) -> (T, D)."""
  position = positions(6, 16)
  x = context @ p["embed"]["kernel"] + p["embed"]["bias"] + position[context_at]
  x = torch.cat([x, p["mask_token"][0] + position[target_at]])[None]
  x = norm(transformer(x, p["blocks"], 2), p["norm"])[0, len(context) :]
  return x @ p["proj"]["kernel"] + p["proj"]["bias"]


def prediction_loss(params, target, images, masks):
  context = encode(params["encoder"], images, torch.tensor(np.asarray(masks.context_BxK)))
  with torch.no_grad():
    whole = encode(target["encoder"], images)
    whole = F.layer_norm(whole, whole.shape[-1:])
  errors = []
  for b in range(len(images)):
    for places, valid in zip(np.asarray(masks.targets_BxMxT)[b], np.asarray(masks.valid_BxMxT)[b]):
      at = torch.tensor(places[valid])
      prediction = predict(params["predictor"], context[b], torch.tensor(np.asarray(masks.context_BxK)[b]), at)
      errors.append(F.smooth_l1_loss(prediction, whole[b][at]))
  return torch.stack(errors).mean()


def schedules(step: int) -> tuple[float, float, float]:
  """The learning rate, weight decay (step from 1) and momentum (from 0) of a step."""
  end = int(STRETCH * TOTAL)
  cosine = lambda t: 0.5 * (1 + math.cos(math.pi * t))
  if step < WARMUP:
    lr = START_LR + (LR - START_LR) * step / WARMUP
  else:
    lr = FINAL_LR + (LR - FINAL_LR) * cosine((step - WARMUP) / (end - WARMUP))
  return lr, FINAL_DECAY + (DECAY - FINAL_DECAY) * cosine(step / end), EMA[0] + (EMA[1] - EMA[0]) * (step - 1) / end


def named(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("one_pass", [False, True], ids=["blocks", "union"])
def test_three_steps_equal_torchs(one_pass):
  run = experiment(one_pass)
  compiled, state = run.compile(), start_of(run)
  params, target = to_torch(state.params), to_torch(state.target)
  leaves = named(params)
  for leaf in leaves.values():
    leaf.requires_grad_(True)
  plain = [leaf for name, leaf in leaves.items() if "bias" in name or "scale" in name]
  decayed = [leaf for name, leaf in leaves.items() if "bias" not in name and "scale" not in name]
  groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed}]
  optimiser = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999))
  views_fn = jax.jit(run.objective.views)

  for step in range(1, 4):
    batch = tiny_batch(run, step)
    views = views_fn(run.views_keys(step - 1, np.arange(run.cfg.batch_size)), batch)
    state, metrics = compiled(state, batch, run.key)
    lr, decay, momentum = schedules(step)
    loss = prediction_loss(params, target, torch.tensor(np.asarray(views.images_BxHxWxC)), views.masks)
    optimiser.zero_grad()
    loss.backward()
    optimiser.param_groups[0]["lr"] = optimiser.param_groups[1]["lr"] = lr
    optimiser.param_groups[1]["weight_decay"] = decay
    optimiser.step()
    with torch.no_grad():
      for name, average in named(target).items():
        average.mul_(momentum).add_((1 - momentum) * leaves[name])
    np.testing.assert_allclose(float(metrics["loss"]), float(loss.detach()), rtol=1e-5)
    np.testing.assert_allclose(float(metrics["learning_rate"]), lr, rtol=1e-5)
    np.testing.assert_allclose(float(metrics["momentum"]), momentum, rtol=1e-6)

  for ours, theirs in ((state.params, leaves), (state.target, named(target))):
    for name, leaf in named(jax.device_get(ours)).items():
      other = theirs[name].detach().numpy()
      if (
        "qkv" in name and "bias" in name
      ):  # the keys' bias changes nothing: its gradient is rounding, which Adam scales up
        leaf, other = leaf[:, [0, 2]], other[:, [0, 2]]
      np.testing.assert_allclose(leaf, other, atol=1e-4, err_msg=name)
