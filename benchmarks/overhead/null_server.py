"""The server of the overhead benchmark: a process of `galaxyline serve` over stages that compute nothing."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import uvloop

from actors.log import configure_logging
from api.engine.options import EngineOptions
from api.server.serve import serve
from api.settings.engine import EngineSettings
from api.settings.server import ServeSettings
from api.text.model_source import ModelSource
from benchmarks.support.null_stage import RUNNER
from benchmarks.support.ports import free_port
from benchmarks.support.server_process import ServerProcesses, running_server
from stages.device import Device
from weights.model_config import UNCHANGED, ConfigChanges, ModelConfig


class NullSettings(EngineSettings, frozen=True, kw_only=True):
    """The engine's settings, with null stages."""

    def engine_options(
        self, source: ModelSource, config: ModelConfig, changes: ConfigChanges = UNCHANGED, *, sharers: int = 1
    ) -> EngineOptions:
        """See `EngineSettings`."""
        options = super().engine_options(source, config, changes, sharers=sharers)
        return msgspec.structs.replace(options, pipeline=msgspec.structs.replace(options.pipeline, runner=RUNNER))


@contextlib.contextmanager
def null_server(model: Path, *, stages: int, streams: int, device: Device) -> Iterator[ServerProcesses]:
    """Serves the directory of `write_null_model` over `stages` stages, to at most `streams` requests at once."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "benchmarks.overhead.null_server",
        str(model),
        str(stages),
        str(streams),
        device,
        str(port),
    ]
    with running_server(command, port, stages) as server:
        yield server


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("stages", type=int)
@click.argument("streams", type=int)
@click.argument("device")
@click.argument("port", type=int)
def main(model: Path, stages: int, streams: int, device: Device, port: int) -> None:
    """Serve MODEL until a signal ends it."""
    configure_logging()
    engine = NullSettings.of(
        cache_dir=model,
        stages=stages,
        max_num_seqs=streams,
        load_format="dummy",
        dtype="bfloat16",
        device=device,
        spare=False,
    )
    source = ModelSource(path=model, name=model.name, root=str(model))
    settings = ServeSettings(engine=engine, source=source, host="127.0.0.1", port=port, shutdown_timeout_s=5.0)
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
