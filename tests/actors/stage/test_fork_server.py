"""The fork server makes workers of the requests of its client, and where there is none the client is the worker."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.cluster import fork_client
from actors.cluster.fork_client import SCRIPT_VARIABLE, SOCKET_VARIABLE, WorkerStart
from actors.options import ClusterOptions, PipelineOptions
from actors.stage.forks import ForkServer
from stages.options import CacheOptions, StageOptions
from stages.plan import StageSpec

SECONDS = 60
WORKER = """
import json, os, sys
found = {
    "arguments": sys.argv[1:],
    "name": __name__,
    "pid": os.getpid(),
    "parent": os.getppid(),
    "leads": os.getpgrp() == os.getpid(),
    "directory": os.getcwd(),
    "variable": os.environ.get("OWN_VARIABLE"),
    "imported": [name for name in ("requests", "actors.stage.actor", "wave", "ray") if name in sys.modules],
}
print(json.dumps(found), flush=True)
"""


def options(environments: list[dict[str, str]] | None = None) -> PipelineOptions:
    cache = CacheOptions(slots=1, pools=1, blocks=2, block_size=32, max_model_len=64)
    return PipelineOptions(
        hidden_size=8,
        specs=[StageSpec(index=index, stages=2, first_layer=index, end_layer=index + 1) for index in range(2)],
        stage=StageOptions(model_path="", cache_dir="", dtype="bfloat16", seed=0, cache=cache),
        cluster=ClusterOptions(rows_per_stage=1),
        # It takes no seconds to import, and nothing else does so.
        runner="wave:Wave_read",
        environments=environments or [],
    )


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[ForkServer]:
    server = ForkServer.start(options(), tmp_path)
    yield server
    server.close()


def run_client(directory: Path, path: Path) -> dict[str, Any]:
    """Runs the client as the raylet does; returns what the worker found, by the streams of the client."""
    script = directory / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    own = {SOCKET_VARIABLE: str(path), SCRIPT_VARIABLE: str(script), "OWN_VARIABLE": "x\udc80"}
    done = subprocess.run(
        [sys.executable, fork_client.__file__, "--id=7", "two words"],
        cwd=directory,
        env={**os.environ, **own},
        preexec_fn=os.setpgrp,
        stdout=subprocess.PIPE,
        timeout=SECONDS,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_fork_becomes_the_worker(forks: ForkServer, tmp_path: Path) -> None:
    first, second = run_client(tmp_path, forks.socket), run_client(tmp_path, forks.socket)
    for found in (first, second):
        assert found["arguments"] == ["--id=7", "two words"]
        assert found["name"] == "__main__"
        assert found["parent"] == forks.pid
        assert found["leads"]
        assert found["directory"] == str(tmp_path)
        assert found["variable"] == "x\udc80"
        # Ray reads its environment when it is imported, and that of the fork server is not the worker's.
        assert found["imported"] == ["requests", "actors.stage.actor", "wave"]
    assert first["pid"] != second["pid"]


def test_without_a_fork_server_the_client_is_the_worker(tmp_path: Path) -> None:
    found = run_client(tmp_path, tmp_path / "nobody")
    assert found["arguments"] == ["--id=7", "two words"]
    assert found["parent"] == os.getpid()
    assert found["imported"] == []


def test_stages_whose_environments_differ_import_for_themselves(tmp_path: Path) -> None:
    server = ForkServer.start(options([{"A": "1"}, {"A": "2"}]), tmp_path)
    try:
        assert run_client(tmp_path, server.socket)["imported"] == ["requests", "actors.stage.actor"]
    finally:
        server.close()


def test_a_request_that_breaks_off_leaves_the_server(forks: ForkServer, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as broken:
        broken.connect(str(forks.socket))
        broken.sendall(b"\0")
    assert run_client(tmp_path, forks.socket)["parent"] == forks.pid


def test_the_server_ends(forks: ForkServer) -> None:
    process = psutil.Process(forks.pid)
    forks.close()
    forks.close()
    assert not process.is_running()


def test_a_start_and_its_streams_arrive(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    with here, there:
        sent = WorkerStart.of_this_process()
        sent.send(here)
        received, streams = WorkerStart.receive(there)
    assert received == sent
    for number, descriptor in enumerate(streams):
        assert os.fstat(descriptor) == os.fstat(number)
        os.close(descriptor)
