"""One experiment, from log to metrics."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import model_validator

from onerec_jax.config.data import DataConfig
from onerec_jax.config.evaluate import EvaluateConfig
from onerec_jax.config.faults import FaultsConfig
from onerec_jax.config.model import ModelConfig
from onerec_jax.config.posttrain import RewardConfig, RLConfig, RSFTConfig
from onerec_jax.config.section import Section, setting
from onerec_jax.config.tokenizer import TokenizerConfig
from onerec_jax.config.train import DistributedConfig, MeshConfig, TrainConfig
from onerec_jax.storage import folder


class Recipe(Section):
    """One experiment, from log to metrics."""

    name: str = setting(
        ..., "name of the run and of its folders", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200
    )
    seed: int = setting(0, "seed of everything random", ge=0)
    runs: str = setting("runs", "folder that holds run directories, also gs://BUCKET/PATH or s3://BUCKET/PATH")
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    train: TrainConfig = TrainConfig()
    faults: FaultsConfig = FaultsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    rsft: RSFTConfig = RSFTConfig()
    reward: RewardConfig = RewardConfig()
    rl: RLConfig = RLConfig()

    @model_validator(mode="after")
    def _samples_items(self) -> Recipe:
        if self.train.sampled_items and self.model.head == "codes":
            raise ValueError(
                "train.sampled_items is of model.head items or both; with codes the softmax is always over all of a level"
            )
        return self

    @model_validator(mode="after")
    def _weighs_items(self) -> Recipe:
        if self.model.head != "both" and self.train.item_weight != 1.0:
            raise ValueError("train.item_weight is of model.head both")
        if self.model.head != "both" and self.train.code_targets:
            raise ValueError("train.code_targets is of model.head both: with one head all targets are its own")
        return self

    @model_validator(mode="after")
    def _shifts_items(self) -> Recipe:
        if self.model.head == "codes" and self.evaluate.label_shift_days:
            raise ValueError("evaluate.label_shift_days corrects scores of items, which model.head codes does not have")
        return self

    @model_validator(mode="after")
    def _masks(self) -> Recipe:
        model = self.model
        if self.train.masked_share and (model.causal or model.lifelong_length or model.short_length < 2):
            raise ValueError(
                "train.masked_share needs model.causal false, model.lifelong_length 0 and a model.short_length of 2 at least: "
                "order and clusters of a history would tell what was taken out of it"
            )
        return self

    @model_validator(mode="after")
    def _buckets(self) -> Recipe:
        if self.train.length_buckets and self.train.length_buckets[-1] >= self.model.short_length:
            raise ValueError(
                f"train.length_buckets {list(self.train.length_buckets)} must be below model.short_length "
                f"{self.model.short_length}, which is always the last of them"
            )
        return self

    @property
    def dataset_directory(self) -> Path:
        return Path(self.data.directory or f"datasets/{self.name}")

    @property
    def tokenizer_directory(self) -> Path:
        return Path(self.tokenizer.directory or self.dataset_directory / "semantic_ids")

    @property
    def run_directory(self) -> Path:
        return folder(self.runs) / self.name

    def stage(self, name: str, **sections: Section) -> Recipe:
        """The recipe of a later stage: a run of its own, `NAME-stage`, on the same dataset and semantic IDs."""
        data = self.data.model_copy(update={"directory": str(self.dataset_directory)})
        tokenizer = self.tokenizer.model_copy(update={"directory": str(self.tokenizer_directory)})
        changed = {"name": f"{self.name}-{name}", "data": data, "tokenizer": tokenizer, **sections}
        return self.model_copy(update=changed)

    def to_yaml(self) -> str:
        buffer = io.StringIO()
        OmegaConf.save(OmegaConf.create(self.model_dump(mode="json")), buffer)
        return buffer.getvalue()

    def digest(self) -> str:
        """Twelve hex digits that change with any setting; see `Section.stated`."""
        return digest_of(self.stated())


def digest_of(*values: Any) -> str:
    """Twelve hex digits of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
