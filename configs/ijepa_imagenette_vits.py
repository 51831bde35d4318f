"""I-JEPA on Imagenette with ViT-S/16 at 160 px. One GPU; not trained yet.

The settings of configs/ijepa_imagenette.py, which were found at 48 px on a CPU: matrices start from the variance of
their inputs, flips, uniform masks. Prepare the data once through TFDS (docs/data.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "ijepa_imagenette_vits",
      "total": "300ep",
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
        "image_size": 160,
        "patch_size": 16,
        "pos_embed": "sincos",
        "init": "fan_in",
        "probe_layers": 4,
      },
      "objective": {
        "name": "ijepa",
        "views": {"global_crops": {"num": 1, "size_px": 160, "scale": (0.3, 1.0)}, "flip_p": 0.5},
        "masks": {"kind": "uniform"},
        "predictor": {"width": 192, "depth": 6},
        "ema": (0.996, 1.0),
      },
      "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": "10%"},
    }
  )
