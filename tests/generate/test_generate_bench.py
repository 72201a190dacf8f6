"""tools/bench/generate.py: the oracle that it checks its own beams by, and what Hugging Face's beams may follow."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent.parent / "tools" / "bench")
        yield importlib.import_module("generate")


def test_beams_by_hand_of_full_width_are_all_ids_by_their_probability(script: ModuleType):
    codes = np.array(list(itertools.product(range(3), range(2), range(2))), np.int32)
    rng = np.random.default_rng(0)
    log_p = np.stack([rng.normal(size=(3, 2, 2))[tuple(codes.T)] for _ in range(3)], axis=1)
    log_p[:, 0] = rng.normal(size=3)[codes[:, 0]]
    log_p[:, 1] = rng.normal(size=(3, 2))[tuple(codes[:, :2].T)]
    order = np.argsort(-log_p.sum(1))
    assert script.beams_by_hand(log_p, codes, 12) == [tuple(c) for c in codes[order].tolist()]


def test_beams_by_hand_lose_what_falls_out_of_the_beam_early(script: ModuleType):
    codes = np.array([[0, 0], [1, 0], [2, 0]], np.int32)
    log_p = np.array([[-1.0, -5.0], [-2.0, -3.0], [-3.0, 0.0]])
    assert script.beams_by_hand(log_p, codes, 2) == [(1, 0), (0, 0)]


def test_every_prefix_of_tokens_goes_on_to_all_that_exists_and_nothing_else(script: ModuleType):
    codes = np.array([[1, 0, 3, 0], [1, 0, 2, 5], [4, 0, 3, 0]], np.int32)
    following = script.next_codes(codes)
    first, second, third, fourth = (1 + script.CODES * level for level in range(4))
    assert following[()] == [first + 1, first + 4]
    assert following[first + 1, second] == [third + 2, third + 3]
    assert following[first + 1, second, third + 2] == [fourth + 5]
    assert (first + 4, second, third + 2) not in following
    assert len(following) == 1 + 2 + 2 + 3
