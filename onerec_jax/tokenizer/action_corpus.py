"""Sequences of feature sets as one linked list, whose token pairs are counted and merged: the corpus of ActionPiece.

Node i holds the tokens of one action, `slot[i]` the token, if any, that spans it and the next node. A link is a node with
its slot and the next node; every pair of tokens that can be merged lies in one link. The last row of each array belongs to
no action: index -1, "none", reads as an empty node.

Axis letters: N actions, F tokens of an action, P pairs.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from onerec_jax.errors import InputError

_LINKS_AT_ONCE = 100_000


@dataclasses.dataclass
class Corpus:
    """The state of the corpus; `merge` changes it in place."""

    tokens: np.ndarray  # int32 [N+1,F], an action's tokens first, then -1
    size: np.ndarray  # int64 [N+1], how many
    slot: np.ndarray  # int32 [N+1], -1 = empty
    after: np.ndarray  # int64 [N+1], the next node of the sequence, -1 = none
    before: np.ndarray  # int64 [N+1]
    base: int  # more than any token; pair (a, b), a <= b, has the key a * base + b
    scale: int  # weights are integers: multiples of 1 / scale


def link_actions(tokens: np.ndarray, base: int) -> Corpus:
    """The corpus of tokens int32 [S,A,F] padded with -1; actions without tokens are left out.

    Raises:
        InputError: the weights of so many tokens per action, added up over so many actions, leave 64 bits.
    """
    present = (tokens >= 0).any(2)
    sequence = np.repeat(np.arange(len(tokens)), present.sum(1))
    sets = -np.sort(-tokens[present], axis=1)
    count, width = sets.shape
    scale = math.lcm(*range(1, width + 1)) ** 2
    if 2 * count * scale >= 2**63:
        raise InputError(
            f"{count} actions of up to {width} features cannot be weighed exactly in 64 bits; "
            f"up to 15 features per action always can for 35 million actions"
        )
    after = np.arange(1, count + 2)
    after[:-1][np.append(sequence[1:] != sequence[:-1], True)[:count]] = -1
    before = np.arange(-1, count)
    before[:-1][np.append(True, sequence[1:] != sequence[:-1])[:count]] = -1
    after[-1] = before[-1] = -1
    sets = np.concatenate([sets, np.full((1, width), -1)]).astype(np.int32)
    return Corpus(sets, (sets >= 0).sum(1), np.full(count + 1, -1, np.int32), after, before, base, scale)


def _weighed(first: np.ndarray, second: np.ndarray, weight: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and weights [P] of the pairs of two broadcast arrays of tokens that are both there."""
    first, second, weight = np.broadcast_arrays(first, second, weight)
    there = (first >= 0) & (second >= 0)
    first, second = first[there].astype(np.int64), second[there].astype(np.int64)
    return np.minimum(first, second) * base + np.maximum(first, second), weight[there]


