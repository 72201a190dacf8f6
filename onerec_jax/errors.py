"""The exceptions that are no bugs: wrong input, and a run that ends itself."""


class InputError(ValueError):
    """A problem the caller can mend: one sentence naming the setting or file, the value, and what would be right.

    The command line prints the sentence and exits with code 2; anything else is a bug and keeps its traceback.
    """


class StoppedError(RuntimeError):
    """A run ended itself, for the reason that the sentence gives; what it wrote before is whole.

    The command line prints the sentence and exits with code 3.
    """
