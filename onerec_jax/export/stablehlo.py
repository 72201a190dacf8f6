"""The recommend step as StableHLO: one file for CPU, GPU and TPU, weights and catalogue as arguments, any number of requests.

Files hold StableHLO's portable bytecode as `jax.export` makes it, which has promises on how long it can be read; what `jax.export`
would add in its own format is in `signature.json`, for which no package is needed. `recommend.py` shows how it is called.

Extra axis letters: X items to leave out, J items to score, I items.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from onerec_jax.config import ModelConfig
from onerec_jax.data.schema import Vocabulary
from onerec_jax.data.tensor_files import Tensors
from onerec_jax.export.recommend import DTYPES
from onerec_jax.generate.scoring import code_log_p
from onerec_jax.generate.step import Catalogue, ListOptions, make_recommend_step
from onerec_jax.model.batch import Batch, ItemFeatures
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.prefixes import DeviceTrie
from onerec_jax.parallel.mesh import on_platform
from onerec_jax.tokenizer.trie import Trie
from onerec_jax.train.exported import as_trees, restored

PLATFORMS = ("cpu", "cuda", "tpu")
PATHWAYS = ("short", "positive", "lifelong")
UNUSED = ("duration_s", "embedding")  # of the catalogue: for who makes features, not for the model
Named = dict[str, Array]

_ABOUT = {
    "user": "user row, then categorical features, 0 = unknown",
    "item": "item rows, oldest event first, -1 = padding",
    "age_s": "seconds from the event to the request",
    "playtime_s": "seconds, negative = unknown",
    "duration_s": "seconds, negative = unknown",
    "feedback": "0 or 1 for each label of config.json",
    "exclude": "item rows that may not be listed, -1 = none",
    "items": "item rows to score",
}
_SINCE_BEFORE = "seconds from the event before to this one; of the first from the one before the window, 0 without"


def serving_config(config: ModelConfig) -> ModelConfig:
    """The same model in a form that every platform computes alike: no kernel of one of them, tables that are only read."""
    portable = {"backend": "tiles", "transport": "local"}
    moe = config.moe.model_copy(update=portable)
    return config.model_copy(update={"attention": "xla", "remat": "none", "moe": moe, "tables": type(config.tables)()})


def request_features(model: Model) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape without the leading B, and type, of every feature of a request."""
    labels, features = len(model.vocabulary.labels), len(model.vocabulary.user_features)
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {"user": ((1 + features,), np.dtype(np.int32))}
    for name in PATHWAYS:
        if length := getattr(model.config, f"{name}_length"):
            found[f"{name}.item"] = ((length,), np.dtype(np.int32))
            found |= {
                f"{name}.{key}": ((length,), np.dtype(np.float32)) for key in ("age_s", "playtime_s", "duration_s")
            }
            found[f"{name}.feedback"] = ((length, labels), np.dtype(np.uint8))
    return found


def batch_of(request: Named, catalogue: Catalogue, vocabulary: Vocabulary) -> Batch:
    """A batch of features by name, with what the catalogue knows of the items; one target, which is none."""
    b, levels, labels = request["user"].shape[0], vocabulary.levels, len(vocabulary.labels)

    def pathway(name: str) -> ItemFeatures:
        item = request.get(f"{name}.item", jnp.zeros((b, 0), jnp.int32))
        row, unknown = jnp.maximum(item, 0), jnp.zeros(item.shape)
        return ItemFeatures(
            item=item,
            codes=catalogue.codes[row],
            author=catalogue.author[row],
            tag=catalogue.tag[row],
            age_s=request.get(f"{name}.age_s", unknown),
            playtime_s=request.get(f"{name}.playtime_s", unknown),
            duration_s=request.get(f"{name}.duration_s", unknown),
            feedback=request.get(f"{name}.feedback", jnp.zeros((*item.shape, labels), jnp.uint8)),
        )

    short = pathway("short")
    return Batch(
        user=request["user"],
        short=short,
        positive=pathway("positive"),
        lifelong=pathway("lifelong"),
        targets=jnp.zeros((b, 1, levels), jnp.int32),
        target_item=jnp.full((b, 1), -1, jnp.int32),
        target_weight=jnp.zeros((b, 1)),
        visible=jnp.sum(short.item >= 0, axis=1, keepdims=True, dtype=jnp.int32),
        feedback=jnp.zeros((b, 1, labels), jnp.uint8),
        playtime_s=jnp.zeros((b, 1)),
    )


def catalogue_of(arrays: Named, trie: Trie, config: ModelConfig) -> Catalogue:
    """The catalogue of its arrays by name; only the sizes of `trie` are read."""
    levels = range(trie.levels)
    on_device = DeviceTrie(
        tuple(arrays[f"child_start.{level}"] for level in levels),
        tuple(arrays[f"token.{level}"] for level in levels),
        trie.branching,
        arrays["codes"] if config.coded_items else None,
    )
    return Catalogue(
        trie=on_device,
        shift=arrays.get("shift"),
        items_per_id=int(np.diff(trie.item_start).max(initial=1)),
        **{name: arrays[name] for name in ("codes", "author", "tag", "item_start", "items", "leaf")},
    )