def _link_pairs(corpus: Corpus, links: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and weights int64 [P] of every pair of tokens of some links, equal pairs not yet added up.

    Two tokens of one action of n weigh 2 / n, one of n and one of the next action's m weigh 1 / (n m): the chances that
    they end up side by side when sets are permuted at random (eqs. 1 and 2). A token in the slot keeps its neighbours
    apart and pairs with those of either as if it were an action of one token.
    """
    follower = corpus.after[links]
    size, next_size = corpus.size[links], corpus.size[follower]
    own = corpus.tokens[links, : max(1, size.max(initial=0))]
    other = corpus.tokens[follower, : max(1, next_size.max(initial=0))]
    unit = corpus.scale // np.maximum(size, 1)
    upper, lower = np.triu_indices(own.shape[1], 1)
    parts = [_weighed(own[:, upper], own[:, lower], 2 * unit[:, None], corpus.base)]

    closed = corpus.slot[links] < 0
    both = corpus.scale // np.maximum(size * next_size, 1)[closed]
    parts.append(_weighed(own[closed][:, :, None], other[closed][:, None, :], both[:, None, None], corpus.base))

    open_ = ~closed
    if open_.any():
        slot = corpus.slot[links][open_, None]
        parts.append(_weighed(own[open_], slot, unit[open_, None], corpus.base))
        next_unit = corpus.scale // np.maximum(next_size, 1)
        parts.append(_weighed(other[open_], slot, next_unit[open_, None], corpus.base))
    return np.concatenate([keys for keys, _ in parts]), np.concatenate([weights for _, weights in parts])


def _added_up(keys: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, ascending, and the sum of each one's weights; those with sum 0 are left out."""
    if not len(keys):
        return keys, weights
    order = np.argsort(keys)
    keys = keys[order]
    first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    sums = np.add.reduceat(weights[order], first)
    return keys[first][sums != 0], sums[sums != 0]


def count_pairs(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Keys int64 [P], ascending, and weights int64 [P] of all pairs of the corpus."""
    keys, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(corpus.size) - 1, _LINKS_AT_ONCE):
        links = np.arange(start, min(start + _LINKS_AT_ONCE, len(corpus.size) - 1))
        chunk = _added_up(*_link_pairs(corpus, links))
        keys.append(chunk[0])
        weights.append(chunk[1])
    return _added_up(np.concatenate(keys), np.concatenate(weights))


def _holds(corpus: Corpus, nodes: np.ndarray, token: int | np.ndarray) -> np.ndarray:
    return (corpus.tokens[nodes] == np.reshape(token, (-1, 1))).any(1)


def living(corpus: Corpus, nodes: np.ndarray, token: int) -> np.ndarray:
    """Those of some nodes that hold a token, in their set or their slot."""
    return nodes[_holds(corpus, nodes, token) | (corpus.slot[nodes] == token)]


def _remove(corpus: Corpus, nodes: np.ndarray, token: int | np.ndarray) -> None:
    column = (corpus.tokens[nodes] == np.reshape(token, (-1, 1))).argmax(1)
    last = corpus.size[nodes] - 1
    corpus.tokens[nodes, column] = corpus.tokens[nodes, last]
    corpus.tokens[nodes, last] = -1
    corpus.size[nodes] = last


def _links_with(corpus: Corpus, links: np.ndarray, a: int, b: int) -> np.ndarray:
    """Those of some links in which a and b can be merged."""
    follower, slot = corpus.after[links], corpus.slot[links]
    own_a, own_b = _holds(corpus, links, a), _holds(corpus, links, b)
    next_a, next_b = _holds(corpus, follower, a), _holds(corpus, follower, b)
    inside = own_a & own_b & (a != b)
    across = (slot < 0) & ((own_a & next_b) | (own_b & next_a))
    with_slot = ((slot == a) & (own_b | next_b)) | ((slot == b) & (own_a | next_a))
    return links[inside | across | with_slot]


def run_offsets(continues: np.ndarray) -> np.ndarray:
    """The place 0, 1, 2, … of each element within its run; `continues` tells which follow the one before."""
    index = np.arange(len(continues))
    return index - np.maximum.accumulate(np.where(continues, 0, index))


def _merge_links(corpus: Corpus, links: np.ndarray, a: int, b: int, merged: int) -> None:
    """Merges a and b in links of which no two share a node: in the set, else with the slot, else across."""
    if a != b:
        inside = links[_holds(corpus, links, a) & _holds(corpus, links, b)]
        _remove(corpus, inside, a)
        corpus.tokens[inside, (corpus.tokens[inside] == b).argmax(1)] = merged
    slot = corpus.slot[links]
    for in_slot, partner in ((a, b), (b, a)):
        spanned = links[slot == in_slot]
        for nodes in (spanned, corpus.after[spanned]):
            hit = (corpus.slot[spanned] == in_slot) & _holds(corpus, nodes, partner)
            _remove(corpus, nodes[hit], partner)
            corpus.slot[spanned[hit]] = merged
    for left, right in ((a, b), (b, a)):
        apart = links[corpus.slot[links] < 0]
        hit = apart[_holds(corpus, apart, left) & _holds(corpus, corpus.after[apart], right)]
        _remove(corpus, hit, left)
        _remove(corpus, corpus.after[hit], right)
        corpus.slot[hit] = merged


def _settle(corpus: Corpus, touched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Emptied nodes take the token of the slot before them, or go when the slot after them is empty too.

    Returns the nodes int [n] that took a token and the tokens [n].
    """
    empty = touched[corpus.size[touched] == 0]
    taker = empty[(corpus.before[empty] >= 0) & (corpus.slot[corpus.before[empty]] >= 0)]
    giver = corpus.before[taker]
    taken = corpus.slot[giver]
    corpus.tokens[taker, 0], corpus.size[taker], corpus.slot[giver] = taken, 1, -1

    maybe = np.union1d(touched, giver)
    gone = maybe[(corpus.size[maybe] == 0) & (corpus.slot[maybe] < 0) & (corpus.after[maybe] >= 0)]
    # No two neighbours go at once: the earlier one's slot would have been taken by the later one.
    earlier, later = corpus.before[gone], corpus.after[gone]
    corpus.before[later] = earlier
    corpus.after[earlier[earlier >= 0]] = later[earlier >= 0]
    return taker, taken


@dataclasses.dataclass(frozen=True)
class Change:
    """What one merge changed: weights of pairs by key, and nodes where tokens are now that were not there before."""

    keys: np.ndarray
    weights: np.ndarray
    placed: np.ndarray  # nodes that hold the merged token
    taker: np.ndarray  # nodes that took a slot's token ...
    taken: np.ndarray  # ... and which


def merge(corpus: Corpus, near: np.ndarray, a: int, b: int, merged: int) -> Change:
    """Merges every pair (a, b) of the corpus, from left to right in each sequence, into the token `merged`.

    `near` has every node that holds the rarer of a and b, in its set or its slot.
    """
    links = np.union1d(near, corpus.before[near])
    links = _links_with(corpus, links[links >= 0], a, b)
    touched = np.union1d(links, corpus.after[links])
    touched = touched[touched >= 0]
    earlier = corpus.before[touched]
    affected = np.concatenate([touched, earlier, corpus.before[earlier[corpus.size[earlier] == 0]]])
    affected = np.unique(affected[affected >= 0])
    keys_before, weights_before = _link_pairs(corpus, affected)

    offset = run_offsets(np.append(False, corpus.before[links[1:]] == links[:-1])[: len(links)])
    for place in range(offset.max(initial=-1) + 1):
        _merge_links(corpus, links[offset == place], a, b, merged)
    taker, taken = _settle(corpus, touched)

    keys, weights = _link_pairs(corpus, affected)
    changed = _added_up(np.concatenate([keys, keys_before]), np.concatenate([weights, -weights_before]))
    return Change(*changed, living(corpus, affected, merged), taker, taken)
