"""What a job runs: a verb of `onerec`, and the checked and resolved settings that travel with it as files."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePath

import yaml
from jax.sharding import AbstractMesh

from onerec_jax.config import LocalCluster, Recipe, SlurmCluster, digest_of
from onerec_jax.errors import InputError
from onerec_jax.evaluate.board import Board, jobs, load_board
from onerec_jax.parallel.mesh import AXES, check_batch, mesh_sizes
from onerec_jax.recipe import load_recipe

JOINED = ("pretrain", "rsft", "reward", "rl")  # train as one on several processes
ALONE = ("run", "board", "evaluate")
POINT = "sweep point"  # which no one calls but `onerec sweep`


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of `onerec`, by every process of a job."""

    verb: str
    recipe: Recipe  # with --verb board the one that all rows start from
    overrides: tuple[str, ...] = ()  # of the call: with board and evaluate, whose settings a file does not hold
    board: Board | None = None

    @property
    def name(self) -> str:
        if self.board is not None:
            return self.board.name
        return self.recipe.name if self.verb in ("pretrain", "run") else f"{self.recipe.name}-{self.verb}"

    def digest(self) -> str:
        """Changes with anything that the job does: two jobs of one digest have the same files."""
        return digest_of(self.files(PurePath()), self.words(PurePath()))

    def files(self, folder: PurePath) -> dict[str, str]:
        """The text of each file that the job reads, where all of them lie in `folder`."""
        recipe = {"recipe.yaml": self.recipe.to_yaml()}
        if self.board is None:
            return recipe
        board = self.board.model_dump(mode="json") | {"recipe": str(folder / "recipe.yaml")}
        return {**recipe, "board.yaml": yaml.safe_dump(board, sort_keys=False)}

    def words(self, folder: PurePath) -> list[str]:
        """What stands after `onerec`."""
        if self.verb == "evaluate":
            return [self.verb, str(self.recipe.run_directory), *self.overrides]
        return [*self.verb.split(), str(folder / ("board.yaml" if self.board else "recipe.yaml")), *self.overrides]

    def folder(self, cluster: LocalCluster | SlurmCluster) -> Path:
        """Of its files, and of no other job's."""
        return Path(cluster.folder) / f"{cluster.name or self.name}-{self.digest()}"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files(folder).items():
            (folder / name).write_text(text, encoding="utf-8")


def make_job(name: str, overrides: list[str], verb: str) -> Job:
    """The job of a recipe (with `board` of a board) and overrides, all of which is checked.

    Raises:
        InputError: no such verb or recipe, any setting out of place, or settings that are the launcher's to make.
    """
    if verb not in (*JOINED, *ALONE):
        raise InputError(f"--verb {verb} is none of {', '.join((*JOINED, *ALONE))}")
    if verb == "board":
        board = load_board(name)
        jobs(board, overrides)  # checks every row
        return Job(verb, load_recipe(board.recipe), tuple(overrides), board)
    recipe = load_recipe(name, overrides)
    if recipe.distributed.coordinator:
        raise InputError("leave distributed.* out of the recipe: the launcher tells the processes of each other")
    evaluation = tuple(override for override in overrides if override.startswith("evaluate."))
    return Job(verb, recipe, evaluation if verb == "evaluate" else ())


def check_processes(job: Job, processes: int) -> None:
    """Raises InputError where several processes would each do the whole job."""
    if processes > 1 and job.verb in ALONE:
        raise InputError(
            f"--verb {job.verb} is for one process, and the job has {processes}: launch {', '.join(JOINED)} on several"
        )
    if processes > 1 and "--evaluate" in job.overrides:
        raise InputError(f"--evaluate is for points of one process, and these have {processes}")


def check_devices(job: Job, devices: int, slices: int = 1) -> None:
    """Raises InputError unless the recipe's mesh, and the batch of pre-training, fit so many devices in so many slices."""
    recipe = job.recipe
    if slices > 1 and recipe.mesh.slices != slices:
        raise InputError(
            f"cluster.slices is {slices} but mesh.slices {recipe.mesh.slices}: with mesh.slices={slices} only gradients "
            "cross the slow network"
        )
    mesh = AbstractMesh(mesh_sizes(recipe.mesh, devices), AXES)
    if job.verb in ("pretrain", "run", POINT):
        check_batch(mesh, recipe.train.batch_size, recipe.train.accumulation)
