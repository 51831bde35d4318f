"""MCR2 on CIFAR-10 with the ConvNet of configs/lejepa_cifar10.py.

The four views of configs/mmcr_cifar10.py, to which it is next of kin (docs/mmcr_theory.md). With class_weight=1 it
learns nothing, with 20 all embeddings become one (docs/neighbours.md).
Prepare CIFAR-10 once through TFDS (docs/data.md), or point --config.data.source, root, train and test at your images.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "mcr2_cifar10",
      "total": "20ep",
      "batch_size": 128,
      "data": {
        "source": "tfds",
        "name": "cifar10",
        "canvas_px": 32,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
      },
      "encoder": {"name": "convnet", "image_size": 32, "widths": (48, 96, 192, 384)},
      "objective": {
        "name": "mcr2",
        "class_weight": 5.0,
        "projector": {"hidden": (1024,), "out": 64},
        "views": {
          "global_crops": {"num": 4, "size_px": 24, "scale": (0.2, 1.0)},
          "flip_p": 0.5,
          "color": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8, "grayscale_p": 0.2},
        },
      },
      "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 5e-2, "warmup": "5%"},
    }
  )
