"""What commands print on."""

from __future__ import annotations

import os
import sys

from rich.console import Console

FILE_WIDTH = 200  # columns


def make_console() -> Console:
    """Standard output. A file, a pipe or a job's log has room for whole tables; rich would cut their numbers at 80 columns.

    `COLUMNS` decides where it is set.
    """
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH)
