"""Reads a dataset directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onerec_jax.config import DataConfig
from onerec_jax.data.checksums import check_files, read_card
from onerec_jax.data.items import read_items
from onerec_jax.data.prepare import CARD, settings_of, shard_name
from onerec_jax.data.records import History, decode, ends, open_records
from onerec_jax.data.schema import SCHEMA_VERSION, Vocabulary
from onerec_jax.data.split import SPLITS
from onerec_jax.errors import DamagedError, InputError


class Dataset:
    """A dataset directory that `onerec data` wrote; histories stay on disk and are read at random.

    Threads may share it, and loader processes open it anew by its path. What is read on opening is checked against the
    checksums of the card, which takes a second per gigabyte and core; histories are checked one by one as they are read.

    I items, U users, F user features, Y labels.

    Args:
        directory: where it lives.
        verify: compare files with their checksums; a loader process leaves that to the process that started it.

    Attributes:
        directory: where it lives.
        card: the content of `card.json`.
        items: `ItemArrays`, one row per item.
        item_ids: the caller's ids by item row, [I].
        user_ids: the caller's ids by user row, [U].
        user_features: codes of the categorical user features, int32 [U,F], 0 = unknown.
        user_feature_sizes: classes of each feature, F of them.
        labels: feedback labels present, Y of them.
        train_stops: the number of events of each user that belong to train, int64 [U].
        frozen: contexts of valid and test end at the moment of the split.
        lifelong_refresh: R, the events between two snapshots of a user's lifelong clusters.

    Raises:
        InputError: there is no dataset, or it is damaged or of another schema version.
    """

    def __init__(self, directory: str | Path, verify: bool = True):
        self.directory = Path(directory)
        self.card = _read_card(self.directory)
        try:
            self._shard_bounds = np.asarray(self.card["shard_bounds"])
            shards = [shard_name(s, len(self._shard_bounds) - 1) for s in range(len(self._shard_bounds) - 1)]
            self._files = self.card.get("files", {})
            if verify:
                check_files(self.directory, self._files, by_size=shards)
            self.labels = tuple(self.card["labels"])
            self.num_authors = int(self.card["vocabulary"]["authors"])
            self.num_tags = int(self.card["vocabulary"]["tags"])
            self.user_feature_sizes = tuple(self.card["vocabulary"]["user_features"].values())
            self.lifelong_refresh = int(self.card["settings"]["lifelong_refresh"])
            split = self.card["settings"]["split"]
            self.frozen = split["kind"] == "time" and split["context"] == "frozen"
            self.items, self.item_ids = read_items(self.directory / "items")
            self.user_ids = pq.read_table(self.directory / "users.parquet", columns=["user_id"])["user_id"].to_numpy()
            self.user_features = np.load(self.directory / "user_features.npy", allow_pickle=False)
            self.train_stops = np.load(self.directory / "train_stops.npy", allow_pickle=False)
            self._examples = {
                name: np.load(self.directory / f"examples-{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in SPLITS
            }
            self._readers = [open_records(self.directory / name) for name in shards]
            self._unknown = set(range(len(shards)))  # shards that no record was read of yet
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.directory} is a damaged dataset ({reason}); make it anew with `onerec data RECIPE`"
            ) from error

    def __reduce__(self):
        return Dataset, (str(self.directory), False)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def train_end_ms(self) -> int:
        """Time of the latest event in train, milliseconds since 1970, UTC.

        Raises:
            InputError: the dataset is older than this entry of its card.
        """
        if "train_end_ms" not in self.card:
            raise InputError(f"{self.directory} does not say when train ends; make it anew with `onerec data RECIPE`")
        return int(self.card["train_end_ms"])

    def check_settings(self, data: DataConfig, recipe: str) -> None:
        """Checks that the dataset was made with these settings, `source` and `directory` apart.

        Raises:
            InputError: a setting has changed since, so that the recipe does not describe what is there.
        """
        made, asked = self.card["settings"], settings_of(data)
        changed = [name for name in asked if made.get(name) != asked[name]]
        if changed:
            name = changed[0]
            raise InputError(
                f"{self.directory} was made with data.{name} {made.get(name)}, the recipe says {asked[name]}; make it anew "
                f"with `onerec data {recipe}`, or name another data.directory"
            )

    def examples(self, split: str) -> np.ndarray:
        """Rows (user row, cut, target start, target stop) of one split, int64 [N,4].

        The context of an example is `history[:cut]`, its targets are `history[start:stop]`.
        """
        return self._examples[split]

    def requests_after_train(self, user_rows: np.ndarray | None = None) -> np.ndarray:
        """The next request, after all of train, of these users or of all: rows as `examples` has them, int64 [N,4].

        It has no targets and is made at the time of the last event of train. Users without an event there have none.
        """
        users = np.arange(self.num_users) if user_rows is None else np.asarray(user_rows, np.int64)
        users = users[self.train_stops[users] > 0]
        ends = self.train_stops[users]
        return np.stack([users, ends, ends - 1, ends - 1], axis=1)

    def train_stop(self, user_row: int) -> int:
        """The number of the user's events that belong to train; they come first."""
        return int(self.train_stops[user_row])

    def history(self, user_row: int) -> History:
        """All events of one user, oldest first."""
        return self.histories([user_row])[0]

    def histories(self, user_rows: np.ndarray | list[int]) -> list[History]:
        """Histories of several users.

        Raises:
            DamagedError: a record is damaged.
        """
        rows = np.asarray(user_rows, np.int64)
        shards = np.searchsorted(self._shard_bounds, rows, side="right") - 1
        positions = rows - self._shard_bounds[shards]
        histories = []
        for shard, position in zip(shards.tolist(), positions.tolist(), strict=True):
            try:
                if shard in self._unknown:
                    self._check_shard(shard)
                # By range: reading a list of positions takes time in proportion to all records of the file.
                histories.append(decode(self._readers[shard].read(position, position + 1)[0]))
            except (RuntimeError, ValueError, IndexError) as error:
                name = shard_name(shard, len(self._readers))
                raise DamagedError(
                    f"{self.directory / name} is damaged ({error}); make it anew with `onerec data RECIPE`"
                ) from error
        return histories

    def _check_shard(self, shard: int) -> None:
        """Raises ValueError where a shard is whole but another one; a record that is damaged shows when it is asked for."""
        written = self._files.get(shard_name(shard, len(self._readers)), {}).get("ends")
        users = int(self._shard_bounds[shard + 1] - self._shard_bounds[shard])
        try:
            found = written and ends(self._readers[shard], users)
        except RuntimeError:
            found = written
        if found != written:
            raise ValueError("it is not the file that card.json tells of")
        self._unknown.discard(shard)

    def vocabulary(self, codebook_sizes: tuple[int, ...]) -> Vocabulary:
        """Every size a model needs to know, with those of the semantic IDs' levels."""
        return Vocabulary(
            users=self.num_users,
            items=self.num_items,
            authors=self.num_authors,
            tags=self.num_tags,
            user_features=self.user_feature_sizes,
            labels=self.labels,
            codebook_sizes=tuple(codebook_sizes),
        )


def _read_card(directory: Path) -> dict[str, Any]:
    path = directory / CARD
    if not path.is_file():
        raise InputError(f"{directory} holds no dataset ({CARD} is missing); make it with `onerec data RECIPE`")
    try:
        card = read_card(path)
        version = card["schema_version"]
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({reason}); make the dataset anew with `onerec data RECIPE`") from None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
            "make the dataset anew with `onerec data RECIPE`"
        )
    return card
