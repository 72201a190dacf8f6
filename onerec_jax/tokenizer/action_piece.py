"""ActionPiece: context-aware tokens of sequences of feature sets (Hou et al., ICML 2025, arXiv 2502.13581).

An action is an unordered set of features, a user a sequence of actions. Like byte-pair encoding, the vocabulary grows by
the pair of tokens with the largest weight, merged everywhere; unlike it, pairs are counted in sets:

    two tokens of one action of n tokens          2 / n          (eq. 1)
    tokens of neighbouring actions of n and m     1 / (n m)      (eq. 2)

A merge across two actions puts its token in an intermediate node between them, of which there is at most one; it pairs with
the tokens of both sides, and moves into an action that is left without tokens. This follows the published code, but for
two things: weights are exact, where the code forgets to take off a pair that leaves a sequence, and a pair that turns up
again after it was merged becomes the token it has already. Ties go to the lowest pair of tokens.

To encode, each set is put into a random order (set permutation regularisation), and neighbouring tokens of the flat sequence
are merged in the order of the vocabulary.

Axis letters: S sequences, A actions of a sequence, F features of an action, T tokens, V the vocabulary, M merges.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import json
from pathlib import Path

import numpy as np

from onerec_jax.data.replacing import replacing
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.action_corpus import Corpus, count_pairs, link_actions, living, merge, run_offsets

FORMAT_VERSION = 1
_ARRAYS = ("features", "left", "right", "weight")


@dataclasses.dataclass(frozen=True)
class ActionPieces:
    """A vocabulary: tokens 0 to len(features)-1 are single features, each further one a merge of two earlier tokens.

    Attributes:
        features: int32 [V-M], ascending; token t stands for features[t].
        left, right: int32 [M], left <= right: the pair that became token V-M, V-M+1, ….
        weight: float64 [M], what the pair weighed when it was merged.
    """

    features: np.ndarray
    left: np.ndarray
    right: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.features) + len(self.left)

    def encode(self, features: np.ndarray, seed: int | None = None) -> np.ndarray:
        """Tokens int32 [S,T], padded with -1, of features int [S,A,F], padded with -1.

        With a seed every set is put into a random order first, another one for every seed; without, into ascending order.

        Raises:
            InputError: a feature that the vocabulary does not have, or a set with a feature twice.
        """
        return self._merged(permuted(self._tokens(checked(features)), seed))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """The features int32 [..., W] of each token int [...], padded with -1; W is the most that a token has.

        Raises:
            InputError: a token that is not of the vocabulary.
        """
        if tokens.size and not (tokens.min() >= -1 and tokens.max() < len(self)):
            raise InputError(f"tokens lie between {tokens.min()} and {tokens.max()}; the vocabulary has {len(self)}")
        return self._features_of[tokens]

    @functools.cached_property
    def _features_of(self) -> np.ndarray:
        """Features int32 [V+1,W] by token, with a last row of padding for token -1."""
        parts = [[feature] for feature in self.features.tolist()]
        for left, right in zip(self.left.tolist(), self.right.tolist(), strict=True):
            parts.append(parts[left] + parts[right])
        table = np.full((len(parts) + 1, max(map(len, parts), default=1)), -1, np.int32)
        for token, part in enumerate(parts):
            table[token, : len(part)] = part
        return table

    def _tokens(self, features: np.ndarray) -> np.ndarray:
        if not len(self.features):
            raise InputError("the vocabulary has no features; fit it on sequences that have some")
        tokens = np.minimum(np.searchsorted(self.features, features), len(self.features) - 1)
        unknown = (features >= 0) & (self.features[tokens] != features)
        if unknown.any():
            sequence, action, column = np.argwhere(unknown)[0]
            raise InputError(
                f"sequence {sequence}, action {action} has feature {features[sequence, action, column]}, "
                f"which the vocabulary was not fitted on"
            )
        return np.where(features >= 0, tokens, -1).astype(np.int32)

    def _merged(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens int32 [S,T] padded with -1, merged in the order of the vocabulary, left to right."""
        row, _ = np.nonzero(tokens >= 0)
        flat = np.append(tokens[tokens >= 0], np.int32(-1))  # the last one is read where there is no neighbour
        after, before = np.arange(1, len(flat) + 1), np.arange(-1, len(flat) - 1)
        after[np.flatnonzero(np.append(row[1:] != row[:-1], True)[: len(row)])] = -1
        before[np.flatnonzero(np.append(True, row[1:] != row[:-1])[: len(row)])] = -1
        places = _places(flat[:-1])
        for new, (a, b) in enumerate(zip(self.left.tolist(), self.right.tolist(), strict=True), len(self.features)):
            if a not in places or b not in places:
                continue
            rarer, other = (a, b) if len(places[a]) <= len(places[b]) else (b, a)
            at = places[rarer] = places[rarer][flat[places[rarer]] == rarer]
            starts = np.union1d(at[flat[after[at]] == other], before[at][flat[before[at]] == other])
            if not len(starts):
                continue
            starts = starts[run_offsets(np.append(False, after[starts[:-1]] == starts[1:])) % 2 == 0]
            gone = after[starts]
            flat[starts], flat[gone] = new, -1
            after[starts] = after[gone]
            before[after[gone]] = starts
            places[new] = starts
        return _padded(flat[:-1][flat[:-1] >= 0], row[flat[:-1] >= 0], len(tokens))

    def save(self, directory: str | Path) -> None:
        """Writes npy and JSON files into `directory`, replacing it only when all of them are there.

        Raises:
            InputError: the folder cannot be written, or holds other files.
        """
        directory = Path(directory)
        if directory.is_dir() and any(directory.iterdir()) and not (directory / "left.npy").is_file():
            raise InputError(f"{directory} holds other files than a vocabulary of actions; name a new folder")
        card = {"format_version": FORMAT_VERSION, "kind": "action_piece", "tokens": len(self)}
        with replacing(directory, "the vocabulary") as partial:
            for name in _ARRAYS:
                np.save(partial / f"{name}.npy", getattr(self, name), allow_pickle=False)
            (partial / "card.json").write_text(json.dumps(card, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> ActionPieces:
        """Reads what `save` wrote.

        Raises:
            InputError: missing or damaged files.
        """
        directory = Path(directory)
        try:
            card = json.loads((directory / "card.json").read_text())
            loaded = cls(*(np.load(directory / f"{name}.npy", allow_pickle=False) for name in _ARRAYS))
            if (card["format_version"], card["tokens"]) != (FORMAT_VERSION, len(loaded)):
                raise ValueError(f"format {card['format_version']} of {card['tokens']} tokens, found {len(loaded)}")
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"no whole vocabulary of actions in {directory} ({error}); fit and save it again"
            ) from None
        return loaded


def checked(features: np.ndarray) -> np.ndarray:
    """Features as int32 [S,A,F].

    Raises:
        InputError: another shape or type, a value below -1, or a set with a feature twice; names the first.
    """
    if features.ndim != 3 or not np.issubdtype(features.dtype, np.integer):
        raise InputError(
            f"features have shape {list(features.shape)} and type {features.dtype}; "
            f"expected integers [sequences, actions, features], padded with -1"
        )
    if features.size and not (features.min() >= -1 and features.max() < 2**31 - 1):
        raise InputError(f"features lie between {features.min()} and {features.max()}; expected -1 to {2**31 - 2}")
    ordered = np.sort(features, axis=2)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        sequence, action, column = np.argwhere(twice)[0]
        raise InputError(
            f"sequence {sequence}, action {action} has feature {ordered[sequence, action, column]} twice; "
            f"an action is a set"
        )
    return features.astype(np.int32)


def permuted(tokens: np.ndarray, seed: int | None) -> np.ndarray:
    """Each set of int [S,A,F] in a random order, or ascending without a seed, its sets joined: int [S,A*F]."""
    if seed is None:
        return np.sort(tokens, axis=2).reshape(len(tokens), -1)
    order = np.argsort(np.random.default_rng(seed).random(tokens.shape, np.float32), axis=2, kind="stable")
    return np.take_along_axis(tokens, order, 2).reshape(len(tokens), -1)


def _places(tokens: np.ndarray) -> dict[int, np.ndarray]:
    """Where each token that occurs in int [N] does, ascending."""
    order = np.argsort(tokens, kind="stable")
    values, first = np.unique(tokens[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, first[1:]), strict=True)) if len(values) else {}


