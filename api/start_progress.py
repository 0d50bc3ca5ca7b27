"""What a user sees while the stages load."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console

from api.messages import EngineState

log = structlog.get_logger()


class StartProgress:
    """Shows the engine's states: on one changing line in a terminal, else as lines of the log."""

    def __init__(self, console: Console) -> None:
        self._status = console.status("Starting the engine") if console.is_terminal else None
        self._shown = ""

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The time in which the line is on the screen."""
        if self._status is None:
            yield
            return
        with self._status:
            yield

    def update(self, state: EngineState) -> None:
        """Shows a new state; one that says the same as the last is not shown again."""
        if state.phase != "loading" or not state.detail or state.detail == self._shown:
            return
        self._shown = state.detail
        if self._status is None:
            log.info("loading", detail=state.detail)
        else:
            self._status.update(state.detail)
