"""From the command to a server and back, with an engine that needs no model."""

import asyncio
import contextlib
import io
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from structlog.testing import capture_logs

from api import demo, serve
from api.demo import DemoSettings, generate, run_demo
from api.engine_options import EngineOptions
from api.errors import EngineError, OptionError, RequestError
from api.listener import listen
from api.messages import EngineState
from api.model_source import resolve_model
from api.serve import ServeSettings
from api.settings import EngineSettings
from api.start_progress import StartProgress
from tests.api_server import DEADLINE_S, MODEL, TEXT_TOKENS, TOKENIZER, endless_text
from tests.fake_engine import FakeEngine, Script
from tests.small_tokenizer import EOS_ID

SAMPLE = resolve_model(None, {})


class FakeEngineClient(FakeEngine):
    """An engine that becomes ready when `loaded` is set, and whose streams end when it is closed."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.state = EngineState(phase="loading", detail="Stage 0: loading, 1 of 3 layers")
        self.loaded = asyncio.Event()
        self.failure: Exception | None = None
        self.started = asyncio.Event()
        self.closed = False

    @contextlib.asynccontextmanager
    async def start(
        self, _: EngineOptions, on_state: Callable[[EngineState], None]
    ) -> AsyncIterator["FakeEngineClient"]:
        on_state(self.state)
        self.started.set()
        try:
            yield self
        finally:
            await self.close()

    async def wait_ready(self, timeout_s: float) -> None:
        await asyncio.wait_for(self.loaded.wait(), timeout_s)
        if self.failure is not None:
            raise self.failure
        self.state = EngineState(phase="ready", detail="")

    async def close(self) -> None:
        self.closed = True
        for stream in self.streams:
            stream.fail()


def free_port() -> int:
    with listen("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
        return port


class Server:
    """`serve` as a task of the test's loop."""

    def __init__(self, tmp_path: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        settings = ServeSettings(
            engine=EngineSettings(cache_dir=tmp_path),
            source=SAMPLE,
            host="127.0.0.1",
            port=port,
            shutdown_timeout_s=0.2,
        )
        self.running = asyncio.create_task(serve.serve(settings))
        self.client = httpx.AsyncClient(base_url=self.url, timeout=DEADLINE_S)

    async def until(self, status: int) -> None:
        """Returns when /health has this status."""
        deadline = asyncio.get_running_loop().time() + DEADLINE_S
        while asyncio.get_running_loop().time() < deadline:
            with contextlib.suppress(httpx.ConnectError):
                if (await self.client.get("/health")).status_code == status:
                    return
            await asyncio.sleep(0.01)
        raise AssertionError(f"/health was not {status} within {DEADLINE_S} s")

    async def stop(self, number: signal.Signals) -> None:
        signal.raise_signal(number)
        await asyncio.wait_for(self.running, DEADLINE_S)
        await self.client.aclose()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngineClient:
    """The engine that `serve` and `run_demo` start."""
    fake = FakeEngineClient(endless_text)
    monkeypatch.setattr(serve, "EngineClient", fake)
    monkeypatch.setattr(demo, "EngineClient", fake)
    return fake


async def test_the_server_says_503_while_loading_and_then_what_to_try(
    engine: FakeEngineClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capture_logs() as logs:
        server = Server(tmp_path)
        await server.until(503)
        assert capsys.readouterr().out == ""
        engine.loaded.set()
        await server.until(200)
        await server.stop(signal.SIGTERM)
    assert engine.closed
    assert "Stage 0: loading, 1 of 3 layers" in [log.get("detail") for log in logs]
    said = capsys.readouterr().out
    assert f"Ready: galaxyline-sample on {server.url}, 6 layers over 2 stages." in said
    command = said[said.index("curl") :]
    assert f"curl {server.url}/v1/completions" in command
    body = json.loads(command[command.index("-d '") + 4 : command.rindex("'")])
    sampling = {"max_tokens": 32, "temperature": 0, "top_p": 0.9, "top_k": 10}
    assert body == {"model": "galaxyline-sample", "prompt": "San Francisco is a", **sampling}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_while_loading_ends_everything(
    number: signal.Signals, engine: FakeEngineClient, tmp_path: Path
) -> None:
    server = Server(tmp_path)
    await server.until(503)
    await server.stop(number)
    assert engine.closed


async def test_open_streams_end_with_an_error_when_the_server_is_stopped(
    engine: FakeEngineClient, tmp_path: Path
) -> None:
    engine.script = lambda request: request.tokens[1:2]
    engine.loaded.set()
    server = Server(tmp_path)
    await server.until(200)
    body = {"prompt": "hello", "stream": True}
    async with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.aiter_lines()
        first = await anext(lines)
        stopping = asyncio.create_task(server.stop(signal.SIGTERM))
        rest = [line async for line in lines if line]
    await stopping
    assert '"text":' in first
    assert "The engine was closed." in rest[-2]
    assert rest[-1] == "data: [DONE]"


async def test_an_engine_that_fails_to_start_is_what_serve_raises(engine: FakeEngineClient, tmp_path: Path) -> None:
    engine.failure = EngineError("Stage 1 found no room.")
    engine.loaded.set()
    server = Server(tmp_path)
    with pytest.raises(EngineError, match="no room"):
        await asyncio.wait_for(server.running, DEADLINE_S)
    assert engine.closed
    await server.client.aclose()


async def test_a_port_in_use_is_refused_before_the_engine_starts(engine: FakeEngineClient, tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        settings = ServeSettings(
            engine=EngineSettings(cache_dir=tmp_path), source=SAMPLE, host="127.0.0.1", port=port, shutdown_timeout_s=1
        )
        with pytest.raises(OptionError, match=f"Port {port} on 127.0.0.1 is in use"):
            await serve.serve(settings)
    assert not engine.closed


def demo_settings(tmp_path: Path, max_new_tokens: int) -> DemoSettings:
    return DemoSettings(engine=EngineSettings(cache_dir=tmp_path), source=SAMPLE, max_new_tokens=max_new_tokens)


async def test_the_demo_completes_all_prompts_greedily() -> None:
    engine = FakeEngine(lambda request: [*request.tokens[1:], *TEXT_TOKENS[:2], EOS_ID, *TEXT_TOKENS])
    pieces: list[str] = []
    prompts = [TOKENIZER.encode("a"), TOKENIZER.encode("€")]
    first, second = await generate(engine, MODEL, prompts, 20, pieces.append)
    assert (first.text, second.text) == ("ahello w", "€hello w")
    assert first.tokens == [*prompts[0][1:], *TEXT_TOKENS[:2]]
    assert "".join(pieces) == first.text
    assert all(stream.request.sampling.temperature == 0 for stream in engine.streams)


async def test_the_demo_runs_through_the_engine_and_ends_it(engine: FakeEngineClient, tmp_path: Path) -> None:
    engine.script = lambda request: request.tokens * 9
    engine.loaded.set()
    [generation] = await run_demo(demo_settings(tmp_path, 3), ["sea"])
    assert len(generation.tokens) == 3
    assert engine.closed


async def test_a_signal_ends_the_demo(engine: FakeEngineClient, tmp_path: Path) -> None:
    running = asyncio.create_task(run_demo(demo_settings(tmp_path, 3), ["sea"]))
    await asyncio.wait_for(engine.started.wait(), DEADLINE_S)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, DEADLINE_S)
    assert engine.closed


async def test_a_demo_prompt_that_is_too_long_is_refused(engine: FakeEngineClient, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"Prompt\[1\] has \d+ tokens; with --max-new-tokens 2040"):
        await run_demo(demo_settings(tmp_path, 2040), ["a", "a b c d e f g h i j"])
    assert not engine.started.is_set()


def test_progress_in_a_terminal_shows_every_stage_once() -> None:
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    progress = StartProgress(console)
    with progress.showing():
        for detail in ("Being placed.", "Stage 0: loading", "Stage 1: loading", "Stage 0: ready", "Stage 0: ready"):
            progress.update(EngineState(phase="loading", detail=detail))
        shown = str(progress.text)
    assert shown == "Stage 0: ready\nStage 1: loading"
