"""LeJEPA on Imagenette at 64 px with a small ConvNet: about fifteen minutes on two CPU cores.

For a GPU see configs/lejepa_imagenette_vits.py. Prepare the data once through TFDS (docs/data.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "lejepa_imagenette",
      "total": "15ep",
      "batch_size": 128,
      "data": {
        "source": "tfds",
        "name": "imagenette/160px-v2",
        "train": "train",
        "test": "validation",
        "canvas_px": 160,
        "max_aspect": 4 / 3,
        "cache_mb": 1536,
      },
      "encoder": {"name": "convnet", "image_size": 64, "widths": (32, 64, 128, 256, 512)},
      "objective": {
        "name": "lejepa",
        "lam": 0.02,
        "num_slices": 256,
        "projector": {"hidden": (1024,), "out": 64},
        "views": {
          "global_crops": {"num": 4, "size_px": 48, "scale": (0.2, 1.0)},
          "flip_p": 0.5,
          "color": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8, "grayscale_p": 0.2},
        },
      },
      "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 5e-2, "warmup": "5%"},
    }
  )
