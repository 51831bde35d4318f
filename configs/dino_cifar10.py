"""DINO on CIFAR-10 with the ConvNet of configs/lejepa_cifar10.py.

Two large and four small views; the teacher sees the large ones.
Prepare CIFAR-10 once through TFDS (docs/data.md), or point --config.data.source, root, train and test at your images.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "dino_cifar10",
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
        "name": "dino",
        # The paper's head has no BatchNorm; without it this encoder's images come to say all prototypes alike.
        "projector": {"hidden": (512, 512), "out": 128, "norm": "batch", "activation": "gelu"},
        "prototypes": 1024,
        "ema": (0.99, 1.0),
        "still": 0.05,  # an epoch
        "views": {
          "global_crops": {"num": 2, "size_px": 24, "scale": (0.2, 1.0)},
          "local_crops": {"num": 4, "size_px": 16, "scale": (0.08, 0.3)},
          "flip_p": 0.5,
          "color": {
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.2,
            "hue": 0.1,
            "p": 0.8,
            "grayscale_p": 0.2,
            "solarize_p": (0.0, 0.2),  # every second view; in the paper the second large one alone
          },
        },
      },
      "optim": {
        "name": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.04,
        "final_weight_decay": 10.0,
        "warmup": "10%",
        "clip_each": 3.0,
      },
    }
  )
