import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onerec_jax.tokenizer.runs import place_in_run


@given(st.lists(st.integers(-2, 2), max_size=20))
def test_places_equal_a_walk_through_the_runs(values):
    expected = [place for _, run in itertools.groupby(values) for place, _ in enumerate(run)]
    assert place_in_run(np.array(values, np.int64)).tolist() == expected
