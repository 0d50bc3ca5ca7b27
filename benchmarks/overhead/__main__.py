"""`python -m benchmarks.overhead`: processor time of the program itself, over stages that compute nothing.

The real server, engine, Ray actors and sockets stream to clients in another process. Apart from caches, processor time
does not depend on other load of the machine, so it needs nothing to be compared with.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from benchmarks.overhead.null_server import null_server
from benchmarks.support.machine import Machine
from benchmarks.support.null_model import write_null_model
from benchmarks.support.null_stage import StepCount, step_count_file
from benchmarks.support.options import benchmark_command
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.server_process import ServerProcesses, processor_seconds
from benchmarks.support.spread import Spread
from benchmarks.support.stream_client import ANSWER_SECONDS, StreamError
from stages.device import Device

FRONT_END_US_MAX = 100.0
STAGE_US_MAX = 200.0
ROUNDS = 3


class Load(msgspec.Struct, frozen=True):
    """A load of `streams` clients at once, each of which streams `tokens` tokens."""

    streams: int
    tokens: int


STAGES = [1, 2, 4, 8]
LOADS = [Load(1, 1500), Load(32, 300), Load(256, 100)]
SHORT_STAGES = [2]
SHORT_LOADS = [Load(4, 32)]


class OverheadRow(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds of processor time: of the front end per token, and of the engine and of a stage's actor per step.

    `tokens_per_step` is the number of tokens in a step.
    """

    stages: int
    streams: int
    tokens_per_step: Spread
    front_end_us: Spread
    engine_us: Spread
    stage_us: Spread


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one run of a load; times are seconds of processor time."""

    tokens: int
    steps: int
    front_end_s: float
    engine_s: float
    stages_s: float


class Overhead:
    """The measurements of one server."""

    def __init__(self, server: ServerProcesses, model: Path) -> None:
        self._server = server
        self._steps = StepCount(step_count_file(model, 0))

    def turn(self, load: Load) -> Turn:
        """Runs a load to its end and measures it."""
        steps, before = self._steps.steps, self._processor_seconds()
        tokens = _stream(self._server.url, load)
        front_end, engine, stages = (now - then for now, then in zip(self._processor_seconds(), before, strict=True))
        steps = self._steps.steps - steps
        return Turn(tokens=tokens, steps=steps, front_end_s=front_end, engine_s=engine, stages_s=stages)

    def row(self, load: Load, turns: Sequence[Turn]) -> OverheadRow:
        """The figures of a load's turns."""
        stages = len(self._server.stages)
        return OverheadRow(
            stages=stages,
            streams=load.streams,
            tokens_per_step=Spread.of([turn.tokens / turn.steps for turn in turns]),
            front_end_us=Spread.of([turn.front_end_s / turn.tokens * 1e6 for turn in turns]),
            engine_us=Spread.of([turn.engine_s / turn.steps * 1e6 for turn in turns]),
            stage_us=Spread.of([turn.stages_s / turn.steps / stages * 1e6 for turn in turns]),
        )

    def _processor_seconds(self) -> tuple[float, float, float]:
        """Seconds of processor time of the front end, of all engines and of all stages."""
        server = self._server
        seconds = processor_seconds
        return seconds(server.front_end), sum(map(seconds, server.engines)), sum(map(seconds, server.stages))


def measure(device: Device, stages: Sequence[int], loads: Sequence[Load], rounds: int) -> list[OverheadRow]:
    """Measures every load on every number of stages; the loads take turns."""
    rows = []
    for count in stages:
        with tempfile.TemporaryDirectory(prefix="null-") as name:
            model = Path(name)
            write_null_model(model)
            with null_server(model, stages=count, streams=max(load.streams for load in loads), device=device) as server:
                overhead = Overhead(server, model)
                for load in loads:
                    _stream(server.url, msgspec.structs.replace(load, tokens=8))
                turns = [[overhead.turn(load) for load in loads] for _ in range(rounds)]
                rows += [
                    overhead.row(load, of_load) for load, of_load in zip(loads, zip(*turns, strict=True), strict=True)
                ]
    return rows


def _stream(url: str, load: Load) -> int:
    command = [sys.executable, "-m", "benchmarks.support.stream_client", url, str(load.streams), str(load.tokens)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=ANSWER_SECONDS)
    tokens = int(json.loads(answer.stdout))
    if tokens != load.streams * load.tokens:
        raise StreamError(f"{tokens} tokens came where {load.streams * load.tokens} were asked for.")
    return tokens


def _targets(rows: Sequence[OverheadRow]) -> list[Target]:
    worst_front_end = max(rows, key=lambda row: row.front_end_us.median)
    worst_stage = max(rows, key=lambda row: row.stage_us.median)
    return [
        Target(
            name=f"front end, us a token ({_where(worst_front_end)}, the worst)",
            bound=FRONT_END_US_MAX,
            figure=worst_front_end.front_end_us.median,
        ),
        Target(
            name=f"stage actor, us a step ({_where(worst_stage)}, the worst)",
            bound=STAGE_US_MAX,
            figure=worst_stage.stage_us.median,
        ),
    ]


def _where(row: OverheadRow) -> str:
    return f"{row.streams} streams, {row.stages} stages"


def _table(rows: Sequence[OverheadRow]) -> Table:
    table = table_of(
        "stages", "streams", "tokens a step", "front end, us a token", "engine, us a step", "stage actor, us a step"
    )
    for row in rows:
        figures = (row.streams, row.tokens_per_step, row.front_end_us, row.engine_us, row.stage_us)
        table.add_row(str(row.stages), *map(str, figures))
    return table


@benchmark_command("overhead")
def main(short: bool, device: Device, out: Path) -> None:
    """Measure processor time of front end, engine and stage actors, over stages that compute nothing.

    Medians of rounds, and the quartiles between which half of the rounds lie.
    """
    machine = Machine.here()
    stages, loads, rounds = (SHORT_STAGES, SHORT_LOADS, 1) if short else (STAGES, LOADS, ROUNDS)
    rows = measure(device, stages, loads, rounds)
    report = Report(
        benchmark="overhead", device=device, short=short, machine=machine, rows=rows, targets=_targets(rows)
    )
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.overhead")
