"""LeJEPA on scikit-learn's 1,797 handwritten digits (8 x 8, shown at 32 px): minutes on a laptop, nothing to download.

The paper's small-data case: pre-training from scratch on about a thousand images.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "lejepa_digits",
      "total": "100ep",
      "batch_size": 128,
      "data": {"source": "digits", "canvas_px": 32, "channels": 1, "mean": (0.3,), "std": (0.35,)},
      "encoder": {"name": "convnet", "image_size": 32, "widths": (32, 64, 128, 256)},
      "objective": {
        "name": "lejepa",
        "lam": 0.02,
        "num_slices": 256,
        "projector": {"hidden": (512,), "out": 32},
        "views": {
          "global_crops": {"num": 4, "size_px": 24, "scale": (0.4, 1.0)},
          "flip_p": 0.0,  # a mirrored 2 is no 2
          "color": {"brightness": 0.4, "contrast": 0.4, "p": 0.8},
        },
      },
      "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 5e-2, "warmup": "5%"},
    }
  )
