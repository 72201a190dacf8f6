"""The exceptions that are no bugs, and what the exit code of a process says to the launcher that may start it again."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a process ended. After INPUT and STOPPED it would end the same way again, after any other it may go on.

    A signal, or BUG where another process was lost, is what the death of a machine looks like to those that remain.
    """

    BUG = 1
    INPUT = 2
    STOPPED = 3  # the run ended itself: it diverged, or recall fell
    STORAGE = 4  # data or checkpoints could not be read or written
    HANG = 5
    PREEMPTED = 6  # told to end, and has saved


class InputError(ValueError):
    """A problem the caller can mend: one sentence naming the setting or file, the value, and what would be right.

    The command line prints the sentence and exits with code 2; anything else is a bug and keeps its traceback.
    """


class StoppedError(RuntimeError):
    """A run ended itself, for the reason that the sentence gives; what it wrote before is whole.

    The command line prints the sentence and exits with code 3.
    """
