"""A recipe for one's own domain: LeJEPA goes on from published weights, on a folder of one's pictures.

    python -m jepa_jax train --config=continue_folder --workdir=workdirs/mine --init-from=weights:FILE \\
        --config.data.root=PICTURES

FILE: a ViT-S/16 for 224 px with timm's or DINO's names; `weights inspect FILE` prints the settings of others
(--config.encoder.num_registers=4; --config.encoder.num_heads=12 for MoCo v3). Pictures lie in PICTURES and below; a
tenth of them is held out. The first blocks stay, the later ones learn slowly, and the projector is new. One GPU; what
going on is worth: docs/weights.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "continue_folder",
      "total": "20ep",
      "batch_size": 256,
      "data": {
        "source": "folder",
        "root": "pictures",
        "train": ".",
        "held_out": 0.1,
        "canvas_px": 256,
        "max_aspect": 4 / 3,
      },
      "encoder": {
        "name": "vit",
        "variant": "small",
        "image_size": 224,
        "patch_size": 16,
        "cls_token": True,
        "pool": "cls",
        "pos_filter": "antialiased",
        "drop_path": 0.1,
      },
      "objective": {
        "name": "lejepa",
        "lam": 0.02,
        "num_slices": 1024,
        "projector": {"hidden": (2048, 2048), "out": 64},
        "views": {
          "global_crops": {"num": 2, "size_px": 224, "scale": (0.3, 1.0)},
          "local_crops": {"num": 4, "size_px": 96, "scale": (0.05, 0.3)},
          "interpolation": "bicubic",
          "flip_p": 0.5,
          "color": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8, "grayscale_p": 0.2},
        },
      },
      "optim": {"lr": 1e-4, "weight_decay": 5e-2, "warmup": "10%", "layer_decay": 0.75, "frozen_blocks": 2},
      "evals": {"crop_fraction": 0.875},
    }
  )
