"""What every test gets: no network look-ups, one torch thread, and no telemetry; and what many tests share."""

import importlib.util
import os
import sys
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.ray_cluster import running_ray

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Before torch is imported: two cores are shared by the test process and the processes it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROWS = 8
LOG_CHARACTERS = 8000
"""Of each log of a failed test that are shown."""

# Where ttnn is not installed; `make test-ttnn` says so if it cannot be.
collect_ignore = [] if importlib.util.find_spec("ttnn") else ["galaxy"]
if sys.version_info < (3, 11) or not importlib.util.find_spec("schemathesis"):
    # It has no release for Python 3.10, and the environment for ttnn does without.
    collect_ignore.append("api/server/test_openapi.py")


def pytest_configure() -> None:
    """Gives each of several test processes its own cores: on shared ones, threads of two servers stall each other."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = sorted(os.sched_getaffinity(0))
    if worker is not None and workers <= len(cores):
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the end of the logs that a failed test leaves behind: what a server said is gone with its machine."""
    report = yield
    folder = item.funcargs.get("tmp_path") if isinstance(item, pytest.Function) else None
    if report.failed and isinstance(folder, Path):
        for log in sorted(folder.rglob("*.log")):
            said = log.read_text(encoding="utf-8", errors="replace")
            report.sections.append((f"end of {log.relative_to(folder)}", said[-LOG_CHARACTERS:]))
    return report


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Mapping[str, str]]:
    """The environment for joining a Ray cluster that all tests of this process share."""
    with running_ray(ROWS) as environment:
        yield environment
