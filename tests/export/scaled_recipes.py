"""The models of all recipes with every structural switch kept, and tiny widths, depths, lengths and experts."""

from __future__ import annotations

from typing import Any

from tiny import TINY

from onerec_jax.config import ModelConfig
from onerec_jax.recipe import CONFIGS, load_recipe

_SMALL = {
    **{name: value for name, value in TINY.items() if name not in ("item_input", "encoder_layers", "decoder_layers")},
    "dtype": "float32",
    "remat": "none",
    "dropout": 0.0,
}


def scaled_down(recipe: str) -> dict[str, Any]:
    config = load_recipe(recipe).model
    values = config.model_dump()
    small = {name: value for name, value in _SMALL.items() if values[name] or not name.endswith("_length")}
    small |= {"encoder_layers": config.moe.every, "decoder_layers": config.moe.every}
    small |= {"item_memory": min(config.item_memory, 5), "pathway_hidden": 0}
    small["moe"] = {**values["moe"], "experts": min(config.moe.experts, 6), "hidden": 16}
    return values | small


def recipes() -> dict[str, dict[str, Any]]:
    """All of them by name."""
    return {path.stem: scaled_down(str(path)) for path in sorted(CONFIGS.glob("*.yaml"))}


def distinct(named: dict[str, dict[str, Any]], **changes: Any) -> dict[str, ModelConfig]:
    """Configurations by name, with these changes; of those that are equal the first."""
    found: dict[ModelConfig, str] = {}
    for name, values in named.items():
        # what compiles fastest and is the oracle of the others
        moe = {**values.get("moe", {}), "backend": "reference"}
        config = ModelConfig.model_validate({**values, "attention": "xla", "moe": moe, **changes})
        found.setdefault(config, name)
    return {name: config for config, name in found.items()}
