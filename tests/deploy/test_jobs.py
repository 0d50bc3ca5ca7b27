"""Serve and demo as Ray jobs, on the cluster that cluster.yaml describes."""

import asyncio
import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.support.ports import free_port
from tests import ROOT
from tests.support.cluster_file import FileCluster, joined, running_cluster

DEADLINE = 120.0
BODY = {"prompt": "San Francisco is a", "max_tokens": 200, "n": 8, "seed": 1, "stream": True, "ignore_eos": True}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[FileCluster]:
    """One head for all tests of this module."""
    with running_cluster() as running:
        yield running


def until(holds: Callable[[], bool], what: str) -> None:
    """Returns when `holds` does."""
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}"
        time.sleep(0.1)


def health(client: httpx.Client) -> int:
    """The status of /health; 0 where nobody listens."""
    try:
        return client.get("/health").status_code
    except httpx.TransportError:
        return 0


def until_health(url: str, status: int, what: str) -> None:
    """Returns when /health answers with that status."""
    # One client for all: to make one takes 30 ms of the core that the server needs.
    with httpx.Client(base_url=url, timeout=5) as client:
        until(lambda: health(client) == status, what)


def submit(cluster: FileCluster, name: str, *command: str, wait: bool = False) -> str:
    """Submits a command as the README does, from the working directory of this repository."""
    how = [] if wait else ["--no-wait"]
    entry = ["--", "python", "-m", "api.cli", *command]
    return cluster.ray("job", "submit", "--submission-id", name, *how, "--working-dir", ".", *entry)


def await_stopped(cluster: FileCluster, name: str) -> None:
    """Returns when the job has been stopped and has left nothing behind."""
    until(lambda: cluster.job_status(name) == "STOPPED", "the job was stopped")
    assert "was stopped" in cluster.ray("job", "status", name)
    until(lambda: not cluster.our_processes(), "processes of the job end")
    assert list((cluster.folder / "tmp").glob("galaxyline-*")) == []


def test_every_port_of_ray_that_speaks_http_wants_the_token(cluster: FileCluster) -> None:
    connections = [
        connection
        for process in cluster.head.children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    answers: dict[int, int] = {}
    for connection in connections:
        # What speaks gRPC alone is not heard.
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
            url = f"http://{connection.laddr.ip.removeprefix('::ffff:').replace('0.0.0.0', '127.0.0.1')}"
            answers[connection.laddr.port] = httpx.get(f"{url}:{connection.laddr.port}/metrics", timeout=5).status_code
    assert answers
    assert set(answers.values()) <= {401, 403}


def test_only_this_host_and_those_with_the_token_reach_the_job_server(cluster: FileCluster) -> None:
    port = int(cluster.dashboard.rpartition(":")[2])
    listening = {
        connection.laddr.ip
        for process in cluster.head.children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
    assert httpx.get(f"{cluster.dashboard}/api/jobs/").status_code == 401


async def test_a_served_model_drains_when_its_job_is_stopped(cluster: FileCluster) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    submit(cluster, "serving", "serve", "--port", str(port), "--shutdown-timeout", "50")
    await asyncio.to_thread(until_health, url, 200, "the server is ready")
    logs = cluster.ray("job", "logs", "serving")
    assert re.search(r"Stage 1 on \S+: loading, \d of 3 layers", logs)
    assert f"Ready: galaxyline-sample on {url}" in logs

    async with (
        httpx.AsyncClient(base_url=url, timeout=DEADLINE) as client,
        client.stream("POST", "/v1/completions", json=BODY) as response,
    ):
        lines = response.aiter_lines()
        assert '"text":' in await anext(lines)
        cluster.ray("job", "stop", "--no-wait", "serving")
        await asyncio.to_thread(until_health, url, 503, "the server drains")
        refused = await client.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert "draining" in refused.json()["error"]["message"]
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in rest[:-1]]
    finished = [choice for event in events for choice in event["choices"] if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in finished) == list(range(8))
    assert {choice["finish_reason"] for choice in finished} == {"length"}
    await_stopped(cluster, "serving")


def test_a_demo_writes_its_results_and_its_output_is_in_the_logs(cluster: FileCluster, tmp_path: Path) -> None:
    prompts, results = tmp_path / "prompts.json", tmp_path / "results.json"
    prompts.write_text(json.dumps([{"prompt": "San Francisco is a"}]), encoding="utf-8")
    options = ["--max-new-tokens", "8", "--prompts-file", str(prompts), "--output-path", str(results)]
    said = submit(cluster, "demo", "demo", *options, wait=True)
    assert f"Results saved to '{results}'" in said
    assert '"loading"' in said
    assert json.loads(results.read_text(encoding="utf-8"))["generations"][0]["text"]
    assert "succeeded" in cluster.ray("job", "status", "demo")


def test_a_demo_that_is_stopped_keeps_the_results_it_has(cluster: FileCluster, tmp_path: Path) -> None:
    prompts, kept = tmp_path / "prompts.json", tmp_path / "kept.jsonl"
    prompts.write_text(json.dumps([{"prompt": f"San Francisco is {i}"} for i in range(2000)]), encoding="utf-8")
    options = ["--prompts-file", str(prompts), "--output-path", str(tmp_path / "out.json")]
    submit(cluster, "stopped", "demo", *options, "--checkpoint-jsonl", str(kept), "--max-new-tokens", "64")
    until(lambda: kept.exists() and kept.stat().st_size > 0, "a first result")
    cluster.ray("job", "stop", "stopped")
    await_stopped(cluster, "stopped")
    for line in kept.read_text(encoding="utf-8").splitlines():
        assert json.loads(line)
    assert "Traceback" not in cluster.ray("job", "logs", "stopped")


def run_on_rows(cluster: FileCluster, rows: int) -> tuple[int, str]:
    """Returns exit code and errors of a demo that joins the cluster, on the host that alone has as many rows."""
    done = subprocess.run(
        [
            *(cluster.bin / "python", "-m", "api.cli", "demo", "hello", "--max-new-tokens", "1"),
            *("--ray-address", cluster.address, "--rows-per-stage", str(rows)),
        ],
        env={**cluster.environment, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"},
        cwd=cluster.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    return done.returncode, done.stderr


def test_a_host_without_galaxyline_and_one_with_another_release_are_named(cluster: FileCluster, tmp_path: Path) -> None:
    with joined(cluster, 5, {}):
        code, said = run_on_rows(cluster, 5)
    assert code == 2
    assert re.search(r"Error: \S+ has no galaxyline .* and the pipeline needs galaxyline \d.*: install", said)

    with joined(cluster, 6, {"PYTHONPATH": str(other_release(tmp_path))}):
        code, said = run_on_rows(cluster, 6)
    assert code == 2
    assert re.search(r"Error: \S+ runs galaxyline 9\.9\.9 .* and the pipeline needs galaxyline \d.*: install", said)


def other_release(folder: Path) -> Path:
    """Returns a directory with this repository's packages, of another version."""
    for package in ("actors", "api", "stages"):
        (folder / package).symlink_to(ROOT / package)
    (folder / "weights").mkdir()
    for entry in (ROOT / "weights").iterdir():
        if entry.name not in {"release.py", "__pycache__"}:
            (folder / "weights" / entry.name).symlink_to(entry)
    (folder / "weights" / "release.py").write_text('VERSION = "9.9.9"\n', encoding="utf-8")
    return folder