def recommend_function(model: Model, trie: Trie, options: ListOptions) -> Callable[..., Named]:
    """(weights, catalogue, request), all of them arrays by name, weights as stored -> items [B,k] and scores [B,k]."""
    step = make_recommend_step(model, options)

    def recommend(weights: Named, catalogue: Named, request: Named) -> Named:
        known = catalogue_of(catalogue, trie, model.config)
        parameters = as_trees(restored(weights), model.abstract, model.tables)
        lists = step(*parameters, known, batch_of(request, known, model.vocabulary), request["exclude"], None)
        return {"items": lists.items, "scores": lists.scores}

    return recommend


def score_function(model: Model, trie: Trie) -> Callable[..., Named]:
    """(weights, catalogue, request with items [B,J]) -> log_p [B,J,C], that of the items [B,J,1] where there is no decoder."""

    def score(weights: Named, catalogue: Named, request: Named) -> Named:
        known = catalogue_of(catalogue, trie, model.config)
        params, tables, bias = as_trees(restored(weights), model.abstract, model.tables)
        batch, items = batch_of(request, known, model.vocabulary), request["items"]
        context = model.encode(params, tables, bias, batch)
        module = model.bind(params)
        if module.decoder is not None:
            return {"log_p": code_log_p(module, context, bias, known.trie, known.codes[items])}
        own = model.item_scores(params, batch, context, known.trie)
        if known.shift is not None:
            own = jax.nn.log_softmax(own + known.shift)
        return {"log_p": jnp.take_along_axis(own, items, axis=1)[..., None]}

    return score


def write_functions(
    directory: Path,
    model: Model,
    weights: Tensors,
    catalogue: Tensors,
    trie: Trie,
    lists: dict[str, Any],
    excluded: int,
) -> None:
    """Writes recommend.stablehlo, score.stablehlo and signature.json.

    Args:
        weights: as they are stored, by name.
        lists: k, width and item_weight of `ListOptions`.
        excluded: X, the same for all requests: of the sorted search of a list JAX must know the length.
    """
    portable = build(serving_config(model.config), model.vocabulary)
    scope = jax.export.SymbolicScope()
    b, j = jax.export.symbolic_shape("b,j", scope=scope)
    features = {name: _spec((b, *shape), dtype) for name, (shape, dtype) in request_features(model).items()}
    read = {name: _spec(array.shape, array.dtype) for name, array in catalogue.items() if name not in UNUSED}
    held = {name: _spec(array.shape, array.dtype) for name, array in weights.items()}
    recommend = recommend_function(portable, trie, ListOptions(**lists))
    functions = {
        "recommend": (recommend, {**features, "exclude": _spec((b, excluded), np.dtype(np.int32))}),
        "score": (score_function(portable, trie), {**features, "items": _spec((b, j), np.dtype(np.int32))}),
    }
    signature: dict[str, Any] = {"jax": jax.__version__, "functions": {}}
    for name, (function, request) in functions.items():
        with on_platform("any"):  # a stack of blocks stays a loop, which takes half as long to compile
            exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(held, read, request)
        (directory / f"{name}.stablehlo").write_bytes(exported.mlir_module_serialized)
        signature["functions"][name] = _signature(name, exported, model.config)
    (directory / "signature.json").write_text(json.dumps(signature, indent=1) + "\n")


def _spec(shape: tuple[Any, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


_TYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def _signature(name: str, exported: jax.export.Exported, config: ModelConfig) -> dict[str, Any]:
    arguments = ("weights", "catalogue", "request")
    inputs = []
    places = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(exported.in_tree, range(len(exported.in_avals))))
    for (path, _), aval in zip(places, exported.in_avals, strict=True):
        argument, key = arguments[path[1].idx], path[2].key
        inputs.append({"argument": argument, "name": key, **_array(aval), **_meaning(argument, key, config)})
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "name": name,
        "file": f"{name}.stablehlo",
        "arguments": arguments,
        "platforms": exported.platforms,
        "calling_convention_version": exported.calling_convention_version,
        "kept": exported.module_kept_var_idx,
        "global_constants": exported.uses_global_constants,
        "inputs": inputs,
        "outputs": [{"name": key, **_array(aval), "about": _OUTPUTS[key]} for key, aval in sorted(outputs.items())],
    }


_OUTPUTS = {
    "items": "item rows, best first, -1 = no more",
    "scores": "natural log of P, weighed as config.json says; -inf where there is no item",
    "log_p": "natural log of P of each code after the codes before it; without a decoder of the item itself",
}


def _array(aval: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return {"shape": shape, "dtype": np.dtype(aval.dtype).name, "type": _TYPE_NAMES[np.dtype(aval.dtype)]}


def _meaning(argument: str, key: str, config: ModelConfig) -> dict[str, str]:
    """What a feature is, with its unit; weights and catalogue are as their files hold them."""
    if argument != "request":
        return {}
    field = key.rpartition(".")[2]
    return {"about": _SINCE_BEFORE if config.causal and field == "age_s" else _ABOUT[field]}
