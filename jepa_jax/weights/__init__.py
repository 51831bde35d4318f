"""Weights in and out: Meta's I-JEPA, Hugging Face and timm checkpoints <-> ours. See docs/weights.md."""
