"""Whether this machine has chips, and the mark of tests that need them."""

from pathlib import Path

import pytest

DEVICES = Path("/dev/tenstorrent")
"""The directory in which tt-kmd, Tenstorrent's kernel driver, creates a file for each chip."""

ROW = 8
GALAXY = 32


def chips() -> int:
    """The number of chips of this machine."""
    return sum(1 for entry in DEVICES.iterdir() if entry.name.isdecimal()) if DEVICES.is_dir() else 0


def needs_chips(count: int) -> pytest.MarkDecorator:
    """A mark that skips a test if there are fewer than `count` chips."""
    return pytest.mark.skipif(chips() < count, reason=f"needs {count} Wormhole chips at {DEVICES}, has {chips()}")
