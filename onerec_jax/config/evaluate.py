"""Item-level metrics and floors."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from onerec_jax.config.section import Section, setting


class EvaluateConfig(Section):
    """Item-level metrics over the full catalogue."""

    split: Literal["valid", "test"] = setting("test", "which examples")
    ks: tuple[PositiveInt, ...] = setting((5, 10), "cut-offs of Recall and NDCG", min_length=1)
    beam_width: int = setting(50, "beams of the trie-constrained search", ge=1)
    batch_size: int = setting(128, "users per search", ge=1)
    item_weight: float = setting(
        1.0,
        "weight of an item's own log-probability beside its semantic ID's where beams are ranked (model.head both)",
        ge=0,
    )
    inferences: int = setting(
        1,
        "inferences per request whose probabilities are averaged; the first reads the whole context, others a part",
        ge=1,
    )
    left_out: float = setting(
        0.2, "share of a context's events, the last never, that further inferences leave out at random", ge=0, lt=1
    )
    label_shift_days: float = setting(
        0.0,
        "correct item scores to what was liked in this many last days of train, 0 = not (model.head items or both)",
        ge=0,
    )
    label_shift_prior: float = setting(
        5000.0, "events that the model's own distribution over items counts as beside those of label_shift_days", gt=0
    )
    max_examples: int = setting(0, "evaluate a fixed random sample of this many examples, 0 = all", ge=0)
    exclude_seen: bool = setting(True, "leave out items the user met before the context's end")
    targets: Literal["positive", "all"] = setting("positive", "relevant items: positive events only, or every event")
    free_examples: int = setting(256, "examples whose unconstrained beams measure legality", ge=0)
    reward_run: str | None = setting(
        None,
        "RUN or RUN@STEP of a reward model: the mean P-Score and learnt rewards of what is served are reported too",
    )
    rerank: int = setting(
        0,
        "so many items of a list are ranked anew by expected score, P times P-Score to the power of rerank_weight, as the reward "
        "model of reward_run has it; 0 = none",
        ge=0,
    )
    rerank_weight: float = setting(1.0, "weight of the reward model in that: 1 ranks by the expected reward", ge=0)
    floors: tuple[Literal["popularity", "recent_popularity", "markov", "item_knn", "ease"], ...] = setting(
        ("popularity", "markov", "item_knn"), "baselines printed beside the model"
    )
    recent_days: float = setting(6.0, "recent_popularity counts the positives of this many last days of train", gt=0)
    ease_lambda: float = setting(100.0, "ridge of EASE", gt=0)
    history_decay: float = setting(
        0.8, "weight per step back of a context in markov, item_knn and ease; 1 = flat", gt=0, le=1
    )
    recall: Literal["user", "pair"] = setting("user", "recall averaged over examples, or hits over all relevant pairs")
