"""The command line on chips: from `galaxyline demo --device ttnn` to tokens, on a mock Galaxy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.galaxy.mesh_pipelines import FITTING
from tests.support.checkpoints import config_keys

pytestmark = pytest.mark.slow

TOKENS = 3


def test_the_demo_runs_on_a_row_of_chips(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_keys(FITTING)), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    chips = ["--device", "ttnn", "--max-users-per-row", "8", "--max-model-len", "256", "--cache-dir", str(tmp_path)]
    model = ["--model-path", str(tmp_path), "--random-weights", "--override-num-layers", "2"]
    command = [sys.executable, "-m", "api.cli", "demo", *model, *chips, "--max-new-tokens", str(TOKENS), "a prompt"]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 0, done.stderr[-4000:]
    # The logits of a mock are zeros, of which the first is the best.
    assert f"token IDs: {[0] * TOKENS}" in done.stdout
