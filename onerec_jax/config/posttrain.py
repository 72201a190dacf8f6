"""After pre-training: reject-sampling fine-tuning, the reward model, and reinforcement learning."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from onerec_jax.config.section import Section, setting

Promote = Literal["always", "better"]
_PROMOTE = (
    "better: where the recall on all held-out requests has not risen beyond its 95 % interval, whoever reads the finished run "
    "gets the one it started from"
)


class RSFTConfig(Section):
    """Reject-sampling fine-tuning: more pre-training, on the requests that were watched longest (REFERENCE 1.8)."""

    init_from: str | None = setting(None, "RUN or RUN@STEP to start from; none: the recipe's own pre-training run")
    share: float = setting(0.5, "share of the requests kept, those with the longest play time", gt=0, le=1)
    per: Literal["user", "all"] = setting("all", "what a request's play time is compared with: the user's own, or all")
    steps: int = setting(200, "optimizer steps", ge=1)
    learning_rate: float = setting(8e-5, "rate at the end, to which a cosine anneals from that of pre-training", gt=0)
    table_rate: float = setting(1e-4, "rate of row-wise Adagrad on id tables", gt=0)
    promote: Promote = setting("always", _PROMOTE)


class RewardConfig(Section):
    """P-Score: target attention over behaviours, a tower per feedback label, one that fuses them (REFERENCE 1.9)."""

    objectives: dict[str, float] = setting(
        {},
        "weight of each label in the loss of the fused tower; playtime is the share of playtime_cap_s that was watched. "
        "Empty: all labels of the log and playtime, 1 each",
    )
    playtime_cap_s: float = setting(120.0, "play time, seconds, above which all are alike", gt=0)
    known_with_playtime: tuple[str, ...] = setting(
        (), "labels that the log knows only of events whose play time it knows; elsewhere nothing is learnt of them"
    )
    width: int = setting(64, "width of item and event vectors", ge=1)
    heads: int = setting(4, "heads of the target attention", ge=1)
    hidden: int = setting(128, "hidden width of the towers", ge=1)
    item_id: bool = setting(True, "an embedding per item beside its semantic ID")
    dropout: float = setting(0.1, "dropout on embeddings and in towers", ge=0, lt=1)
    history: int = setting(50, "most recent events that a candidate attends to", ge=1)
    steps: int = setting(1000, "optimizer steps", ge=1)
    batch_size: int = setting(256, "requests per step", ge=1)
    learning_rate: float = setting(1e-3, "peak rate of AdamW", gt=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", ge=0)

    @model_validator(mode="after")
    def _weights(self) -> RewardConfig:
        wrong = [name for name, weight in self.objectives.items() if weight < 0]
        if wrong:
            raise ValueError(f"reward.objectives {wrong[0]} is {self.objectives[wrong[0]]}: weights are at least 0")
        if self.width % self.heads:
            raise ValueError(f"reward.width {self.width} must be a multiple of reward.heads {self.heads}")
        return self


class ShareCap(Section):
    """Holds back a group of items where it takes too much of what is generated (REFERENCE 1.9, SIR)."""

    share: float = setting(1.0, "share of all generated items above which the group is held back", gt=0, le=1)
    factor: float = setting(0.5, "what the reward of its items is multiplied by then", gt=0, lt=1)
    popular: float = setting(
        0.01, "the group: this share of the catalogue, the items most exposed in train", gt=0, le=1
    )


class RLConfig(Section):
    """Reinforcement learning on the model's own generations, with the loss of RSFT beside it (REFERENCE 1.8, 1.9)."""

    init_from: str | None = setting(None, "RUN or RUN@STEP to start from; none: the recipe's RSFT run")
    reward_run: str | None = setting(
        None, "RUN or RUN@STEP of the reward model; none: the recipe's own, where rl.rewards names a learnt reward"
    )
    steps: int = setting(300, "optimizer steps", ge=1)
    requests: int = setting(16, "requests per step that candidates are generated for", ge=1)
    ask: Literal["log", "end"] = setting(
        "log",
        "requests that candidates are generated for: those of the log, when they were made; end: every user's next one, after all "
        "of train, which learnt rewards can judge",
    )
    batch_size: int = setting(64, "logged requests per step, for the loss of RSFT", ge=1)
    ntp_weight: float = setting(1.0, "weight of the loss of RSFT, next-token prediction on the kept requests", ge=0)
    weight: float = setting(1.0, "weight of the objective", ge=0)
    item_weight: float = setting(
        0.0,
        "weight of the objective on the item head's probabilities beside the codes' (model.head both), 0 = none",
        ge=0,
    )
    learning_rate: float = setting(1e-4, "rate of AdamW at the start", gt=0)
    final_rate: float = setting(1.0, "share of it that a cosine ends at, 1 = the rate is constant", ge=0, le=1)
    table_rate: float = setting(1e-4, "rate of row-wise Adagrad on id tables", gt=0)
    objective: Literal["grpo", "ecpo", "gbpo", "dpo", "s_dpo", "ipa", "sprec", "best_of"] = setting(
        "ecpo", "what is done with the rewards of a group; see posttrain/objectives.py"
    )
    clip: float = setting(0.2, "epsilon: how far a ratio of probabilities may move from 1", gt=0, lt=1)
    early_clip: float = setting(0.1, "delta of ECPO: how much further a bad candidate's ratio may start", ge=0)
    beta: float = setting(0.1, "strength of the preference objectives' reference", gt=0)
    negatives: int = setting(3, "s_dpo: rejected candidates per chosen one", ge=1)
    kl_weight: float = setting(0.0, "weight of the divergence from the run that RL started from, 0 = none", ge=0)
    rest_weight: float = setting(
        0.0,
        "with rl.item_weight: weight of the divergence from the run that RL started from on the items that were not "
        "generated, 0 = none; RL then moves the head of the list alone",
        ge=0,
    )
    group: int = setting(128, "candidates per request", ge=2)
    rollout: Literal["beam", "sample", "served"] = setting(
        "beam",
        "how candidates are generated; sample: at random without replacement; served: the head of the list that evaluate makes, "
        "with model.head both by both heads",
    )
    constrained: bool = setting(True, "generate along the trie; false: any codes, those of no item are left out")
    temperature: float = setting(1.0, "rollout sample: temperature", gt=0)
    top_k: int = setting(0, "rollout sample: codes of a level to choose from, the most probable, 0 = all", ge=0)
    top_p: float = setting(1.0, "rollout sample: probability that the codes to choose from hold together", gt=0, le=1)
    distribution: Literal["all", "legal"] = setting(
        "all", "probabilities in the objective: over all codes of a level, or over those that go on to an item"
    )
    refresh_every: int = setting(
        20, "steps between refreshes of the policy that generates, 0 = it stays the one that RL started from", ge=0
    )
    rewards: dict[str, float] = setting({"p_score": 1.0}, "weight of each reward, 0 = without; see posttrain/judge.py")
    share_cap: ShareCap | None = setting(None, "hold popular items back")
    format_samples: int = setting(5, "K: candidates of a free search per request that the format reward looks at", ge=0)
    format_weight: float = setting(1.0, "weight of the format reward's objective, 0 = none", ge=0)
    watch_every: int = setting(50, "steps between measurements of the held-out recall, 0 = never", ge=0)
    watch_examples: int = setting(1000, "held-out requests", ge=1)
    watch_k: int = setting(10, "cut-off of the held-out recall", ge=1)
    promote: Promote = setting("always", _PROMOTE)
    max_fall: float = setting(0.05, "stop where the held-out recall has fallen by more than this share", gt=0, le=1)
    checkpoint_every: int = setting(50, "steps between checkpoints", ge=1)
    log_every: int = setting(10, "steps between log lines", ge=1)

    @model_validator(mode="after")
    def _fits(self) -> RLConfig:
        if not any(self.rewards.values()):
            raise ValueError("rl.rewards weighs nothing: give at least one reward a weight, such as {p_score: 1.0}")
        if self.rollout != "sample" and (self.top_k or self.top_p < 1 or self.temperature != 1):
            raise ValueError("rl.temperature, rl.top_k and rl.top_p are of rl.rollout sample")
        if self.rollout == "served" and not self.constrained:
            raise ValueError("rl.rollout served lists items, which needs rl.constrained")
        if self.rest_weight and not self.item_weight:
            raise ValueError(
                "rl.rest_weight holds the item head to what it was, which only rl.item_weight moves: give both"
            )
        if self.distribution == "legal" and not self.constrained:
            raise ValueError(
                "rl.distribution legal needs rl.constrained: a code that leads to no item has no probability there"
            )
        return self
