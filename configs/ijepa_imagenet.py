"""I-JEPA on ImageNet-1k, the official recipe. A pod slice (ViT-B), a pod (ViT-L, ViT-H).

`--config=configs/ijepa_imagenet.py:vitl`. The paper's linear accuracies: ViT-B/16 72.9 and ViT-L/16 77.5 after 600
epochs, ViT-H/14 79.3 after 300. ViT-H has 630 M parameters, twice, and two moments: on chips of 16 GB add
--config.mesh.fsdp=8.
"""

from ml_collections import ConfigDict

VARIANTS = {  # encoder, patch, blocks of the predictor, remat
  "vitb": ("base", 16, 6, "matmuls"),
  "vitl": ("large", 16, 12, "block"),
  "vith": ("huge", 14, 12, "block"),
}


def get_config(variant: str = "vitb") -> ConfigDict:
  size, patch_px, depth, remat = VARIANTS[variant]
  return ConfigDict(
    {
      "name": f"ijepa_imagenet_{variant}",
      "total": "300ep",
      "batch_size": 2048,
      "data": {
        "source": "tfds",
        "name": "imagenet2012",
        "train": "train",
        "test": "validation",
        "canvas_px": 256,
        "max_aspect": 4 / 3,
      },
      "encoder": {
        "name": "vit",
        "variant": size,
        "image_size": 224,
        "patch_size": patch_px,
        "pos_embed": "sincos",
        "probe_layers": 4,
        "remat": remat,
      },
      "objective": {
        "name": "ijepa",
        "views": {"global_crops": {"num": 1, "size_px": 224, "scale": (0.3, 1.0)}, "flip_p": 0.0},
        "masks": {"kind": "official"},
        "predictor": {"width": 384, "depth": depth, "remat": remat},
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
