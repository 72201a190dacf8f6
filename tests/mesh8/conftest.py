"""Eight CPU devices; a pytest run of its own, because the number of devices is fixed at the first use of JAX."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 8)
