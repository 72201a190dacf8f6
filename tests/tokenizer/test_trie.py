import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.tokenizer.trie import Trie


@st.composite
def catalogues(draw):
    levels = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(st.integers(0, 3), min_size=levels, max_size=levels), max_size=30))
    priority = draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    return np.array(rows, np.int32).reshape(len(rows), levels), np.array(priority, np.int64)


def nested(codes, priority):
    """Dict of dicts; the last level maps a code to its items in resolve order."""
    root = {}
    for item in sorted(range(len(codes)), key=lambda row: (-priority[row], row)):
        node = root
        for code in codes[item, :-1].tolist():
            node = node.setdefault(code, {})
        node.setdefault(int(codes[item, -1]), []).append(item)
    return root


def unfold(trie, depth=0, node=0):
    if depth == trie.levels:
        return trie.leaf_items(node).tolist()
    start = trie.child_start[depth]
    children = range(start[node], start[node + 1])
    return {int(trie.token[depth][child]): unfold(trie, depth + 1, child) for child in children}


def in_order(tree):
    return [(code, in_order(child) if isinstance(child, dict) else child) for code, child in tree.items()]


def sort_tree(tree):
    return {code: sort_tree(tree[code]) if isinstance(tree[code], dict) else tree[code] for code in sorted(tree)}


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_trie_unfolds_to_the_nested_dict_in_lexicographic_order(catalogue):
    codes, priority = catalogue
    assert in_order(unfold(Trie.build(codes, priority))) == in_order(sort_tree(nested(codes, priority)))


@settings(max_examples=100, deadline=None)
@given(catalogues())
def test_a_trie_knows_the_codes_it_was_built_from(catalogue):
    found = Trie.build(*catalogue).codes
    assert found.dtype == np.int32 and found.tolist() == catalogue[0].tolist()


@settings(max_examples=150, deadline=None)
@given(catalogues(), st.lists(st.integers(-1, 5), min_size=4, max_size=4))
def test_find_leads_to_the_items_of_a_prefix_or_nowhere(catalogue, query):
    codes, priority = catalogue
    trie = Trie.build(codes, priority)
    for depth in range(1, codes.shape[1] + 1):
        prefixes = sorted({tuple(row) for row in codes[:, :depth].tolist()})
        assert trie.find(np.array(prefixes).reshape(-1, depth)).tolist() == list(range(len(prefixes)))
        prefix = tuple(query[:depth])
        expected = prefixes.index(prefix) if prefix in prefixes else -1
        assert trie.find(np.array([prefix]))[0] == expected


@settings(max_examples=50, deadline=None)
@given(catalogues())
def test_leaves_and_branching_are_those_of_the_nested_dict(catalogue):
    codes, priority = catalogue
    trie = Trie.build(codes, priority)
    assert trie.leaves == len({tuple(row) for row in codes.tolist()})
    for depth in range(codes.shape[1]):
        children = {}
        for row in codes.tolist():
            children.setdefault(tuple(row[:depth]), set()).add(row[depth])
        assert trie.branching[depth] == max(map(len, children.values()), default=0)


def test_arrays_are_int32_and_items_a_permutation():
    codes = np.random.default_rng(0).integers(0, 5, (100, 3))
    trie = Trie.build(codes, np.random.default_rng(1).random(100))
    arrays = (*trie.child_start, *trie.token, trie.item_start, trie.items)
    assert {str(array.dtype) for array in arrays} == {"int32"}
    assert sorted(trie.items.tolist()) == list(range(100))


@settings(max_examples=50, deadline=None)
@given(catalogues())
def test_codes_too_large_to_be_packed_into_one_number_give_the_same_trie(catalogue):
    codes, priority = catalogue
    small, large = Trie.build(codes, priority), Trie.build(codes * 2**28, priority)
    assert large.items.tolist() == small.items.tolist() and large.item_start.tolist() == small.item_start.tolist()
    for depth in range(codes.shape[1]):
        assert large.child_start[depth].tolist() == small.child_start[depth].tolist()
        assert large.token[depth].tolist() == (small.token[depth] * 2**28).tolist()


@settings(max_examples=50, deadline=None)
@given(catalogues())
def test_children_and_leaves_of_a_node_are_those_with_its_prefix(catalogue):
    codes, priority = catalogue
    trie, ids = Trie.build(codes, priority), sorted({tuple(row) for row in codes.tolist()})
    for depth in range(codes.shape[1] + 1):
        prefixes = sorted({row[:depth] for row in ids}) or [()] * (depth == 0)
        starts = trie.leaf_starts(depth)
        for node, prefix in enumerate(prefixes):
            assert ids[starts[node] : starts[node + 1]] == [row for row in ids if row[:depth] == prefix]
            if depth < codes.shape[1]:
                first, last = trie.children(depth, np.array([node]))
                codes_below = sorted({row[depth] for row in ids if row[:depth] == prefix})
                assert trie.token[depth][first[0] : last[0]].tolist() == codes_below
