"""Servers that are ended by signals at any moment of their start, under load, and after one of their processes died."""

import itertools
import os
import signal
from pathlib import Path

import pytest

from benchmarks.stopping import (
    KINDS,
    START_MOMENTS,
    TOKENS_SEEN,
    WAYS,
    Moment,
    StopRow,
    Way,
    kill_one,
    server,
    stop_under_load,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

IS_FULL = bool(os.environ.get("GALAXYLINE_FULL"))
SHELL_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""128 and the number of the signal."""

ALL_STARTS = list(itertools.product(START_MOMENTS, WAYS))
ALL_LOADS = list(itertools.product(TOKENS_SEEN, WAYS))
# Unless all are asked for: every second moment of a start, all ways in turn, and two moments under load.
STARTS = ALL_STARTS if IS_FULL else list(zip(START_MOMENTS[1::2], [*WAYS, WAYS[0]], strict=True))
LOADS = ALL_LOADS if IS_FULL else [(TOKENS_SEEN[2], WAYS[1]), (TOKENS_SEEN[6], WAYS[3])]


TIMED = () if IS_FULL else ("--device", "timed", "--stage-time", "10")
"""Options of servers that are ready when a process is killed: stages that import no torch are so in half the time."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted weights, for all servers of this module."""
    return tmp_path_factory.mktemp("cache")


def shell_code(row: StopRow) -> int:
    """The exit code as a shell has it, also of a process that a signal has ended before it could handle it."""
    return 128 - row.code if row.code < 0 else row.code


@pytest.mark.parametrize(("moment", "way"), STARTS, ids=lambda part: str(part[0]))
def test_a_start_is_ended_at_any_moment_and_leaves_nothing(moment: Moment, way: Way, cache: Path) -> None:
    name, has_come = moment
    with server(cache) as starting:
        starting.until(lambda: has_come(starting))
        row = starting.stop(name, way)
        assert (shell_code(row), row.left) == (SHELL_CODES[way[0]], [])
        assert "Traceback" not in starting.log


@pytest.mark.parametrize(("tokens", "way"), LOADS, ids=str)
def test_a_server_under_load_is_ended_and_leaves_nothing(tokens: int, way: Way, cache: Path) -> None:
    row = stop_under_load(cache, tokens, way)
    # Its requests were not given the time to end.
    assert (row.code, row.left) == (SHELL_CODES[way[0]], [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_is_killed_leaves_nothing(kind: str, cache: Path) -> None:
    row = kill_one(cache, kind, *TIMED)
    expected = {"front end": -signal.SIGKILL, "engine": 1}.get(kind, 0)
    assert (row.code, row.left) == (expected, [])
