"""Processes of this machine: joined, ended together, started again by exit code, and told to end from outside."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from clusters import quickstart

from onerec_jax.config import LocalCluster
from onerec_jax.launch.local import commands
from onerec_jax.launch.supervise import Command, supervise


def python(program: str, *words: str, **environment: str) -> Command:
    return Command([sys.executable, "-u", "-c", program, *words], environment)


# Ends with the first code of its own line of the file that is left, with 0 when there is none.
NEXT_CODE = """
import os, pathlib, sys
place = pathlib.Path(sys.argv[1])
codes = place.read_text().split()
place.write_text(" ".join(codes[1:]))
code = int(codes[0]) if codes else 0
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""
WAITS = "import time; time.sleep(60)"


@pytest.fixture
def ended(tmp_path: Path):
    """Runs a process that ends with these codes one after the other; gives the job's code and how often it was started."""

    def run(*codes: int, **cluster) -> tuple[int, int]:
        (tmp_path / "codes").write_text(" ".join(map(str, codes)))
        starts = []

        def make() -> list[Command]:
            starts.append(0)
            return [python(NEXT_CODE, str(tmp_path / "codes"))]

        return supervise(make, LocalCluster(**{"backoff_s": 0.0} | cluster), lambda line: None), len(starts)

    return run


@pytest.mark.parametrize(
    ("code", "starts"),
    [(0, 1), (1, 2), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (-signal.SIGKILL, 2), (-signal.SIGSEGV, 2)],
)
def test_a_job_is_started_again_by_its_exit_code(ended, code: int, starts: int):
    assert ended(code) == (code if starts == 1 else 0, starts)


def test_failures_are_counted_and_preemptions_are_not(ended):
    assert ended(6, 1, 6, 6, 5, 6, max_restarts=2) == (0, 7)
    assert ended(6, 1, 6, -9, 6, max_restarts=1) == (137, 4)


def test_a_job_waits_after_a_failure_of_storage_alone(ended):
    started = time.monotonic()
    ended(1, 5, 6, backoff_s=60)
    assert time.monotonic() - started < 30
    started = time.monotonic()
    ended(4, backoff_s=0.7)
    assert time.monotonic() - started > 0.7


def test_the_first_to_fail_ends_the_others_and_gives_the_code():
    obeys = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(6)); print('here'); time.sleep(60)"
    )
    fails = "import sys, time; time.sleep(0.5); sys.exit(9)"
    lines: list[str] = []
    code = supervise(lambda: [python(obeys), python(fails)], LocalCluster(max_restarts=0), lines.append)
    assert code == 9 and lines[0] == "[0] here"


def test_a_process_that_does_not_end_is_killed():
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    fails = "import sys, time; time.sleep(0.5); sys.exit(3)"
    started = time.monotonic()
    assert supervise(lambda: [python(deaf), python(fails)], LocalCluster(grace_s=0.5), lambda line: None) == 3
    assert time.monotonic() - started < 20


def test_a_code_that_says_it_is_of_no_use_is_the_jobs_even_if_another_process_fell_first():
    falls = "import os, time; time.sleep(1); os.abort()"
    stops = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); time.sleep(60)"
    assert supervise(lambda: [python(falls), python(stops)], LocalCluster(), lambda line: None) == 3


def test_what_a_process_leaves_behind_is_ended_with_it():
    leaves = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    )
    lines: list[str] = []
    started = time.monotonic()
    assert supervise(lambda: [python(leaves)], LocalCluster(), lines.append) == 0
    assert time.monotonic() - started < 30
    pid = int(lines[0].removeprefix("[0] "))
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_every_line_says_whose_it_is():
    lines: list[str] = []
    says = "import os, sys; print(os.environ['WHO']); print('and', file=sys.stderr)"
    supervise(lambda: [python(says, WHO="a"), python(says, WHO="b")], LocalCluster(), lines.append)
    assert sorted(lines) == ["[0] a", "[0] and", "[1] and", "[1] b"]


SUPERVISOR = """
import sys
from onerec_jax.config import LocalCluster
from onerec_jax.launch.supervise import Command, supervise
child = '''
import signal, sys, time
def end(number, frame):
    print("told", number)
    time.sleep(0.3)
    sys.exit(int(sys.argv[1]))
signal.signal(signal.SIGTERM, end), signal.signal(signal.SIGINT, end)
print("ready")
time.sleep(60)
'''
sys.exit(supervise(lambda: [Command([sys.executable, "-u", "-c", child, code], {}) for code in ("6", "6")], LocalCluster()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_the_job_is_not_started_again(number: signal.Signals):
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(number)
    rest = sorted(process.stdout.read().splitlines())
    assert (rest, process.wait(timeout=30)) == ([f"[0] told {number.value}", f"[1] told {number.value}"], 6)


def test_the_processes_of_a_job_are_told_of_each_other():
    cluster = LocalCluster(processes=3, port=4321, gpus_per_process=2, environment={"A": "b"})
    found = commands(quickstart(), cluster, Path("jobs"))
    for i, command in enumerate(found):
        assert command.words[1:] == [
            "-m", "onerec_jax.cli", "pretrain", "jobs/recipe.yaml", "distributed.coordinator=127.0.0.1:4321",
            "distributed.processes=3", f"distributed.process={i}",
        ]  # fmt: skip
        assert command.environment == {"A": "b", "CUDA_VISIBLE_DEVICES": f"{2 * i},{2 * i + 1}"}


def test_a_process_alone_is_told_of_nobody():
    (command,) = commands(quickstart(), LocalCluster(), Path("jobs"))
    assert command.words[1:] == ["-m", "onerec_jax.cli", "pretrain", "jobs/recipe.yaml"]
