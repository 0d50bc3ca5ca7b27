"""The benchmark of large requests runs, and its file has what it promises. No test looks at the figures."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.memory import KINDS


@pytest.mark.slow
def test_the_short_form_prints_a_table_and_writes_figures(tmp_path: Path, ray_cluster: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "--short", "--out", str(tmp_path)]
    environment = {**os.environ, **ray_cluster}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "memory on timed" in done.stdout
    report = json.loads((tmp_path / "memory.timed.json").read_bytes())
    assert [row["kind"] for row in report["rows"]] == list(KINDS)
    assert len(report["targets"]) == 2 * len(KINDS)
    statuses = {row["kind"]: row["status"] for row in report["rows"]}
    assert statuses == {"cut text": 200, "text too long": 400, "many prompts": 400, "ids": 400, "tokenize": 200}