def _padded(values: np.ndarray, row: np.ndarray, rows: int) -> np.ndarray:
    """Values [N] by ascending row as int32 [rows,T], padded with -1."""
    length = np.bincount(row, minlength=rows)
    column = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    out = np.full((rows, int(length.max(initial=0))), -1, np.int32)
    out[row, column] = values
    return out


def fit(features: np.ndarray, vocabulary_size: int) -> ActionPieces:
    """The vocabulary of sequences of sets, features int [S,A,F] padded with -1; actions without features are left out.

    It has fewer tokens than asked for when nothing is left to merge.

    Raises:
        InputError: more distinct features than `vocabulary_size`, a set with a feature twice, or sets too large to weigh.
    """
    features = checked(features)
    known = np.unique(features[features >= 0])
    if len(known) > vocabulary_size:
        raise InputError(
            f"vocabulary_size {vocabulary_size} is less than the {len(known)} features; give at least as many"
        )
    tokens = np.where(features >= 0, np.searchsorted(known, features), -1)
    if not len(known):
        return ActionPieces(known, np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))
    corpus = link_actions(tokens, vocabulary_size)
    rules = _grow(corpus, len(known))
    pairs = np.array([divmod(key, corpus.base) for key, _ in rules], np.int32).reshape(-1, 2)
    weight = np.array([weight / corpus.scale for _, weight in rules], np.float64)
    return ActionPieces(known, pairs[:, 0], pairs[:, 1], weight)


