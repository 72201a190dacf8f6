import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from action_piece_reference import construct, count_sequence, segment
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.errors import InputError
from onerec_jax.tokenizer.action_corpus import count_pairs, link_actions
from onerec_jax.tokenizer.action_piece import ActionPieces, fit, permuted


def padded(corpus):
    """Sequences of sets as int32 [S,A,F]."""
    actions = max(map(len, corpus), default=0)
    width = max((len(action) for sequence in corpus for action in sequence), default=0)
    out = np.full((len(corpus), actions, width), -1, np.int32)
    for row, sequence in zip(out, corpus, strict=True):
        for place, action in zip(row, sequence, strict=False):
            place[: len(action)] = sorted(action)
    return out


def random_corpus(sequences, actions, features, alphabet, seed=0, skew=1.5):
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, alphabet + 1) ** skew
    lengths = rng.integers(1, actions + 1, sequences)
    return [
        [set(rng.choice(alphabet, features, replace=False, p=share / share.sum()).tolist()) for _ in range(length)]
        for length in lengths
    ]


def dense(corpus):
    """The corpus with its features numbered as the vocabulary numbers them."""
    known = sorted({feature for sequence in corpus for action in sequence for feature in action})
    return [[{known.index(feature) for feature in action} for action in sequence] for sequence in corpus]


def merges(pieces):
    return list(zip(pieces.left.tolist(), pieces.right.tolist(), pieces.weight.tolist(), strict=True))


def sets(largest):
    return st.sets(st.integers(0, largest), max_size=5)


corpora = st.integers(1, 9).flatmap(
    lambda largest: st.lists(st.lists(sets(largest), max_size=7), min_size=1, max_size=6)
)


@settings(max_examples=120, deadline=None)
@given(corpora, st.integers(0, 30))
def test_the_vocabulary_is_that_of_the_reference(corpus, more):
    size = len({feature for sequence in corpus for action in sequence for feature in action}) + more
    assert merges(fit(padded(corpus), size)) == construct(dense(corpus), size)


@pytest.mark.parametrize("seed", range(4))
def test_the_vocabulary_of_a_larger_corpus_is_that_of_the_reference(seed):
    corpus = random_corpus(60, 8, 4, 8 + 6 * seed, seed)
    pieces = fit(padded(corpus), 130)
    assert len(pieces) == 130 and merges(pieces) == construct(dense(corpus), 130)


def test_a_merged_pair_that_meets_again_keeps_its_token():
    # A token that moves into an emptied action meets partners that it was apart from when the pair was merged.
    corpus = [[{0, 3}, {1, 3}, {1}, {0, 1}, {1}]]
    found = merges(fit(padded(corpus), 20))
    assert [rule[:2] for rule in found] == [(0, 1), (2, 3), (1, 1), (4, 4), (5, 6)]
    assert found == construct(dense(corpus), 20)


@settings(max_examples=50, deadline=None)
@given(corpora)
def test_weights_are_the_paper_s_two_equations(corpus):
    tokens = padded(corpus)
    if (tokens < 0).all():
        return
    expected = Counter()
    for sequence in [[action for action in sequence if action] for sequence in corpus]:
        for action in sequence:
            for first in action:
                for second in action:
                    if first < second:
                        expected[first, second] += Fraction(2, len(action))
        for action, following in pairwise(sequence):
            for first in action:
                for second in following:
                    pair = (min(first, second), max(first, second))
                    expected[pair] += Fraction(1, len(action) * len(following))
    linked = link_actions(tokens, 100)
    keys, weights = count_pairs(linked)
    by_key = zip(keys.tolist(), weights.tolist(), strict=True)
    found = {divmod(key, 100): Fraction(weight, linked.scale) for key, weight in by_key}
    assert found == expected


def test_the_reference_counts_a_worked_example():
    weights = {}
    count_sequence([[0, 1], [2], [0, 3]], [None, 4], 4, weights)
    assert weights == {(0, 1): 4, (0, 2): 2, (1, 2): 2, (2, 4): 4, (0, 4): 2, (3, 4): 2, (0, 3): 4}


def test_a_pair_of_neighbouring_actions_outweighs_the_pairs_within():
    pieces = fit(padded([[{10}, {20}, {30, 40, 50}]] * 3), 6)
    assert merges(pieces) == [(0, 1, 3.0)] and pieces.features.tolist() == [10, 20, 30, 40, 50]


@settings(max_examples=80, deadline=None)
@given(corpora, st.integers(0, 25), st.none() | st.integers(0, 5))
def test_encodings_are_those_of_the_reference(corpus, more, seed):
    features = padded(corpus)
    known = np.unique(features[features >= 0])
    if not len(known):
        return
    pieces = fit(features, len(known) + more)
    token_of = {pair[:2]: len(known) + rank for rank, pair in enumerate(merges(pieces))}
    flat = permuted(np.where(features >= 0, np.searchsorted(known, features), -1), seed)
    found = pieces.encode(features, seed)
    assert [row[row >= 0].tolist() for row in found] == [segment(row[row >= 0].tolist(), token_of) for row in flat]


