"""The config of the throw-away method of tests/examples."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "two_towers",
      "total": "4steps",
      "batch_size": 16,
      "data": {"source": "synthetic", "canvas_px": 16, "channels": 1, "mean": (0.5,), "std": (0.5,), "max_train": 64},
      "encoder": {"name": "vit", "image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2},
      "objective": {
        "name": "two_towers",
        "views": {"global_crops": {"num": 2, "size_px": 16, "scale": (0.3, 1.0)}},
        "other": {"name": "mlp", "image_size": 16, "widths": (16, 8)},
      },
      "optim": {"lr": 1e-2, "warmup": "1steps"},
      "checkpoint": {"every": "2steps", "keep_last": 3},
      "log": {"every": "1steps", "tensorboard": False, "views": 0},
      "probe": {"spectrum_every": 0},
      "evals": {"names": ("knn", "pairs"), "knn": {"k": 5}, "pairs": {"top": 3}},
    }
  )
