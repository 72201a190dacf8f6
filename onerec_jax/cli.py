"""`onerec VERB`: one short function per verb, no logic. Bad input is one sentence on stderr and exit code 2."""

from __future__ import annotations

import glob
import os
import sys
import time
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from onerec_jax.errors import BACKOFF, FORESEEN, ExitCode, InputError
from onerec_jax.recipe import load_recipe
from onerec_jax.scaling.verbs import app as sweep
from onerec_jax.terminal import make_console

app = typer.Typer(
    help="OneRec-style generative recommenders in JAX.", no_args_is_help=True, pretty_exceptions_enable=False,
    add_completion=True,
)  # fmt: skip
app.add_typer(sweep, name="sweep")

RecipeName = Annotated[str, typer.Argument(help="a recipe of configs/ by name, or a YAML file", metavar="RECIPE")]
RunName = Annotated[str, typer.Argument(help="a run by name or folder, RUN or RUN@STEP", metavar="RUN")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings, as key.path=value", metavar="[KEY=VALUE]...")]

console = make_console()


def say(line: Any) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def tell(line: str) -> None:
    """Progress, which is no part of what is asked for."""
    print(line, file=sys.stderr, flush=True)


@app.command()
def config(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print the resolved recipe as YAML."""
    print(load_recipe(recipe, overrides or []).to_yaml(), end="")


@app.command()
def count(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Count the parameters of a recipe's model, without memory or data."""
    from onerec_jax.model.onerec import build, count_parameters, planned_vocabulary

    loaded = load_recipe(recipe, overrides or [])
    counts = count_parameters(build(loaded.model, planned_vocabulary(loaded)))
    table = Table("part", "parameters", "")
    notes = {
        "model": "everything whose size follows from width and depth",
        "active": "of these, used by one token",
        "codes": "code embeddings and output heads",
        "features": "tag, bucket, label and category embeddings",
        "tables": "id tables, at the recipe's planned vocabulary",
    }
    for name, value in counts.items():
        table.add_row(name, f"{value:,}", notes[name])
    say(table)


@app.command()
def plan(
    recipe: RecipeName,
    topology: Annotated[str, typer.Option(help="the TPU slice, such as v5p:8x8x8, v5e:4x4 or v6e:8x8")],
    overrides: Overrides = None,
    step: Annotated[str, typer.Option(help="train, or decode: one beam search")] = "train",
    batch: Annotated[int, typer.Option(help="requests of a step on all chips, 0 = the recipe's", min=0)] = 0,
    largest: Annotated[bool, typer.Option(help="also search the largest batch that fits, by model.remat")] = False,
    thorough: Annotated[bool, typer.Option(help="compile as for a real run, several times as long")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Compile a recipe's step for a TPU slice, here, and say what it needs: memory, FLOPs, traffic, collectives, bounds."""
    import json

    from onerec_jax.plan.largest_batch import largest_batches
    from onerec_jax.plan.plan import make_plan
    from onerec_jax.plan.report import comparison, tables

    loaded = load_recipe(recipe, overrides or [])
    found = make_plan(loaded, topology, batch, step, thorough=thorough)
    search = largest_batches(loaded, topology, found.ways, tell, thorough=thorough) if largest else {}
    if as_json:
        others = {policy: other and other.to_json() for policy, other in search.items()}
        print(json.dumps({**found.to_json(), **({"largest": others} if largest else {})}, indent=1))
        return
    say(tables(found))
    if largest:
        say(comparison(search))


@app.command()
def data(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Turn a recipe's log into a dataset directory."""
    from onerec_jax.data.prepare import prepare
    from onerec_jax.data.store import Dataset

    card = Dataset(prepare(load_recipe(recipe, overrides or []))).card
    counts = card["counts"]
    say(", ".join(f"{value:,} {name}" for name, value in counts.items() if isinstance(value, int)))
    if counts["train_targets"] < 0.5 * counts["train_events"]:
        say(
            f"warning: only {counts['train_targets'] / counts['train_events']:.0%} of the train events are ever a target; "
            "see data.min_history, data.targets and data.target_stride"
        )


@app.command()
def tokenize(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Fit the tokenizer on a dataset's items, print its quality and write its report."""
    from onerec_jax.data.store import Dataset
    from onerec_jax.tokenizer.content import content_rows
    from onerec_jax.tokenizer.quality import table
    from onerec_jax.tokenizer.report import write_report
    from onerec_jax.tokenizer.semantic_ids import fit_and_save

    loaded = load_recipe(recipe, overrides or [])
    dataset, report = Dataset(loaded.dataset_directory), loaded.tokenizer_directory / "report.html"
    content = content_rows(dataset, loaded.tokenizer, loaded.seed)
    ids = fit_and_save(dataset, loaded.tokenizer, loaded.seed, loaded.tokenizer_directory, content)
    say(table(ids.quality))
    write_report(ids, dataset, content, report)
    say(f"report: {report}")


@app.command()
def expand(
    recipe: RecipeName,
    former: Annotated[str, typer.Option(help="dataset directory that the existing semantic IDs were made of")],
    overrides: Overrides = None,
    levels: Annotated[str, typer.Option(help="codebooks that grow: last, or all")] = "last",
    codes: Annotated[
        int | None, typer.Option(help="new codes per grown level; by default as the catalogue grew")
    ] = None,
    penalty: Annotated[float, typer.Option(help="weight of using a code again")] = 0.5,
) -> None:
    """Give the new items of a grown dataset semantic IDs, without moving an existing one."""
    from pathlib import Path

    from onerec_jax.data.store import Dataset
    from onerec_jax.tokenizer.expansion import Expansion, expand_semantic_ids
    from onerec_jax.tokenizer.semantic_ids import SemanticIds
    from onerec_jax.tokenizer.versions import table, version_report

    loaded, old = load_recipe(recipe, overrides or []), Dataset(former)
    dataset, ids = Dataset(loaded.dataset_directory), SemanticIds.load(Path(former) / "semantic_ids", old)
    expansion = Expansion(levels, codes, penalty)  # type: ignore[arg-type]  # which refuses any other levels
    grown = expand_semantic_ids(dataset, old, ids, loaded.tokenizer, loaded.seed, expansion)
    grown.save(loaded.tokenizer_directory)
    say(table(version_report(ids, grown, old.item_ids, dataset.item_ids)))


@app.command()
def pretrain(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train, or go on training from the run's newest checkpoint."""
    from onerec_jax.train import loop

    run = loop.pretrain(load_recipe(recipe, overrides or []), say)
    say(f"run: {run}")


@app.command()
def rsft(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Reject-sampling fine-tuning: train on, on the requests watched longest. Run NAME-rsft."""
    from onerec_jax.evaluate.stages import fine_tune

    say(f"run: {fine_tune(load_recipe(recipe, overrides or []), say)}")


@app.command()
def reward(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train the reward model on logged feedback and measure it on the test split. Run NAME-reward."""
    from onerec_jax.reward import training

    run = training.train_reward(load_recipe(recipe, overrides or []), say)
    say(training.quality_table(training.measure_reward(run)))
    say(f"run: {run}")


@app.command()
def rl(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Reinforcement learning on the model's own generations, beside the loss of RSFT. Run NAME-rl."""
    from onerec_jax.evaluate.stages import reinforce_watched

    say(f"run: {reinforce_watched(load_recipe(recipe, overrides or []), say)}")


@app.command()
def ab(
    runs: Annotated[list[str], typer.Argument(help="two runs or more, RUN or RUN@STEP; the first is compared with")],
    users: Annotated[int, typer.Option(help="fresh simulated users, the same for every run", min=2)] = 500,
    sessions: Annotated[int, typer.Option(help="sessions of every user", min=1)] = 3,
    impressions: Annotated[int, typer.Option(help="items shown in a session", min=1)] = 10,
    best_of: Annotated[int, typer.Option(help="one more arm: the truly best of so many of the first run's", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="of the users' luck")] = 0,
    folder: Annotated[str, typer.Option(help="where table, plot and page go; by default beside the last run")] = "",
) -> None:
    """Let runs serve the same fresh simulated users, and compare what these truly watch, like and see."""
    from pathlib import Path

    from onerec_jax.evaluate.ab_report import write_report
    from onerec_jax.evaluate.ab_test import ab_test
    from onerec_jax.generate.load import load_recommender

    loaded = {Path(run).name: load_recommender(run) for run in runs}
    if len(loaded) < len(runs):
        raise InputError(f"two runs of one name cannot be told apart: {', '.join(runs)}")
    result = ab_test(loaded, users, sessions, impressions, seed, best_of, progress=True)
    say(result.table())
    place = Path(folder) if folder else list(loaded.values())[-1].run / "ab"
    say(f"report: {write_report(result, place)}")


@app.command()
def posttrain(recipe: RecipeName, overrides: Overrides = None) -> None:
    """The road after pre-training: RSFT, the reward model, RL; on a simulated log also the A/B test of what came out."""
    from onerec_jax.config import SimulatorSource
    from onerec_jax.posttrain.loop import rl_recipe
    from onerec_jax.posttrain.rsft import rsft_recipe

    loaded = load_recipe(recipe, overrides or [])
    for stage in (rsft, reward, rl):
        stage(recipe, overrides)
    stages = [str(r.run_directory) for r in (loaded, rsft_recipe(loaded), rl_recipe(loaded))]
    for run in stages:
        evaluate(run)
    if isinstance(loaded.data.source, SimulatorSource):
        ab(stages, best_of=loaded.evaluate.beam_width)


@app.command()
def evaluate(run: RunName, overrides: Overrides = None) -> None:
    """Item-level metrics of a run over the full catalogue, beside its floors."""
    from onerec_jax.evaluate import evaluation
    from onerec_jax.generate.load import load_recommender

    say(evaluation.evaluate(load_recommender(run, overrides or []), say).table())


@app.command()
def cold(
    run: RunName,
    overrides: Overrides = None,
    draft: Annotated[int, typer.Option(help="candidates of a round", min=1)] = 50,
    threshold: Annotated[float | None, typer.Option(help="mean log P to accept; by default the best on valid")] = None,
    levels: Annotated[int, typer.Option(help="codes of new items that count; 0 = the best, or all but one", min=0)] = 0,
) -> None:
    """Recall of warm and of new items apart: of a run, of drafts by content that it verified, and of the drafter alone."""
    from onerec_jax.evaluate.cold_start import evaluate_cold
    from onerec_jax.generate.cold import ColdOptions
    from onerec_jax.generate.load import load_recommender

    recommender = load_recommender(run, overrides or [])
    options = ColdOptions(draft, threshold or 0.0, levels or None)
    say(evaluate_cold(recommender, options, choose=threshold is None, report=say).table())


@app.command()
def recommend(
    run: RunName,
    user: Annotated[str, typer.Option(help="the user's id, as in the log")],
    overrides: Overrides = None,
    top: Annotated[int, typer.Option(help="how many items", min=1)] = 5,
    leave_out: Annotated[str, typer.Option(help="items not to list, ID,ID,..")] = "",
    only: Annotated[str, typer.Option(help="the only items to list, ID,ID,..")] = "",
    diversity: Annotated[
        float, typer.Option(help="price, in log P, of every better item of the same group", min=0)
    ] = 0.0,
    diverse_by: Annotated[Literal["code", "author"], typer.Option(help="the group: first code, or author")] = "code",
) -> None:
    """Recommend items to one user after all that the log knows of them."""
    from onerec_jax.evaluate.rerank import Reranker
    from onerec_jax.generate.load import load_recommender
    from onerec_jax.generate.recommendation import recommend_to

    loaded = load_recommender(run, overrides or [])
    options: Any = {"leave_out": leave_out, "only": only, "diversity": diversity, "diverse_by": diverse_by}
    ranks = Reranker.of(loaded) if loaded.recipe.evaluate.rerank else None
    for part in recommend_to(loaded, user, top, **options, ranks=ranks):
        say(part)


@app.command()
def export(
    run: RunName,
    to: Annotated[str, typer.Option(help="the folder to write; an older export there is replaced")],
    overrides: Overrides = None,
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16 or int8")] = "float32",
    top: Annotated[int, typer.Option(help="items of a list", min=1)] = 10,
    beams: Annotated[int, typer.Option(help="beams of a search, 0 = evaluate.beam_width", min=0)] = 0,
    users: Annotated[int, typer.Option(help="sample users, whose histories go with it; 0 = none", min=0)] = 50,
    shard_gb: Annotated[float, typer.Option(help="most gigabytes of a file of weights", min=0)] = 5.0,
) -> None:
    """Write a run as a directory that JAX, PyTorch and any program that runs StableHLO can load, without this package."""
    from onerec_jax.export.verb import export_run

    width = beams or None
    place = export_run(run, to, overrides or [], dtype=dtype, k=top, width=width, users=users, shard_gb=shard_gb)
    say(f"export: {place}")


@app.command()
def run(recipe: RecipeName, overrides: Overrides = None) -> None:
    """The whole road: data, tokenize, pretrain, evaluate, and a sample of recommendations."""
    from onerec_jax.generate.load import load_recommender
    from onerec_jax.generate.recommendation import recommend_to, sample_user

    data(recipe, overrides)
    tokenize(recipe, overrides)
    pretrain(recipe, overrides)
    loaded = load_recipe(recipe, overrides or [])
    folder = str(loaded.run_directory)
    evaluate(folder)
    recommender = load_recommender(folder)
    for part in recommend_to(recommender, str(sample_user(recommender)), 5):
        say(part)


@app.command()
def goodput(run: RunName) -> None:
    """Where the seconds of a run went, over all of its starts."""
    from onerec_jax.train.checkpoint import parse_run
    from onerec_jax.train.goodput import goodput, goodput_table

    say(goodput_table(*goodput(parse_run(run, "runs")[0])))


@app.command()
def board(
    name: Annotated[str, typer.Argument(help="a board of configs/boards/ by name, or a YAML file", metavar="BOARD")],
    overrides: Overrides = None,
    only: Annotated[str, typer.Option(help="the row of this name, or those whose name contains this")] = "",
    processes: Annotated[int, typer.Option(help="jobs at a time, each on its share of the processors", min=1)] = 1,
    record: Annotated[str, typer.Option(help="folder of results to go on from, and to keep new ones in")] = "",
) -> None:
    """Train and evaluate all rows of a board on all its seeds, or go on where it was stopped."""
    from pathlib import Path

    from onerec_jax.evaluate.board import load_board, run_board

    kept = Path(record) if record else None
    folder = run_board(load_board(name), overrides or [], only=only, processes=processes, record=kept, report=say)
    say((folder / "board.md").read_text())
    say(f"board: {folder / 'board.html'}")


@app.command()
def fit(
    table: Annotated[str, typer.Argument(help="runs: params, tokens or flops, and a metric of each", metavar="CSV")],
    kind: Annotated[str, typer.Option(help="parametric: of params and tokens; power: of one; isoflop")] = "parametric",
    metric: Annotated[str, typer.Option(help="the column that is fitted")] = "loss",
    by: Annotated[str | None, typer.Option(help="kind power: params, tokens or flops")] = None,
    objective: Annotated[str | None, typer.Option(help="huber_log, the default, or squares")] = None,
    asymptote: Annotated[float | None, typer.Option(help="E where it is known, 0 = none; by default fitted")] = None,
    rising: Annotated[bool, typer.Option(help="the metric rises with size, as Recall@k does")] = False,
    budget: Annotated[list[float] | None, typer.Option(help="FLOPs to find the best params and tokens for")] = None,
    factor: Annotated[
        float | None, typer.Option(help="FLOPs per parameter and token, 6 unless CSV has all three")
    ] = None,
    resamples: Annotated[int, typer.Option(help="of the runs, for the intervals")] = 1000,
    seed: Annotated[int, typer.Option(help="of the resamples", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, not rounded, instead of tables")] = False,
) -> None:
    """Fit a scaling law to a table of runs: constants with intervals, how far they hang on one run, the best sizes."""
    from onerec_jax.scaling.report import fit_runs, tables, to_json
    from onerec_jax.scaling.runs import read_runs

    runs = read_runs(table, metric, factor)
    found = fit_runs(runs, kind, by, objective, asymptote, rising, budget or [], resamples, seed)
    if as_json:
        print(to_json(found))
    else:
        say(tables(found))


@app.command()
def serve(
    directory: Annotated[str, typer.Argument(help="an export directory", metavar="DIR")],
    host: Annotated[
        str, typer.Option(help="address to listen at; the default is for this machine alone")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 = any that is free")] = 8000,
    beams: Annotated[str, typer.Option(help="numbers of beams on offer, W,W,..; by default that of the export")] = "",
    max_batch: Annotated[int, typer.Option(help="requests that one run of the model answers")] = 64,
    max_wait_ms: Annotated[float, typer.Option(help="how long a request may wait for others")] = 5.0,
    queue: Annotated[int, typer.Option(help="requests that may wait at a time")] = 256,
) -> None:
    """Serve an export over HTTP, with a page to try it on. For trying and load-testing, not for the open internet."""
    from onerec_jax.serve import server
    from onerec_jax.serve.released import load_released

    settings = server.Settings(host, port, server.numbers(beams), max_batch, max_wait_ms, queue)
    server.serve(load_released(directory), settings, say)


@app.command()
def launch(
    recipe: Annotated[
        str, typer.Argument(help="a recipe of configs/ by name, or a YAML file; with --verb board a board")
    ],
    on: Annotated[str, typer.Option(help="local, slurm or gke")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="settings of the recipe, and those of the cluster as cluster.KEY=VALUE", metavar="[KEY=VALUE]..."
        ),
    ] = None,
    verb: Annotated[
        str, typer.Option(help="what runs: pretrain, rsft, reward, rl, run, board or evaluate")
    ] = "pretrain",
    cluster: Annotated[str, typer.Option(help="YAML file of settings of the cluster")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be submitted, and do nothing")] = False,
) -> None:
    """Start a job: processes of this machine that train as one, a Slurm job, or a JobSet on GKE."""
    from onerec_jax.launch.launch import launch as start

    code = start(recipe, overrides or [], on=on, verb=verb, cluster=cluster, dry_run=dry_run)
    raise typer.Exit(code)


ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def main() -> None:
    """Entry point of the `onerec` command."""
    if not any(glob.glob(pattern) for pattern in ACCELERATORS):  # else JAX asks libtpu, which complains at length
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        app()
    except FORESEEN as error:
        print(f"onerec: {error}", file=sys.stderr, flush=True)
        if error.code == ExitCode.STORAGE:
            time.sleep(float(os.environ.get(BACKOFF, 0)))
        raise SystemExit(int(error.code)) from None


if __name__ == "__main__":
    main()
