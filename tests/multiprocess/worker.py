"""One process of a run: python worker.py DEVICES RECIPE [KEY=VALUE]...; trains and says where."""

from __future__ import annotations

import sys

import jax

jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))

from onerec_jax.errors import FORESEEN  # noqa: E402  # the devices come first
from onerec_jax.recipe import load_recipe  # noqa: E402
from onerec_jax.train.loop import pretrain  # noqa: E402

try:
    print(pretrain(load_recipe(sys.argv[2], sys.argv[3:])))
except FORESEEN as error:
    print(error)
    raise SystemExit(int(error.code)) from None
