"""`python -m benchmarks.grammars`: tokens a second of requests with grammars beside those of free ones.

One server of the sample model answers the same prompts in turn: free, with a schema of its own for each request, and
free again while somebody sends grammars that have to be refused, one after the other. Answers are cut off at the same
number of tokens: the schemas demand longer ones.
"""

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvloop
from rich.table import Table

from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.ports import free_port
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.server_process import ServerError, running_server
from benchmarks.support.spread import Spread, ratios
from stages.device import Device

USERS = 32
STAGES = 2
TOKENS, SHORT_TOKENS = 100, 8
ROUNDS = 5
TIMES_FREE_MIN = 0.9
ANSWER_SECONDS = 300.0

FREE, SCHEMAS, STRANGERS = "free", f"{USERS} schemas", "beside refused grammars"


class GrammarsRow(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second of USERS requests in one case, and their ratio to those of free ones."""

    case: str
    tokens_per_s: Spread
    times_free: Spread


def schema(user: int) -> dict[str, Any]:
    """A schema of this user alone, whose answers are longer than any that is asked for."""
    properties = {
        f"name_{user}": {"type": "string", "maxLength": 20 + user},
        "kind": {"enum": [f"kind {user} {number}" for number in range(8)]},
        "size": {"type": "integer", "minimum": 0, "maximum": 10_000 + user},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "inner": {"type": "object", "properties": {"is_so": {"type": "boolean"}}, "required": ["is_so"]},
    }
    item = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "items": item, "minItems": 1000}


def refused(number: int) -> dict[str, Any]:
    """Fields of a request that is refused, another one each time: too slow, too deep, or too large."""
    chain = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1200)}
    kinds: list[dict[str, Any]] = [
        {"guided_json": {"properties": {f"p{number}_{i}": True for i in range(3500)}}},
        {"guided_json": {"$defs": {**chain, "d1200": {"const": number}}, "$ref": "#/$defs/d0"}},
        {
            "guided_json": {
                "properties": {f"p{number}_{i}": {"type": "integer", "multipleOf": 9001 + i} for i in range(60)}
            }
        },
        {"guided_json": {"properties": {f"p{i}": {"description": f"{number}" * 9} for i in range(20_000)}}},
    ]
    return kinds[number % len(kinds)]


def measure(tokens: int, rounds: int) -> list[GrammarsRow]:
    """Measures all cases in turn, in `rounds` rounds."""
    port = free_port()
    command = [sys.executable, "-m", "api.cli", "serve", "--port", str(port), "--stages", str(STAGES), "--no-spare"]
    with running_server(command, port, STAGES) as server:
        turns = uvloop.run(_turns(f"{server.url}/v1/completions", tokens, rounds))
    free, *_ = speeds = list(zip(*turns, strict=True))
    return [
        GrammarsRow(case=case, tokens_per_s=Spread.of(speed), times_free=ratios(speed, free))
        for case, speed in zip((FREE, SCHEMAS, STRANGERS), speeds, strict=True)
    ]


async def _turns(url: str, tokens: int, rounds: int) -> list[list[float]]:
    turns: list[list[float]] = []
    numbers = itertools.count()
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS, limits=httpx.Limits(max_connections=None)) as client:
        # The first grammar starts the process that tries them out, and each schema is compiled for the first time.
        await _tokens_per_s(client, url, SHORT_TOKENS, with_schemas=True)
        for _ in range(rounds):
            turn = [
                await _tokens_per_s(client, url, tokens, with_schemas=False),
                await _tokens_per_s(client, url, tokens, with_schemas=True),
            ]
            async with _stranger(client, url, numbers):
                turn.append(await _tokens_per_s(client, url, tokens, with_schemas=False))
            turns.append(turn)
    return turns


async def _tokens_per_s(client: httpx.AsyncClient, url: str, tokens: int, *, with_schemas: bool) -> float:
    async def ask(user: int) -> int:
        body: dict[str, Any] = {"prompt": "San Francisco is a", "max_tokens": tokens, "temperature": 1, "seed": user}
        body |= {"guided_json": schema(user)} if with_schemas else {"ignore_eos": True}
        response = await client.post(url, json=body)
        if not response.is_success:
            raise ServerError(f"The server answered {response.status_code}: {response.text[:200]}")
        return int(response.json()["usage"]["completion_tokens"])

    began = time.monotonic()
    counts = await asyncio.gather(*map(ask, range(USERS)))
    if set(counts) != {tokens}:
        raise ServerError(f"Answers had {sorted(set(counts))} tokens where {tokens} were asked for.")
    return sum(counts) / (time.monotonic() - began)


@contextlib.asynccontextmanager
async def _stranger(client: httpx.AsyncClient, url: str, numbers: "itertools.count[int]") -> AsyncIterator[None]:
    """Somebody who sends grammars that are refused, as fast as they are, while the block lasts."""

    async def send() -> None:
        while True:
            body = json.dumps({"prompt": "a", "max_tokens": 1, **refused(next(numbers))})
            response = await client.post(url, content=body, headers={"content-type": "application/json"})
            if response.status_code != httpx.codes.BAD_REQUEST:
                raise ServerError(f"A grammar was not refused: {response.status_code}.")

    sending = asyncio.create_task(send())
    try:
        yield
    finally:
        if sending.done():
            sending.result()
        sending.cancel()
        await asyncio.wait([sending], timeout=ANSWER_SECONDS)


def _table(rows: Sequence[GrammarsRow]) -> Table:
    table = table_of("case", "tokens/s", "times free")
    for row in rows:
        table.add_row(row.case, str(row.tokens_per_s), str(row.times_free))
    return table


@benchmark_command("grammars")
def main(short: bool, device: Device, out: Path) -> None:
    """Measure what grammars cost, on the embedded device, whichever is named."""
    machine = Machine.here()
    rows = measure(SHORT_TOKENS if short else TOKENS, 1 if short else ROUNDS)
    targets = [
        Target(
            name=f"{row.case}, times free ({USERS} users)",
            bound=TIMES_FREE_MIN,
            figure=row.times_free.median,
            is_floor=True,
        )
        for row in rows[1:]
    ]
    report = Report(benchmark="grammars", device=device, short=short, machine=machine, rows=rows, targets=targets)
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.grammars")
