"""What is done about items that share a semantic ID (`tokenizer.dedup`): one more level, or another last code.

A re-assigned item keeps its prefix and takes a last code that decodes to another vector than the nearest, so `encode` of
its content gives the quantizer's code, not the item's. Items with an ID of their own keep it.

Axis letters: I items, C levels, K codes of the last level, G prefixes, N items under a prefix that are re-assigned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from onerec_jax.tokenizer.kmeans import Rows
from onerec_jax.tokenizer.quantizer import Arrays, quantizer
from onerec_jax.tokenizer.runs import place_in_run
from onerec_jax.tokenizer.trie import Trie

Distances = Callable[[np.ndarray], np.ndarray]  # item rows [N] -> squared distances [N,K] to the last codes

EPSILON = 0.003  # LC-Rec's regularisation, on distances scaled to [-1, 1] (REFERENCE 7.3)
_SCALINGS = 50
_ROUNDS = 20
_ADDITIVE = ("residual_kmeans", "product")  # decode is a sum of one vector per level
_VALUES = 2**24  # float32 values of a temporary array


def extra_level(codes: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """The number int32 [I] of each item among those with its codes int32 [I,C]: 0, 1, 2, … in resolve order."""
    trie = Trie.build(codes, priority)
    position = np.arange(len(codes)) - np.repeat(trie.item_start[:-1], np.diff(trie.item_start))
    level = np.empty(len(codes), np.int32)
    level[trie.items] = position
    return level


def reassign(
    method: str, kind: str, arrays: Arrays, vectors: Rows, codes: np.ndarray, size: int, priority: np.ndarray
) -> np.ndarray:
    """Codes int32 [I,C] with other last codes for items that share theirs.

    Args:
        method: `sinkhorn` or `nearest_free`, as in `tokenizer.dedup`.
        kind: the construction, as in `tokenizer.quantizer.kind`.
        arrays: the construction's.
        vectors: content float32 [I,D]; only those of items that share their ID are read, some prefixes at a time.
        codes: int32 [I,C].
        size: K.
        priority: [I], the item with the largest chooses first (`nearest_free`).
    """
    distances = last_level_distances(kind, arrays, vectors, codes, size)
    width = int(vectors.shape[1])
    block = max(1, _VALUES // (max(size, width) if kind in _ADDITIVE else size * width))
    prefix, _ = _numbered(codes[:, :-1])
    if method == "sinkhorn":
        last = sinkhorn(prefix, codes[:, -1], size, distances, block)
    else:
        last = nearest_free(prefix, codes[:, -1], size, priority, distances, block)
    return np.column_stack([codes[:, :-1], last]).astype(np.int32)


def last_level_distances(kind: str, arrays: Arrays, vectors: Rows, codes: np.ndarray, size: int) -> Distances:
    """||x - decode(prefix of x, k)||^2 for every last code k, as a function of item rows.

    With residual codebooks that is ||residual - c_k||^2, one matrix product; else each candidate is decoded.
    """
    decode = quantizer(kind).decode
    candidates = np.arange(size)[:, None]
    if kind in _ADDITIVE:
        nothing = np.zeros((1, codes.shape[1] - 1), codes.dtype)
        book = decode(arrays, np.hstack([np.repeat(nothing, size, axis=0), candidates])) - decode(arrays, nothing)
        norm = np.sum(book**2, axis=1)

        def of_residuals(rows: np.ndarray) -> np.ndarray:
            residual = vectors[rows] - decode(arrays, codes[rows, :-1])
            return np.sum(residual**2, axis=1, keepdims=True) + norm - 2 * residual @ book.T

        return of_residuals

    def of_decoded(rows: np.ndarray) -> np.ndarray:
        number, first = _numbered(codes[rows, :-1])
        prefixes = np.repeat(codes[rows[first], :-1], size, axis=0)
        decoded = decode(arrays, np.hstack([prefixes, np.tile(candidates, (len(first), 1))]))
        decoded = decoded.reshape(len(first), size, -1)[number]
        return np.sum((vectors[rows][:, None] - decoded) ** 2, axis=2)

    return of_decoded


def _numbered(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number [I] for each distinct row of codes [I,l], in lexicographic order, and the first row of each."""
    if not codes.shape[1]:
        return np.zeros(len(codes), np.int64), np.zeros(1, np.int64)
    order = np.lexsort(codes.T[::-1])
    ordered = codes[order]
    opens = np.append(True, (ordered[1:] != ordered[:-1]).any(1))
    number = np.empty(len(codes), np.int64)
    number[order] = np.cumsum(opens) - 1
    return number, order[opens]


