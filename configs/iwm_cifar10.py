"""IWM on CIFAR-10 with a small ViT, equivariant: an hour on one CPU core. What mattered is in docs/iwm.md.

`--config=configs/iwm_cifar10.py:invariant` has the paper's jitter alone and a shallow predictor. Prepare the data once
through TFDS, or give .npz files (docs/data.md).
"""

from ml_collections import ConfigDict

VARIANTS = ("equivariant", "invariant")


def get_config(variant: str = "equivariant") -> ConfigDict:
  equivariant = variant == "equivariant"
  # Twice the paper's strengths, its strong jitter. In one order, so that the action says all of what was done.
  times = 2 if equivariant else 1
  jitter = {"brightness": 0.4 * times, "contrast": 0.4 * times, "saturation": 0.2 * times, "hue": 0.1 * times}
  jitter |= {"p": 0.8, "order": "fixed"}
  masks = {"kind": "uniform", "context_scale": (1.0, 1.0)}
  if equivariant:  # two rectangles, not the paper's four: those leave 6 of 16 patches
    masks |= {"num_targets": 2, "num_context_patches": 9}
  else:
    masks |= {"num_context_patches": 6}
  return ConfigDict(
    {
      "name": "iwm_cifar10" if equivariant else "iwm_cifar10_invariant",
      "total": "6000steps",
      "batch_size": 128,
      "data": {"source": "tfds", "name": "cifar10", "train": "train", "test": "test", "canvas_px": 32},
      "encoder": {
        "name": "vit",
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
        "source": jitter | ({"grayscale_p": 0.2, "blur_p": (0.2,), "solarize_p": (0.2,)} if equivariant else {}),
        "source_from": "image",
        "masks": masks,
        "predict": "all" if equivariant else "masked",
        "predictor": {"width": 128, "depth": 4 if equivariant else 1, "num_heads": 4, "conditioning": "feature"},
        "ema": (0.996, 1.0),
      },
      "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05, "warmup": "10%"},
      "evals": {
        "names": ("knn", "linear", "mrr", "predictor_tuning"),
        "tuning": {"epochs": 3, "learning_rates": (3e-3,)},  # a quarter of an hour; a GPU has time for more
      },
    }
  )
