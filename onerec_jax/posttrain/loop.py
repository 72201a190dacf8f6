"""Reinforcement learning, read from top to bottom: rollout, reward, step, refresh, and the watch over the held-out recall.

Everything random is a function of the recipe's seed and the step, and a rollout is one of the policy that generates, which
checkpoints hold beside the one that learns: a run that is killed goes on bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from onerec_jax.config import Recipe, RewardConfig
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError, StoppedError
from onerec_jax.generate.recommender import FREQUENCIES, Recommender, kept_frequencies
from onerec_jax.parallel.distributed import start
from onerec_jax.parallel.mesh import check_batch, make_mesh, on_mesh, share_of_process
from onerec_jax.parallel.sharding import batch_sharding, put_batch
from onerec_jax.posttrain.drift import make_drift
from onerec_jax.posttrain.experience import Policy, make_experience
from onerec_jax.posttrain.judge import BY_THE_LOG, check_rewards, learnt
from onerec_jax.posttrain.rsft import rsft_recipe
from onerec_jax.posttrain.step import AGAINST_THE_LOG, make_rl_step
from onerec_jax.reward.candidates import make_catalogue
from onerec_jax.reward.lists import ListScorer
from onerec_jax.reward.training import load_reward, reward_recipe
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train.checkpoint import POLICY, Checkpoints, parse_run
from onerec_jax.train.divergence import stop_if_lost
from onerec_jax.train.loop import load_inputs, write_config
from onerec_jax.train.metrics import MetricsLog, add, ratios
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.promotion import served_run
from onerec_jax.train.session import Session
from onerec_jax.train.state import TrainState, abstract_state, create_state

Report = Callable[[str], None]
# (recipe, dataset) -> (recommender, reward or None) -> metrics, `recall` among them
MakeWatch = Callable[[Recipe, Dataset], Callable[[Recommender, ListScorer | None], dict[str, float]]]

_REQUESTS = 7919  # apart from the recipe's seed: which requests candidates are generated for


def rl_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the RL run `NAME-rl`: RSFT's requests, rates of its own."""
    settings = recipe.rl
    changes = {
        "init_from": settings.init_from or str(rsft_recipe(recipe).run_directory),
        "kept_share": recipe.rsft.share,
        "kept_per": recipe.rsft.per,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "warmup_steps": 0,
        "schedule": "constant" if settings.final_rate == 1 else "cosine",
        "final_rate": settings.final_rate,
        "learning_rate": settings.learning_rate,
        "table_rate": settings.table_rate,
        "half_life_from": 0.0,
        "log_every": settings.log_every,
        "checkpoint_every": settings.checkpoint_every,
    }
    return recipe.stage("rl", train=recipe.train.model_copy(update=changes))


def reinforce(recipe: Recipe, make_watch: MakeWatch, report: Report = print) -> Path:
    """Learns to `rl.steps`, or goes on from the run's newest checkpoint; returns the run directory, `NAME-rl`.

    Raises:
        InputError: the recipe, a run it names, or the dataset does not fit.
        StoppedError: the held-out recall fell by more than `rl.max_fall`; the last checkpoint is of before.
    """
    start(recipe.distributed)
    recipe = rl_recipe(recipe)
    with Session(recipe) as session:
        return _reinforce(recipe, make_watch, report, session)


