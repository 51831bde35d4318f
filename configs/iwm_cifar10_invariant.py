"""IWM on CIFAR-10 with a small ViT, invariant: jitter at the paper's strengths alone, a shallow predictor.

Prepare the data once through TFDS, or give .npz files (docs/data.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8, "order": "fixed"}
  return ConfigDict(
    {
      "name": "iwm_cifar10_invariant",
      "total": "6000steps",
      "batch_size": 128,
      "data": {"source": "tfds", "name": "cifar10", "train": "train", "test": "test", "canvas_px": 32},
      "encoder": {
        "kind": "vit",
        "image_size": 32,
        "patch_size": 8,
        "width": 128,
        "depth": 2,
        "num_heads": 2,
        "pos_embed": "sincos",
        "init": "fan_in",
        "probe_layers": 2,
      },
      "objective": {
        "name": "iwm",
        "views": {"global_crops": {"num": 1, "size_px": 32, "scale": (0.3, 1.0)}, "flip_p": 0.5, "color": jitter},
        "source": jitter,
        "source_from": "image",
        "masks": {"kind": "uniform", "context_scale": (1.0, 1.0), "num_context_patches": 6},
        "predictor": {"width": 128, "depth": 1, "num_heads": 4, "conditioning": "feature"},
        "ema": (0.996, 1.0),
      },
      "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05, "warmup": "10%"},
      "evals": {"tuning_epochs": 3, "tuning_lrs": (3e-3,)},  # a quarter of an hour; a GPU has time for more
    }
  )