def _colliding(prefix: np.ndarray, last: np.ndarray, size: int) -> np.ndarray:
    """Whether each item shares its ID, bool [I]."""
    _, group, count = np.unique(prefix * size + last, return_inverse=True, return_counts=True)
    return (count > 1)[group.ravel()]


def _in_use(prefix: np.ndarray, last: np.ndarray, prefixes: int, size: int) -> sparse.csr_array:
    """How many items [G,K] have each last code under each prefix."""
    return sparse.csr_array((np.ones(len(last), np.int32), (prefix, last)), shape=(prefixes, size))


def nearest_free(
    prefix: np.ndarray, last: np.ndarray, size: int, priority: np.ndarray, distances: Distances, block: int = 4096
) -> np.ndarray:
    """Last codes [I]: of the items of one ID the first by priority keeps it, the others move.

    Under each prefix those that move take, in order of priority, ties by row, the nearest code that no item has. Where
    no code is left the rest stay and share theirs.

    Args:
        prefix: int [I], 0 to G-1.
        last: int [I].
        size: K.
        priority: [I].
        distances: of item rows to the K candidates.
        block: rows whose distances are held at once, more where one prefix has more.
    """
    order = np.lexsort((-priority, last, prefix))
    movers = order[place_in_run(prefix[order] * size + last[order]) > 0]
    in_use = _in_use(prefix, last, int(prefix.max()) + 1, size)
    free = size - np.diff(in_use.indptr)
    # The prefixes with the most to move come first: those of one block then take about the same number of turns.
    moving = np.bincount(prefix[movers], minlength=len(free))
    movers = movers[np.lexsort((movers, -priority[movers], prefix[movers], -moving[prefix[movers]]))]
    turn = place_in_run(prefix[movers])
    placed = turn < free[prefix[movers]]
    movers, turn = movers[placed], turn[placed]
    last = last.copy()
    for part in _blocks(turn, block):
        rows = movers[part]
        prefixes, group = np.unique(prefix[rows], return_inverse=True)
        last[rows] = _in_turn(distances(rows), group.ravel(), turn[part], in_use[prefixes].toarray() > 0)
    return last


