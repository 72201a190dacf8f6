"""Mesh and pre-training."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from onerec_jax.config.section import Section, setting


class MeshConfig(Section):
    """Devices along each axis of the mesh; -1 for `data` takes what is left."""

    data: int = setting(-1, "pure data parallel, -1 = all remaining devices", ge=-1)
    fsdp: int = setting(1, "data parallel with sharded parameters", ge=1)
    expert: int = setting(1, "data parallel with sharded experts", ge=1)
    tensor: int = setting(1, "heads and feed-forward width", ge=1)
    slices: int = setting(
        1,
        "slices of a TPU job, or hosts, with a slow network between them: only `data` goes over it, and is a multiple",
        ge=1,
    )

    @model_validator(mode="after")
    def _nonzero(self) -> MeshConfig:
        if self.data == 0:
            raise ValueError("mesh.data must be positive, or -1 for all remaining devices")
        return self


class DistributedConfig(Section):
    """Several processes that train as one. Under Slurm and on GKE nothing needs to be set."""

    coordinator: str = setting(
        "",
        "HOST:PORT of process 0; empty: found from Slurm, GKE or TPU metadata, where there are any, else one process",
    )
    processes: int = setting(0, "how many processes, where a coordinator is given", ge=0)
    process: int = setting(-1, "which of them this one is, from 0", ge=-1)

    @model_validator(mode="after")
    def _complete(self) -> DistributedConfig:
        if bool(self.coordinator) != (self.processes > 0) or bool(self.coordinator) != (self.process >= 0):
            raise ValueError(
                "distributed.coordinator, distributed.processes and distributed.process are given together"
            )
        if self.coordinator and self.process >= self.processes:
            raise ValueError(f"distributed.process {self.process} must be below distributed.processes {self.processes}")
        return self


class TrainConfig(Section):
    """Pre-training."""

    steps: int = setting(1000, "optimizer steps", ge=1)
    batch_size: int = setting(256, "requests per optimizer step over all devices", ge=1)
    accumulation: int = setting(1, "micro-batches per step", ge=1)
    learning_rate: float = setting(1e-3, "peak rate of AdamW on dense parameters", gt=0)
    warmup_steps: int = setting(100, "linear warm-up", ge=0)
    schedule: Literal["cosine", "constant"] = setting("cosine", "after warm-up: cosine to final_rate, or constant")
    final_rate: float = setting(0.1, "share of the peak rate the cosine ends at", ge=0, le=1)
    optimizer: Literal["adamw", "muon"] = setting("adamw", "dense optimizer; muon: matrices by Muon, the rest by AdamW")
    b1: float = setting(0.9, "Adam's first decay", ge=0, lt=1)
    b2: float = setting(0.95, "Adam's second decay", ge=0, lt=1)
    weight_decay: float = setting(0.1, "decoupled weight decay on dense matrices", ge=0)
    clip_norm: float = setting(1.0, "global-norm clip of the dense gradient, 0 = off", ge=0)
    table_rate: float = setting(0.05, "rate of row-wise Adagrad on id tables", gt=0)
    negative_weight: float = setting(1.0, "loss weight of targets without a positive label; positives weigh 1", ge=0)
    half_life_days: float = setting(
        0.0, "targets weigh half as much for every so many days before the end of train, 0 = all alike", ge=0
    )
    half_life_from: float = setting(
        0.0,
        "share of the steps after which half_life_days sets in: before, all of the log counts alike, so that the end of "
        "training follows what is watched now without forgetting who watches what",
        ge=0,
        le=1,
    )
    masked_share: float = setting(
        0.0,
        "targets are this share of a user's events, taken out at random and anew at every step, instead of those that follow "
        "a cut; 0 = off. For an encoder that is not causal, where a set of items is asked for and not the next one",
        ge=0,
        lt=1,
    )
    kept_share: float = setting(
        1.0,
        "share of the requests trained on, those with the longest play time; with masked_share, of the events that are targets",
        gt=0,
        le=1,
    )
    kept_per: Literal["user", "all"] = setting(
        "all", "kept_share: what a play time is compared with, the user's own or all"
    )
    code_targets: int = setting(
        0,
        "targets of a request, the first ones, whose codes are learnt beside all their items; 0 = all (model.head both)",
        ge=0,
    )
    label_smoothing: float = setting(0.0, "mass spread over all codes of a level, or all items", ge=0, lt=1)
    sampled_items: int = setting(0, "items head: softmax against this many random items, 0 = against all", ge=0)
    item_weight: float = setting(1.0, "weight of the loss over items beside that over codes (model.head both)", ge=0)
    log_every: int = setting(20, "steps between log lines", ge=1)
    eval_every: int = setting(0, "steps between validation losses, 0 = never", ge=0)
    eval_batches: int = setting(8, "validation batches per validation loss", ge=1)
    checkpoint_every: int = setting(200, "steps between checkpoints; one is always written at the end", ge=1)
    keep: int = setting(2, "checkpoints kept, the most recent", ge=1)
    keep_every: int = setting(0, "also keep the checkpoints of every so many steps, 0 = none", ge=0)
    keep_best: int = setting(0, "also keep so many checkpoints of the lowest validation loss, 0 = none", ge=0)
    length_buckets: tuple[int, ...] = setting(
        (),
        "lengths, below model.short_length, that the short pathway of a batch is cut to where all of its requests fit: "
        "batches are then of requests of like length, and padding costs less; each length compiles the step once more",
    )
    workers: int = setting(0, "loader processes, 0 = threads of this process", ge=0)
    threads: int = setting(2, "loader threads per process", ge=1)
    prefetch: int = setting(4, "batches prepared ahead", ge=1)
    tensorboard: bool = setting(True, "write TensorBoard events beside metrics.jsonl, where runs is on a disk")
    profile_steps: str | None = setting(
        None, "first..last step that an XProf trace is written of, into the run's folder profile, such as 100..105",
        pattern=r"^[1-9][0-9]*\.\.[1-9][0-9]*$",
    )  # fmt: skip
    init_from: str | None = setting(None, "RUN, RUN@STEP or an export directory whose parameters to start from")

    def half_life_at(self, step: int) -> float:
        """`half_life_days` from the step on where it sets in, 0 before."""
        return self.half_life_days if step >= self.half_life_from * self.steps else 0.0

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last of `profile_steps`."""
        if self.profile_steps is None:
            return None
        first, last = self.profile_steps.split("..")
        return int(first), int(last)

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.keep_best and not self.eval_every:
            raise ValueError("train.keep_best goes by the validation loss: set train.eval_every")
        if self.profiled is not None and self.profiled[0] > self.profiled[1]:
            raise ValueError(f"train.profile_steps {self.profile_steps} must be first..last, and last not before first")
        if self.sampled_items and self.label_smoothing:
            raise ValueError("train.label_smoothing is over all items: it must be 0 where train.sampled_items is not")
        if list(self.length_buckets) != sorted({length for length in self.length_buckets if length > 0}):
            raise ValueError("train.length_buckets must be positive and grow")
        if self.half_life_from and not self.half_life_days:
            raise ValueError("train.half_life_from is when train.half_life_days sets in: it must be 0 where that is 0")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.batch_size {self.batch_size} does not divide into train.accumulation {self.accumulation} micro-batches"
            )
        return self
