"""GET /health, /ready and /live: whether a token can be made, a request be taken, and the process answers."""

from collections.abc import Awaitable, Callable

from starlette.responses import Response

from api.client.token_source import TokenSource
from api.errors import EngineError, NotReadyError
from api.messages.state import not_ready, takes_requests
from api.openai.responses import Status, encode

PROBE_TIMEOUT_S = 2.0
"""How long the engine has to answer while its state says that it is ready."""

Probe = Callable[[], Awaitable[object]]


class Health:
    """Answers the three routes for one engine."""

    def __init__(self, engine: TokenSource, probe: Probe | None = None) -> None:
        """`probe` asks the engine something that it answers at once, and raises EngineError where it does not."""
        self._engine = engine
        self._probe = probe

    async def health(self) -> Response:
        """200 where a token can be made now. Raises NotReadyError: while stages load or are replaced, where the engine
        failed, and where its process does not answer."""
        state = self._engine.state
        if state.phase != "ready":
            raise not_ready(state)
        if self._probe is not None:
            try:
                await self._probe()
            except EngineError as error:
                raise NotReadyError(f"No token can be made: {error}") from error
        return _status("ready")

    async def ready(self) -> Response:
        """200 where requests are taken: also while a lost stage is replaced, when they wait. Raises NotReadyError."""
        state = self._engine.state
        if not takes_requests(state):
            raise not_ready(state)
        return _status(state.phase)

    async def live(self) -> Response:
        """200 as long as this process answers, whatever its engine does."""
        return _status("live")


def _status(status: str) -> Response:
    return Response(encode(Status(status=status)), media_type="application/json")
