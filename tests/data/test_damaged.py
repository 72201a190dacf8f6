"""Histories that cannot be read: named, and up to a set share skipped without moving anything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from onerec_jax.config import Recipe
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.data.schema import Batch, ItemFeatures
from onerec_jax.data.store import Dataset
from onerec_jax.errors import DamagedError, InputError
from onerec_jax.tokenizer.semantic_ids import SemanticIds


@pytest.fixture
def folder(tiny_recipe: Recipe, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_recipe.dataset_directory, tmp_path / "dataset"))


def _harm(folder: Path, user: int) -> str:
    """Flips a bit of a user's record; returns the name of the shard."""
    rows = Dataset(folder).history(user).rows.tobytes()
    for shard in sorted(folder.glob("histories-*")):
        content = bytearray(shard.read_bytes())
        if (at := content.find(rows)) >= 0:
            content[at + len(rows) // 2] ^= 1
            shard.write_bytes(content)
            return shard.name
    raise AssertionError("no shard holds the record")


def _pipeline(folder: Path, recipe: Recipe, share: float) -> Pipeline:
    faults = recipe.faults.model_copy(update={"bad_records": share})
    dataset = Dataset(folder)
    codes = SemanticIds.load(recipe.tokenizer_directory, Dataset(recipe.dataset_directory)).codes
    return Pipeline(dataset, codes, recipe.model_copy(update={"faults": faults}))


def _leaves(batch: Batch) -> list[np.ndarray]:
    parts = [vars(value) if isinstance(value, ItemFeatures) else value for value in vars(batch).values()]
    return jax.tree.leaves(parts)


def _users(recipe: Recipe, count: int) -> list[int]:
    """Users of the first batches' requests."""
    pipeline = _pipeline(Path(recipe.dataset_directory), recipe, 0.0)
    return np.unique(np.concatenate([pipeline.batch_at(step).user[:, 0] for step in range(8)]))[:count].tolist()


def test_requests_of_damaged_histories_weigh_nothing_and_all_others_are_as_before(
    folder: Path, tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
):
    harmed = _users(tiny_recipe, 3)
    shards = {_harm(folder, user) for user in harmed}
    whole, cut = _pipeline(Path(tiny_recipe.dataset_directory), tiny_recipe, 0.0), _pipeline(folder, tiny_recipe, 0.2)
    seen = 0
    for step in range(12):
        before, after = whole.batch_at(step), cut.batch_at(step)
        lost = np.isin(before.user[:, 0], harmed)
        seen += lost.sum()
        assert not after.target_weight[lost].any()
        assert not np.isin(after.user[:, 0], harmed).any()
        for a, b in zip(_leaves(before), _leaves(after), strict=True):
            np.testing.assert_array_equal(a[~lost], b[~lost])
    assert seen >= 3
    told = capsys.readouterr().err
    assert told.count("warning") == 3 and "3 so far" in told and all(shard in told for shard in shards)


def test_without_a_share_the_first_damaged_history_ends_the_run_and_names_its_shard(folder: Path, tiny_recipe: Recipe):
    (user,) = _users(tiny_recipe, 1)
    shard = _harm(folder, user)
    pipeline = _pipeline(folder, tiny_recipe, 0.0)
    with pytest.raises(DamagedError, match=rf"{shard} is damaged"):
        for step in range(12):
            pipeline.batch_at(step)


def test_more_than_the_share_end_the_run_and_are_counted(folder: Path, tiny_recipe: Recipe):
    harmed = _users(tiny_recipe, 3)
    for user in harmed:
        _harm(folder, user)
    pipeline = _pipeline(folder, tiny_recipe, 2.5 / Dataset(folder).num_users)
    with pytest.raises(DamagedError, match=r"3 histories are damaged, faults\.bad_records allows 2"):
        for step in range(12):
            pipeline.batch_at(step)


def test_a_shard_that_is_gone_is_named_before_anything_is_trained(folder: Path):
    shard = next(folder.glob("histories-*"))
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        Dataset(folder)
