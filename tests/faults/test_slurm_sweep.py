"""On a real Slurm cluster: a sweep of twelve trainings of which one node of two is killed, and which finishes nevertheless."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, Unavailable, wait_for
from tiny import COMPILED

from onerec_jax import cli
from onerec_jax.config import Recipe
from onerec_jax.scaling.points import PointRun, load_folder

POINTS, AT_A_TIME = 12, 2


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory):
    try:
        with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.fail(str(reason))


@pytest.fixture
def points(
    slurm: Cluster,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[PointRun]:
    """Those of a sweep over twelve rates that was just submitted."""
    monkeypatch.chdir(tmp_path)
    caches = {"JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    for variable, value in {**slurm.environment, **caches}.items():
        monkeypatch.setenv(variable, value)
    short = {"model.positive_length": 0, "model.lifelong_length": 0, "train.steps": 20, "train.log_every": 1}
    rates = [round(1e-3 * (1 + i), 4) for i in range(POINTS)]
    Path("tiny.yaml").write_text(tiny_recipe.model_copy(update={"runs": str(tmp_path / "runs")}).to_yaml())
    Path("rates.yaml").write_text(
        yaml.safe_dump({"recipe": "tiny.yaml", "sweep": {"param": {"train.learning_rate": rates}}})
    )
    words = ["sweep", "rates.yaml", "--launcher", "slurm", "--max-parallel", str(AT_A_TIME)]
    monkeypatch.setattr(sys, "argv", ["onerec", *words, *(f"{key}={value}" for key, value in short.items())])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert capsys.readouterr().out.startswith("Submitted batch job ")
    return load_folder(str(tmp_path / "runs" / "sweeps" / "rates")).points


def on_node(slurm: Cluster, node: str) -> set[int]:
    """Numbers of the points that run there."""
    return {int(number) for number in slurm.run("squeue", "-h", "-w", node, "-t", "running", "-o", "%K").split()}


def test_a_sweep_that_loses_a_node_finishes_every_point(slurm: Cluster, points: list[PointRun], tmp_path: Path):
    def states() -> Counter[str]:
        return Counter(point.state() for point in points)

    def told() -> str:
        outputs = "\n".join(path.read_text() for path in sorted(tmp_path.rglob("*.out")))
        return f"{states()}\n{outputs[-4000:]}"

    lost = slurm.nodes[1]
    wait_for(lambda: states()["done"] >= 3, "some points are done", 300)
    wait_for(
        lambda: [p for p in on_node(slurm, lost) if (points[p].folder / "metrics.jsonl").exists()],
        "one trains there",
        120,
    )
    killed = on_node(slurm, lost)
    slurm.kill_node(lost)
    assert len(killed) == 1 and states()["done"] < POINTS - 1
    wait_for(lambda: states()["done"] >= POINTS - 1, "the other node goes on with the rest", 400)
    slurm.start_node(lost)
    wait_for(lambda: states()["done"] == POINTS, "every point is done", 200)
    started = {i: point.result()["starts"] for i, point in enumerate(points)}  # type: ignore[index]
    assert started == {i: 2 if i in killed else 1 for i in started}, told()
    assert len({point.result()["numbers"]["loss"] for point in points}) == POINTS  # type: ignore[index]
