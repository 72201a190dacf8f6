"""The one exception type that means "the input is wrong, not the program"."""


class InputError(ValueError):
    """A problem the caller can mend: one sentence naming the setting or file, the value, and what would be right.

    The command line prints the sentence and exits with code 2; anything else is a bug and keeps its traceback.
    """
