"""`python -m benchmarks.overload`: goodput under up to ten times as many requests as the pipeline can serve.

The real server runs over timed stages, whose capacity follows from their time, and clients come at a given rate
whatever happens to those before them. Goodput has to stay at its peak, waiting has to stay bounded, and the rest has to
be refused at once.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
from rich.table import Table

from benchmarks.overload.figures import Capacity, OverloadRow, Turn, row_of
from benchmarks.overload.open_loop_client import Notes
from benchmarks.support.machine import Machine
from benchmarks.support.null_model import write_null_model
from benchmarks.support.options import benchmark_command
from benchmarks.support.ports import free_port
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.server_process import ServerProcesses, processor_seconds, running_server
from benchmarks.support.stream_client import StreamError
from stages.device import Device

STAGES = 2
MICROBATCHES = 3
USERS = 8
"""Users of a microbatch."""
STAGE_MS = 20.0
TOKENS = 32
QUEUED = 48
"""Requests that may wait, which is as long as two rounds of all slots take."""

CAPACITY = Capacity(slots=MICROBATCHES * USERS, queued=QUEUED, tokens_per_s=USERS / STAGE_MS * 1e3, tokens=TOKENS)

LOADS = [0.5, 1.0, 2.0, 5.0, 10.0]
SHORT_LOADS = [1.0, 10.0]
ROUNDS = 3
WARM_S, MEASURED_S = 6.0, 20.0
SHORT_WARM_S, SHORT_MEASURED_S = 2.0, 4.0
CLIENT_MARGIN_S = 60.0

GOODPUT_MIN = 0.9
"""The least goodput at the highest load, as a share of its peak over all loads."""
WAIT_MAX = 1.5
"""The longest wait over what follows from queue length and peak goodput; steps of prompts come in between."""
MEMORY_GROWTH_MAX = 1.1


def measure(loads: Sequence[float], rounds: int, warm_s: float, measured_s: float) -> list[OverloadRow]:
    """Measures every load in turn on one server, in `rounds` rounds."""
    with tempfile.TemporaryDirectory(prefix="overload-") as name, _server(Path(name)) as server:
        turns = [[_turn(server, load, warm_s, measured_s, seed=round_) for load in loads] for round_ in range(rounds)]
    return [row_of(load, of_load) for load, of_load in zip(loads, zip(*turns, strict=True), strict=True)]


@contextmanager
def _server(folder: Path) -> Iterator[ServerProcesses]:
    write_null_model(folder)
    port = free_port()
    command = [sys.executable, "-m", "api.cli", "serve", "--port", str(port), "--model", str(folder)]
    command += ["--device", "timed", "--stages", str(STAGES), "--stage-time", f"{STAGE_MS:g}"]
    command += ["--max-num-seqs", str(CAPACITY.slots), "--max-num-queued-reqs", str(QUEUED)]
    command += ["--cache-dir", str(folder / "cache"), "--no-spare"]
    with running_server(command, port, STAGES) as server:
        yield server


def _turn(server: ServerProcesses, load: float, warm_s: float, measured_s: float, seed: int) -> Turn:
    rate = load * CAPACITY.requests_per_s
    shape = (TOKENS, rate, warm_s, measured_s, seed)
    command = [sys.executable, "-m", "benchmarks.overload.open_loop_client", server.url, *map(str, shape)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as clients:
        try:
            if clients.stdout is None or clients.stdout.readline().strip() != "begins":
                raise StreamError("The clients ended before all was measured; their own error is above.")
            process = psutil.Process(clients.pid)
            before, memory = _seconds(process, server), _memory(server)
            if clients.stdout.readline().strip() != "ended":
                raise StreamError("The clients ended before all was measured; their own error is above.")
            after, memory_after = _seconds(process, server), _memory(server)
            notes = msgspec.json.decode(clients.stdout.readline(), type=Notes)
            clients.wait(CLIENT_MARGIN_S)
        finally:
            clients.kill()
    shares = [(now - then) / measured_s for now, then in zip(after, before, strict=True)]
    return Turn(
        notes=notes, client=shares[0], front_end=shares[1], engine=shares[2], memory=memory, memory_after=memory_after
    )


def _seconds(client: psutil.Process, server: ServerProcesses) -> list[float]:
    return [processor_seconds(process) for process in (client, server.front_end, *server.engines)]


def _memory(server: ServerProcesses) -> int:
    """The resident bytes of front end and engines."""
    return sum(int(process.memory_info().rss) for process in (server.front_end, *server.engines))


def _targets(rows: Sequence[OverloadRow]) -> list[Target]:
    peak = max(row.goodput.median for row in rows)
    worst = rows[-1]
    name = f"at {worst.load:g} times capacity"
    bound_s = CAPACITY.queued * CAPACITY.tokens / peak + CAPACITY.slots * CAPACITY.tokens / peak
    refusals = [row.with_retry_after.low for row in rows if row.refused.median > 0]
    return [
        Target(
            name=f"goodput {name}, of its peak", bound=GOODPUT_MIN, figure=worst.goodput.median / peak, is_floor=True
        ),
        Target(
            name=f"first token {name}, p99 over what queue and slots take",
            bound=WAIT_MAX,
            figure=worst.first_token_s.median / bound_s,
        ),
        Target(name="refusals with Retry-After", bound=1.0, figure=min(refusals, default=1.0), is_floor=True),
        Target(
            name=f"memory of front end and engine {name}, end over beginning",
            bound=MEMORY_GROWTH_MAX,
            figure=worst.memory_growth.high,
        ),
    ]


def _table(rows: Sequence[OverloadRow]) -> Table:
    table = table_of(
        *("load", "asked /s", "goodput, tokens/s", "refused", "first token p99, s"),
        *("client CPU", "front end CPU", "engine CPU", "memory, end / begin"),
    )
    for row in rows:
        figures = (row.asked, row.goodput, row.refused, row.first_token_s)
        shares = (row.client, row.front_end, row.engine, row.memory_growth)
        table.add_row(f"{row.load:g}", *map(str, figures), *map(str, shares))
    return table


@benchmark_command("overload", devices=("timed",))
def main(short: bool, device: Device, out: Path) -> None:
    """Measure goodput, waiting and refusals at up to ten times the capacity of timed stages.

    Medians of rounds, and the quartiles between which half of the rounds lie; processor time in cores.
    """
    machine = Machine.here()
    if short:
        rows = measure(SHORT_LOADS, 1, SHORT_WARM_S, SHORT_MEASURED_S)
    else:
        rows = measure(LOADS, ROUNDS, WARM_S, MEASURED_S)
    report = Report(
        benchmark="overload", device=device, short=short, machine=machine, rows=rows, targets=_targets(rows)
    )
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.overload")
