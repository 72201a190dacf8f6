"""Trains the reward model on logged feedback, and measures it on later days."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.progress import track
from rich.table import Table

from onerec_jax.config import Recipe
from onerec_jax.data.batch import make_batch
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError
from onerec_jax.parallel.distributed import start
from onerec_jax.parallel.mesh import check_batch, data_parallel, make_mesh, on_mesh, share_of_process
from onerec_jax.parallel.sharding import batch_sharding, put_batch, shardings
from onerec_jax.reward.candidates import Catalogue, make_catalogue
from onerec_jax.reward.pscore import RewardModel, build_reward, make_reward_loss, outcomes
from onerec_jax.reward.quality import quality
from onerec_jax.storage import write_text
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train.checkpoint import Checkpoints, parse_run
from onerec_jax.train.divergence import counted, stop_if_lost, where_finite
from onerec_jax.train.loop import load_inputs, write_config
from onerec_jax.train.metrics import Metrics, MetricsLog, add, mean, ratios
from onerec_jax.train.session import Session
from onerec_jax.train.state import TrainState

QUALITY = "reward.json"


def reward_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the reward run: its requests are read by one pathway, the most recent events, and all are learnt from."""
    settings = recipe.reward
    model = recipe.model.model_copy(
        update={"short_length": settings.history, "positive_length": 0, "lifelong_length": 0, "causal": False}
    )
    changes = {"steps": settings.steps, "batch_size": settings.batch_size, "masked_share": 0.0, "length_buckets": ()}
    changes |= {"kept_share": 1.0}  # of what is not liked there must be examples too
    train = recipe.train.model_copy(update=changes)
    return recipe.stage("reward", model=model, train=train)


def load_reward_inputs(recipe: Recipe) -> tuple[Dataset, SemanticIds, RewardModel]:
    """Dataset, semantic IDs and the reward model whose sizes follow from them; `recipe` is that of any stage."""
    dataset, ids, model = load_inputs(recipe)
    return dataset, ids, build_reward(recipe.reward, model.vocabulary)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    settings = recipe.reward
    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.steps, alpha=0.05)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=settings.weight_decay))


