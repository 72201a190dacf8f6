"""Pre-training, read from top to bottom: what a run does from the first file to the last checkpoint."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from onerec_jax.config import Recipe
from onerec_jax.data.batch import TargetWeights, make_batch
from onerec_jax.data.pipeline import Pipeline
from onerec_jax.data.store import Dataset
from onerec_jax.errors import InputError, StoppedError
from onerec_jax.model.batch import pathways
from onerec_jax.model.onerec import Model, build
from onerec_jax.model.prefixes import DeviceTrie, training_trie
from onerec_jax.model.table_rows import from_step_zero
from onerec_jax.parallel.distributed import start
from onerec_jax.parallel.mesh import check_batch, make_mesh, on_mesh, share_of_process
from onerec_jax.parallel.sharding import check_sharded, put_batch
from onerec_jax.storage import folder, write_text
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.train.checkpoint import Checkpoints, has_checkpoint, parse_run
from onerec_jax.train.divergence import Divergence
from onerec_jax.train.exported import is_export, start_from_export
from onerec_jax.train.flops import peak_flops, request_flops
from onerec_jax.train.metrics import MetricsLog, add, ratios
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.promotion import served_run
from onerec_jax.train.session import Session
from onerec_jax.train.state import TrainState, abstract_state, create_state
from onerec_jax.train.step import compile_step, make_eval_step, make_train_step

Report = Callable[[str], None]


def load_inputs(recipe: Recipe) -> tuple[Dataset, SemanticIds, Model]:
    """Dataset, semantic IDs and the model whose sizes follow from them."""
    dataset = Dataset(recipe.dataset_directory)
    dataset.check_settings(recipe.data, recipe.name)
    ids = SemanticIds.load(recipe.tokenizer_directory, dataset)
    if ids.codes.shape[0] != dataset.num_items:
        raise InputError(
            f"{recipe.tokenizer_directory} has semantic IDs of {ids.codes.shape[0]} items but {recipe.dataset_directory} "
            f"has {dataset.num_items}; run `onerec tokenize {recipe.name}` again"
        )
    return dataset, ids, build(recipe.model, dataset.vocabulary(ids.codebook_sizes))


def pretrain(recipe: Recipe, report: Report = print) -> Path:
    """Trains to `train.steps`, going on from the run's newest checkpoint if there is one; returns the run directory."""
    start(recipe.distributed)
    with Session(recipe) as session:
        return _pretrain(recipe, report if jax.process_index() == 0 else _silent, session)


def _pretrain(recipe: Recipe, report: Report, session: Session) -> Path:
    train, first = recipe.train, jax.process_index() == 0
    mesh = make_mesh(recipe.mesh)
    check_batch(mesh, train.batch_size, train.accumulation)
    dataset, ids, model = load_inputs(recipe)
    optimizer = make_optimizer(train, recipe.model.width_share)
    abstract = abstract_state(model, optimizer, mesh)
    check_sharded({"params": abstract.params, "tables": abstract.tables}, mesh)

    if train.eval_every and not len(dataset.examples("valid")):
        raise InputError(
            f"train.eval_every is {train.eval_every} but {dataset.directory} has no valid examples; "
            "set it to 0, or move data.split.valid_from before data.split.test_from"
        )
    run = recipe.run_directory
    given = _other_run(abstract, recipe) if train.init_from and not has_checkpoint(run) else None
    checkpoints = Checkpoints(run, train, report)
    index, count = share_of_process(mesh)
    pipeline = Pipeline(dataset, ids.codes, recipe, process_index=index, process_count=count)
    if checkpoints.steps():
        state, position = checkpoints.restore(abstract, recipe)
        pipeline.restore(position)
        report(f"resumed {run} at step {int(state.step)}")
    else:
        state = create_state(model, optimizer, recipe.seed, mesh)
        if given is not None:
            state = dataclasses.replace(state, **given)
    if first:
        write_config(run, recipe)

    trie = training_trie(recipe.model, ids.trie)
    step_fn = compile_step(make_train_step(model, recipe, optimizer), abstract, mesh)
    validate = _validation(model, dataset, ids, recipe, mesh, trie)
    log = MetricsLog(run, train.tensorboard) if first else None
    speed, divergence, rollbacks = Speed(model, recipe, mesh), Divergence(recipe.faults), 0
    window, validation, at = None, None, int(state.step)
    session.begin(at)
    try:
        while at < train.steps:
            waited = time.perf_counter()
            with session.doing("data"):
                host_batch = next(pipeline)
            speed.waited(time.perf_counter() - waited)
            speed.count(host_batch)
            state, metrics = step_fn(state, put_batch(host_batch, mesh), trie)
            window = metrics if window is None else add(window, metrics)
            at += 1
            leaving = session.stepped(at, metrics["loss"])
            last = at == train.steps
            saving = leaving or last or at % train.checkpoint_every == 0
            if saving or at % train.log_every == 0:  # what is saved has been looked at, and its line ends there
                values, window = ratios(window) | speed.window(at), None
                _write(log, at, values)
                session.log(at, values)
                report(progress_line(at, train.steps, values))
                if (wrong := divergence.found(values)) is not None:
                    state, at = _go_back(checkpoints, abstract, recipe, f"step {at}: {wrong}", rollbacks, report)
                    rollbacks += 1
                    session.back(at)
                    continue
            if train.eval_every and (last or at % train.eval_every == 0):
                with session.doing("evaluation"):
                    values = validate(state)
                validation = values["valid/loss"]
                _write(log, at, values)
                report(f"step {at}  validation loss {validation:.4f}")
                speed.restart()
            if saving:
                with session.doing("checkpoint"):
                    checkpoints.save(at, state, pipeline.state(), recipe, validation=validation)
            if leaving and not last:
                session.leave(at, checkpoints.wait)
    finally:
        if log is not None:
            log.close()
        with session.doing("checkpoint"):
            checkpoints.close()
        pipeline.close()
    return run


