"""Real servers for tests: `galaxyline serve` as a process of its own, on loopback."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from api.client.engine_client import leave_group
from benchmarks.support.ports import free_port
from weights.sample import PROMPTS_FILE

READY_DEADLINE = 300.0
EXIT_DEADLINE = 60.0
PROGRAM = ("api.cli",)


@dataclass(frozen=True)
class Prompt:
    """A prompt for the sample model; `text` is Hugging Face's greedy completion, where it is known."""

    prompt: str
    max_tokens: int
    in_training_text: bool
    text: str = ""


def sample_prompts() -> list[Prompt]:
    """The prompts at whose every greedy position the sample model is certain, each with its completion."""
    return [Prompt(**entry) for entry in json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def completions(self) -> str:
        return f"{self.url}/v1/completions"


def launch(
    folder: Path, *options: str, environment: Mapping[str, str] | None = None, program: Sequence[str] = PROGRAM
) -> Server:
    """Starts `galaxyline serve OPTIONS`, which the caller waits for and ends.

    It has no spares, which tests would have to wait for, unless OPTIONS ask for them.
    """
    port = free_port()
    log = folder / "server.log"
    command = [sys.executable, "-m", *program, "serve", "--port", str(port), "--cache-dir", str(folder / "cache")]
    command.append("--no-spare")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            # A group of its own, as a shell gives it: Ctrl-C goes to the whole group.
            preexec_fn=leave_group,  # noqa: PLW1509 - a single system call
        )
    return Server(url=f"http://127.0.0.1:{port}", process=process, log=log)


@contextlib.contextmanager
def serving(
    folder: Path, *options: str, environment: Mapping[str, str] | None = None, program: Sequence[str] = PROGRAM
) -> Iterator[Server]:
    """Runs `galaxyline serve OPTIONS`, from ready to a clean exit that leaves no child and no stage."""
    server = launch(folder, *options, environment=environment, program=program)
    stages: list[psutil.Process] = []
    try:
        wait_until_ready(server)
        stages = stage_processes(server)
        yield server
    finally:
        stop(server, stages)


def wait_until_ready(server: Server) -> None:
    """Polls /pipeline, for all replicas; fails with the log if the process ends or the deadline passes."""
    deadline = time.monotonic() + READY_DEADLINE
    # One client for all: to make one takes 30 ms of the core that the server needs to start.
    with httpx.Client(base_url=server.url, timeout=10) as client:
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                raise AssertionError(f"server exited with {server.process.returncode}:\n{server.log.read_text()}")
            with contextlib.suppress(httpx.TransportError):
                response = client.get("/pipeline")
                # An engine that has not started yet answers nothing: 503.
                if response.is_success and all(replica["phase"] == "ready" for replica in response.json()["replicas"]):
                    assert client.get("/health").status_code == 200
                    return
            time.sleep(0.1)
    raise AssertionError(f"server not ready after {READY_DEADLINE} s:\n{server.log.read_text()}")


def stage_processes(server: Server) -> list[psutil.Process]:
    """The stages of a server that is ready: no children of its own where it has joined a cluster."""
    stages = httpx.get(f"{server.url}/pipeline", timeout=5).json()["stages"]
    # None would be this very process.
    assert all(stage["pid"] for stage in stages)
    return [psutil.Process(stage["pid"]) for stage in stages]


def stop(server: Server, stages: Sequence[psutil.Process]) -> None:
    """Sends SIGTERM; checks the exit code, and that neither a descendant nor a stage outlives the server."""
    descendants = psutil.Process(server.process.pid).children(recursive=True) if server.process.poll() is None else []
    descendants = [*{*descendants, *stages}]
    server.process.send_signal(signal.SIGTERM)
    try:
        code = server.process.wait(EXIT_DEADLINE)
    except subprocess.TimeoutExpired:
        for left in [psutil.Process(server.process.pid), *descendants]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        raise AssertionError(f"server did not end on SIGTERM:\n{server.log.read_text()}") from None
    _, alive = psutil.wait_procs(descendants, timeout=EXIT_DEADLINE)
    names = [f"{child.pid} {' '.join(child.cmdline())}" for child in alive]
    for child in alive:
        child.kill()
    assert (code, names) == (0, []), server.log.read_text()


async def complete(client: httpx.AsyncClient, server: Server, prompt: Prompt, **fields: Any) -> str:
    """Returns the greedy text of one prompt, in one answer."""
    body = {"prompt": prompt.prompt, "max_tokens": prompt.max_tokens, "temperature": 0, **fields}
    response = await client.post(server.completions, json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def stream(client: httpx.AsyncClient, server: Server, prompt: Prompt, **fields: Any) -> list[str]:
    """Returns the greedy text of one prompt, as the chunks it came in."""
    body = {"prompt": prompt.prompt, "max_tokens": prompt.max_tokens, "temperature": 0, "stream": True, **fields}
    chunks: list[str] = []
    async with client.stream("POST", server.completions, json=body) as response:
        assert response.status_code == 200
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event, event
        chunks.extend(choice["text"] for choice in event["choices"])
    return chunks
