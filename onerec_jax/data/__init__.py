"""From raw logs to batches; nothing in this room imports jax."""
