"""Writes the workdirs that tests/test_old_runs.py reads; it ran with version 0.2.0, before the seams were rebuilt."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from jepa_jax.config import build_config
from jepa_jax.evaluate import evaluate, load_encoder
from jepa_jax.train import train

OUT = Path(sys.argv[1])
data = {"source": "synthetic", "canvas_px": 16, "channels": 1, "max_train": 64}
views = {"global_crops": {"num": 2, "size_px": 16, "scale": (0.3, 1.0)}, "mean": (0.5,), "std": (0.25,)}
one = views | {"global_crops": {"num": 1, "size_px": 16, "scale": (0.3, 1.0)}}
rgb = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3)}
vit = {"kind": "vit", "image_size": 16, "patch_size": 8, "channels": 1, "width": 16, "depth": 2, "num_heads": 2}
small = {
  "total": "4steps",
  "batch_size": 16,
  "data": data,
  "optim": {"lr": 1e-2, "warmup": "1steps"},
  "checkpoint": {"every": "4steps", "keep_last": 1},
  "log": {"every": "1steps", "tensorboard": False},
  "evals": {"evals": ("knn",), "knn_k": 5},
}
jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 1.0, "order": "fixed"}
runs = {
  "lejepa": small
  | {
    "encoder": vit,
    "objective": {
      "name": "lejepa",
      "num_slices": 16,
      "weight_average": 0.9,
      "projector": {"hidden": (32,), "out": 8},
      "views": views,
    },
  },
  "mmcr": small
  | {
    "encoder": {"kind": "resnet", "variant": "18", "stem": "cifar", "width": 2, "image_size": 16, "channels": 1},
    "objective": {"name": "mmcr", "momentum": 0.9, "projector": {"hidden": (32,), "out": 8}, "views": views},
  },
  "ijepa": small
  | {
    "encoder": vit | {"pos_embed": "sincos", "patch_size": 4},
    "objective": {"name": "ijepa", "views": one, "masks": {"kind": "random"}, "predictor": {"width": 16, "depth": 1}},
  },
  "iwm": small
  | {
    "data": data | {"channels": 3},
    "encoder": vit | {"pos_embed": "sincos", "patch_size": 4, "channels": 3},
    "objective": {
      "name": "iwm",
      "views": one | rgb | {"color": jitter},
      "source": jitter | {"grayscale_p": 0.2},
      "masks": {"kind": "random"},
      "predictor": {"width": 16, "depth": 1, "conditioning": "feature"},
    },
    "evals": {
      "evals": ("knn",),
      "knn_k": 5,
      "mrr_images": 8,
      "mrr_bank": 16,
      "mrr_chunk": 8,
      "tuning_epochs": 1,
      "tuning_batch": 16,
      "tuning_lrs": (3e-3,),
    },
  },
}
expected = {}
for name, values in runs.items():
  folder = OUT / name
  train(build_config(values | {"name": f"old_{name}"}), folder)
  evals = {"iwm": "('knn', 'linear', 'mrr', 'predictor_tuning')"}.get(name, "('knn', 'linear')")
  rows = evaluate(folder, overrides={"evals.evals": evals}, show=False)
  apply_fn, params, cfg = load_encoder(folder)
  images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, cfg.data.channels), np.uint8)
  out = apply_fn(params, images)
  expected[name] = {"rows": rows, "pooled": np.asarray(out.pooled_BxD).astype(float).round(6).tolist()}
  for extra in ("features", "tensorboard", "evals", "views.png", "curves.png"):
    p = folder / extra
    shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)
(OUT / "expected.json").write_text(json.dumps(expected))
