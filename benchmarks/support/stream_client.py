"""Streaming clients in a process of their own, so that their processor time is not measured.

They only count events: if they parsed JSON, the server would wait for them.
"""

import asyncio
import json
from typing import cast

import click
import httpx
import uvloop

ANSWER_SECONDS = 300.0
HTTP_PORT = 80
EVENT = b'data: {"id":'
DONE = b"data: [DONE]"
OK = b"HTTP/1.1 200 "


class StreamError(Exception):
    """The server answered with something other than a stream, or left."""


class Client(asyncio.Protocol):
    """The client of one completion, from request to end."""

    def __init__(self) -> None:
        self.tokens: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._count = 0
        self._rest = b""
        self._is_stream = False
        self._transport: asyncio.Transport | None = None

    def ask(self, host: str, tokens: int) -> None:
        """Sends the request."""
        body = {"prompt": "San Francisco is a", "max_tokens": tokens, "temperature": 0}
        content = json.dumps({**body, "ignore_eos": True, "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        if self._transport is None:
            raise StreamError("not connected")
        self._transport.write(head.encode() + content)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        received = self._rest + data
        if not self._is_stream:
            self._is_stream = received.startswith(OK)
        self._count += received.count(EVENT)
        if DONE in received and not self.tokens.done():
            self.tokens.set_result(self._count)
        # An event may be cut between two reads, so bytes that may be the beginning of one are kept for the next read.
        self._rest = received[max(received.rfind(b"\n"), len(received) - len(EVENT)) + 1 :]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.tokens.done():
            cause = "it ended in the middle" if self._is_stream else "the answer was not a stream"
            self.tokens.set_exception(StreamError(f"The server's stream is of no use: {cause}."))


async def stream_all(url: httpx.URL, streams: int, tokens: int) -> int:
    """Connects `streams` clients, then requests all completions at once; returns the number of tokens that came."""
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, url.host, url.port or HTTP_PORT))[1] for _ in range(streams)]
    for client in clients:
        client.ask(url.netloc.decode(), tokens)
    return sum(await asyncio.wait_for(asyncio.gather(*(client.tokens for client in clients)), ANSWER_SECONDS))


@click.command()
@click.argument("url", type=httpx.URL)
@click.argument("streams", type=int)
@click.argument("tokens", type=int)
def main(url: httpx.URL, streams: int, tokens: int) -> None:
    """Stream TOKENS tokens to each of STREAMS clients of the server at URL; print how many came, as JSON."""
    click.echo(json.dumps(uvloop.run(stream_all(url, streams, tokens))))


if __name__ == "__main__":
    main()