def _go_back(
    checkpoints: Checkpoints, abstract: TrainState, recipe: Recipe, wrong: str, rollbacks: int, report: Report
) -> tuple[TrainState, int]:
    """The newest checkpoint; the data goes on from where it is, past what the run diverged on.

    Raises:
        StoppedError: it has gone back too often, or there is no checkpoint.
    """
    checkpoints.wait()
    limit, steps = recipe.faults.rollbacks, checkpoints.steps()
    if rollbacks >= limit or not steps:
        done = f"after {rollbacks} of faults.rollbacks {limit}" if steps else "before the first checkpoint"
        raise StoppedError(
            f"stopped at {wrong}, {done}; a lower train.learning_rate or more train.warmup_steps may help"
        )
    report(f"diverged at {wrong}; back to step {steps[-1]}, and past the data since")
    state, _ = checkpoints.restore(abstract, recipe)
    return state, int(state.step)


def _silent(line: str) -> None:
    """What all processes but the first report."""


def _write(log: MetricsLog | None, step: int, values: dict[str, float]) -> None:
    if log is not None:
        log.write(step, values)


def _other_run(abstract: TrainState, recipe: Recipe) -> dict[str, Any]:
    """Parameters, tables and biases of the run, or of the export directory, that `train.init_from` names."""
    if is_export(exported := folder(recipe.train.init_from or "")):
        return start_from_export(exported, abstract, recipe)
    source, step = served_run(*parse_run(recipe.train.init_from or "", recipe.runs))
    other = Checkpoints(source)
    try:
        given = other.restore_model(abstract, recipe, step)
        return given | {"tables": from_step_zero(given["tables"])}
    finally:
        other.close()


