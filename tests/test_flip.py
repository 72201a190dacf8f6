"""No setting is silently ignored: for every field of a recipe, another value changes what some part of the code does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import flip_probes as probe
import pytest
from pydantic import BaseModel

from onerec_jax.config import Recipe
from onerec_jax.data.sources import load_tables
from onerec_jax.data.store import Dataset
from onerec_jax.recipe import make_recipe
from onerec_jax.tokenizer.quantizer import MODULES
from onerec_jax.tokenizer.semantic_ids import SemanticIds


class Flip(NamedTuple):
    """Another value of a field, the probe whose outcome it changes, and the settings under which it does."""

    value: Any
    probe: Callable[[Recipe, probe.World], Any]
    under: dict[str, Any] = {}  # noqa: RUF012


SMALL_LOG = {
    "kind": "simulator", "users": 20, "items": 40, "events_per_user": 25, "days": 4, "topics": 3, "embedding_dim": 4
}  # fmt: skip
SMALL_SIMULATOR = {"data.source": SMALL_LOG}
KUAIRAND = {"data.source": {"kind": "kuairand", "path": "one"}}
AMAZON = {"data.source": {"kind": "amazon", "path": "one"}}
PARQUET = {"data.source": {"kind": "parquet", "events": "one/events.parquet"}}
BARE = {"model.item_input": "sid", "model.event_features": []}
LIFELONG = {"model.lifelong_length": 9}
SHORT_RUN = {
    "train.steps": 4, "train.eval_every": 3, "train.eval_batches": 2, "train.log_every": 2,
    "train.checkpoint_every": 3,
}  # fmt: skip
LEAPING = {**SHORT_RUN, "train.steps": 8, "train.eval_every": 0, "train.log_every": 1}
ALIGNED = {"tokenizer.alignment": {"steps": 2, "batch_size": 8, "width": 4, "pairs": ["swing"], "neighbours": 4}}
SHORT_TRAINING = {"hidden": [8], "steps": 4, "batch_size": 10, "learning_rate": 0.01}
RQ_VAE = {
    "tokenizer.quantizer": {"kind": "rq_vae", "latent": 4, **SHORT_TRAINING}, "tokenizer.codebook_sizes": [8]
}  # fmt: skip
FSQ = {"tokenizer.quantizer": {"kind": "fsq", **SHORT_TRAINING}, "tokenizer.codebook_sizes": [8]}
BOARD = {"evaluate.floors": ["popularity", "markov"]}

ONE_OF_TWO = {"distributed": {"coordinator": "10.0.0.2:1", "processes": 2, "process": 0}}
ITEM_HEAD = {"model.head": "items", "model.moe.experts": 0}
BOTH_HEADS = {"model.head": "both", "model.item_input": "both"}
SMALL_REWARD = {"reward.width": 8, "reward.heads": 2, "reward.hidden": 8, "reward.history": 6, "reward.batch_size": 4}
SHORT_REWARD_RUN = {"reward.steps": 2, "reward.batch_size": 4, "reward.history": 6}
RULES = {"rl.rewards": {"hit": 1.0}}
DRAWN = {
    **RULES, "rl.rollout": "sample", "rl.constrained": False, "rl.group": 4, "rl.format_samples": 2,
    "model.moe.experts": 0,
}  # fmt: skip
CAPPED = {**RULES, "rl.share_cap": {}}
SHORT_RL = {
    **RULES, "rl.steps": 4, "rl.requests": 4, "rl.batch_size": 4, "rl.refresh_every": 2, "rl.watch_every": 2,
    "rl.max_fall": 0.5, "rl.checkpoint_every": 2, "rl.log_every": 2,
}  # fmt: skip
PREFERENCE = {"rl.objective": "s_dpo"}
FLIPS: dict[str, Flip] = {
    "name": Flip("another", probe.training, SHORT_RUN),
    "seed": Flip(1, probe.log_tables, SMALL_SIMULATOR),
    "runs": Flip("experiments", probe.training, SHORT_RUN),
    "data.source.kind": Flip("amazon", probe.log_tables, KUAIRAND),
    "data.source.simulator.users": Flip(21, probe.log_tables, SMALL_SIMULATOR),
    "data.source.simulator.items": Flip(41, probe.log_tables, SMALL_SIMULATOR),
    "data.source.simulator.events_per_user": Flip(26, probe.log_tables, SMALL_SIMULATOR),
    "data.source.simulator.days": Flip(5, probe.log_tables, SMALL_SIMULATOR),
    "data.source.simulator.topics": Flip(4, probe.log_tables, SMALL_SIMULATOR),
    "data.source.simulator.embedding_dim": Flip(5, probe.log_tables, SMALL_SIMULATOR),
    "data.source.simulator.drift": Flip(0.3, probe.log_tables, SMALL_SIMULATOR),
    "data.source.kuairand.path": Flip("two", probe.log_tables, KUAIRAND),
    "data.source.amazon.path": Flip("two", probe.log_tables, AMAZON),
    "data.source.parquet.events": Flip("two/events.parquet", probe.log_tables, PARQUET),
    "data.source.parquet.items": Flip("items.parquet", probe.log_tables, PARQUET),
    "data.source.parquet.users": Flip("users.parquet", probe.log_tables, PARQUET),
    "data.source.parquet.columns": Flip({"like": "liked"}, probe.log_tables, PARQUET),
    "data.directory": Flip("elsewhere", probe.dataset_place, {**SMALL_SIMULATOR, "data.directory": None}),
    "data.split.kind": Flip("leave_one_out", probe.dataset_files),
    "data.split.valid_from": Flip(0.7, probe.dataset_files),
    "data.split.test_from": Flip(0.95, probe.dataset_files),
    "data.split.context": Flip("frozen", probe.dataset_files),
    "data.positive_labels": Flip(["click"], probe.dataset_files),
    "data.request_gap_s": Flip(5.0, probe.dataset_files),
    "data.targets": Flip(2, probe.dataset_files),
    "data.target_stride": Flip(1, probe.dataset_files),
    "data.min_history": Flip(4, probe.dataset_files),
    "data.max_history": Flip(10, probe.dataset_files),
    "data.lifelong_cluster_size": Flip(2, probe.dataset_files),
    "data.lifelong_refresh": Flip(6, probe.dataset_files),
    "data.shards": Flip(2, probe.dataset_files),
    "tokenizer.directory": Flip("elsewhere", probe.semantic_ids_place),
    "tokenizer.content": Flip(["behaviour"], probe.vectors),
    "tokenizer.sentence_model": Flip(
        "model-b", probe.vectors, {"tokenizer.content": ["sentence"], "tokenizer.sentence_model": "model-a"}
    ),
    "tokenizer.dimensions": Flip(3, probe.vectors, {"tokenizer.content": ["text"], "tokenizer.dimensions": 4}),
    "tokenizer.codebook_sizes": Flip([8, 8], probe.semantic_ids),
    "tokenizer.iterations": Flip(1, probe.semantic_ids),
    "tokenizer.batch_size": Flip(64, probe.assignments),
    "tokenizer.embedding_path": Flip("given.npy", probe.vectors),
    "tokenizer.alignment.steps": Flip(1, probe.semantic_ids, {"tokenizer.alignment.batch_size": 8}),
    "tokenizer.alignment.batch_size": Flip(9, probe.aligned, ALIGNED),
    "tokenizer.alignment.learning_rate": Flip(2e-3, probe.aligned, ALIGNED),
    "tokenizer.alignment.temperature": Flip(0.1, probe.aligned, ALIGNED),
    "tokenizer.alignment.width": Flip(5, probe.aligned, ALIGNED),
    "tokenizer.alignment.reconstruction_weight": Flip(0.0, probe.aligned, ALIGNED),
    "tokenizer.alignment.pairs": Flip(["user"], probe.aligned, ALIGNED),
    "tokenizer.alignment.swing_alpha": Flip(100.0, probe.aligned, ALIGNED),
    "tokenizer.alignment.neighbours": Flip(1, probe.aligned, ALIGNED),
    "tokenizer.quantizer.kind": Flip("sequential", probe.semantic_ids, {"tokenizer.quantizer": {"kind": "random"}}),
    "tokenizer.quantizer.residual_kmeans.assignment": Flip("bfloat16", probe.assignments),
    "tokenizer.quantizer.residual_kmeans.balanced_levels": Flip([2], probe.semantic_ids),
    "tokenizer.quantizer.rq_vae.hidden": Flip([9], probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.rq_vae.latent": Flip(5, probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.rq_vae.steps": Flip(5, probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.rq_vae.batch_size": Flip(9, probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.rq_vae.learning_rate": Flip(0.02, probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.rq_vae.commitment": Flip(0.5, probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.rq_vae.estimator": Flip("rotation", probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.rq_vae.dead_after": Flip(1, probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.rq_vae.collaborative_weight": Flip(0.5, probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.rq_vae.diversity_weight": Flip(0.5, probe.semantic_ids, RQ_VAE),
    "tokenizer.quantizer.fsq.hidden": Flip([9], probe.semantic_ids, FSQ),
    "tokenizer.quantizer.fsq.steps": Flip(5, probe.semantic_ids, FSQ),
    "tokenizer.quantizer.fsq.batch_size": Flip(9, probe.semantic_ids, FSQ),
    "tokenizer.quantizer.fsq.learning_rate": Flip(0.02, probe.semantic_ids, FSQ),
    "tokenizer.quantizer.product.rotate": Flip(False, probe.semantic_ids, {"tokenizer.quantizer": {"kind": "product"}}),
    "tokenizer.quantizer.hierarchical.of": Flip(
        "co_occurrence", probe.semantic_ids, {"tokenizer.quantizer": {"kind": "hierarchical"}}
    ),
    "tokenizer.dedup": Flip("extra_level", probe.semantic_ids),
    "tokenizer.resolve": Flip("uniform", probe.semantic_ids),
    "model.d_model": Flip(16, probe.model),
    "model.base_width": Flip(16, probe.step),
    "model.heads": Flip(4, probe.model),
    "model.head_dim": Flip(5, probe.model),
    "model.head": Flip("items", probe.model, {"model.moe.experts": 0}),
    "model.softmax": Flip("legal", probe.item_step),
    "model.item_memory": Flip(5, probe.model, BOTH_HEADS),
    "model.block": Flip("hstu", probe.model),
    "model.event_tokens": Flip("codes", probe.model, BARE | {"model.project_events": False}),
    "model.project_events": Flip(False, probe.model, BARE),
    "model.ffn_hidden": Flip(16, probe.model),
    "model.encoder_layers": Flip(2, probe.model),
    "model.decoder_layers": Flip(2, probe.model),
    "model.item_input": Flip("sid", probe.model),
    "model.short_length": Flip(0, probe.model),
    "model.positive_length": Flip(3, probe.model),
    "model.lifelong_length": Flip(9, probe.model),
    "model.lifelong_queries": Flip(3, probe.model, LIFELONG),
    "model.lifelong_layers": Flip(2, probe.model, LIFELONG),
    "model.static_dim": Flip(4, probe.model),
    "model.event_features": Flip(["author", "tag", "age", "playtime", "duration"], probe.model),
    "model.author_dim": Flip(4, probe.model),
    "model.feature_dim": Flip(4, probe.model),
    "model.pathway_hidden": Flip(5, probe.model),
    "model.causal": Flip(True, probe.model),
    "model.user_id": Flip(False, probe.model),
    "model.item_rows": Flip(10, probe.model),
    "model.author_rows": Flip(3, probe.model),
    "model.user_rows": Flip(10, probe.model),
    "model.dropout": Flip(0.5, probe.model),
    "model.qk_norm": Flip(True, probe.model),
    "model.attention": Flip("fused", probe.model),
    "model.dtype": Flip("bfloat16", probe.model),
    "model.remat": Flip("dots", probe.kept_for_backward),
    "model.tables.dtype": Flip("bfloat16", probe.item_step),
    "model.tables.evict_after": Flip(3, probe.item_step),
    "model.tables.admit_after": Flip(3, probe.item_step),
    "model.moe.experts": Flip(3, probe.model),
    "model.moe.active": Flip(1, probe.model),
    "model.moe.hidden": Flip(8, probe.model),
    "model.moe.location": Flip("both", probe.model),
    "model.moe.every": Flip(2, probe.model, {"model.decoder_layers": 2}),
    "model.moe.router": Flip("sigmoid", probe.model),
    "model.moe.balance_rate": Flip(0.0, probe.step),
    "model.moe.shared": Flip(1, probe.model),
    "model.moe.z_loss": Flip(0.1, probe.item_step),
    "model.moe.backend": Flip("reference", probe.model),
    "model.moe.transport": Flip("all_to_all", probe.experts_on_a_mesh),
    "model.moe.capacity": Flip(0.5, probe.experts_on_a_mesh, {"model.moe.transport": "all_to_all"}),
    "model.moe.tile": Flip(4, probe.model),
    "mesh.data": Flip(4, probe.layout),
    "mesh.fsdp": Flip(2, probe.layout),
    "mesh.expert": Flip(2, probe.layout),
    "mesh.tensor": Flip(2, probe.layout),
    "mesh.slices": Flip(2, probe.layout),
    "distributed.coordinator": Flip("10.0.0.1:1", probe.joined, ONE_OF_TWO),
    "distributed.processes": Flip(3, probe.joined, ONE_OF_TWO),
    "distributed.process": Flip(1, probe.joined, ONE_OF_TWO),
    "train.steps": Flip(3, probe.training, SHORT_RUN),
    "train.batch_size": Flip(8, probe.batch),
    "train.accumulation": Flip(2, probe.step),
    "train.learning_rate": Flip(2e-3, probe.step),
    "train.warmup_steps": Flip(1, probe.step),
    "train.schedule": Flip("constant", probe.step, {"train.warmup_steps": 0}),
    "train.final_rate": Flip(0.5, probe.step, {"train.warmup_steps": 0}),
    "train.optimizer": Flip("muon", probe.step),
    "train.b1": Flip(0.8, probe.step),
    "train.b2": Flip(0.9, probe.step),
    "train.weight_decay": Flip(0.0, probe.step),
    "train.clip_norm": Flip(0.01, probe.step),
    "train.table_rate": Flip(0.1, probe.step),
    "train.negative_weight": Flip(0.5, probe.batch),
    "train.half_life_days": Flip(1.0, probe.batch),
    "train.half_life_from": Flip(0.5, probe.batch, {"train.half_life_days": 1.0}),
    "train.kept_share": Flip(0.5, probe.batch),
    "train.kept_per": Flip("user", probe.batch, {"train.kept_share": 0.5}),
    "train.code_targets": Flip(1, probe.item_step, BOTH_HEADS),
    "train.masked_share": Flip(0.5, probe.batch),
    "train.label_smoothing": Flip(0.1, probe.step),
    "train.sampled_items": Flip(5, probe.item_step, {"model.head": "items", "model.moe.experts": 0}),
    "train.item_weight": Flip(0.5, probe.item_step, BOTH_HEADS),
    "train.log_every": Flip(3, probe.training, SHORT_RUN),
    "train.eval_every": Flip(2, probe.training, SHORT_RUN),
    "train.eval_batches": Flip(1, probe.training, SHORT_RUN),
    "train.checkpoint_every": Flip(2, probe.training, SHORT_RUN),
    "train.keep": Flip(1, probe.training, SHORT_RUN),
    "train.keep_every": Flip(3, probe.training, {**SHORT_RUN, "train.keep": 1}),
    "train.keep_best": Flip(2, probe.training, {**SHORT_RUN, "train.keep": 1}),
    "train.length_buckets": Flip([2], probe.batch),
    "train.workers": Flip(1, probe.loader),
    "train.threads": Flip(2, probe.loader),
    "train.prefetch": Flip(3, probe.loader),
    "train.tensorboard": Flip(True, probe.training, SHORT_RUN),
    "train.profile_steps": Flip("2..3", probe.training, SHORT_RUN),
    "train.init_from": Flip("other", probe.start, {"train.steps": 1}),
    "faults.hang_factor": Flip(30.0, probe.patience),
    "faults.hang_least_s": Flip(1000.0, probe.patience),
    "faults.spike_factor": Flip(9.0, probe.diverging, LEAPING),
    "faults.rollbacks": Flip(1, probe.diverging, LEAPING),
    "faults.bad_records": Flip(0.5, probe.damaged_records),
    "faults.metrics_port": Flip(9464, probe.served, SHORT_RUN),
    "evaluate.split": Flip("valid", probe.board, BOARD),
    "evaluate.ks": Flip([3], probe.board, BOARD),
    "evaluate.beam_width": Flip(9, probe.searches),
    "evaluate.item_weight": Flip(9.0, probe.lists, BOTH_HEADS),
    "evaluate.inferences": Flip(2, probe.lists, ITEM_HEAD),
    "evaluate.left_out": Flip(0.9, probe.lists, {**ITEM_HEAD, "evaluate.inferences": 2}),
    "evaluate.label_shift_days": Flip(9.0, probe.lists, BOTH_HEADS),
    "evaluate.label_shift_prior": Flip(1.0, probe.lists, {**BOTH_HEADS, "evaluate.label_shift_days": 9.0}),
    "evaluate.batch_size": Flip(10, probe.searches),
    "evaluate.max_examples": Flip(0, probe.board, BOARD),
    "evaluate.exclude_seen": Flip(False, probe.board, BOARD),
    "evaluate.targets": Flip("all", probe.board, BOARD),
    "evaluate.free_examples": Flip(3, probe.board, BOARD),
    "evaluate.reward_run": Flip("no-such-run", probe.judged_board, BOARD),
    "evaluate.rerank": Flip(7, probe.judged_board, BOARD),
    "evaluate.rerank_weight": Flip(0.5, probe.reranked, {"evaluate.rerank": 5}),
    "evaluate.floors": Flip(["popularity"], probe.board, BOARD),
    "evaluate.recent_days": Flip(1.0, probe.floor_scores, {"evaluate.floors": ["recent_popularity"]}),
    "evaluate.ease_lambda": Flip(10.0, probe.floor_scores, {"evaluate.floors": ["ease"]}),
    "evaluate.history_decay": Flip(0.5, probe.floor_scores, {"evaluate.floors": ["ease"]}),
    "evaluate.recall": Flip("pair", probe.board, BOARD),
    "rsft.init_from": Flip("other", probe.fine_tuning),
    "rsft.share": Flip(0.25, probe.fine_tuning),
    "rsft.per": Flip("user", probe.fine_tuning),
    "rsft.steps": Flip(100, probe.fine_tuning),
    "rsft.learning_rate": Flip(4e-5, probe.fine_tuning),
    "rsft.table_rate": Flip(2e-4, probe.fine_tuning),
    "rsft.promote": Flip("better", probe.promotion),
    "reward.objectives": Flip({"click": 1.0}, probe.reward_loss, SMALL_REWARD),
    "reward.known_with_playtime": Flip(("click",), probe.reward_loss, SMALL_REWARD),
    "reward.playtime_cap_s": Flip(60.0, probe.reward_loss, SMALL_REWARD),
    "reward.width": Flip(16, probe.reward_loss, SMALL_REWARD),
    "reward.heads": Flip(4, probe.reward_loss, SMALL_REWARD),
    "reward.hidden": Flip(12, probe.reward_loss, SMALL_REWARD),
    "reward.item_id": Flip(False, probe.reward_loss, SMALL_REWARD),
    "reward.dropout": Flip(0.5, probe.reward_loss, SMALL_REWARD),
    "reward.history": Flip(5, probe.reward_training, SHORT_REWARD_RUN),
    "reward.steps": Flip(3, probe.reward_training, SHORT_REWARD_RUN),
    "reward.batch_size": Flip(5, probe.reward_training, SHORT_REWARD_RUN),
    "reward.learning_rate": Flip(1e-2, probe.reward_training, SHORT_REWARD_RUN),
    "reward.weight_decay": Flip(1.0, probe.reward_training, SHORT_REWARD_RUN),
    "rl.init_from": Flip("other", probe.rl_without_a_start, RULES),
    "rl.reward_run": Flip("other-reward", probe.rl_without_a_start),
    "rl.steps": Flip(3, probe.reinforcement, SHORT_RL),
    "rl.requests": Flip(5, probe.reinforcement, SHORT_RL),
    "rl.batch_size": Flip(5, probe.reinforcement, SHORT_RL),
    "rl.ntp_weight": Flip(0.5, probe.rl_step),
    "rl.weight": Flip(0.5, probe.rl_step),
    "rl.item_weight": Flip(1.0, probe.experience, {**BOTH_HEADS, **DRAWN}),
    "rl.rest_weight": Flip(0.5, probe.experience, {**BOTH_HEADS, **DRAWN, "rl.item_weight": 1.0}),
    "rl.learning_rate": Flip(2e-4, probe.rl_step),
    "rl.final_rate": Flip(0.5, probe.rl_step),
    "rl.table_rate": Flip(2e-4, probe.rl_step),
    "rl.objective": Flip("grpo", probe.rl_step),
    "rl.clip": Flip(0.3, probe.rl_step),
    "rl.early_clip": Flip(0.2, probe.rl_step),
    "rl.beta": Flip(0.2, probe.rl_step, PREFERENCE),
    "rl.negatives": Flip(2, probe.rl_step, PREFERENCE),
    "rl.kl_weight": Flip(0.1, probe.rl_step),
    "rl.group": Flip(5, probe.experience, DRAWN),
    "rl.ask": Flip("end", probe.reinforcement, {**SHORT_RL, "rl.rewards": {"diversity": 1.0}}),
    "rl.rollout": Flip("beam", probe.experience, DRAWN),
    "rl.constrained": Flip(True, probe.experience, DRAWN),
    "rl.temperature": Flip(2.0, probe.experience, DRAWN),
    "rl.top_k": Flip(3, probe.experience, DRAWN),
    "rl.top_p": Flip(0.5, probe.experience, DRAWN),
    "rl.distribution": Flip("legal", probe.rl_step),
    "rl.refresh_every": Flip(3, probe.reinforcement, SHORT_RL),
    "rl.rewards": Flip({"hit": 2.0}, probe.judgement, CAPPED),
    "rl.share_cap": Flip(None, probe.judgement, CAPPED),
    "rl.share_cap.share": Flip(0.5, probe.judgement, CAPPED),
    "rl.share_cap.factor": Flip(0.1, probe.judgement, CAPPED),
    "rl.share_cap.popular": Flip(0.5, probe.judgement, CAPPED),
    "rl.format_samples": Flip(3, probe.experience, DRAWN),
    "rl.format_weight": Flip(0.5, probe.rl_step),
    "rl.watch_every": Flip(3, probe.reinforcement, SHORT_RL),
    "rl.watch_examples": Flip(10, probe.watched),
    "rl.watch_k": Flip(5, probe.watched),
    "rl.promote": Flip("better", probe.promotion),
    "rl.max_fall": Flip(0.15, probe.reinforcement, SHORT_RL),
    "rl.checkpoint_every": Flip(3, probe.reinforcement, SHORT_RL),
    "rl.log_every": Flip(3, probe.reinforcement, SHORT_RL),
}


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Paths of all settings; where a section is one of several kinds, or may be left out, its own come after that."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if field.discriminator:
            yield f"{prefix}{name}.kind"
            for choice in get_args(kind):
                paths = fields(choice, f"{prefix}{name}.{choice.model_fields['kind'].default}.")
                yield from (path for path in paths if not path.endswith(".kind"))
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
            for section in get_args(kind):
                if isinstance(section, type) and issubclass(section, BaseModel):
                    yield from fields(section, f"{prefix}{name}.")


KINDS = ("simulator", "kuairand", "amazon", "parquet", *MODULES)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested values with those at dotted paths replaced."""
    values = copy.deepcopy(values)
    for path, value in changes.items():
        *sections, name = path.split(".")
        node = values
        for section in sections:
            if section not in KINDS:
                node = node.setdefault(section, {})
        node[name] = copy.deepcopy(value)
    return values


