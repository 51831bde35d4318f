"""I-JEPA on scikit-learn's 1,797 handwritten digits (8 x 8, shown at 24 px): minutes on a laptop, nothing to download."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "ijepa_digits",
      "total": "60ep",
      "batch_size": 128,
      "data": {"source": "digits", "canvas_px": 32, "channels": 1},
      "encoder": {
        "kind": "vit",
        "image_size": 24,
        "patch_size": 4,
        "channels": 1,
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
          "global_crops": {"num": 1, "size_px": 24, "scale": (0.6, 1.0)},
          "flip_p": 0.0,  # a mirrored 2 is no 2
          "mean": (0.3,),
          "std": (0.35,),
        },
        "masks": {"kind": "uniform"},
        "predictor": {"width": 64, "depth": 2},
        "ema": (0.996, 1.0),
      },
      "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": "10%"},
    }
  )
