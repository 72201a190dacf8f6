"""Feeds mutated settings and mutated files to the project: each must be refused in one sentence, or be harmless, provably.

    python tests/faults/fuzz.py --configs 1000 --files 1000 --seed 0

Ends in a table of the kinds of mutations and how they ended, and with exit code 1 where one was a traceback, a hang, an unclear
message, or was accepted though it must not be or though something else was read than what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import fuzz_configs  # noqa: E402
import fuzz_files  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from onerec_jax.errors import InputError, StorageError  # noqa: E402

HANG_S = 5
HARMLESS = "harmless"
Ends = dict[str, Counter[str]]  # kind of mutation -> how its cases ended


class HangError(BaseException):
    """Raised by the alarm; no `except Exception` takes it."""


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def ring(*_):
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def end_of(read: Callable[[], str | None], must_refuse: bool, names: tuple[str, ...], longest: int) -> tuple[str, str]:
    """How a case ended, and what is wrong with that, if anything is.

    Args:
        read: reads what was mutated; returns what is wrong with what came out.
        must_refuse: whether nothing may come out.
        names: the message must hold one of these.
        longest: characters of the message about each problem.
    """
    try:
        with alarm(HANG_S):
            wrong = read()
    except (InputError, StorageError) as error:
        message, kind = str(error), type(error).__name__
        if "\n" in message or max(map(len, message.split("; "))) > longest:
            return kind, f"not one sentence: {message[:600]!r}"
        return kind, "" if any(
            name in message for name in names
        ) else f"does not name {' or '.join(names)}: {message!r}"
    except HangError:
        return "hang", f"no answer in {HANG_S} s"
    except BaseException as error:  # also those of Rust, which are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "traceback", f"{type(error).__name__}: {str(error)[:300]!r}"
    if wrong or must_refuse:
        return "silent success", wrong or "accepted, and must not be"
    return HARMLESS, ""


def fuzz_settings(count: int, seed: int, folder: Path, through_cli: int = 0, first: int = 0) -> tuple[Ends, list[str]]:
    """Ends of so many cases of mutated settings and what was wrong; every `count / through_cli`-th refused one is also run
    through the command line."""
    ends: Ends = {}
    problems, due = [], count // 2
    for number in track(range(first, first + count), "settings", console=Console(stderr=True)):
        case = fuzz_configs.make_case(number, seed, folder)
        # A point of a sweep is checked where it is run, as overrides of its recipe.
        names = (
            case.file.stem,
            "override",
            "no recipe",
            *([str(fuzz_configs.CONFIGS)] if case.subject == "sweep" else []),
        )
        end, wrong = end_of(lambda case=case: fuzz_configs.load(case), case.must_refuse, names, fuzz_configs.LONGEST)
        ends.setdefault(case.kind, Counter())[end] += 1
        due += through_cli
        if due >= count and end == "InputError" and case.subject == "recipe" and "\0" not in (case.override or ""):
            due -= count
            wrong = wrong or by_command_line(case)
            ends.setdefault("of the above through `onerec config`", Counter())[
                "exit code 2" if not wrong else "other"
            ] += 1
        if wrong:
            shown = repr(case.override[:200]) if case.override else repr(case.file.read_bytes()[:2000])
            problems.append(f"case {number}, {case.kind} of a {case.subject}: {end}: {wrong}\n    {shown}")
    return ends, problems


def by_command_line(case: fuzz_configs.Case) -> str:
    """What is wrong with how `onerec config` refuses a case."""
    words = [str(case.file), *([] if case.override is None else ["--", case.override])]
    command = [sys.executable, "-m", "onerec_jax.cli", "config", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    one_line = answer.stderr.startswith("onerec: ") and answer.stderr.count("\n") == 1
    if answer.returncode == 2 and one_line and not answer.stdout:
        return ""
    return f"exit code {answer.returncode}, stderr {answer.stderr[-600:]!r}"


def fuzz_data(count: int, seed: int, folder: Path, first: int = 0) -> tuple[Ends, list[str]]:
    """Ends of so many cases of mutated dataset files and raw logs, and what was wrong."""
    places = fuzz_files.make_places(folder)
    ends: Ends = {}
    problems = []
    for number in track(range(first, first + count), "files", console=Console(stderr=True)):
        place = places[fuzz_files.turn(number)]
        case = fuzz_files.make_case(number, seed, place)
        with fuzz_files.mutated(case):
            end, wrong = end_of(place.check, case.must_refuse, case.names, fuzz_files.LONGEST)
        ends.setdefault(f"{place.name}: {case.kind}", Counter())[end] += 1
        if wrong:
            problems.append(f"case {number}, {case.kind} of {case.target} ({place.name}): {end}: {wrong}")
    return ends, problems


def table(ends: Ends) -> Table:
    columns = sorted({end for counts in ends.values() for end in counts})
    made = Table("mutation", "cases", *columns)
    for kind, counts in ends.items():
        made.add_row(kind, str(counts.total()), *(str(counts[end] or "") for end in columns))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=1000)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to look at one again")
    asked = parser.parse_args()
    started, console = time.perf_counter(), Console(width=140)
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for what, count, fuzz in (
            ("settings", asked.configs, lambda n: fuzz_settings(n, asked.seed, Path(folder), 20, asked.first)),
            ("files", asked.files, lambda n: fuzz_data(n, asked.seed, Path(folder) / "data", asked.first)),
        ):
            if count:
                ends, wrong = fuzz(count)
                console.print(f"{count} mutated {what}, seed {asked.seed}")
                console.print(table(ends))
                problems += wrong
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems ({time.perf_counter() - started:.0f} s)")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