def code_revision() -> str:
    """The git revision of the code, `unknown` outside of a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def write_config(run: Path, recipe: Recipe) -> None:
    """config.yaml: the resolved recipe under its digest and the git revision of the code."""
    write_text(run / "config.yaml", f"# digest {recipe.digest()}, revision {code_revision()}\n{recipe.to_yaml()}")


def _validation(model: Model, dataset: Dataset, ids: SemanticIds, recipe: Recipe, mesh: Mesh, trie: DeviceTrie | None):
    """state -> mean loss and accuracies over the first `eval_batches` of a fixed order of the validation examples."""
    step = on_mesh(mesh, jax.jit(make_eval_step(model)))
    size, train = recipe.train.batch_size, recipe.train
    index, count = share_of_process(mesh)
    per_process = size // count
    first = index * per_process

    def batches() -> Iterator[Any]:
        examples = dataset.examples("valid")
        order = np.random.default_rng(recipe.seed).permutation(len(examples))
        for i in range(min(train.eval_batches, -(-len(examples) // size))):
            rows = np.resize(order[i * size : (i + 1) * size], size)
            batch = make_batch(
                dataset,
                ids.codes,
                recipe.model,
                examples[rows],
                recipe.data.targets,
                TargetWeights(train.negative_weight),
                frozen=dataset.frozen,
            )
            yield put_batch(jax.tree.map(lambda x: x[first : first + per_process], batch), mesh)

    def validate(state: TrainState) -> dict[str, float]:
        total = None
        for batch in batches():
            metrics = step(state, batch, trie)
            total = metrics if total is None else add(total, metrics)
        assert total is not None
        return {f"valid/{name}": value for name, value in ratios(total).items()}

    return validate


class Speed:
    """Clock and counters between two log lines."""

    def __init__(self, model: Model, recipe: Recipe, mesh: Mesh):
        self._model, self._recipe = model, recipe
        self._devices = mesh.devices.size
        self._shares = share_of_process(mesh)[1]
        self._peak = peak_flops(mesh.devices.flat[0], recipe.model.dtype)
        self._started: float | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets the window, so that validation or compilation is not counted as slow steps."""
        self._started = None
        self._from = time.perf_counter()
        self._wait = self._events = self._targets = self._decoded = self._requests = 0.0
        self._lengths: dict[str, float] = {}

    def waited(self, seconds: float) -> None:
        self._wait += seconds

    def count(self, batch: Any) -> None:
        """Adds this process's requests, targets and events; padding is not counted."""
        scale = self._shares
        self._requests += scale * batch.user.shape[0]
        targets = batch.target_weight > 0
        self._targets += scale * float(targets.sum())
        self._decoded += scale * float(targets[:, : self._recipe.train.code_targets or None].sum())
        for name, events in pathways(batch).items():
            self._lengths[name] = self._lengths.get(name, 0.0) + scale * float((events.item >= 0).sum())

    def window(self, step: int) -> dict[str, float]:
        """Rates since the last call; MFU only where the device's peak is known."""
        seconds = time.perf_counter() - self._from
        requests = max(1.0, self._requests)
        mean = {name: self._lengths.get(name, 0.0) / requests for name in ("short", "positive", "lifelong")}
        flops = request_flops(
            self._model.config, self._model.vocabulary, targets=self._targets / requests, **mean,
            sampled_items=self._recipe.train.sampled_items, decoded=self._decoded / requests,
        )  # fmt: skip
        rate = flops.training * self._requests / seconds
        by_code = self._model.config.head != "items"
        values = {
            "examples_per_s": self._requests / seconds,
            "target_tokens_per_s": (self._decoded * self._model.vocabulary.levels if by_code else self._targets)
            / seconds,
            "targets_per_context": self._targets / requests,
            "gflops": rate / 1e9,
            "data_wait": self._wait / seconds,
            "step_ms": 1000 * seconds * self._recipe.train.batch_size / requests,
        }
        if self._peak:
            values["mfu"] = rate / (self._devices * self._peak)
        self.restart()
        return values


def progress_line(step: int, steps: int, values: dict[str, float]) -> str:
    """One line a person can follow: loss per level, expert load, rates."""
    levels = [v for k, v in sorted(values.items()) if k.startswith("loss/level")]
    parts = [
        f"step {step}/{steps}",
        f"loss {values['loss']:.3f}" + (f" ({' '.join(f'{v:.2f}' for v in levels)})" if levels else ""),
        f"{values['examples_per_s']:.0f} ex/s",
        f"{values['target_tokens_per_s']:.0f} tok/s",
        f"MFU {100 * values['mfu']:.1f}%" if "mfu" in values else f"{values['gflops']:.1f} GFLOP/s",
        f"data {100 * values['data_wait']:.0f}%",
    ]
    if values.get("skipped"):
        parts.append(f"{values['skipped']:.0%} of the steps skipped")
    load = [v for k, v in values.items() if k.endswith("max_over_mean")]
    if load:
        parts.append(f"expert load {max(load):.2f}")
    return "  ".join(parts)
