"""I-JEPA on Imagenette at 48 px with a small ViT: about half an hour on one CPU core.

What mattered is in docs/ijepa.md. Prepare the data once through TFDS (docs/data.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "ijepa_imagenette",
      "total": "40ep",
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
      "encoder": {
        "name": "vit",
        "image_size": 48,
        "patch_size": 8,
        "width": 128,
        "depth": 4,
        "num_heads": 2,
        "pos_embed": "sincos",
        "init": "fan_in",
        "probe_layers": 4,
      },
      "objective": {
        "name": "ijepa",
        "views": {
          "global_crops": {"num": 1, "size_px": 48, "scale": (0.3, 1.0)},
          "flip_p": 0.5,
        },
        "masks": {"kind": "uniform", "target_scale": (0.15, 0.2)},
        "predictor": {"width": 64, "depth": 2},
        "ema": (0.996, 1.0),
      },
      "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": "10%"},
    }
  )
