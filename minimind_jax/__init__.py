"""minimind_jax: train a small language model end to end in JAX, and get a Hugging Face folder."""

__version__ = "0.1.0"
