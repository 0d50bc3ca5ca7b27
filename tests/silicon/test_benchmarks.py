"""The benchmarks run on chips and write their reports; the figures themselves are not checked."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.silicon.chips import needs_chips

pytestmark = [pytest.mark.galaxy, pytest.mark.timeout(3600), needs_chips(1)]


@pytest.mark.parametrize("name", ["trace", "loading", "model"])
def test_a_benchmark_runs_on_chips(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--short", "--device", "ttnn", "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    report = msgspec.json.decode((tmp_path / f"{name}.ttnn.json").read_bytes())
    assert report["device"] == "ttnn"
    assert report["rows"]
