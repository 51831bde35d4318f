"""MAE on CIFAR-10 with a small ViT.

It needs a ViT. A quarter of the patches is encoded.
Prepare CIFAR-10 once through TFDS (docs/data.md), or point --config.data.source, root, train and test at your images.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "mae_cifar10",
      "total": "60ep",
      "batch_size": 128,
      "data": {
        "source": "tfds",
        "name": "cifar10",
        "canvas_px": 32,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
      },
      "encoder": {
        "name": "vit",
        "image_size": 32,
        "patch_size": 4,
        "width": 128,
        "depth": 4,
        "num_heads": 4,
        "pos_embed": "sincos",
        "init": "fan_in",
      },
      "objective": {
        "name": "mae",
        "predictor": {"depth": 2, "width": 96, "num_heads": 4},
        "views": {
          "global_crops": {"num": 1, "size_px": 32, "scale": (0.2, 1.0)},
          "flip_p": 0.5,
          "interpolation": "bicubic",
        },
      },
      "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05, "b2": 0.95, "warmup": "10%"},
    }
  )