def _reinforce(recipe: Recipe, make_watch: MakeWatch, report: Report, session: Session) -> Path:
    settings, first = recipe.rl, jax.process_index() == 0
    mesh = make_mesh(recipe.mesh)
    check_batch(mesh, settings.batch_size, recipe.train.accumulation)
    check_batch(mesh, settings.requests, recipe.train.accumulation)
    dataset, ids, model = load_inputs(recipe)
    _check(recipe, dataset)
    reward = load_reward(_reward_run(recipe), recipe) if learnt(recipe) else None
    optimizer = make_optimizer(recipe.train, recipe.model.width_share)
    abstract = abstract_state(model, optimizer, mesh)
    began = _start_policy(recipe, abstract)
    run = recipe.run_directory
    checkpoints = Checkpoints(run, recipe.train, report)
    logged, requests, histories = _pipelines(
        recipe, dataset, ids, mesh, recipe.reward if reward is None else reward[0].config
    )
    if checkpoints.steps():
        state, position = checkpoints.restore(abstract, recipe)
        behaviour: Policy = checkpoints.restore_behaviour(abstract)
        for pipeline in (logged, requests, histories):
            pipeline.restore(position)
        frequencies = kept_frequencies(run)
        report(f"resumed {run} at step {int(state.step)}")
    else:
        state = dataclasses.replace(create_state(model, optimizer, recipe.seed, mesh), **_copy(began))
        behaviour = _copy(began)
        frequencies = None
        if recipe.evaluate.label_shift_days:
            source, _ = _start_run(recipe)
            before = Recommender(source, recipe, dataset, ids, model, state, kept_frequencies(source))
            frequencies = _keep_frequencies(before, run)
    if first:
        write_config(run, recipe)

    catalogue = make_catalogue(dataset, ids.codes)
    experience = on_mesh(mesh, make_experience(model, recipe, dataset.labels, reward and reward[0]))
    drift = on_mesh(mesh, make_drift(model, recipe))
    step = on_mesh(mesh, _compiled(make_rl_step(model, recipe, optimizer), abstract, mesh))
    recommender = Recommender(run, recipe, dataset, ids, model, state, frequencies)
    listed = recommender.catalogue
    if settings.watch_every:
        watch, scorer = make_watch(recipe, dataset), reward and ListScorer(recipe, dataset, ids, *reward, mesh)
        guard = _Guard(recipe, lambda policy: watch(recommender.with_state(policy), scorer), report)
        guard.begin(dataclasses.replace(state, **began))
    else:
        guard = None
    log = MetricsLog(run, recipe.train.tensorboard) if first else None
    window, at = None, int(state.step)
    session.begin(at)
    try:
        while at < settings.steps:
            with session.doing("data"):
                request, history, of_log = (put_batch(next(p), mesh) for p in (requests, histories, logged))
            key = jax.random.fold_in(jax.random.key(recipe.seed + _REQUESTS), at)
            seen, of_rollout = experience(
                behaviour, began, reward and reward[1], catalogue, listed, request, history, key
            )
            state, metrics = step(state, of_log, seen, listed.trie)
            metrics = metrics | of_rollout
            window = metrics if window is None else add(window, metrics)
            at += 1
            leaving = session.stepped(at, metrics["gradient_norm"])
            if settings.refresh_every and at % settings.refresh_every == 0:
                behaviour = _copy({name: getattr(state, name) for name in POLICY})
            last = at == settings.steps
            saving = leaving or last or at % settings.checkpoint_every == 0
            if saving or at % settings.log_every == 0:
                policy = {name: getattr(state, name) for name in POLICY}
                values, window = ratios(window | drift(began, policy, seen, listed.trie)), None
                if log is not None:
                    log.write(at, values)
                session.log(at, values)
                report(progress_line(at, settings.steps, values))
                stop_if_lost(at, values)
            if guard is not None and (last or at % settings.watch_every == 0):
                with session.doing("evaluation"):
                    values = guard.look(at, state)
                if log is not None:
                    log.write(at, {f"held_out/{name}": value for name, value in values.items()})
            if saving:
                with session.doing("checkpoint"):
                    checkpoints.save(at, state, logged.state(), recipe, behaviour)
            if leaving and not last:
                session.leave(at, checkpoints.wait)
    finally:
        for pipeline in (logged, requests, histories):
            pipeline.close()
        if log is not None:
            log.close()
        checkpoints.close()
    return run


def _check(recipe: Recipe, dataset: Dataset) -> None:
    check_rewards(recipe, dataset.labels)
    answered = [name for name in BY_THE_LOG if recipe.rl.rewards.get(name)]
    answered += [recipe.rl.objective] if recipe.rl.objective in AGAINST_THE_LOG else []
    if recipe.rl.ask == "end" and answered:
        raise InputError(f"rl.ask end has requests that the log does not answer, which {answered[0]} needs: rl.ask log")
    if recipe.model.head == "items":
        raise InputError("model.head items has no decoder to generate with: reinforcement learning needs codes or both")
    if recipe.rl.item_weight and recipe.model.head != "both":
        raise InputError(
            f"rl.item_weight needs model.head both: {recipe.model.head} has no item head beside its decoder"
        )
    if recipe.rl.watch_every and not len(dataset.examples("valid")):
        raise InputError(
            f"rl.watch_every is {recipe.rl.watch_every} but {dataset.directory} has no valid examples; set it to 0, or move "
            "data.split.valid_from before data.split.test_from"
        )


def _reward_run(recipe: Recipe) -> str:
    base = recipe.model_copy(update={"name": recipe.name.removesuffix("-rl")})
    return recipe.rl.reward_run or str(reward_recipe(base).run_directory)


