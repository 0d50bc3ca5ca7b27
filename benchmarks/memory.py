"""`python -m benchmarks.memory`: what requests of many megabytes cost a server, and those who ask beside them.

The front end's resident memory before and after ten requests of each kind, and the time of a 5 KB completion alone and
beside clients that send them without a pause. The stage takes its time and computes nothing, so that the front end is
what is measured.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import msgspec
import psutil
from rich.table import Table

from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.ports import free_port
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.server_process import ServerProcesses, running_server
from benchmarks.support.spread import Spread, ratios
from stages.device import Device

STEP_MS = 20
MI = 1 << 20
KINDS: dict[str, tuple[str, object]] = {
    "cut text": ("/v1/completions", {"prompt": "ab" * (7 * MI), "truncate_prompt_tokens": 5, "max_tokens": 1}),
    "text too long": ("/v1/completions", {"prompt": "ab " * (4 * MI), "max_tokens": 1}),
    "many prompts": ("/v1/completions", {"prompt": ["ab " * 900] * 4096, "max_tokens": 1}),
    "ids": ("/v1/completions", {"prompt": [[17] * 1000] * 3000, "max_tokens": 1}),
    "tokenize": ("/tokenize", {"prompt": "ab" * (MI // 2)}),
}
"""Requests by the name of their kind: path and body. Some of them are refused, which must cost no more."""

REQUESTS, SHORT_REQUESTS = 10, 1
ROUNDS, SHORT_ROUNDS = 9, 1
CLIENTS = 2
"""Clients that send large requests at once: more would share the processor with the server that is measured."""

SMALL = {"prompt": "a b " * 1250, "truncate_prompt_tokens": 64, "max_tokens": 8, "ignore_eos": True}
SETTLED_S, SHORT_SETTLED_S = 4.0, 0.0
"""The seconds after which memory is read: the server gives it back a second after the last large body. A short run,
whose figures mean little, does not wait for it."""

TIMEOUT_S = 300.0
GROWTH_MAX = 1.05
SLOWDOWN_MAX = 2.0


class MemoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of request: its bytes and the status of its answer, and what it costs.

    `growth` is resident memory after over before, `seconds` the time of one such request, and `slower` the time of a
    small one beside them over that alone.
    """

    kind: str
    bytes: int
    status: int
    before_mb: float
    growth: float
    seconds: Spread
    alone_s: Spread
    beside_s: Spread
    slower: Spread


def measure(requests: int, rounds: int, settled_s: float) -> list[MemoryRow]:
    """Measures every kind on one server, one after the other."""
    port = free_port()
    command = [sys.executable, "-m", "api.cli", "serve", "--port", str(port), "--no-spare"]
    command += ["--device", "timed", "--stages", "1", "--stage-time", str(STEP_MS)]
    with running_server(command, port, 1) as server, httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        for _ in range(3):
            _seconds(client, "/v1/completions", json.dumps(SMALL).encode())
        return [_row(server, client, kind, requests, rounds, settled_s) for kind in KINDS]


def _row(
    server: ServerProcesses, client: httpx.Client, kind: str, requests: int, rounds: int, settled_s: float
) -> MemoryRow:
    path, body = KINDS[kind][0], json.dumps(KINDS[kind][1]).encode()
    small = json.dumps(SMALL).encode()
    before = _resident(server.front_end)
    status = client.post(path, content=body).status_code
    seconds = [_seconds(client, path, body) for _ in range(requests - 1)] or [0.0]
    time.sleep(settled_s)
    after = _resident(server.front_end)
    alone = [_seconds(client, "/v1/completions", small) for _ in range(rounds)]
    with _sending(server.url, path, body):
        beside = [_seconds(client, "/v1/completions", small) for _ in range(rounds)]
    time.sleep(settled_s)
    return MemoryRow(
        kind=kind,
        bytes=len(body),
        status=status,
        before_mb=before / 1e6,
        growth=after / before,
        seconds=Spread.of(seconds),
        alone_s=Spread.of(alone),
        beside_s=Spread.of(beside),
        slower=ratios(beside, alone),
    )


def _seconds(client: httpx.Client, path: str, body: bytes) -> float:
    began = time.monotonic()
    client.post(path, content=body)
    return time.monotonic() - began


@contextlib.contextmanager
def _sending(url: str, path: str, body: bytes) -> Iterator[None]:
    """Sends a request again and again, from CLIENTS threads, while the block runs."""
    is_over = threading.Event()
    has_begun = threading.Barrier(CLIENTS + 1)

    def send() -> None:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            has_begun.wait(TIMEOUT_S)
            while not is_over.is_set():
                client.post(path, content=body)

    threads = [threading.Thread(target=send) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    has_begun.wait(TIMEOUT_S)
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(TIMEOUT_S)


def _resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _targets(rows: Sequence[MemoryRow]) -> list[Target]:
    return [
        target
        for row in rows
        for target in (
            Target(name=f"{row.kind}: memory, after / before", bound=GROWTH_MAX, figure=row.growth),
            Target(name=f"{row.kind}: a small one beside / alone", bound=SLOWDOWN_MAX, figure=row.slower.median),
        )
    ]


def _table(rows: Sequence[MemoryRow]) -> Table:
    table = table_of(
        "request", "MB", "status", "s", "memory before, MB", "after / before", "small alone, s", "beside, s"
    )
    for row in rows:
        memory = (f"{row.before_mb:.0f}", f"{row.growth:.3f}")
        table.add_row(
            *(row.kind, f"{row.bytes / 1e6:.1f}", str(row.status), str(row.seconds)),
            *memory,
            *(str(row.alone_s), str(row.beside_s)),
        )
    return table


@benchmark_command("memory", devices=("timed",))
def main(short: bool, device: Device, out: Path) -> None:
    """Measure what large requests leave behind, and how long small ones take beside them."""
    machine = Machine.here()
    effort = (SHORT_REQUESTS, SHORT_ROUNDS, SHORT_SETTLED_S) if short else (REQUESTS, ROUNDS, SETTLED_S)
    rows = measure(*effort)
    report = Report(benchmark="memory", device=device, short=short, machine=machine, rows=rows, targets=_targets(rows))
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.memory")
