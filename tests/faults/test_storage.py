"""Runs that live in a bucket, on servers that fail, are the runs that live on a disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from storage_server import (
    BUCKET,
    Bucket,
    bucket_recipe,
    ended_well,
    killed_once,
    left_alone_by_the_server,
    same_as_on_disk,
    storage,
    train,
)

from onerec_jax.config import Recipe

pytestmark = pytest.mark.usefixtures("tiny_recipe")  # which writes the dataset


@pytest.fixture(scope="module")
def disk(tiny_recipe: Recipe, tiny_folder: Path) -> tuple[Recipe, Path]:
    """The recipe of all of these runs, and its file; the run on a disk has ended."""
    recipe = bucket_recipe(tiny_folder)
    path = tiny_folder / "bucket.yaml"
    path.write_text(recipe.to_yaml())
    ended_well(train(path, "disk", tiny_folder / "disk.txt"), tiny_folder / "disk.txt")
    return recipe, path


def test_a_run_in_s3_with_a_fifth_of_all_requests_failing_and_a_kill_ends_as_on_a_disk_and_notices_damage(
    disk: tuple[Recipe, Path], tmp_path: Path
):
    recipe, path = disk
    log = tmp_path / "log.txt"
    with storage("s3") as (door, environment):
        bucket = Bucket("s3", door.behind)
        door.rate = 0.2
        assert "resumed s3://bucket/runs/failing at step 3" in killed_once(bucket, path, "failing", log, environment)
        assert door.failed > 10
        same_as_on_disk(recipe, bucket, "failing", tmp_path)

        door.rate = 0.0
        newest = max(bucket.files.find(f"{BUCKET}/runs/failing/checkpoints/6/state"), key=bucket.files.size)
        bucket.files.pipe(newest, bucket.files.cat(newest)[:-1])
        told = ended_well(train(path, "failing", log, bucket, environment), log)
        assert told.count("warning: checkpoint 6 is damaged") == 1 and newest in told
        assert "resumed s3://bucket/runs/failing at step 3" in told
        assert bucket.steps("failing") == [3, 6]
        assert bucket.files.find(f"{BUCKET}/runs/failing/checkpoints_damaged/6")
        same_as_on_disk(recipe, bucket, "failing", tmp_path / "again")


def test_a_run_in_google_storage_that_is_gone_for_a_while_at_a_save_ends_as_on_a_disk(
    disk: tuple[Recipe, Path], tmp_path: Path
):
    recipe, path = disk
    with storage("gs") as (door, environment):
        bucket = Bucket("gs", door.behind)
        left_alone_by_the_server(bucket, door, 8.0, path, "down", tmp_path / "log.txt", environment)
        assert door.failed > 0
        same_as_on_disk(recipe, bucket, "down", tmp_path)
