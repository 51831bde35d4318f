"""LeJEPA on Fashion-MNIST (28 x 28, grey) with a small ConvNet: about ten minutes on two CPU cores.

Prepare it once through TFDS (docs/data.md), or point --config.data.source, root, train and test at images of your own.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "lejepa_fashion_mnist",
      "total": "15ep",
      "batch_size": 256,
      "data": {
        "source": "tfds",
        "name": "fashion_mnist",
        "canvas_px": 28,
        "channels": 1,
        "mean": (0.286,),
        "std": (0.353,),
      },
      "encoder": {"name": "convnet", "image_size": 28, "widths": (32, 64, 128, 256)},
      "objective": {
        "name": "lejepa",
        "lam": 0.02,
        "num_slices": 256,
        "projector": {"hidden": (512,), "out": 32},
        "views": {
          "global_crops": {"num": 4, "size_px": 24, "scale": (0.3, 1.0)},
          "flip_p": 0.5,
          "color": {"brightness": 0.4, "contrast": 0.4, "p": 0.8},
        },
      },
      "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 5e-2, "warmup": "5%"},
    }
  )
