"""jepa_jax: joint-embedding self-supervised learning in JAX."""

__version__ = "0.3.0.dev0"
