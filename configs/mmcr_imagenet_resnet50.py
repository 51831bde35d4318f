"""MMCR on ImageNet-1k as in the paper: ResNet-50, two views, batch 2048, momentum encoder, LARS, 100 epochs. A pod."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "mmcr_imagenet_resnet50",
      "total": "100ep",
      "batch_size": 2048,
      "data": {
        "source": "tfds",
        "name": "imagenet2012",
        "train": "train",
        "test": "validation",
        "canvas_px": 256,
        "max_aspect": 4 / 3,
      },
      "encoder": {"name": "resnet", "variant": "50", "image_size": 224},
      "objective": {
        "name": "mmcr",
        "momentum": 0.99,
        "projector": {"hidden": (8192, 8192), "out": 512},
        "views": {
          "global_crops": {"num": 2, "size_px": 224, "scale": (0.08, 1.0)},
          "flip_p": 0.5,
          "color": {  # BYOL's pair: the second view is blurred rarely and solarised sometimes
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.2,
            "hue": 0.1,
            "p": 0.8,
            "grayscale_p": 0.2,
            "blur_p": (1.0, 0.1),
            "solarize_p": (0.0, 0.2),
          },
          "interpolation": "bicubic",
        },
      },
      "optim": {"name": "lars", "lr": 0.6, "lr_batch": 256, "weight_decay": 1e-6, "warmup": "10ep"},
      "evals": {"crop_fraction": 0.875},
    }
  )
