"""ActionPiece as its paper tells it, in plain Python: everything is counted anew for every merge.

A corpus is a list of sequences; a sequence is a list of action nodes (lists of tokens) and a list of the intermediate nodes
between them (a token or None).
"""

import math
from itertools import pairwise


def weight_scale(corpus):
    """Weights are counted in units of 1 / scale, so that all of them are integers."""
    largest = max((len(action) for actions in corpus for action in actions), default=1)
    return math.lcm(*range(1, largest + 1)) ** 2


def add_pair(weights, first, second, weight):
    pair = (min(first, second), max(first, second))
    weights[pair] = weights.get(pair, 0) + weight


def count_sequence(actions, between, scale, weights):
    """Count: within an action 2 / n, between neighbouring nodes 1 / (n m), an intermediate node having one token."""
    for index, action in enumerate(actions):
        for place, first in enumerate(action):
            for second in action[place + 1 :]:
                add_pair(weights, first, second, 2 * scale // len(action))
        if index + 1 == len(actions):
            break
        following = actions[index + 1]
        if between[index] is None:
            neighbours = [(action, following)]
        else:
            neighbours = [(action, [between[index]]), ([between[index]], following)]
        for left, right in neighbours:
            for first in left:
                for second in right:
                    add_pair(weights, first, second, scale // (len(left) * len(right)))


def merge_sequence(actions, between, a, b, new):
    """Update: merges a and b wherever they meet, from left to right."""
    for index in range(len(actions)):
        if a != b and a in actions[index] and b in actions[index]:
            actions[index] = [new] + [token for token in actions[index] if token not in (a, b)]
        if index + 1 == len(actions):
            break
        if between[index] is not None:
            for side in (index, index + 1):
                for held, partner in ((a, b), (b, a)):
                    if between[index] == held and partner in actions[side]:
                        actions[side] = [token for token in actions[side] if token != partner]
                        between[index] = new
                        break
        else:
            for left, right in ((a, b), (b, a)):
                if left in actions[index] and right in actions[index + 1]:
                    actions[index] = [token for token in actions[index] if token != left]
                    actions[index + 1] = [token for token in actions[index + 1] if token != right]
                    between[index] = new
                    break
    tidy(actions, between)


def tidy(actions, between):
    """An action without tokens takes the one before it, and goes together with an empty intermediate node after it."""
    changed = True
    while changed:
        changed = False
        for index in range(1, len(actions)):
            if not actions[index] and between[index - 1] is not None:
                actions[index], between[index - 1] = [between[index - 1]], None
                changed = True
        for index in range(len(actions) - 2, -1, -1):
            if not actions[index] and between[index] is None:
                del actions[index], between[index]
                changed = True


def construct(corpus, vocabulary_size):
    """Merges [(a, b, weight)] of a corpus of sets of tokens 0 to n-1, until there are `vocabulary_size` tokens."""
    corpus = [[sorted(action) for action in actions if action] for actions in corpus]
    num_features = len({token for actions in corpus for action in actions for token in action})
    scale = weight_scale(corpus)
    state = [(actions, [None] * (len(actions) - 1)) for actions in corpus]
    rules = {}
    while num_features + len(rules) < vocabulary_size:
        weights = {}
        for actions, between in state:
            count_sequence(actions, between, scale, weights)
        if not weights:
            break
        a, b = min(weights, key=lambda pair: (-weights[pair], pair))
        token, _ = rules.setdefault((a, b), (num_features + len(rules), weights[a, b] / scale))
        for actions, between in state:
            merge_sequence(actions, between, a, b, token)
    return [(a, b, weight) for (a, b), (_, weight) in rules.items()]


def segment(tokens, token_of):
    """Byte-pair encoding of a flat list: the neighbours that were merged first, the leftmost of them, again and again."""
    tokens = list(tokens)
    while True:
        ranked = [
            (token_of[min(pair), max(pair)], place)
            for place, pair in enumerate(pairwise(tokens))
            if (min(pair), max(pair)) in token_of
        ]
        if not ranked:
            return tokens
        token, place = min(ranked)
        tokens[place : place + 2] = [token]
