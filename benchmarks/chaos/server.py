"""The server of the chaos benchmark: a process of `galaxyline serve` whose stages fail on order."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import msgspec
import psutil
import uvloop

from actors.log import LEVEL_VARIABLE, configure_logging
from actors.run_directory import MEMORY
from api.engine.options import EngineOptions
from api.server.serve import serve
from api.settings.engine import EngineSettings
from api.settings.server import ServeSettings
from api.text.model_source import ModelSource, resolve_model
from benchmarks.chaos.stage import DIRECTORY_VARIABLE, RUNNER
from benchmarks.support.ports import free_port
from benchmarks.support.server_process import STAGE_TITLE, ServerError, end, engines_of, title, wait_until_ready
from weights.model_config import UNCHANGED, ConfigChanges, ModelConfig

STEP_TIMEOUT_S = 10.0
"""Seconds until a device that hangs just after a recovery is detected, as the duration of steps is not known yet."""
KV_DIRECTORY = "kv"
KV_BYTES = 8 << 20
"""What each tier may hold: less than comes, so that blocks are given up too."""
DRAFTS = 2
ANSWER_SECONDS = 30.0
POLL_SECONDS = 0.05


class ChaosSettings(EngineSettings, frozen=True, kw_only=True):
    """The engine's settings, with faulty stages."""

    directory: Path

    def engine_options(
        self, source: ModelSource, config: ModelConfig, changes: ConfigChanges = UNCHANGED, *, sharers: int = 1
    ) -> EngineOptions:
        """See `EngineSettings`."""
        options = super().engine_options(source, config, changes, sharers=sharers)
        environment = {DIRECTORY_VARIABLE: str(self.directory)}
        pipeline = msgspec.structs.replace(
            options.pipeline, runner=RUNNER, environments=[environment] * len(options.pipeline.specs)
        )
        return msgspec.structs.replace(options, pipeline=pipeline)


class PipelineState(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of GET /pipeline: `pids` by stage, 0 if a stage has none, and how often each was restarted.

    So many `draft_tokens` were verified since the start.
    """

    phase: str
    detail: str
    epoch: int
    pids: list[int]
    restarts: list[int]
    draft_tokens: int


class ChaosServer(msgspec.Struct, frozen=True, kw_only=True):
    """A server that is ready; `directory` contains its log, its stages' orders and everything that it creates."""

    url: str
    directory: Path
    process: psutil.Process
    engine: psutil.Process

    @property
    def log(self) -> Path:
        """The file with its stderr, one JSON object a line."""
        return self.directory / "server.log"

    @property
    def processes(self) -> list[psutil.Process]:
        """All processes of the server, the front end first."""
        return [self.process, *self.process.children(recursive=True)]

    def host_tier_files(self) -> list[Path]:
        """The files in which stages keep blocks in memory."""
        return [file for memory in self.memories() for file in memory.glob("*.kv.*")]

    def disk_tier_files(self) -> list[Path]:
        """The files in which stages keep blocks on disk."""
        return list((self.directory / KV_DIRECTORY).glob("*.kv.*"))

    def memories(self) -> list[Path]:
        """The directories of the server in memory."""
        names = [f"{directory.name}.kv" for directory in self.directory.glob("galaxyline-*")]
        return [MEMORY / name for name in names if (MEMORY / name).exists()]

    def stage_pids(self) -> list[int]:
        """The process ids of all stages, including those that are starting or ending."""
        return [process.pid for process in self.processes if title(process).startswith(STAGE_TITLE)]

    async def state(self, client: httpx.AsyncClient) -> PipelineState:
        """The state of the pipeline. Raises ServerError if the server does not answer, or its engine is gone."""
        try:
            body = (await client.get(f"{self.url}/pipeline", timeout=ANSWER_SECONDS)).json()
        except httpx.TransportError as error:
            raise ServerError(f"GET /pipeline was not answered: {error!r}. The server's log is {self.log}.") from error
        if body["engine"] is None:
            raise ServerError(f"The server's engine is gone: {body['detail']} Its log is {self.log}.")
        return PipelineState(
            phase=body["phase"],
            detail=body["detail"],
            epoch=body["engine"]["epoch"] or 0,
            pids=[stage["pid"] or 0 for stage in body["stages"]],
            restarts=[stage["restarts"] for stage in body["stages"]],
            draft_tokens=body["engine"]["drafts"]["draft_tokens"],
        )

    async def back(self, client: httpx.AsyncClient, epoch: int, seconds: float) -> PipelineState:
        """Waits until the pipeline is ready in an epoch after `epoch`. Raises ServerError after `seconds`."""
        deadline = asyncio.get_running_loop().time() + seconds
        while (state := await self.state(client)).epoch <= epoch or state.phase != "ready":
            if asyncio.get_running_loop().time() > deadline:
                raise ServerError(
                    f"The pipeline did not come back within {seconds:g} s; it is {state.phase} in epoch "
                    f"{state.epoch}: {state.detail} Its log is {self.log}."
                )
            await asyncio.sleep(POLL_SECONDS)
        return state


@contextlib.contextmanager
def chaos_server(directory: Path, *, stages: int, clients: int) -> Iterator[ChaosServer]:
    """Serves the sample model until the block ends. Raises ServerError if the server does not start or end properly."""
    port = free_port()
    arguments = [str(directory), str(stages), str(clients), str(port)]
    environment = {
        **os.environ,
        LEVEL_VARIABLE: "info",
        # Ray's workers have to find this package too.
        "PYTHONPATH": str(Path(__file__).parents[2]),
        # Files that are left behind are found here.
        "TMPDIR": str(directory),
        "RAY_TMPDIR": str(directory),
    }
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos.server", *arguments], env=environment, stdout=log, stderr=log
        )
    descendants: list[psutil.Process] = []
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        front_end = psutil.Process(process.pid)
        server = ChaosServer(url=url, directory=directory, process=front_end, engine=engines_of(front_end)[0])
        yield server
        descendants = server.processes[1:]
    finally:
        end(process)
    if process.returncode:
        raise ServerError(f"The server ended with exit code {process.returncode}. Its log is {server.log}.")
    if left := psutil.wait_procs(descendants, timeout=ANSWER_SECONDS)[1]:
        raise ServerError(f"Processes outlived the server: {', '.join(str(child.pid) for child in left)}.")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("stages", type=int)
@click.argument("clients", type=int)
@click.argument("port", type=int)
def main(directory: Path, stages: int, clients: int, port: int) -> None:
    """Serve the sample model until a signal ends it."""
    configure_logging()
    engine = ChaosSettings.of(
        cache_dir=directory / "weights",
        stages=stages,
        max_num_seqs=2 * clients,
        dtype="float32",
        step_timeout_s=STEP_TIMEOUT_S,
        directory=directory,
        kv_host_memory=str(KV_BYTES),
        kv_dir=directory / KV_DIRECTORY,
        kv_disk=str(KV_BYTES),
        num_speculative_tokens=DRAFTS,
        always_draft=True,
    )
    source = resolve_model(None, {})
    settings = ServeSettings(engine=engine, source=source, host="127.0.0.1", port=port, shutdown_timeout_s=5.0)
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
