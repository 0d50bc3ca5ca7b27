"""The routes that tell orchestrators and balancers how the server is: /health, /ready, /live, /ping and /load."""

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.responses import Response

from api.client.open_requests import TokenSource
from api.errors import EngineError, NotReadyError
from api.messages.engine import not_ready, takes_requests
from api.openai.bodies import Load, Status, Version, encode
from api.server.admission import AdmissionControl
from api.server.openapi import add_route, answers_of

Probe = Callable[[], Awaitable[object]]

"""Returns when the engine answers; raises EngineError where it does not."""


class Health:
    """The routes of one engine."""

    def __init__(self, engine: TokenSource, admission: AdmissionControl, probe: Probe | None = None) -> None:
        """`probe` queries the engine, which answers at once where it works."""
        self._engine = engine
        self._admission = admission
        self._probe = probe

    def add_routes(self, app: FastAPI) -> None:
        """Adds the routes to an application."""
        for path, handler, errors, summary in (
            ("/health", self.health, [503], "200 if a token can be made now."),
            ("/ready", self.ready, [503], "200 if requests are taken, also while they wait for a lost stage."),
            ("/live", self.live, [], "200 if this process answers."),
            ("/ping", self.health, [503], "The same as /health."),
        ):
            add_route(app, path, handler, answers_of(Status, *errors), summary)
        add_route(app, "/ping", self.health, answers_of(Status, 503), "The same as /health.", method="POST")
        add_route(app, "/load", self.load, answers_of(Load), "The number of completions that have not ended.")

        async def program_version() -> Response:
            return _json(encode(Version(version=app.version)))

        add_route(app, "/version", program_version, answers_of(Version), "The program's version.")

    async def health(self) -> Response:
        """Answers 200 where a token can be made now.

        Raises NotReadyError while stages load or are replaced, and where the engine failed or does not answer.
        """
        state = self._engine.state
        if state.phase != "ready":
            raise not_ready(state)
        if self._probe is not None:
            try:
                await self._probe()
            except EngineError as error:
                public = f"No token can be made: {error.public}" if error.public else "No token can be made."
                raise NotReadyError(f"No token can be made: {error}", public=public) from error
        return _json(encode(Status(status="ready")))

    async def ready(self) -> Response:
        """Answers 200 where requests are accepted, also while they wait for a stage. Raises NotReadyError elsewhere."""
        state = self._engine.state
        if not takes_requests(state):
            raise not_ready(state)
        return _json(encode(Status(status=state.phase)))

    async def live(self) -> Response:
        """Answers 200 as long as this process answers, whatever its engine does."""
        return _json(encode(Status(status="live")))

    async def load(self) -> Response:
        """Answers with the number of open completions, under vLLM's name."""
        return _json(encode(Load(server_load=self._admission.open)))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
