"""Settings of every test (no network look-ups, one torch thread, no telemetry), and fixtures that many tests share."""

import importlib.util
import os
import sys
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import structlog

from actors.log import keep_logs_off_stdout
from tests import ROOT
from tests.support.ray_cluster import running_ray

# Each of a dozen processes that a test starts would compile torch and Ray anew, and Ray's would not be up in time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Nothing is left in the cache of the user who runs the tests.
os.environ.setdefault("DEEPSEEK_V3_CACHE", str(ROOT / "generated" / "deepseek_v3"))
# Before torch is imported: two cores are shared by the test process and the processes it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST_FILES = (
    "tests/program/test_end_to_end.py",
    "tests/deploy/test_jobs.py",
    "tests/program/test_replica_servers.py",
    "tests/api/demo/test_demo.py",
    "tests/hosts/test_hosts.py",
    "tests/hosts/test_lost_host.py",
    "tests/program/test_stopping.py",
    "tests/program/chat/test_parameters.py",
    "tests/program/chat/test_answers.py",
    "tests/program/test_seeded_tokens.py",
    "tests/actors/test_recovery.py",
    "tests/program/test_poisoned_requests.py",
    "tests/program/test_shutdown.py",
    "tests/program/test_lm_eval.py",
    "tests/program/test_ray_faults.py",
    "tests/benchmarks/test_benchmarks.py",
    "tests/weights/sample/test_sample_model.py",
    "tests/actors/test_pipeline.py",
    "tests/stages/test_stage_prefix.py",
    "tests/actors/test_recovery_blocks.py",
    "tests/scaling/test_timed_server.py",
    "tests/api/server/test_untrusted_peers.py",
    "tests/program/test_load.py",
    "tests/program/test_other_users.py",
    "tests/benchmarks/test_overload.py",
    "tests/program/test_monitored_server.py",
    "tests/scaling/test_scaling_benchmark.py",
    "tests/benchmarks/test_memory.py",
)
"""Files whose slow tests take more than a quarter of a minute each, by that time."""

# No test fails because the machine is busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROWS = 8
LOG_CHARACTERS = 8000
"""How much of each log of a failed test is shown."""

# Where ttnn is not installed; `make test-ttnn` says so if it cannot be.
collect_ignore = [] if importlib.util.find_spec("ttnn") else ["galaxy"]
if sys.version_info < (3, 11) or not importlib.util.find_spec("schemathesis"):
    # It has no release for Python 3.10, and the environment for ttnn does without.
    collect_ignore.append("api/server/test_openapi.py")


def pytest_configure() -> None:
    """Gives each of several test processes its own cores, or one that it shares with few others.

    On all cores at once, threads of two servers would stall each other.
    """
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is not None:
        cores = sorted(os.sched_getaffinity(0))
        count = min(workers, len(cores))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % count :: count])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first, so that test processes that take whole files end at the same time."""
    last = len(LONGEST_FILES)
    order = {ROOT / file: place for place, file in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path, last))


def pytest_collection_finish() -> None:
    """Refuses test modules that import Ray: it would have read its environment before a fixture has prepared that."""
    if "ray" in sys.modules:
        raise pytest.UsageError("A test module imports Ray: import it within the test, after prepare_environment.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the end of the logs that a failed test leaves behind: what a server said is gone with its machine."""
    report = yield
    folder = item.funcargs.get("tmp_path") if isinstance(item, pytest.Function) else None
    if report.failed and isinstance(folder, Path):
        for log in sorted(folder.rglob("*.log")):
            text = log.read_text(encoding="utf-8", errors="replace")
            report.sections.append((f"end of {log.relative_to(folder)}", text[-LOG_CHARACTERS:]))
    return report


@pytest.fixture(scope="session", autouse=True)
def loggers_not_cached() -> Iterator[None]:
    """Keeps `capture_logs` working after a test that configures logging: a cached logger would never get there."""
    configure = structlog.configure

    def configure_without_cache(**options: Any) -> None:
        configure(**{**options, "cache_logger_on_first_use": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", configure_without_cache)
        # Not to stdout, where commands that run in this process print their results.
        keep_logs_off_stdout()
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Mapping[str, str]]:
    """The environment for joining a Ray cluster that all tests of this process share."""
    with running_ray(ROWS) as environment:
        yield environment
