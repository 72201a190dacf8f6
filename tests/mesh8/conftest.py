"""Eight CPU devices; a pytest run of its own, because the number of devices is fixed at the first use of JAX."""

from __future__ import annotations

import os

# Less optimization: what is compared here is one layout with another, and compiling is nearly all of the time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