def _blocks(turn: np.ndarray, block: int) -> Iterator[slice]:
    """Slices of about `block` of the rows whose turns [N] are given, cut only where a prefix begins (turn 0)."""
    starts = np.flatnonzero(turn == 0)
    starts = starts[np.diff(starts // block, prepend=-1) != 0]
    for start, stop in itertools.pairwise([*starts.tolist(), len(turn)]):
        yield slice(start, stop)


def _in_turn(distance: np.ndarray, group: np.ndarray, turn: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The codes [N] taken when in every group [N] one row after the other takes the nearest that is not held [G,K]."""
    taken = np.empty(len(distance), np.int64)
    order = np.argsort(turn, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(turn[order])) + 1):
        taken[rows] = np.where(held[group[rows]], np.inf, distance[rows]).argmin(1)
        held[group[rows], taken[rows]] = True
    return taken


@jax.jit
def _transport(distance: jax.Array, member: jax.Array, held: jax.Array) -> jax.Array:
    """The code [G,N] of each member by the plan that sends the same amount to every code not held.

    Sinkhorn-Knopp in the log domain, the distances [G,N,K] of the members bool [G,N] scaled to [-1, 1] as in LC-Rec;
    held bool [G,K]. LC-Rec takes the largest entry of a member's row. Where members are fewer than codes each fills many
    codes to the brim, and which entry is the largest says nothing about nearness, so a member takes the
    nearest of the codes that it fills more than any other does, and the largest entry only where it has none of those.
    """
    valid = member[:, :, None]
    low = jnp.min(distance, axis=(1, 2), where=valid, initial=jnp.inf)[:, None, None]
    high = jnp.max(distance, axis=(1, 2), where=valid, initial=-jnp.inf)[:, None, None]
    middle = (high + low) / 2
    score = jnp.where(valid, (middle - distance) / (high - middle + 1e-5) / EPSILON, 0)

    def scaled(_: int, by_item: jax.Array) -> jax.Array:
        by_code = jnp.where(held, -jnp.inf, -jax.nn.logsumexp(score + by_item[:, :, None], axis=1))
        return jnp.where(member, -jax.nn.logsumexp(score + by_code[:, None], axis=2), -jnp.inf)

    by_item = jax.lax.fori_loop(0, _SCALINGS, scaled, jnp.where(member, 0.0, -jnp.inf))
    by_code = jnp.where(held, -jnp.inf, -jax.nn.logsumexp(score + by_item[:, :, None], axis=1))
    plan = score + by_code[:, None] + by_item[:, :, None]
    filled_most = (plan >= plan.max(axis=1, keepdims=True)) & ~held[:, None]
    nearest = jnp.argmin(jnp.where(filled_most, distance, jnp.inf), axis=2)
    return jnp.where(filled_most.any(2), nearest, jnp.argmax(plan, axis=2))


def sinkhorn(prefix: np.ndarray, last: np.ndarray, size: int, distances: Distances, block: int = 4096) -> np.ndarray:
    """Last codes [I], assigned anew among the items of a prefix that share their ID (LC-Rec, Zheng et al. 2024).

    The codes that no other item has get the same share of them (Sinkhorn-Knopp, epsilon 0.003, 50 scalings) and each
    item takes a code of its share; what still collides goes into another round, at most 20. A prefix that a round
    does not help keeps the codes it had: items of equal content stay together, as do more items than free codes.

    Args:
        prefix: int [I], 0 to G-1.
        last: int [I].
        size: K.
        distances: of item rows to the K candidates.
        block: rows whose distances are held at once, more where one prefix has more.
    """
    last = last.copy()
    prefixes = int(prefix.max()) + 1
    moving = _colliding(prefix, last, size)
    for _ in range(_ROUNDS):
        held = _in_use(prefix[~moving], last[~moving], prefixes, size)
        rows = np.flatnonzero(moving & (np.diff(held.indptr) < size)[prefix])
        if not rows.size:
            break
        attempt = last.copy()
        attempt[rows] = _transported(prefix[rows], held, distances, rows, block)
        collides = _colliding(prefix, attempt, size)
        helped = np.bincount(prefix, collides, prefixes) < np.bincount(prefix, moving, prefixes)
        last = np.where(helped[prefix], attempt, last)
        moving = collides & helped[prefix]
    return last


def _transported(
    prefix: np.ndarray, held: sparse.csr_array, distances: Distances, rows: np.ndarray, block: int
) -> np.ndarray:
    """New last codes [N] of item rows [N] under their prefixes [N]; prefixes of about as many rows go together."""
    codes = cast(tuple[int, int], held.shape)[1]
    count = np.bincount(prefix)
    taken = np.empty(len(rows), np.int64)
    width = 1 << np.maximum(0, np.ceil(np.log2(np.maximum(count, 1)))).astype(int)
    for most in np.unique(width[prefix]):
        members = np.flatnonzero(width[prefix] == most)
        members = members[np.argsort(prefix[members], kind="stable")]
        all_prefixes, group = np.unique(prefix[members], return_inverse=True)
        turn = place_in_run(prefix[members])
        # One shape per width, so that each is compiled once.
        step = min(max(1, block // int(most)), 1 << int(np.ceil(np.log2(len(all_prefixes)))))
        for first in range(0, len(all_prefixes), step):
            part = slice(*np.searchsorted(group, [first, first + step]))
            place = group[part] - first, turn[part]
            distance = np.zeros((step, most, codes), np.float32)
            member = np.zeros((step, most), bool)
            distance[place] = distances(rows[members[part]])
            member[place] = True
            used = np.zeros((step, codes), bool)
            used[: len(all_prefixes) - first] = held[all_prefixes[first : first + step]].toarray() > 0
            taken[members[part]] = np.asarray(_transport(distance, member, used))[place]
    return taken
