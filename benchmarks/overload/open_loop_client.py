"""Open-loop clients, which come at a given rate whatever happens to those before, in a process of their own.

Each sends one request, streams the answer and leaves; a refusal is not tried again. The process writes a line to its
standard output when the measured time begins and when it ends; the last line has its notes.
"""

import asyncio
import json
import os
import random
import re
import sys
import time
from typing import cast

import click
import httpx
import msgspec
import uvloop

from benchmarks.support.stream_client import DONE, EVENT, HTTP_PORT, StreamError

STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
RETRY_AFTER = re.compile(rb"\r\nretry-after: (\d+)\r\n", re.I)
HEAD_BYTES_MAX = 4096


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request; times are seconds of one clock.

    `status` is 0 if no answer came. `ended_s` is None for an answer that was cut short, or not over when clients left.
    """

    asked_s: float
    status: int
    retry_after_s: int | None
    tokens_s: list[float]
    ended_s: float | None


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """All requests until the end of the measured time, and when that time began and ended."""

    began_s: float
    ended_s: float
    outcomes: list[Outcome]


class Visitor(asyncio.Protocol):
    """A client with one request, from connection to end."""

    def __init__(self, request: bytes, asked_s: float) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._asked_s = asked_s
        self._head = b""
        self._rest = b""
        self._tokens_s: list[float] = []
        self._ended_s: float | None = None
        self._transport: asyncio.Transport | None = None

    def outcome(self) -> Outcome:
        """What has become of the request so far."""
        status, retry = STATUS.match(self._head), RETRY_AFTER.search(self._head)
        return Outcome(
            asked_s=self._asked_s,
            status=0 if status is None else int(status.group(1)),
            retry_after_s=None if retry is None else int(retry.group(1)),
            tokens_s=self._tokens_s,
            ended_s=self._ended_s,
        )

    def leave(self) -> None:
        """Closes the connection."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._head += data[: HEAD_BYTES_MAX - len(self._head)]
        received = self._rest + data
        self._tokens_s += [now] * received.count(EVENT)
        if DONE in received:
            self._ended_s = now
        # An event may be cut between two reads, so bytes that may be the beginning of one are kept for the next read.
        self._rest = received[max(received.rfind(b"\n"), len(received) - len(EVENT)) + 1 :]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


class OpenLoop:
    """All visitors of one server."""

    def __init__(self, url: httpx.URL, tokens: int) -> None:
        body = {"prompt": "San Francisco is a", "max_tokens": tokens, "temperature": 0}
        content = json.dumps({**body, "ignore_eos": True, "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {url.netloc.decode()}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self._url = url
        self._request = head.encode() + content
        self._visitors: list[Visitor] = []
        self._connecting: set[asyncio.Task[None]] = set()

    async def run(self, rate: float, warm_s: float, measured_s: float, seed: int) -> Notes:
        """Sends visitors in a Poisson process of `rate` a second; they leave when the measured time is over."""
        chance = random.Random(seed)
        start = time.monotonic()
        begins, ends = start + warm_s, start + warm_s + measured_s
        is_measured = False
        due = start
        while due < ends:
            await asyncio.sleep(max(due - time.monotonic(), 0))
            if due >= begins and not is_measured:
                click.echo("begins")
                is_measured = True
            self._visit(due)
            due += chance.expovariate(rate)
        await asyncio.sleep(max(ends - time.monotonic(), 0))
        click.echo("ended")
        notes = Notes(began_s=begins, ended_s=ends, outcomes=[visitor.outcome() for visitor in self._visitors])
        for visitor in self._visitors:
            visitor.leave()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        return notes

    def _visit(self, due: float) -> None:
        visitor = Visitor(self._request, due)
        self._visitors.append(visitor)
        connecting = asyncio.create_task(self._connect(visitor))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    async def _connect(self, visitor: Visitor) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: visitor, self._url.host, self._url.port or HTTP_PORT)
        except OSError as error:
            raise StreamError(f"The server cannot be reached: {error}.") from error


@click.command()
@click.argument("url", type=httpx.URL)
@click.argument("tokens", type=int)
@click.argument("rate", type=float)
@click.argument("warm_s", type=float)
@click.argument("measured_s", type=float)
@click.argument("seed", type=int)
def main(url: httpx.URL, tokens: int, rate: float, warm_s: float, measured_s: float, seed: int) -> None:
    """Ask the server at URL for TOKENS tokens RATE times a second, for WARM_S and then MEASURED_S seconds."""
    notes = uvloop.run(OpenLoop(url, tokens).run(rate, warm_s, measured_s, seed))
    # With PYTHONUNBUFFERED the standard output writes only as much as a pipe takes at once, and drops the rest.
    with os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as whole:
        whole.write(msgspec.json.encode(notes) + b"\n")


if __name__ == "__main__":
    main()
