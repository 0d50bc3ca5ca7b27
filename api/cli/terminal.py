"""Where the commands print their tables."""

import sys

from rich.console import Console

PLAIN_COLUMNS = 120
"""The width of a table that does not go to a terminal."""


def result_console(plain_columns: int = PLAIN_COLUMNS) -> Console:
    """The console on stdout: as wide as the terminal, or `plain_columns` without one."""
    return Console() if sys.stdout.isatty() else Console(width=plain_columns)
