"""Images and captions from scratch: Flickr8k, 6,000 images with five captions each.

Default: the best that was found for a CPU, on the development split: MMCR on pairs in batches of 16, a ConvNet at 64 px
and a small text tower. "clip": CLIP with these towers. "vits": CLIP with ViT-S/16 at 112 px and a text tower of
4 x 256, for a GPU. docs/multimodal.md says what the two files of data hold. Other losses:
--config.objective.name=siglip or cross_modal.
"""

from ml_collections import ConfigDict

VARIANTS = ("mmcr", "clip", "vits")


def get_config(variant: str = "mmcr") -> ConfigDict:
  small, mmcr = variant != "vits", variant == "mmcr"
  return ConfigDict(
    {
      "name": "clip_flickr8k" if mmcr else f"clip_flickr8k_{variant}",
      "total": "30ep" if small else "100ep",
      "batch_size": 16 if mmcr else 64 if small else 256,
      "data": {
        "source": "npz",
        "root": "$HOME/data",
        "train": "flickr8k_128.npz:0",
        "test": "flickr8k_128.npz:2",
        "canvas_px": 128,
        "captions": {"train": "flickr8k_captions.json.gz", "length": 24 if small else 32},
      },
      "encoder": {"name": "convnet", "image_size": 64, "widths": (32, 64, 128, 256, 512)}
      if small
      else {"name": "vit", "variant": "small", "image_size": 112, "drop_path": 0.1},
      "objective": {
        "name": "mmcr_pairs" if mmcr else "clip",
        "projector": {"hidden": (), "out": 256},
        "text": {"width": 128, "depth": 2, "num_heads": 2} if small else {"width": 256, "depth": 4, "drop_path": 0.1},
        "views": {
          "global_crops": {"num": 1, "size_px": 64 if small else 112, "scale": (0.5, 1.0)},
          "flip_p": 0.5,
          "color": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.0, "p": 0.8, "grayscale_p": 0.0},
        },
      },
      "optim": {
        "name": "adamw",
        "lr": 3e-4 if mmcr else 5e-4 if small else 1e-3,
        "weight_decay": 0.2,
        "b2": 0.98,
        "warmup": "5%",
      },
      "evals": {"names": ("retrieval",)},
    }
  )
