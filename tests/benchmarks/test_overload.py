"""The benchmark of overload runs, and its figures follow from its clients' notes. No test looks at measured figures."""

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from api.server.admission import AdmissionControl
from api.server.app import create_app
from api.settings.server import QueueLimits
from benchmarks.overload.figures import Capacity, Turn, row_of
from benchmarks.overload.open_loop_client import Notes, OpenLoop, Outcome
from tests.support.api_server import MODEL, AppServer, endless_text
from tests.support.fake_engine import FakeEngine

SECONDS = 280


def outcome(
    asked_s: float, status: int, *tokens_s: float, retry_after_s: int | None = None, ended_s: float | None = None
) -> Outcome:
    return Outcome(
        asked_s=asked_s, status=status, retry_after_s=retry_after_s, tokens_s=list(tokens_s), ended_s=ended_s
    )


def test_figures_are_of_the_measured_time() -> None:
    outcomes = [
        outcome(5.0, 200, 9.0, 11.0, ended_s=11.0),
        outcome(10.5, 200, 12.0, 13.0, 21.0),
        outcome(11.0, 429, retry_after_s=3),
        outcome(12.0, 429),
        outcome(19.0, 503),
        outcome(19.5, 0),
    ]
    turn = Turn(
        notes=Notes(began_s=10.0, ended_s=20.0, outcomes=outcomes),
        client=0.5,
        front_end=0.25,
        engine=0.125,
        memory=100,
        memory_after=150,
    )
    row = row_of(10.0, [turn])
    assert (row.asked.median, row.goodput.median) == (0.5, 0.3)
    assert (row.refused.median, row.failed.median, row.with_retry_after.median) == (0.4, 1.0, 0.5)
    assert (row.first_token_s.median, row.memory_growth.median) == (1.5, 1.5)
    nobody = Turn(
        notes=Notes(began_s=0.0, ended_s=1.0, outcomes=[]), client=0, front_end=0, engine=0, memory=1, memory_after=1
    )
    assert (nobody.first_token_s, nobody.with_retry_after) == (math.inf, 1.0)


def test_a_capacity_is_of_requests() -> None:
    assert Capacity(slots=24, queued=48, tokens_per_s=400, tokens=32).requests_per_s == 12.5


def test_visitors_come_whatever_becomes_of_those_before() -> None:
    """Half of the requests stay open until the end, and the others are refused."""
    admission = AdmissionControl(QueueLimits(slots=1, requests=1, tokens=1000))
    engine = FakeEngine(lambda request: endless_text(request)[:2])
    server = AppServer(create_app(MODEL, engine, admission=admission))
    server.start()
    try:
        notes = asyncio.run(OpenLoop(httpx.URL(server.url), tokens=3).run(100.0, 0.1, 0.4, seed=1))
    finally:
        server.stop()
    served = [outcome for outcome in notes.outcomes if outcome.status == 200]
    refused = [outcome for outcome in notes.outcomes if outcome.status == 429]
    assert [len(outcome.tokens_s) for outcome in served] == [2, 2]
    assert all(outcome.ended_s is None for outcome in served)
    assert len(refused) > len(served)
    assert all(outcome.retry_after_s == 2 for outcome in refused)
    assert all(outcome.asked_s < notes.ended_s for outcome in notes.outcomes)


@pytest.mark.slow
def test_the_short_form_prints_a_table_and_writes_figures(tmp_path: Path, ray_cluster: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "benchmarks.overload", "--short", "--out", str(tmp_path)]
    environment = {**os.environ, **ray_cluster}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    assert "overload on timed" in done.stdout
    report = json.loads((tmp_path / "overload.timed.json").read_bytes())
    assert [row["load"] for row in report["rows"]] == [1.0, 10.0]
    assert all(row["failed"]["high"] == 0 for row in report["rows"])
    assert len(report["targets"]) == 4
