from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from onerec_jax.config import AlignmentConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.pairs import LATEST, PositiveLog, closest_before, mine_pairs, positive_log, strongest, swing


def random_log(seed=0, users=25, items=12, events=9):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, events, users)
    user = np.repeat(np.arange(users), lengths)
    return PositiveLog(rng.integers(0, items, len(user)), user, np.arange(len(user)))


def brute_swing(log, num_items, alpha, users_per_item=None):
    """Swing as the paper states it, one pair of users at a time."""
    all_items, latest = {}, {}
    for item, user, time in zip(*map(np.ndarray.tolist, log), strict=True):
        all_items.setdefault(user, set()).add(item)
        latest.setdefault(item, {})[user] = max(time, latest.get(item, {}).get(user, time))
    kept = {item: sorted(users, key=lambda u: (-users[u], -u))[:users_per_item] for item, users in latest.items()}
    counted = {user: {item for item in items if user in kept[item]} for user, items in all_items.items()}
    result = np.zeros((num_items, num_items))
    for u, v in combinations(counted, 2):
        both = counted[u] & counted[v]
        weight = (len(all_items[u]) * len(all_items[v])) ** -0.5 / (alpha + len(both))
        for i in both:
            for j in both - {i}:
                result[i, j] += weight
    return result


@pytest.mark.parametrize("users_per_item", [2, 4, 100])
def test_swing_is_the_sum_over_pairs_of_users_with_both_items(users_per_item):
    log = random_log()
    expected = brute_swing(log, 14, 0.7, users_per_item)
    assert (expected > 0).sum() > 4
    np.testing.assert_allclose(swing(log, 14, 0.7, 14, users_per_item).toarray(), expected, rtol=1e-6)


def test_swing_in_blocks_is_swing_at_once(monkeypatch):
    log = random_log(1)
    for name in ("_USERS_AT_ONCE", "_ITEMS_AT_ONCE"):
        monkeypatch.setattr(f"onerec_jax.tokenizer.pairs.{name}", 5)
    np.testing.assert_allclose(swing(log, 12, 1.0, 12).toarray(), brute_swing(log, 12, 1.0), rtol=1e-6)


def test_swing_keeps_the_strongest_of_every_item_and_the_lower_row_of_equals():
    full = swing(random_log(), 12, 1.0, 12)
    kept = strongest(full, 2).toarray()
    for row, cut in zip(full.toarray(), kept, strict=True):
        best = sorted(np.flatnonzero(row), key=lambda j, row=row: (-row[j], j))[:2]
        assert np.flatnonzero(cut).tolist() == sorted(best)


def brute_partners(log, similarity, met):
    found = []
    for at, (item, user) in enumerate(zip(log.item, log.user, strict=True)):
        before = [p for p in range(max(0, at - LATEST), at) if log.user[p] == user and log.item[p] != item]
        if before:
            best = max(before, key=lambda p: (similarity[item, log.item[p]], met[item, log.item[p]], p))
            found.append((log.item[best], item))
    return found


def test_a_target_is_paired_with_the_closest_of_the_latest_positives_before_it():
    log = random_log(2, users=12, items=9, events=25)
    similarity = swing(log, 9, 1.0, 9)
    met = np.zeros((9, 9))  # sum of 1 / gap over events of one user at most LATEST apart
    for a, b in combinations(range(len(log.item)), 2):
        if log.user[a] == log.user[b] and b - a <= LATEST and log.item[a] != log.item[b]:
            met[log.item[a], log.item[b]] += 1 / (b - a)
            met[log.item[b], log.item[a]] += 1 / (b - a)
    partner, target = closest_before(log, similarity)
    assert list(zip(partner, target, strict=True)) == brute_partners(log, similarity.toarray(), met)


def test_without_swing_the_partner_is_the_one_met_most_and_of_equals_the_later():
    items = [0, 1, 2, 0, 9, 2]  # user 0 has 0 1 2; user 1 has 0 9 2: item 2 met 0 in both
    log = PositiveLog(np.array(items), np.array([0, 0, 0, 1, 1, 1]), np.arange(6))
    partner, target = closest_before(log, swing(log, 10, 1.0, 10)[:] * 0)
    assert list(zip(partner, target, strict=True)) == [(0, 1), (1, 2), (0, 9), (9, 2)]


def logged(histories, positive=None, stops=None):
    """A dataset of these histories."""
    positive = positive or [[True] * len(items) for items in histories]
    events = [
        SimpleNamespace(item=np.array(i, np.int32), positive=np.array(p, bool), timestamp_ms=np.arange(len(i)))
        for i, p in zip(histories, positive, strict=True)
    ]
    stops = np.array([len(items) for items in histories] if stops is None else stops)
    return SimpleNamespace(num_items=10, train_stops=stops, histories=lambda users: [events[user] for user in users])


def test_only_positive_events_before_the_train_stop_count():
    dataset = logged([[1, 2, 3, 4], [5, 6]], [[1, 0, 1, 1], [1, 1]], stops=[3, 0])
    log = positive_log(dataset)
    assert log.item.tolist() == [1, 3] and log.user.tolist() == [0, 0] and log.timestamp_ms.tolist() == [0, 2]
    pairs = mine_pairs(dataset, AlignmentConfig(pairs=("user",)))
    assert pairs.items.tolist() == [[1, 3]] and pairs.weight.tolist() == [1]


def test_pairs_are_unordered_and_each_source_has_the_same_part():
    dataset = logged([[1, 2, 3], [1, 2], [2, 1], [7, 8]])
    pairs = mine_pairs(dataset, AlignmentConfig())
    weight = {tuple(pair): share for pair, share in zip(pairs.items.tolist(), pairs.weight.tolist(), strict=True)}
    # Swing knows 1 and 2 alone; users give (1, 2) three times, then the partner of 3, and (7, 8).
    assert pairs.items.dtype == np.int32 and pairs.weight.dtype == np.float32
    assert weight == pytest.approx({(1, 2): 0.5 + 0.5 * 3 / 5, (2, 3): 0.1, (7, 8): 0.1})


def test_every_item_has_the_same_part_of_swing_whatever_its_popularity():
    dataset = logged([[0, 1]] * 9 + [[2, 3]] * 2)
    pairs = mine_pairs(dataset, AlignmentConfig(pairs=("swing",)))
    assert pairs.items.tolist() == [[0, 1], [2, 3]] and pairs.weight.tolist() == [0.5, 0.5]


def test_no_pairs_and_no_sources_are_refused():
    for histories in ([[1], [2]], [[3, 3, 3]], [[]], []):
        with pytest.raises(InputError, match=r"tokenizer\.alignment\.pairs \['swing', 'user'\] gives no pair of items"):
            mine_pairs(logged(histories), AlignmentConfig())
    with pytest.raises(InputError, match=r"tokenizer\.alignment\.pairs is empty"):
        mine_pairs(logged([[1, 2]]), AlignmentConfig(pairs=()))


def test_pairs_of_one_source_are_enough():
    pairs = mine_pairs(logged([[1, 2], [4]]), AlignmentConfig())  # one user: no Swing
    assert pairs.items.tolist() == [[1, 2]] and pairs.weight.tolist() == [1]