def _grow(corpus: Corpus, num_features: int) -> list[tuple[int, int]]:
    """Key and weight of each merge, until the vocabulary has `corpus.base` tokens or no pair is left.

    The heap may hold outdated weights, but always one of at least its present weight for every pair.
    """
    weights = dict(zip(*(array.tolist() for array in count_pairs(corpus)), strict=True))
    heap = [(-weight, key) for key, weight in weights.items()]
    heapq.heapify(heap)
    nodes, column = np.nonzero(corpus.tokens >= 0)
    places = {token: nodes[at] for token, at in _places(corpus.tokens[nodes, column]).items()}
    rules: dict[int, tuple[int, int]] = {}  # token and weight by key
    while heap and num_features + len(rules) < corpus.base:
        negative, key = heapq.heappop(heap)
        weight = weights.get(key, 0)
        if weight != -negative:
            if weight:
                heapq.heappush(heap, (-weight, key))
            continue
        a, b = divmod(key, corpus.base)
        token, _ = rules.setdefault(key, (num_features + len(rules), weight))
        rarer = a if len(places[a]) <= len(places[b]) else b
        places[rarer] = living(corpus, places[rarer], rarer)
        change = merge(corpus, places[rarer], a, b, token)
        places[token] = np.union1d(places[token], change.placed) if token in places else change.placed
        for node, moved in zip(change.taker.tolist(), change.taken.tolist(), strict=True):
            if moved != token:
                places[moved] = np.append(places[moved], node)
        for changed, difference in zip(change.keys.tolist(), change.weights.tolist(), strict=True):
            value = weights.get(changed, 0) + difference
            weights[changed] = value
            if not value:
                del weights[changed]
            elif difference > 0 or changed == key:
                heapq.heappush(heap, (-value, changed))
    return [(key, weight) for key, (_, weight) in rules.items()]
