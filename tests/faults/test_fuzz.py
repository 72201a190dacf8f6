"""Mutated settings and files are refused in one sentence, or are harmless; `python tests/faults/fuzz.py` runs thousands."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import fuzz
import fuzz_configs
import fuzz_files
import pytest

from onerec_jax.errors import InputError

# Every kind of mutation is in so many consecutive cases of settings; those of files are drawn from more.
SETTINGS = 3 * len(fuzz_configs.MUTATIONS | fuzz_configs.OVERRIDES)
FILES = 66


def test_mutated_settings_are_refused_in_one_sentence_or_are_what_their_text_says(tmp_path: Path):
    ends, problems = fuzz.fuzz_settings(SETTINGS, 0, tmp_path, through_cli=2)
    assert problems == []
    assert ends["of the above through `onerec config`"] == Counter({"exit code 2": 2})
    for kind, (must_refuse, *_) in (fuzz_configs.MUTATIONS | fuzz_configs.OVERRIDES).items():
        assert ends[kind].total() == 3
        assert not must_refuse or ends[kind] == Counter(InputError=3)
    assert ends["other order and style"] == Counter({fuzz.HARMLESS: 3})


def test_mutated_files_of_datasets_and_logs_are_refused_by_name_or_read_as_before(tmp_path: Path):
    ends, problems = fuzz.fuzz_data(FILES, 0, tmp_path)
    assert problems == []
    assert {f"dataset: {kind}" for kind in fuzz_files.DATASET} <= set(ends)
    total = sum(ends.values(), Counter())
    assert total.total() == FILES and total[fuzz.HARMLESS] < FILES / 4


def raising(error: BaseException):
    def read():
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "must_refuse", "end", "fine"),
    [
        (raising(InputError("a.yaml: 'seed' is -1")), True, "InputError", True),
        (raising(InputError("something is wrong")), True, "InputError", False),
        (raising(InputError("a.yaml: two\nlines")), True, "InputError", False),
        (raising(InputError("a.yaml: " + "x" * 400)), True, "InputError", False),
        (raising(ValueError("a.yaml")), True, "traceback", False),
        (lambda: None, True, "silent success", False),
        (lambda: None, False, fuzz.HARMLESS, True),
        (lambda: "seed is 3, the text says 4", False, "silent success", False),
    ],
)
def test_an_end_is_fine_where_it_is_one_sentence_with_the_name_or_harmless(
    read, must_refuse: bool, end: str, fine: bool
):
    found, wrong = fuzz.end_of(read, must_refuse, ("a.yaml",), fuzz_configs.LONGEST)
    assert (found, not wrong) == (end, fine)


def test_a_read_without_end_is_a_hang(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzz, "HANG_S", 1)
    assert fuzz.end_of(lambda: time.sleep(60), False, ("a.yaml",), 400)[0] == "hang"
