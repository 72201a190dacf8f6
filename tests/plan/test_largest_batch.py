"""The search for the largest batch, against programs whose memory is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from onerec_jax.plan import largest_batch
from onerec_jax.plan.compiled import DoesNotFit
from onerec_jax.plan.largest_batch import largest_batches, rounded
from onerec_jax.recipe import load_recipe

ROOM = 1_000_000


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch):
    """Plans whose memory is `fixed` and `each` a request and way; the batches that were compiled."""
    tried: list[int] = []

    def settle(fixed: dict[str, float], each: dict[str, float]) -> list[int]:
        def make_plan(recipe, topology, batch, *, thorough):
            tried.append(batch)
            policy = recipe.model.remat
            total = int(fixed[policy] + each[policy] * batch / 4)
            if total > 2 * ROOM:
                raise DoesNotFit("too much")
            return SimpleNamespace(memory=SimpleNamespace(total=total, usable=ROOM), fits=total <= ROOM, batch=batch)

        monkeypatch.setattr(largest_batch, "make_plan", make_plan)
        return tried

    return settle


def test_the_largest_batch_of_each_policy_is_found_in_few_compilations(compiled):
    each = {"none": 40_000.0, "dots": 9_000.0, "block": 1_500.0}
    tried = compiled(dict.fromkeys(each, 100_000), each)
    found = largest_batches(load_recipe("quickstart", []), "v5e:2x2", 4)
    for policy, plan in found.items():
        best = max(n for n in range(1, 4097) if rounded(n) == n and 100_000 + each[policy] * n <= ROOM)
        assert plan is not None and plan.batch == 4 * best
    assert len(tried) <= 3 * 4


def test_a_policy_under_which_nothing_or_little_fits(compiled):
    compiled({"none": 1.1e6, "dots": 1e5, "block": 7e5}, {"none": 1e4, "dots": 5e5, "block": 1e5})
    found = largest_batches(load_recipe("quickstart", []), "v5e:2x2", 4)
    assert found["none"] is None
    assert found["dots"] is not None and found["dots"].batch == 4 * 1
    assert found["block"] is not None and found["block"].batch == 4 * 2


def test_micro_batches_are_kept_whole(compiled):
    compiled(dict.fromkeys(("none", "dots", "block"), 1e5), dict.fromkeys(("none", "dots", "block"), 1e5))
    found = largest_batches(load_recipe("quickstart", ["train.accumulation=2"]), "v5e:2x2", 4)
    assert all(plan is not None and plan.batch % 8 == 0 for plan in found.values())


def test_sizes_are_eighths_of_a_power_of_two():
    assert [rounded(n) for n in (1, 7, 8, 15, 17, 31, 33, 100)] == [1, 7, 8, 15, 16, 30, 32, 96]
