"""IWM ViT-B/16 on ImageNet-1k (300 epochs), a pod slice: the paper's equivariant model, and an invariant one.

`--config=configs/iwm_imagenet.py:vitb_invariant` has a predictor of 12 blocks in place of 18 and weak augmentation:
jitter alone, the easiest of the paper's three difficulties (what is weak the paper does not say).
"""

from ml_collections import ConfigDict

VARIANTS = {  # what destroys the source, blocks of the predictor
  "vitb": ({"grayscale_p": 0.2, "blur_p": (0.2,), "solarize_p": (0.1,)}, 18),
  "vitb_invariant": ({}, 12),
}


def get_config(variant: str = "vitb") -> ConfigDict:
  destructive, depth = VARIANTS[variant]
  jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8}
  return ConfigDict(
    {
      "name": f"iwm_imagenet_{variant}",
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
        "variant": "base",
        "image_size": 224,
        "patch_size": 16,
        "pos_embed": "sincos",
        "probe_layers": 4,
      },
      "objective": {
        "name": "iwm",
        "views": {"global_crops": {"num": 1, "size_px": 224, "scale": (0.3, 1.0)}, "flip_p": 0.5, "color": jitter},
        "source": jitter | destructive,
        # four rectangles of 15 to 20 % leave 102 of 196 patches in the mean; shapes are static, so 80 are kept
        "masks": {"kind": "uniform", "context_scale": (1.0, 1.0), "num_context_patches": 80},
        "predictor": {"width": 384, "depth": depth, "conditioning": "feature"},
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
      "evals": {"names": ("mrr", "linear", "attentive", "predictor_tuning"), "crop_fraction": 0.875},
    }
  )
