"""The exceptions that are no bugs, and the exit codes by which a launcher knows what to do next."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How the command line ends. Launchers start a job again after any but INPUT and STOPPED; see launch/README.md."""

    BUG = 1  # anything unforeseen, also that another process of the job went away
    INPUT = 2  # what the caller can mend: starting again would end in the same way
    STOPPED = 3  # the run ended itself: its loss diverged, or its recall fell
    STORAGE = 4  # data or checkpoints could not be read or written: start again after a while
    HANG = 5  # a step did not end
    PREEMPTED = 6  # the machine was taken away; all is saved


# A variable: seconds from a failure of storage to the end of the process, for a launcher that makes no pause itself.
BACKOFF = "ONEREC_BACKOFF_S"


class InputError(ValueError):
    """A problem the caller can mend: one sentence naming the setting or file, the value, and what would be right.

    The command line prints the sentence and exits with `ExitCode.INPUT`; anything that is not of this module is a bug and
    keeps its traceback.
    """

    code = ExitCode.INPUT


class DamagedError(InputError):
    """A record of a dataset is not what was written."""


class StoppedError(RuntimeError):
    """A run ended itself, for the reason that the sentence gives; what it wrote before is whole."""

    code = ExitCode.STOPPED


class StorageError(RuntimeError):
    """Data or a checkpoint could not be read or written; what was written before is whole."""

    code = ExitCode.STORAGE


class PreemptedError(RuntimeError):
    """The process was asked to leave, and has saved; starting it again goes on."""

    code = ExitCode.PREEMPTED


FORESEEN = (InputError, StoppedError, StorageError, PreemptedError)
