"""`onerec sweep ..`: the verbs of a sweep."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from onerec_jax.terminal import make_console

FolderName = Annotated[str, typer.Argument(help="a sweep that was started: its folder, or name in runs/sweeps")]


class RunByDefault(TyperGroup):
    """`onerec sweep SWEEP ..` is `onerec sweep run SWEEP ..`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunByDefault, no_args_is_help=True, help="Run all points of a sweep, and say what they show.")


@app.command()
def run(
    sweep: Annotated[str, typer.Argument(help="a sweep of configs/sweeps/ by name, or a YAML file", metavar="SWEEP")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="settings of all points, and those of the cluster as cluster.KEY=VALUE", metavar="[KEY=VALUE]..."
        ),
    ] = None,
    launcher: Annotated[str, typer.Option(help="local, slurm or gke")] = "local",
    max_parallel: Annotated[
        int | None, typer.Option(help="points at a time; 1 on this machine, all under Slurm", min=1)
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run failed points again")] = False,
    name: Annotated[str, typer.Option(help="of the sweep's folder in RUNS/sweeps; by default the sweep's")] = "",
    cluster: Annotated[str, typer.Option(help="YAML file of settings of the cluster")] = "",
    evaluate: Annotated[bool, typer.Option("--evaluate", help="also measure Recall and NDCG of every point")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be run, and do nothing")] = False,
) -> None:
    """Run the points that are not done, or go on where they were stopped; then write runs.csv and report.html."""
    from onerec_jax.scaling.launcher import launch_sweep, make_request

    request = make_request(
        sweep, overrides or [], launcher=launcher, max_parallel=max_parallel, retry_failed=retry_failed, folder_name=name,
        cluster=cluster, evaluate=evaluate,
    )  # fmt: skip
    raise typer.Exit(launch_sweep(request, dry_run, _tell))


@app.command()
def status(sweep: FolderName) -> None:
    """Show where all points of a sweep are."""
    from onerec_jax.scaling.points import load_folder
    from onerec_jax.scaling.progress import rows_of, table

    found = load_folder(sweep)
    make_console().print(table(found, rows_of(found, set())), highlight=False)


@app.command()
def report(
    sweep: FolderName,
    metric: Annotated[
        str, typer.Option(help="loss, valid_loss, loss_level1, ..; by default valid_loss where all runs have it")
    ] = "",
    resamples: Annotated[int, typer.Option(help="of the runs, for the intervals")] = 1000,
) -> None:
    """Write runs.csv, report.html and plots/ of the points that are done."""
    from onerec_jax.scaling.page import write_report
    from onerec_jax.scaling.points import load_folder

    _tell(f"report: {write_report(load_folder(sweep), metric, resamples)}")


@app.command(hidden=True)
def point(
    recipe: Annotated[str, typer.Argument(help="recipe.yaml of a point")],
    overrides: Annotated[list[str] | None, typer.Argument(help="distributed.*, which a launcher adds")] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate")] = False,
) -> None:
    """Train one point; what every process of a sweep runs."""
    from onerec_jax.scaling.outcome import run_point

    run_point(recipe, overrides or [], evaluate, _tell)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
