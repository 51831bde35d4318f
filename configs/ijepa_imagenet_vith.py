"""I-JEPA ViT-H/14 on ImageNet-1k, the official recipe (the paper: 79.3 linear after 300 epochs). A pod.

630 M parameters, twice, and two moments: on chips of 16 GB add --config.mesh.fsdp=8.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "ijepa_imagenet_vith",
      "total": "300ep",
      "batch_size": 2048,
      "data": {"source": "tfds", "name": "imagenet2012", "train": "train", "test": "validation", "canvas_px": 256},
      "encoder": {
        "kind": "vit",
        "variant": "huge",
        "image_size": 224,
        "patch_size": 14,
        "pos_embed": "sincos",
        "probe_layers": 4,
        "remat": "block",
      },
      "objective": {
        "name": "ijepa",
        "views": {"global_crops": {"num": 1, "size_px": 224, "scale": (0.3, 1.0)}, "flip_p": 0.0},
        "masks": {"kind": "official"},
        "predictor": {"width": 384, "depth": 12, "remat": "block"},
        "ema": (0.996, 1.0),
      },
      "optim": {
        "name": "adamw",
        "lr": 1e-3,
        "start_lr": 0.2,
        "final_lr": 1e-3,
        "warmup": "40ep",
        "weight_decay": 0.04,
        "final_weight_decay": 10.0,
        "ipe_scale": 1.25,
      },
      "evals": {"crop_fraction": 0.875},
    }
  )
