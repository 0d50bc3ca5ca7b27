"""`python -m benchmarks.replicas`: tokens a second of two replicas beside those of one.

Two servers have one and two pipelines of timed stages: only the front end that its replicas share, and the balance of
requests, can slow the second one down. They are measured in turn in one run, each with as many clients as its replicas
have slots, so that the times in which clients come and leave have the same weight.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import msgspec
import uvloop
from rich.table import Table

from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.ports import free_port
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.server_process import ServerProcesses, running_server
from benchmarks.support.spread import Spread, ratios
from benchmarks.support.stream_client import StreamError, stream_all
from stages.device import Device

REPLICAS = (1, 2)
STAGES = 2
STEP_MS = 20
"""The milliseconds of every step, about those of a decode step of a Galaxy's stage."""

SLOTS = 24
"""The slots of a replica: eight in each of its three microbatches."""

TOKENS, SHORT_TOKENS = 150, 8
ROUNDS = 5
TIMES_ONE_MIN = 1.9


class ReplicasRow(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second of `replicas` replicas to `streams` clients, and their ratio to those of one replica."""

    replicas: int
    streams: int
    tokens_per_s: Spread
    times_one: Spread


def measure(tokens: int, rounds: int) -> list[ReplicasRow]:
    """Measures all numbers of replicas in turn, in `rounds` rounds."""
    with contextlib.ExitStack() as servers:
        urls = [servers.enter_context(_server(replicas)).url for replicas in REPLICAS]
        contenders = list(zip(urls, (SLOTS * replicas for replicas in REPLICAS), strict=True))
        for url, streams in contenders:
            _tokens_per_s(url, streams, SHORT_TOKENS)
        turns = [[_tokens_per_s(url, streams, tokens) for url, streams in contenders] for _ in range(rounds)]
    one, *_ = speeds = list(zip(*turns, strict=True))
    return [
        ReplicasRow(
            replicas=replicas, streams=SLOTS * replicas, tokens_per_s=Spread.of(speed), times_one=ratios(speed, one)
        )
        for replicas, speed in zip(REPLICAS, speeds, strict=True)
    ]


def _server(replicas: int) -> AbstractContextManager[ServerProcesses]:
    port = free_port()
    command = [sys.executable, "-m", "api.cli", "serve", "--port", str(port), "--replicas", str(replicas)]
    options = ["--device", "timed", "--stage-time", str(STEP_MS), "--stages", str(STAGES), "--max-num-seqs", str(SLOTS)]
    options.append("--no-spare")
    return running_server([*command, *options], port, STAGES * replicas)


def _tokens_per_s(url: str, streams: int, tokens: int) -> float:
    began = time.monotonic()
    count = uvloop.run(stream_all(httpx.URL(url), streams, tokens))
    if count != streams * tokens:
        raise StreamError(f"{count} tokens came where {streams * tokens} were asked for.")
    return float(count / (time.monotonic() - began))


def _table(rows: Sequence[ReplicasRow]) -> Table:
    table = table_of("replicas", "streams", "tokens/s", "times one")
    for row in rows:
        table.add_row(str(row.replicas), str(row.streams), str(row.tokens_per_s), str(row.times_one))
    return table


@benchmark_command("replicas")
def main(short: bool, device: Device, out: Path) -> None:
    """Measure what a second replica adds, over timed stages, whichever device is named."""
    machine = Machine.here()
    rows = measure(SHORT_TOKENS if short else TOKENS, 1 if short else ROUNDS)
    target = Target(
        name=f"two replicas, times one ({STAGES} stages of {STEP_MS} ms)",
        bound=TIMES_ONE_MIN,
        figure=rows[-1].times_one.median,
        is_floor=True,
    )
    report = Report(benchmark="replicas", device=device, short=short, machine=machine, rows=rows, targets=[target])
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.replicas")
