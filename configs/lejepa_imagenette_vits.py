"""LeJEPA on Imagenette with ViT-S/8 at 128 px: the authors' minimal recipe (they reach 90.7 linear). One GPU."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "lejepa_imagenette_vits",
      "total": "800ep",
      "batch_size": 256,
      "data": {
        "source": "tfds",
        "name": "imagenette/160px-v2",
        "train": "train",
        "test": "validation",
        "canvas_px": 160,
        "max_aspect": 4 / 3,
        "cache_mb": 1536,
      },
      "encoder": {
        "name": "vit",
        "variant": "small",
        "image_size": 128,
        "patch_size": 8,
        "cls_token": True,
        "pool": "cls",
        "drop_path": 0.1,
      },
      "objective": {
        "name": "lejepa",
        "lam": 0.02,
        "num_slices": 256,
        "projector": {"hidden": (2048, 2048), "out": 16},
        "views": {
          "global_crops": {"num": 4, "size_px": 128, "scale": (0.08, 1.0)},
          "flip_p": 0.5,
          "color": {
            "brightness": 0.8,
            "contrast": 0.8,
            "saturation": 0.8,
            "hue": 0.2,
            "p": 0.8,
            "grayscale_p": 0.2,
            "blur_p": (0.5,),
            "blur_sigma": (0.1, 2.0),
            "solarize_p": (0.2,),
          },
        },
      },
      "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 5e-2, "warmup": "1ep"},
    }
  )