def test_encodings_of_a_larger_corpus_are_those_of_the_reference():
    features = padded(random_corpus(80, 10, 4, 12))
    pieces = fit(features, 200)
    token_of = {pair[:2]: len(pieces.features) + rank for rank, pair in enumerate(merges(pieces))}
    for row, flat in zip(pieces.encode(features, 3), permuted(features, 3), strict=True):
        assert row[row >= 0].tolist() == segment(flat[flat >= 0].tolist(), token_of)


@settings(max_examples=40, deadline=None)
@given(corpora, st.integers(0, 25), st.none() | st.integers(0, 5))
def test_decoding_gives_every_feature_back(corpus, more, seed):
    features = padded(corpus)
    known = np.unique(features[features >= 0])
    if not len(known):
        return
    pieces = fit(features, len(known) + more)
    decoded = pieces.decode(pieces.encode(features, seed)).reshape(len(corpus), -1)
    for row, sequence in zip(decoded, corpus, strict=True):
        assert Counter(row[row >= 0].tolist()) == Counter(feature for action in sequence for feature in action)


def test_permutations_stay_within_their_set_and_differ_by_seed():
    features = np.arange(4000).reshape(100, 10, 4)
    first, again, other = (permuted(features, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(np.sort(first.reshape(100, 10, 4), axis=2), features)
    orders = Counter(map(tuple, (first.reshape(-1, 4) % 4).tolist()))
    assert len(orders) == 24 and max(orders.values()) < 90  # 1000 draws, 41.7 expected, deviation 6.3


def test_seeds_give_different_segmentations_of_one_sequence():
    features = padded(random_corpus(200, 6, 4, 20))
    pieces = fit(features, 300)
    once, again, other, plain = (pieces.encode(features, seed) for seed in (7, 7, 8, None))
    np.testing.assert_array_equal(once, again)
    assert once.shape != other.shape or (once != other).any()
    # Merges shorten the sequences, in any order of the sets.
    for encoded in (once, other, plain):
        assert (encoded >= 0).sum() < 0.9 * (features >= 0).sum()


def test_growing_ends_when_nothing_is_left_to_merge():
    pieces = fit(padded([[{1, 2}, {3}]]), 100)
    assert len(pieces) == 5 and pieces.encode(padded([[{1, 2}, {3}]])).tolist() == [[4]]
    assert len(fit(padded([[{5}]]), 100)) == 1


def test_a_corpus_without_features_has_an_empty_vocabulary():
    for corpus in ([], [[]], [[set()]]):
        assert len(fit(padded(corpus), 10)) == 0
    with pytest.raises(InputError, match="the vocabulary has no features"):
        fit(padded([[set()]]), 10).encode(padded([[{1}]]))


def test_sequences_and_actions_without_features_are_passed_over():
    pieces = fit(padded([[{1, 2}, set(), {3}], []]), 5)
    assert merges(pieces) == merges(fit(padded([[{1, 2}, {3}]]), 5))
    assert pieces.encode(padded([[], [{3}, set(), {1}]])).tolist()[0] == [-1] * 2


def test_input_that_is_no_sequence_of_sets_is_named():
    pieces = fit(padded([[{1, 2}, {3}]]), 4)
    with pytest.raises(InputError, match="sequence 0, action 1 has feature 9, which the vocabulary was not fitted on"):
        pieces.encode(padded([[{1}, {9}]]))
    with pytest.raises(InputError, match="sequence 1, action 0 has feature 4 twice"):
        fit(np.array([[[1, 2]], [[4, 4]]]), 10)
    with pytest.raises(InputError, match=r"shape \[2, 2\] and type int64; expected integers"):
        fit(np.zeros((2, 2), np.int64), 10)
    with pytest.raises(InputError, match="features lie between -3 and 2"):
        fit(np.array([[[2, -3]]]), 10)
    with pytest.raises(InputError, match="vocabulary_size 2 is less than the 3 features"):
        fit(padded([[{1, 2}, {3}]]), 2)
    with pytest.raises(InputError, match="tokens lie between 0 and 4; the vocabulary has 4"):
        pieces.decode(np.array([[0, 4]]))
    with pytest.raises(InputError, match="1 actions of up to 40 features cannot be weighed exactly"):
        fit(np.arange(40).reshape(1, 1, 40), 100)


def test_save_and_load_give_the_same_vocabulary_back(tmp_path):
    features = padded(random_corpus(30, 5, 3, 9))
    pieces = fit(features, 40)
    for _ in range(2):
        pieces.save(tmp_path / "deep" / "pieces")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pieces"]
    assert {path.suffix for path in (tmp_path / "deep" / "pieces").iterdir()} == {".npy", ".json"}
    loaded = ActionPieces.load(tmp_path / "deep" / "pieces")
    assert merges(loaded) == merges(pieces)
    np.testing.assert_array_equal(loaded.encode(features, 1), pieces.encode(features, 1))


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    pieces = fit(padded([[{1, 2}, {3}]]), 4)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files than a vocabulary of actions"):
        pieces.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="no whole vocabulary of actions in"):
        ActionPieces.load(tmp_path / "nowhere")
    folder = tmp_path / "pieces"
    pieces.save(folder)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "tokens": 9}))
    with pytest.raises(InputError, match="of 9 tokens, found 4"):
        ActionPieces.load(folder)
