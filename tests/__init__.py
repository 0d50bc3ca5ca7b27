"""The tests, as a mirror of the source; what several share is in support/."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The repository."""
