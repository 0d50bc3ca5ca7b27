"""What /health, /ready and /live say in each state of the engine."""

import httpx
import pytest

from api.errors import EngineError
from api.messages.engine import EnginePhase, EngineState
from api.server.app import create_app
from tests.support.api_client import error_of
from tests.support.api_server import MODEL, endless_text
from tests.support.fake_engine import FakeEngine


def client(engine: FakeEngine, answers: bool = True) -> httpx.AsyncClient:
    async def probe() -> None:
        if not answers:
            raise EngineError.for_clients("The engine did not answer within 2 s.")

    app = create_app(MODEL, engine, probe=probe)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize(
    ("phase", "health", "ready"),
    [("loading", 503, 503), ("ready", 200, 200), ("recovering", 503, 200), ("failed", 503, 503)],
)
async def test_each_state_has_its_answers(phase: EnginePhase, health: int, ready: int) -> None:
    engine = FakeEngine(endless_text)
    engine.state = EngineState(phase=phase, detail="")
    async with client(engine) as opened:
        for path, status in (("/health", health), ("/ready", ready), ("/live", 200)):
            answer = await opened.get(path)
            assert answer.status_code == status
            if status == 503:
                error_of(answer, 503)
                assert answer.headers["retry-after"]


async def test_an_engine_that_does_not_answer_is_not_healthy_whatever_it_said_before() -> None:
    async with client(FakeEngine(endless_text), answers=False) as opened:
        assert "did not answer" in error_of(await opened.get("/health"), 503)["message"]
        assert (await opened.get("/ready")).status_code == 200