def _start_run(recipe: Recipe) -> tuple[Path, int | None]:
    """The directory of the run that RL starts from, and the step; None: its newest."""
    return served_run(*parse_run(recipe.train.init_from or "", recipe.runs))


def _start_policy(recipe: Recipe, abstract: TrainState) -> Policy:
    """The policy of the run that RL starts from."""
    folder, step = _start_run(recipe)
    other = Checkpoints(folder)
    try:
        return other.restore_model(abstract, recipe, step)
    finally:
        other.close()


def _keep_frequencies(before: Recommender, run: Path) -> np.ndarray:
    """The item frequencies by which the run's lists are corrected, those of the run that it starts from; kept beside it."""
    frequencies = before.item_frequencies()
    if jax.process_index() == 0:
        with (run / FREQUENCIES).open("wb") as file:
            np.save(file, frequencies)
    return frequencies


def _copy(policy: Policy) -> Policy:
    """Arrays of its own, which no step donates."""
    return jax.tree.map(jnp.copy, policy)


def _pipelines(
    recipe: Recipe, dataset: Dataset, ids: SemanticIds, mesh: Mesh, reward: RewardConfig
) -> tuple[Pipeline, Pipeline, Pipeline]:
    """Logged requests; requests to generate for, after a cut of the log; and those as the reward model reads them."""
    changes = {"batch_size": recipe.rl.requests, "masked_share": 0.0, "length_buckets": ()}
    train = recipe.train.model_copy(update=changes)
    asked = recipe.model_copy(update={"train": train, "seed": recipe.seed + _REQUESTS})
    history = reward_recipe(recipe.model_copy(update={"reward": reward})).model
    read = asked.model_copy(update={"model": history})
    index, count = share_of_process(mesh)
    splits = ("train", *["train" if recipe.rl.ask == "log" else "end"] * 2)
    made = [
        Pipeline(dataset, ids.codes, r, split, process_index=index, process_count=count)
        for r, split in zip((recipe, asked, read), splits, strict=True)
    ]
    return made[0], made[1], made[2]


def _compiled(step: Callable[..., Any], abstract: TrainState, mesh: Mesh) -> Callable[..., Any]:
    """`step` jitted: the state stays in place and is donated, requests are split over the data axes."""
    places, batch = jax.tree.map(lambda leaf: leaf.sharding, abstract), batch_sharding(mesh)
    given = (places, batch, batch, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(step, in_shardings=given, out_shardings=(places, None), donate_argnums=0)


class _Guard:
    """Measures the held-out recall, and ends a run whose recall has fallen."""

    def __init__(self, recipe: Recipe, measure: Callable[[TrainState], dict[str, float]], report: Report):
        self._settings, self._measure, self._report = recipe.rl, measure, report
        self._before = 0.0

    def begin(self, state: TrainState) -> None:
        """What the run is compared with."""
        values = self._measure(state)
        self._before = values["recall"]
        self._report(f"held-out before  {_named(values)}")

    def look(self, at: int, state: TrainState) -> dict[str, float]:
        values, settings = self._measure(state), self._settings
        self._report(f"held-out at {at}  {_named(values)}")
        if values["recall"] < (1 - settings.max_fall) * self._before:
            raise StoppedError(
                f"stopped at step {at}: held-out Recall@{settings.watch_k} fell from {self._before:.4f} to "
                f"{values['recall']:.4f}, by more than rl.max_fall {settings.max_fall:.0%}; the last checkpoint is of before, and "
                "a lower rl.learning_rate or rl.weight, or a higher rl.ntp_weight, keeps more"
            )
        return values


def _named(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def progress_line(step: int, steps: int, values: dict[str, float]) -> str:
    """One line a person can follow: reward, what the objective did, legality."""
    parts = [f"step {step}/{steps}", f"reward {values['reward']:.4f}", f"best {values['reward/best']:.4f}"]
    parts += [f"loss {values['rl/loss']:+.4f}"]
    parts += [f"NTP {values['loss']:.3f}"] if "loss" in values else []
    for name, label in (
        ("rl/ratio", "ratio"),
        ("rl/clipped", "clipped"),
        ("rl/margin", "margin"),
        ("rl/accepted", "accepted"),
    ):
        parts += [f"{label} {values[name]:.3f}"] if name in values else []
    parts += [f"log p {values['policy/log_p']:.2f}"]
    moved = [value for name, value in values.items() if name.startswith("policy/kl/level")]
    parts += [f"KL {sum(moved):.3f}"] if moved else []
    parts += [f"legal {values['legality']:.3f}"] if "legality" in values else []
    return "  ".join(parts)
