"""The front end on a real socket, and the model that it serves in tests."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from api.messages.engine import AddRequest
from api.server.access import AccessLog, RequestWatch
from api.server.app import create_app, plain_paths
from api.server.client_protocol import HttpServer, client_protocol
from api.server.serve import listen, url
from api.settings.server import DEFAULT_CLIENT_TIMEOUT_S, DEFAULT_KEEP_ALIVE_S, FrontSettings
from api.text.served_model import GenerationConfig, ServedModel
from tests.support.fake_engine import FakeEngine
from tests.support.small_tokenizer import EOS_ID, small_text_tokenizer

DEADLINE_S = 20
TEXT = "hello wörld € and so on "
TOKENIZER = small_text_tokenizer()
TEXT_TOKENS = TOKENIZER.encode(TEXT, add_special_tokens=False)

MODEL = ServedModel(
    name="small",
    root="org/small",
    max_model_len=256,
    vocab_size=300,
    eos_token_ids=[EOS_ID],
    tokenizer=TOKENIZER,
    generation=GenerationConfig(),
    created=1,
)


def endless_text(_: AddRequest) -> Sequence[int]:
    """A script that repeats TEXT for as long as it is asked."""
    return TEXT_TOKENS * 20


def never_ending(_: AddRequest) -> Sequence[int]:
    """A script that gives two tokens and then nothing, so that the request stays open."""
    return TEXT_TOKENS[:2]


class AppServer:
    """An application served by uvicorn on a thread with its own loop; `options` are those of `client_protocol`."""

    def __init__(
        self,
        app: FastAPI,
        client_timeout_s: float = DEFAULT_CLIENT_TIMEOUT_S,
        *,
        watch: RequestWatch | None = None,
        keep_alive_s: float = DEFAULT_KEEP_ALIVE_S,
        **options: Any,
    ) -> None:
        self._listener = listen("127.0.0.1", 0)
        self.url = url(self._listener)
        watch = watch or RequestWatch()
        config = uvicorn.Config(
            AccessLog(app, watch, plain_paths(app)),
            http=client_protocol(client_timeout_s, watch, **options),
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]  # the loop takes fractions too
        )
        self._server = HttpServer(config, client_timeout_s)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the server; fails if it does not end, as when a request hangs."""
        self._server.should_exit = True
        self._thread.join(DEADLINE_S)
        self._listener.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._listener]))


@contextmanager
def serving_app(
    engine: FakeEngine,
    model: ServedModel = MODEL,
    client_timeout_s: float = DEFAULT_CLIENT_TIMEOUT_S,
    front: FrontSettings | None = None,
    **options: Any,
) -> Iterator[str]:
    """The base URL of a server with `engine` behind it."""
    server = AppServer(create_app(model, engine, front=front), client_timeout_s, **options)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()
