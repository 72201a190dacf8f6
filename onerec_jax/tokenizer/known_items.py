"""Semantic IDs as they are on the day of the split: fitted on the items met by then, all later ones encoded by what was fitted.

The usual fit sees the content of every item of a dataset, also of those that nobody had met where train ends. How well a
model does on new items can only be measured with a tokenizer that has not seen them.

Axis letters: I items of the dataset, N of them with train events, C codes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_jax.config import TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.content import content_vectors
from onerec_jax.tokenizer.expansion import encode_new
from onerec_jax.tokenizer.semantic_ids import SemanticIds, fit_semantic_ids, resolve_priority
from onerec_jax.tokenizer.trie import Trie

if TYPE_CHECKING:
    from onerec_jax.data.store import Dataset


def fit_known_items(dataset: Dataset, config: TokenizerConfig, seed: int) -> SemanticIds:
    """Semantic IDs of all items of a dataset, fitted on those with train events; the others' by the frozen codebooks.

    With `dedup: extra_level` the last code of a new item goes on counting under its ID. The report is that of the fit.

    Args:
        dataset: whose `train_count` says which items are known.
        config: residual k-means, without alignment, and content that needs no behaviour, which new items have none of.
        seed: of the fit.

    Raises:
        InputError: other settings than these, or no item with train events.
    """
    _check(config)
    known = np.flatnonzero(dataset.items.train_count > 0)
    if not len(known):
        raise InputError(f"no item of {dataset.directory} has a train event; move data.split.valid_from later")
    content = content_vectors(dataset, config, seed)
    part: Any = SimpleNamespace(
        items=SimpleNamespace(
            train_count=dataset.items.train_count[known], upload_ms=dataset.items.upload_ms[known]
        ),
        num_items=len(known),
        card=dataset.card,
    )  # fmt: skip
    fitted = fit_semantic_ids(part, config, seed, content[known])
    codes = np.empty((dataset.num_items, fitted.codes.shape[1]), np.int32)
    codes[known] = fitted.codes
    new = np.setdiff1d(np.arange(dataset.num_items), known)
    if len(new):
        codes[new] = encode_new(fitted, content[new])
    sizes = (*fitted.codebook_sizes[: fitted.levels], *(int(c.max()) + 1 for c in codes.T[fitted.levels :]))
    trie = Trie.build(codes, resolve_priority(dataset, config.resolve, seed))
    return SemanticIds(codes, fitted.kind, fitted.arrays, fitted.levels, sizes, trie, fitted.quality, fitted.origin)


def _check(config: TokenizerConfig) -> None:
    if config.quantizer.kind != "residual_kmeans" or config.alignment.steps:
        raise InputError(
            "a tokenizer fitted on known items alone needs tokenizer.quantizer.kind residual_kmeans and "
            "tokenizer.alignment.steps 0"
        )
    if "behaviour" in config.content:
        raise InputError(
            "tokenizer.content names 'behaviour', which items without train events have none of; use 'embedding', "
            "'text' or 'sentence'"
        )
