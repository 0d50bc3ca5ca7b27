"""`serve` from its start to its end, with an engine that needs no model."""

import asyncio
import contextlib
import io
import json
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from structlog.testing import capture_logs

from actors.stage.health import Phase, StageProgress
from api.client import replicas
from api.client.progress import StartProgress
from api.errors import EngineError, OptionError, StoppedError, exit_code
from api.messages.engine import AddRequest, EngineState, PipelineReport, loading_state
from api.server import serve
from api.server.serve import listen
from api.settings.engine import EngineSettings
from api.settings.server import ApiKeys, CorsOptions, FrontSettings, ServeSettings
from benchmarks.support.ports import free_port
from tests.support.api_server import DEADLINE_S, endless_text
from tests.support.fake_engine import SAMPLE, FakeEngineClient


class Server:
    """`serve` as a task of the test's loop."""

    def __init__(self, tmp_path: Path, shutdown_timeout_s: float = 0.2, front: FrontSettings | None = None) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        settings = ServeSettings(
            engine=EngineSettings.of(cache_dir=tmp_path),
            source=SAMPLE,
            host="127.0.0.1",
            port=port,
            shutdown_timeout_s=shutdown_timeout_s,
            front=front or FrontSettings(),
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

    async def stop(self, number: signal.Signals) -> int:
        """Sends the signal, and returns the exit code that the command has then."""
        signal.raise_signal(number)
        [outcome] = await asyncio.wait_for(asyncio.gather(self.running, return_exceptions=True), DEADLINE_S)
        await self.client.aclose()
        if outcome is None:
            return 0
        assert isinstance(outcome, StoppedError)
        return exit_code(outcome)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngineClient:
    """The engine that `serve` starts."""
    fake = FakeEngineClient(endless_text)
    monkeypatch.setattr(replicas, "EngineClient", fake)
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


async def test_the_request_to_try_has_a_place_for_the_key_and_not_the_key(
    engine: FakeEngineClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.loaded.set()
    server = Server(tmp_path, front=FrontSettings(api_keys=ApiKeys(["of the house"])))
    await server.until(200)
    await server.stop(signal.SIGTERM)
    said = capsys.readouterr().out
    assert '\\\n  -H "Authorization: Bearer $GALAXYLINE_API_KEY" \\\n' in said
    assert "of the house" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_while_loading_ends_everything(
    number: signal.Signals, engine: FakeEngineClient, tmp_path: Path
) -> None:
    server = Server(tmp_path)
    await server.until(503)
    assert await server.stop(number) == 128 + number
    assert engine.closed


BODY = {"prompt": "hello", "stream": True, "max_tokens": 4}


def one_token(request: AddRequest) -> Sequence[int]:
    """A script that gives one token with a text and then nothing, so that the request stays open."""
    return request.tokens[1:2]


@contextlib.asynccontextmanager
async def an_open_stream(server: Server) -> AsyncIterator[AsyncIterator[str]]:
    """Opens a completion, and gives its lines after the first one."""
    async with server.client.stream("POST", "/v1/completions", json=BODY) as response:
        lines = response.aiter_lines()
        assert '"text":' in await anext(lines)
        yield lines


async def test_while_draining_open_streams_go_on_and_new_requests_are_refused(
    engine: FakeEngineClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def report() -> PipelineReport:
        raise EngineError("The engine was closed.")

    monkeypatch.setattr(engine, "report", report, raising=False)
    monkeypatch.setattr(engine, "pid", 1, raising=False)
    engine.script = one_token
    engine.loaded.set()
    server = Server(tmp_path, shutdown_timeout_s=DEADLINE_S)
    await server.until(200)
    async with an_open_stream(server) as lines:
        signal.raise_signal(signal.SIGTERM)
        await server.until(503)
        refused = await server.client.post("/v1/completions", json=BODY)
        health = await server.client.get("/health")
        models = await server.client.get("/v1/models")
        pipeline = await server.client.get("/pipeline")
        assert not engine.closed
        engine.streams[0].finish(engine.streams[0].request.tokens[1:2] * 3)
        rest = [line async for line in lines if line]
    await asyncio.wait_for(server.running, DEADLINE_S)
    await server.client.aclose()
    for answer in (refused, health):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "draining" in answer.json()["error"]["message"]
    assert models.status_code == 200
    assert (pipeline.status_code, pipeline.json()["phase"], pipeline.json()["detail"]) == (200, "stopping", "")
    assert '"finish_reason":"length"' in rest[-2]
    assert rest[-1] == "data: [DONE]"


async def test_open_streams_end_with_an_error_when_their_time_is_up(engine: FakeEngineClient, tmp_path: Path) -> None:
    engine.script = one_token
    engine.loaded.set()
    server = Server(tmp_path)
    await server.until(200)
    async with an_open_stream(server) as lines:
        stopping = asyncio.create_task(server.stop(signal.SIGTERM))
        rest = [line async for line in lines if line]
    assert await stopping == 143
    assert "The engine was closed." in rest[-2]
    assert rest[-1] == "data: [DONE]"


async def test_a_second_signal_ends_everything_at_once(engine: FakeEngineClient, tmp_path: Path) -> None:
    engine.script = one_token
    engine.loaded.set()
    server = Server(tmp_path, shutdown_timeout_s=10 * DEADLINE_S)
    await server.until(200)
    async with an_open_stream(server) as lines:
        signal.raise_signal(signal.SIGTERM)
        await server.until(503)
        stopping = asyncio.create_task(server.stop(signal.SIGINT))
        rest = [line async for line in lines if line]
    assert await stopping == 143
    assert "The engine was closed." in rest[-2]


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
            engine=EngineSettings.of(cache_dir=tmp_path),
            source=SAMPLE,
            host="127.0.0.1",
            port=port,
            shutdown_timeout_s=1,
        )
        with pytest.raises(OptionError, match=f"Port {port} on 127.0.0.1 is in use"):
            await serve.serve(settings)
    assert not engine.closed


def loading(stage: int, phase: Phase) -> EngineState:
    progress = StageProgress(stage=stage, host="host-a", rows=[stage], phase=phase, layers_done=1, layers=3)
    return EngineState(phase="loading", progress=progress)


def test_progress_in_a_terminal_shows_every_stage_once() -> None:
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    progress = StartProgress(console)
    states = [loading(0, "loading"), loading(1, "loading"), loading(0, "ready"), loading(0, "ready")]
    with progress.showing():
        for state in (loading_state("Being placed."), *states):
            progress.update(state)
        shown = str(progress.text)
    assert shown == "Stage 0 on host-a: ready\nStage 1 on host-a: loading, 1 of 3 layers"


def test_progress_of_several_replicas_says_which_one() -> None:
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    progress = StartProgress(console, replicas=2)
    with progress.showing():
        for replica, state in (
            (1, loading_state("Being placed.")),
            (0, loading_state("Being placed.")),
            (0, loading(0, "loading")),
            (0, loading(1, "ready")),
        ):
            progress.update(state, replica)
        shown = str(progress.text)
    assert shown.splitlines() == [
        "Replica 0: Stage 0 on host-a: loading, 1 of 3 layers",
        "Replica 0: Stage 1 on host-a: ready",
        "Replica 1: Being placed.",
    ]


async def test_pages_of_the_allowed_origins_may_ask_behind_a_proxy_with_a_root_path(
    engine: FakeEngineClient, tmp_path: Path
) -> None:
    engine.loaded.set()
    front = FrontSettings(root_path="/models/r1", cors=CorsOptions(allowed_origins=['["https://a.example"]']))
    server = Server(tmp_path, front=front)
    await server.until(200)
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, status in (("https://a.example", 200), ("https://b.example", 400)):
        headers = {"origin": origin, **asked}
        preflight = await server.client.options("/v1/completions", headers=headers)
        assert preflight.status_code == status
        assert preflight.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    for prefix in ("", "/models/r1"):
        headers = {"origin": "https://a.example"}
        answer = await server.client.post(f"{prefix}/v1/completions", json={"prompt": "a"}, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, headers["origin"])
    schema = (await server.client.get("/models/r1/openapi.json")).json()
    assert schema["servers"] == [{"url": "/models/r1"}]
    await server.stop(signal.SIGTERM)


def test_values_that_make_no_sense_are_refused_with_their_option() -> None:
    with pytest.raises(OptionError, match=r"--allowed-methods .* not a JSON list"):
        CorsOptions(allowed_methods=['["GET", 1]'])
    for path in ("models", "/models/", "/"):
        with pytest.raises(OptionError, match="--root-path"):
            FrontSettings(root_path=path)
