"""CLIP on Flickr8k at 112 px from scratch: a ViT of 4 x 256 and a text tower of 4 x 256.

Flickr8k, its pictures at 128 px in one .npz file, and its captions: docs/multimodal.md says what the files hold.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "name": "clip_flickr8k",
      "total": "30ep",
      "batch_size": 128,
      "data": {
        "source": "npz",
        "root": "$HOME/data",
        "train": "flickr8k_128.npz:0",
        "test": "flickr8k_128.npz:2",
        "canvas_px": 128,
        "captions": {"train": "flickr8k_captions.json.gz"},
      },
      "encoder": {"name": "convnet", "image_size": 112, "widths": (32, 64, 128, 256, 512)},
      "objective": {
        "name": "clip",
        "projector": {"hidden": (), "out": 256, "norm": "none"},
        "text": {"width": 256, "depth": 4, "num_heads": 4, "drop_path": 0.1},
        "views": {
          "global_crops": {"num": 1, "size_px": 112, "scale": (0.5, 1.0)},
          "flip_p": 0.5,
          "color": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.0, "p": 0.8, "grayscale_p": 0.0},
        },
      },
      "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.2, "b2": 0.98, "warmup": "5%"},
      "evals": {"names": ("retrieval",)},
    }
  )
