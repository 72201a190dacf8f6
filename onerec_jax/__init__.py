"""onerec_jax: OneRec-style generative recommenders in JAX, from raw logs to an aligned, exported model."""

__version__ = "0.1.0"