@pytest.fixture(scope="session")
def small_tables():
    return load_tables(make_recipe({"name": "small", "data": {"source": SMALL_LOG}}).data.source, 0)


@pytest.fixture
def outcome(tiny_recipe: Recipe, small_tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a probe in a new folder on the tiny recipe with some settings replaced."""
    dataset = Dataset(tiny_recipe.dataset_directory)
    ids = SemanticIds.load(tiny_recipe.tokenizer_directory)
    small = {
        "runs": "runs", "data.min_history": 1, "data.lifelong_refresh": 8, "tokenizer.directory": None,
        "train.threads": 1, "model.positive_length": 0, "model.lifelong_length": 0,
    }  # fmt: skip
    base = changed(tiny_recipe.model_dump(mode="json"), small)
    folders = iter(range(9))

    def run(measure: Callable[[Recipe, probe.World], Any], changes: dict[str, Any]) -> Any:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(Dataset, "check_settings", lambda *_: None)  # one dataset serves all recipes here
            return measure(make_recipe(changed(base, changes)), probe.World(small_tables, dataset, ids, patch))

    return run


@pytest.fixture(scope="session")
def unflipped() -> dict[str, Any]:
    """Outcomes without a flip, by probe and settings: many fields share one."""
    return {}


def key(flip: Flip) -> str:
    return f"{flip.probe.__name__} {json.dumps(flip.under)}"


@pytest.mark.parametrize("path", list(fields()))
def test_another_value_of_a_field_has_an_effect(path: str, outcome, unflipped: dict[str, Any]):
    assert path in FLIPS, f"{path} is new: add it to FLIPS with another value and a probe that shows its effect"
    flip = FLIPS[path]
    if key(flip) not in unflipped:
        unflipped[key(flip)] = outcome(flip.probe, flip.under)
    assert outcome(flip.probe, flip.under | {path: flip.value}) != unflipped[key(flip)]


@pytest.mark.parametrize("flip", {key(flip): flip for flip in FLIPS.values()}.values(), ids=key)
def test_without_a_flip_a_probe_has_the_same_outcome_again(flip: Flip, outcome, unflipped: dict[str, Any]):
    if key(flip) not in unflipped:
        unflipped[key(flip)] = outcome(flip.probe, flip.under)
    assert outcome(flip.probe, flip.under) == unflipped[key(flip)]


def test_every_flip_is_of_a_field_that_exists():
    assert sorted(set(FLIPS) - set(fields())) == []
