"""The network of lejepa_digits trained with labels: what it can learn at all, for comparison. A minute on a laptop."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "supervised_digits",
      "total": "50ep",
      "batch_size": 128,
      "data": {"source": "digits", "canvas_px": 32, "channels": 1, "mean": (0.3,), "std": (0.35,)},
      "encoder": {"name": "convnet", "image_size": 32, "widths": (32, 64, 128, 256)},
      "objective": {
        "name": "supervised",
        "projector": {"hidden": (), "out": 10},  # a linear head, an output per class
        "views": {
          "global_crops": {"num": 1, "size_px": 24, "scale": (0.4, 1.0)},
          "flip_p": 0.0,  # a mirrored 2 is no 2
          "color": {"brightness": 0.4, "contrast": 0.4, "p": 0.8},
        },
      },
      "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 5e-2, "warmup": "5%"},
    }
  )
