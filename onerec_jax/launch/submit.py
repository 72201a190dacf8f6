"""Calls the command of a cluster that takes jobs."""

from __future__ import annotations

import shutil
import subprocess

from onerec_jax.errors import InputError


def require(program: str, where: str) -> None:
    """Raises InputError unless the program is there."""
    if shutil.which(program) is None:
        raise InputError(f"there is no `{program}` on this machine's PATH: launch {where}, or look with --dry-run")


def submit(command: list[str], text: str = "") -> str:
    """What the command printed, given `text` on its standard input.

    Raises:
        InputError: it failed.
    """
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"`{command[0]}` did not take the job: {' '.join(done.stderr.split())}")
    return done.stdout
