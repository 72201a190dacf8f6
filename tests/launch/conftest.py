from __future__ import annotations

from pathlib import Path

import pytest

from onerec_jax.launch.job import Job


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a shell script on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def write(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)

    return write


@pytest.fixture
def short_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that travels with a job is one line, so that a new setting does not change the golden files of jobs."""
    monkeypatch.setattr(Job, "files", lambda job, folder: {"recipe.yaml": f"name: {job.recipe.name}\n"})
