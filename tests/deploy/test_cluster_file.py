"""cluster.yaml: whether Ray's launcher accepts it, and what a job takes along.

Ray runs in another process: its first import in this one has to be that of a pipeline.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.cluster_file import FILE, read_cluster_file

UPLOAD_BYTES_MAX = 20 << 20

PREPARE = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
with open(sys.argv[1]) as file:
    prepared = prepare_config(yaml.safe_load(file))
validate_config(prepared)
print(json.dumps(prepared))
"""

PACK = """
import sys
from ray._private.runtime_env.packaging import create_package
from pathlib import Path
root, package, respects_gitignore = sys.argv[1:]
create_package(root, Path(package), include_gitignore=respects_gitignore == "True", excludes=[".git", "__pycache__"])
"""


def in_another_process(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ray_accepts_it_as_it_is() -> None:
    prepared = json.loads(in_another_process(PREPARE, str(FILE)))
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 3


@pytest.mark.parametrize("node", ["head", "worker"])
def test_every_host_has_four_rows_and_wants_the_token(node: str) -> None:
    contents = read_cluster_file()
    command = contents[f"{node}_start_ray_commands"][-1]
    assert contents["provider"]["type"] == "local"
    assert """--resources='{"galaxy_rows": 4}'""" in command
    for setting in (
        "RAY_AUTH_MODE=token",
        "RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token",
        "RAY_USAGE_STATS_ENABLED=0",
        "RAY_enable_metrics_collection=0",
        "AUTOSCALER_METRIC_PORT=-1",
        "DASHBOARD_METRIC_PORT=-1",
        "RAY_EXPERIMENTAL_NOSET_TENSTORRENT_VISIBLE_DEVICES=1",
        "RAY_JOB_STOP_WAIT_TIME_S=60",
    ):
        assert f" {setting}" in command.partition("ray start")[0]
    assert "chmod 600 ~/.ray/auth_token" in contents["setup_commands"]
    assert ("--dashboard-host=127.0.0.1" in command) is (node == "head")


@pytest.mark.parametrize("respects_gitignore", [True, False])
def test_a_job_takes_the_program_and_the_sample_model_along_and_little_else(
    respects_gitignore: bool, tmp_path: Path
) -> None:
    package = tmp_path / "package.zip"
    in_another_process(PACK, str(ROOT), str(package), str(respects_gitignore))
    assert package.stat().st_size < UPLOAD_BYTES_MAX
    names = zipfile.ZipFile(package).namelist()
    assert {"api/cli/__main__.py", "weights/sample/checkpoint/model.safetensors"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", ".venv"))]
