"""A dataset as the tokenizer sees it, in memory."""

from types import SimpleNamespace

import numpy as np
import pytest


def history(items):
    """Events a second apart, all positive."""
    return SimpleNamespace(
        item=items, positive=np.ones(len(items), bool), timestamp_ms=1000 * np.arange(len(items), dtype=np.int64)
    )


@pytest.fixture
def make_dataset():
    def make(num_items, histories=(), train_stops=None, embedding=None, text=None, train_count=None, upload_ms=None):
        histories = [np.asarray(items, np.int32) for items in histories]
        if train_stops is None:
            train_stops = [len(items) for items in histories]
        items = SimpleNamespace(
            embedding=None if embedding is None else np.asarray(embedding, np.float32),
            text=text or [""] * num_items,
            train_count=np.zeros(num_items, np.int64) if train_count is None else np.asarray(train_count, np.int64),
            upload_ms=np.full(num_items, -1, np.int64) if upload_ms is None else np.asarray(upload_ms, np.int64),
        )
        return SimpleNamespace(
            items=items,
            num_items=num_items,
            num_users=len(histories),
            train_stops=np.asarray(train_stops, np.int64),
            histories=lambda users: [history(histories[user]) for user in users],
            item_ids=np.arange(num_items),
            card={"content_hash": "abc123"},
        )

    return make
