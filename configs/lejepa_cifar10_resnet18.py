"""LeJEPA on CIFAR-10 with a ResNet-18 (CIFAR stem), 300 epochs: the setting in which eb_jepa reports 91.0. One GPU."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "lejepa_cifar10_resnet18",
      "total": "300ep",
      "batch_size": 256,
      "data": {
        "source": "tfds",
        "name": "cifar10",
        "canvas_px": 32,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
      },
      "encoder": {"name": "resnet", "variant": "18", "stem": "cifar", "image_size": 32},
      "objective": {
        "name": "lejepa",
        "lam": 0.02,
        "num_slices": 256,
        "projector": {"hidden": (2048, 2048), "out": 128},
        "views": {
          "global_crops": {"num": 4, "size_px": 32, "scale": (0.2, 1.0)},
          "flip_p": 0.5,
          "color": {
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.2,
            "hue": 0.1,
            "p": 0.8,
            "grayscale_p": 0.2,
            "solarize_p": (0.1,),
          },
        },
      },
      "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 5e-4, "warmup": "10ep"},
    }
  )
