"""Clients that keep a server under steady load and note when each token came, in a process of their own.

The process writes a line to its standard output when the measured time begins and when it ends, so that others can
read clocks and counters at these moments; the last line has its notes.
"""

import asyncio
import itertools
import os
import sys
import time
from typing import Literal

import click
import httpx
import msgspec
import uvloop

from benchmarks.support.stream_client import ANSWER_SECONDS, HTTP_PORT, Client, StreamError

Moment = Literal["begins", "ended"]


class SteadyTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The notes of the clients, in seconds of one clock.

    They have when measuring began and ended, when each stream's tokens came in between, and how long the first token of
    each probe took.
    """

    began_s: float
    ended_s: float
    streams: list[list[float]]
    probes: list[float]

    @property
    def tokens(self) -> int:
        """The number of tokens of all streams in the measured time."""
        return sum(map(len, self.streams))

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all streams."""
        return self.tokens / (self.ended_s - self.began_s)

    @property
    def gaps(self) -> list[float]:
        """Seconds from every token to the next of its stream."""
        return [after - before for times in self.streams for before, after in itertools.pairwise(times)]


class NotingClient(Client):
    """A client that notes when each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.first = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        before = self._count
        super().data_received(data)
        self.times += [time.monotonic()] * (self._count - before)
        if self.times and not self.first.done():
            self.first.set_result(self.times[0])

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.tokens.exception() is not None and not self.first.done():
            self.first.set_exception(StreamError("The server refused a stream, or left."))

    def leave(self) -> None:
        """Closes the connection, which ends the request."""
        if self._transport is not None:
            self._transport.close()


class Load:
    """All clients of one server."""

    def __init__(self, url: httpx.URL) -> None:
        self._url = url

    async def run(self, streams: int, tokens: int, warm_s: float, measured_s: float, probes: int) -> SteadyTimes:
        """Runs the load and measures it. Raises StreamError if a stream ends before all is measured."""
        clients = [await self._ask(tokens) for _ in range(streams)]
        await asyncio.wait_for(asyncio.gather(*(client.first for client in clients)), ANSWER_SECONDS)
        await asyncio.sleep(warm_s)
        began = self._say("begins")
        await asyncio.sleep(measured_s)
        ended = self._say("ended")
        if any(client.tokens.done() for client in clients):
            raise StreamError("A stream ended while all were measured: it needs more tokens, or less time.")
        asked = [await self._probe() for _ in range(probes)]
        for client in clients:
            client.leave()
        noted = [[at for at in client.times if began < at <= ended] for client in clients]
        return SteadyTimes(began_s=began, ended_s=ended, streams=noted, probes=asked)

    async def _ask(self, tokens: int) -> NotingClient:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(NotingClient, self._url.host, self._url.port or HTTP_PORT)
        client.ask(self._url.netloc.decode(), tokens)
        return client

    async def _probe(self) -> float:
        """The seconds to the first token of one more request."""
        asked = time.monotonic()
        client = await self._ask(1)
        return float(await asyncio.wait_for(client.first, ANSWER_SECONDS)) - asked

    @staticmethod
    def _say(moment: Moment) -> float:
        click.echo(moment)
        return time.monotonic()


@click.command()
@click.argument("url", type=httpx.URL)
@click.argument("streams", type=int)
@click.argument("tokens", type=int)
@click.argument("warm_s", type=float)
@click.argument("measured_s", type=float)
@click.argument("probes", type=int)
def main(url: httpx.URL, **shape: float) -> None:
    """Keep STREAMS streams of TOKENS tokens at URL for WARM_S and then MEASURED_S seconds, and try PROBES requests."""
    times = uvloop.run(Load(url).run(**shape))  # type: ignore[arg-type]
    # With PYTHONUNBUFFERED, `echo` may write only a part of a long line without an error.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as output:
        output.write(msgspec.json.encode(times))


if __name__ == "__main__":
    main()
