"""`python -m benchmarks.start`: where the seconds go until a server of the sample model is ready.

The moments are those of the server's own log. With `--beside`, another checkout is measured in turn with this one.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
import psutil
from rich.table import Table

from actors.log import LEVEL_VARIABLE
from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.ports import free_port
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.server_process import READY_SECONDS, ServerError, end
from stages.device import Device

TURNS = 3
SHORT_TURNS = 1
SECONDS_MAX = 9.0
HERE = Path(__file__).parents[1]

PARTS = (
    ("front end: imports, options, tokenizer", re.compile(r"The engine process starts\.")),
    ("engine: its process and imports", re.compile(r"The stages are being placed\.")),
    ("Ray: import, control store, raylet, rows", re.compile(r"Stage \d+ on .*: starting")),
    ("stages: their processes", re.compile(r"Stage \d+ on .*: loading, 0 of")),
    ("stages: torch, device, weights", re.compile(r"Stage \d+ on .*: connecting")),
    ("links, until every stage is ready", re.compile(r"Stage \d+ on .*: ready")),
)
"""What goes on until the last record of the log whose detail begins so."""

LAST_PART = "the engine's first answers"
KINDS = {
    "api.cli": "front end",
    "api.engine": "engine",
    "fork_server": "fork server",
    "gcs_server": "control store",
    "raylet": "raylet",
    "StageActor": "stages",
    "Agent": "Ray's agents",
}


class StartRow(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the start: its `seconds` in this checkout, and in the one beside it, turn by turn.

    Parts follow each other; what a process does meanwhile is in the processor seconds of its kind.
    """

    part: str
    unit: str
    seconds: list[float]
    beside: list[float]


class Start(NamedTuple):
    """One start: the seconds of its parts, in order, and the processor seconds of the kinds of processes."""

    parts: dict[str, float]
    processor: dict[str, float]

    @property
    def seconds(self) -> float:
        """From the command to the line that says that it is ready."""
        return sum(self.parts.values())


def start_once(checkout: Path) -> Start:
    """Starts the server of a checkout with the sample model, and ends it when it is ready. Raises ServerError."""
    command = [sys.executable, "-m", "api.cli", "serve", "--port", str(free_port())]
    # Its records are the moments, and the Ray is to be its own.
    environment = {name: value for name, value in os.environ.items() if name not in {LEVEL_VARIABLE, "RAY_ADDRESS"}}
    with tempfile.TemporaryFile("w+") as log:
        began = time.time()
        process = subprocess.Popen(
            command,
            cwd=checkout,
            env={**environment, "PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE,
            stderr=log,
        )
        with _ended(process):
            _wait_for_ready_line(process)
            ready = time.time()
            processor = _processor_seconds(psutil.Process(process.pid))
        log.seek(0)
        return Start(_parts(log.read(), began, ready), processor)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    timer = threading.Timer(READY_SECONDS, process.send_signal, [signal.SIGTERM])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        end(process)


def _wait_for_ready_line(process: subprocess.Popen[bytes]) -> None:
    for line in process.stdout or ():
        if line.startswith(b"Ready:"):
            return
    raise ServerError(f"The server was not ready within {READY_SECONDS:g} s, or ended: run `galaxyline serve` for why.")


def _processor_seconds(front_end: psutil.Process) -> dict[str, float]:
    """Seconds of all processes that run, by their kind."""
    seconds: dict[str, float] = defaultdict(float)
    for process in (front_end, *front_end.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times, command = process.cpu_times(), " ".join(process.cmdline()[:3])
            kind = next((kind for word, kind in KINDS.items() if word in command), "others")
            seconds[kind] += times.user + times.system
    return dict(seconds)


def _parts(log: str, began: float, ready: float) -> dict[str, float]:
    """The seconds of each part, by the times of the log's records."""
    records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    parts, last = {}, began
    for part, pattern in PARTS:
        moments = [record["timestamp"] for record in records if pattern.match(record.get("detail", ""))]
        moment = datetime.fromisoformat(moments[-1]).timestamp() if moments else last
        parts[part], last = moment - last, moment
    return {**parts, LAST_PART: ready - last}


def _rows(starts: list[Start], beside: list[Start]) -> list[StartRow]:
    rows = [
        StartRow(
            part=part,
            unit="s",
            seconds=[start.parts[part] for start in starts],
            beside=[start.parts[part] for start in beside],
        )
        for part in starts[0].parts
    ]
    rows.append(
        StartRow(
            part="start to ready",
            unit="s",
            seconds=[start.seconds for start in starts],
            beside=[start.seconds for start in beside],
        )
    )
    kinds = dict.fromkeys(kind for start in (*starts, *beside) for kind in start.processor)
    for kind in kinds:
        mine, other = ([start.processor.get(kind, 0.0) for start in some] for some in (starts, beside))
        rows.append(StartRow(part=kind, unit="processor s", seconds=mine, beside=other))
    totals = ([sum(start.processor.values()) for start in some] for some in (starts, beside))
    mine, other = totals
    rows.append(StartRow(part="all processes", unit="processor s", seconds=mine, beside=other))
    return rows


def _table(rows: list[StartRow]) -> Table:
    table = table_of("part", "unit", "seconds, by turn", "beside, by turn")
    for row in rows:
        table.add_row(
            row.part, row.unit, *(" ".join(f"{one:.2f}" for one in each) for each in (row.seconds, row.beside))
        )
    return table


def _targets(starts: list[Start]) -> list[Target]:
    median = sorted(start.seconds for start in starts)[len(starts) // 2]
    return [Target(name="seconds from start to ready", bound=SECONDS_MAX, figure=median)]


@benchmark_command("start", ("embedded",))
@click.option(
    "--beside",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    help="Another checkout, measured in turn with this one.",
)
def main(short: bool, device: Device, out: Path, beside: Path | None) -> None:
    """Time the parts of a start with the sample model and default options, from the command to the ready line."""
    machine = Machine.here()
    starts, others = [], []
    for _ in range(SHORT_TURNS if short else TURNS):
        if beside is not None:
            others.append(start_once(beside))
        starts.append(start_once(HERE))
    rows, targets = _rows(starts, others), [] if short else _targets(starts)
    report = Report(benchmark="start", device=device, short=short, machine=machine, rows=rows, targets=targets)
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.start")