def _init(model: RewardModel, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = model.init(seed)
    return TrainState(np.zeros((), np.int32), params, optimizer.init(params), {}, {})


def _abstract(model: RewardModel, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    shapes = jax.eval_shape(lambda: _init(model, optimizer, 0))
    places = shardings(shapes, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def make_reward_step(
    model: RewardModel, recipe: Recipe, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Catalogue], tuple[TrainState, Metrics]]:
    """A pure function of (state, global batch, catalogue)."""
    gradients = jax.value_and_grad(make_reward_loss(model), has_aux=True)

    def step(state: TrainState, batch: Any, catalogue: Catalogue) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step) if model.config.dropout else None
        (_, metrics), grads = gradients(state.params, batch, catalogue, key)
        grads = jax.tree.map(lambda g: g / (metrics["loss"][1] + 1e-20), grads)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        metrics["gradient_norm"] = mean(norm)
        changed = optax.apply_updates(state.params, updates), optimizer_state
        params, optimizer_state = where_finite(finite, changed, (state.params, state.optimizer))
        return TrainState(state.step + 1, params, optimizer_state, {}, {}), counted(finite, metrics)

    return step


def train_reward(recipe: Recipe, report: Callable[[Any], None] = print) -> Path:
    """Trains to `reward.steps`, or goes on from the run's newest checkpoint; returns the run directory, `NAME-reward`."""
    start(recipe.distributed)
    recipe = reward_recipe(recipe)
    with Session(recipe) as session:
        return _train_reward(recipe, report, session)


def _train_reward(recipe: Recipe, report: Callable[[Any], None], session: Session) -> Path:
    first = jax.process_index() == 0
    mesh = make_mesh(recipe.mesh)
    check_batch(mesh, recipe.train.batch_size, 1)
    dataset, ids, model = load_reward_inputs(recipe)
    catalogue = make_catalogue(dataset, ids.codes)
    optimizer = _optimizer(recipe)
    abstract = _abstract(model, optimizer, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    run = recipe.run_directory
    checkpoints = Checkpoints(run, recipe.train, report)
    index, count = share_of_process(mesh)
    pipeline = Pipeline(dataset, ids.codes, recipe, process_index=index, process_count=count)
    if checkpoints.steps():
        state, position = checkpoints.restore(abstract, recipe)
        pipeline.restore(position)
        report(f"resumed {run} at step {int(state.step)}")
    else:
        state = jax.jit(lambda: _init(model, optimizer, recipe.seed), out_shardings=places)()
    if first:
        write_config(run, recipe)
    given = (places, batch_sharding(mesh), NamedSharding(mesh, PartitionSpec()))
    step = jax.jit(
        make_reward_step(model, recipe, optimizer), in_shardings=given, out_shardings=(places, None), donate_argnums=0
    )
    step_fn = on_mesh(mesh, step)
    log = MetricsLog(run, recipe.train.tensorboard) if first else None
    window, at, steps = None, int(state.step), recipe.reward.steps
    session.begin(at)
    try:
        while at < steps:
            with session.doing("data"):
                host_batch = next(pipeline)
            state, metrics = step_fn(state, put_batch(host_batch, mesh), catalogue)
            window = metrics if window is None else add(window, metrics)
            at += 1
            leaving = session.stepped(at, metrics["loss"])
            saving = leaving or at == steps or at % recipe.train.checkpoint_every == 0
            if saving or at % recipe.train.log_every == 0:
                values, window = ratios(window), None
                session.log(at, values)
                if log is not None:
                    log.write(at, values)
                    report(f"step {at}/{steps}  loss {values['loss']:.4f}  P-Score {values['loss/p_score']:.4f}")
                stop_if_lost(at, values)
            if saving:
                with session.doing("checkpoint"):
                    checkpoints.save(at, state, pipeline.state(), recipe)
            if leaving and at < steps:
                session.leave(at, checkpoints.wait)
    finally:
        pipeline.close()
        if log is not None:
            log.close()
        checkpoints.close()
    return run


def load_reward(run: str, recipe: Recipe) -> tuple[RewardModel, Any]:
    """The reward model of RUN or RUN@STEP and its parameters, for the dataset of `recipe`.

    Raises:
        InputError: no such run or checkpoint, or one of another dataset.
    """
    folder, step = parse_run(run, recipe.runs)
    checkpoints = Checkpoints(folder)
    try:
        theirs = checkpoints.recipe(step)
        _, _, model = load_reward_inputs(recipe.model_copy(update={"reward": theirs.reward}))
        abstract = _abstract(model, _optimizer(theirs), make_mesh(recipe.mesh))
        return model, checkpoints.restore_model(abstract, theirs, step)["params"]
    finally:
        checkpoints.close()


def measure_reward(run: Path, split: str = "test") -> dict[str, dict[str, float]]:
    """AUC, GAUC and calibration of every label over all impressions of a split; written into the run as reward.json.

    Raises:
        InputError: the split is empty.
    """
    checkpoints = Checkpoints(run)
    try:
        recipe = checkpoints.recipe()
    finally:
        checkpoints.close()
    dataset, ids, model = load_reward_inputs(recipe)
    targets = recipe.data.targets
    examples = impressions_by(dataset.examples(split), targets)
    if not len(examples):
        raise InputError(f"{dataset.directory} has no {split} impressions; data.split of its recipe leaves none")
    _, params = load_reward(str(run), recipe)
    catalogue, mesh = make_catalogue(dataset, ids.codes), make_mesh(recipe.mesh)
    ways = data_parallel(mesh)
    size = -(-recipe.reward.batch_size // ways) * ways

    @jax.jit
    def predict(params: Any, batch: Any, catalogue: Catalogue) -> Any:
        scores = model.bind(params)(batch, batch.target_item, catalogue, None)
        return (
            jax.nn.sigmoid(scores.labels),
            jax.nn.sigmoid(scores.fused),
            *outcomes(batch, model.config, model.vocabulary.labels),
        )

    predict_on, parts = on_mesh(mesh, predict), []
    for first in track(range(0, len(examples), size), "scoring", transient=True):
        chosen = examples[first : first + size]
        padded = chosen[np.resize(np.arange(len(chosen)), size)]
        batch = make_batch(dataset, ids.codes, recipe.model, padded, targets, frozen=dataset.frozen)
        found = predict_on(params, put_batch(batch, mesh), catalogue)
        user = np.repeat(padded[:, :1], targets, axis=1)
        parts.append([np.asarray(x)[: len(chosen)] for x in (*found, user)])
    labels, fused, y, known, user = (np.concatenate(column) for column in zip(*parts, strict=True))
    measured = {}
    for i, name in enumerate(model.labels):
        rows = known[..., i]
        measured[f"p_{name}"] = quality(labels[rows, i].astype(float), y[rows, i].astype(float), user[rows])
        on = fused[rows].astype(float)
        measured[f"p_{name}"] |= {"AUC of p_score": quality(on, y[rows, i].astype(float), user[rows])["AUC"]}
    defined = {n: {k: None if np.isnan(v) else v for k, v in values.items()} for n, values in measured.items()}
    write_text(run / QUALITY, json.dumps({"split": split, "labels": defined}, indent=1) + "\n")
    return measured


def impressions_by(examples: np.ndarray, targets: int) -> np.ndarray:
    """Examples [N,4] cut into ones of at most `targets` impressions each, all with the context of the first."""
    user, cut, start, stop = examples.T
    parts = -(-(stop - start) // targets)
    row = np.repeat(np.arange(len(examples)), parts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
    begin = start[row] + within * targets
    return np.stack([user[row], cut[row], begin, np.minimum(begin + targets, stop[row])], axis=1)


def quality_table(measured: dict[str, dict[str, float]]) -> Table:
    """A row per label."""
    columns = list(next(iter(measured.values())))
    table = Table("", *columns)
    for name, values in measured.items():
        cells = [f"{values[c]:,.0f}" if c == "impressions" else f"{values[c]:.4f}" for c in columns]
        table.add_row(name, *cells)
    return table
