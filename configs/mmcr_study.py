"""MMCR in miniature, for sweeps of many short runs: `python -m jepa_jax study double_descent` (docs/mmcr_theory.md).

A small ConvNet on 16 px crops. The learning rate is constant after a warm-up of fixed length, so that every beginning
of a run is the whole of a shorter one, which is what fits against compute suppose. The unit of `total` decides what all
runs of a sweep share: "300steps" the number of updates, "2ep" the images seen.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "mmcr_study",
      "total": "300steps",
      "batch_size": 64,  # the sweep sets batch_size, objective.projector.out and objective.views.global_crops.num
      "data": {
        "source": "tfds",
        "name": "cifar10",
        "canvas_px": 32,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
      },
      "encoder": {"name": "convnet", "image_size": 16, "widths": (32, 64, 128)},
      "objective": {
        "name": "mmcr",
        "projector": {"hidden": (512,), "out": 64},
        "views": {
          "global_crops": {"num": 2, "size_px": 16, "scale": (0.2, 1.0)},
          "flip_p": 0.5,
          "color": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8, "grayscale_p": 0.2},
        },
      },
      "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-6, "warmup": "20steps", "schedule": "constant"},
      "probe": {"spectrum_every": 0},  # nothing but the steps' own percent error is read
    }
  )
