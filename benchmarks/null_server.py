"""`galaxyline serve` over stages that compute nothing: a process for the benchmark of the program's own overhead."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import msgspec
import psutil
import uvloop

from actors.log import configure_logging
from actors.options import Device
from api.engine_options import EngineOptions
from api.listener import listen
from api.model_source import ModelSource
from api.serve import ServeSettings, serve
from api.settings import EngineSettings
from benchmarks.null_stage import RUNNER
from weights.model_config import UNCHANGED, ConfigChanges, ModelConfig

READY_SECONDS = 120.0
POLL_SECONDS = 0.1
END_SECONDS = 60.0
STAGE_TITLE = "ray::StageActor"
"""How Ray calls a stage's process."""


class ServerError(Exception):
    """The server did not start, answer or end as it should."""


class NullSettings(EngineSettings, frozen=True, kw_only=True):
    """The engine's options, but for what the stages run."""

    def engine_options(
        self, source: ModelSource, config: ModelConfig, changes: ConfigChanges = UNCHANGED
    ) -> EngineOptions:
        """See `EngineSettings`."""
        options = super().engine_options(source, config, changes)
        return msgspec.structs.replace(options, pipeline=msgspec.structs.replace(options.pipeline, runner=RUNNER))


class NullServer(msgspec.Struct, frozen=True):
    """A server that is ready: its address, and its processes."""

    url: str
    front_end: psutil.Process
    engine: psutil.Process
    stages: list[psutil.Process]


@contextlib.contextmanager
def null_server(model: Path, *, stages: int, streams: int, device: Device) -> Iterator[NullServer]:
    """Serves the directory of `write_null_model` over so many stages, to at most so many requests at once."""
    port = _free_port()
    command = [sys.executable, "-m", "benchmarks.null_server", str(model), str(stages), str(streams), device, str(port)]
    root = str(Path(__file__).parent.parent)
    # Ray's workers have to find this package as well.
    environment = {**os.environ, "PYTHONPATH": root}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        front_end = psutil.Process(process.pid)
        yield NullServer(url, front_end, _engine_of(front_end), _stages_of(front_end, stages))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise ServerError(f"The server did not end within {END_SECONDS:g} s.") from None


def _free_port() -> int:
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"The server ended with exit code {process.returncode}; its own error is above.")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(POLL_SECONDS)
    raise ServerError(f"The server was not ready within {READY_SECONDS:g} s.")


def _engine_of(front_end: psutil.Process) -> psutil.Process:
    [engine] = [child for child in front_end.children() if "api.engine" in child.cmdline()]
    return engine


def _stages_of(front_end: psutil.Process, count: int) -> list[psutil.Process]:
    stages = [child for child in front_end.children(recursive=True) if _title(child).startswith(STAGE_TITLE)]
    if len(stages) != count:
        raise ServerError(f"{len(stages)} processes are called {STAGE_TITLE}; {count} stages were started.")
    return stages


def _title(process: psutil.Process) -> str:
    command = process.cmdline()
    return command[0] if command else ""


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("stages", type=int)
@click.argument("streams", type=int)
@click.argument("device")
@click.argument("port", type=int)
def main(model: Path, stages: int, streams: int, device: Device, port: int) -> None:
    """Serve MODEL until a signal ends it."""
    configure_logging()
    engine = NullSettings(
        cache_dir=model, stages=stages, max_num_seqs=streams, load_format="dummy", dtype="bfloat16", device=device
    )
    source = ModelSource(path=model, name=model.name, root=str(model))
    settings = ServeSettings(engine=engine, source=source, host="127.0.0.1", port=port, shutdown_timeout_s=5.0)
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
