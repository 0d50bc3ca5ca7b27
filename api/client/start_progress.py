"""What a user sees while the stages load."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console

from api.messages.engine import EngineState

log = structlog.get_logger()


class StartProgress:
    """Shows the engines' states: the last one of every stage in a terminal, else as lines of the log."""

    def __init__(self, console: Console, replicas: int = 1) -> None:
        """Of several `replicas`, each line says which one it is of."""
        self._status = console.status("Starting the engine") if console.is_terminal else None
        self._is_numbered = replicas > 1
        self._shown: dict[tuple[int, str], str] = {}

    @property
    def text(self) -> str:
        """The states that are shown now."""
        lines = sorted(self._shown.items(), key=lambda line: line[0][0])
        return "\n".join(self._line(replica, detail) for (replica, _), detail in lines)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The time in which the states are on the screen."""
        if self._status is None:
            yield
            return
        with self._status:
            yield

    def update(self, state: EngineState, replica: int = 0) -> None:
        """Shows a new state; one that says the same as the last is not shown again."""
        subject, separator, _ = state.detail.partition(":")
        key = replica, subject
        if state.phase != "loading" or not state.detail or self._shown.get(key) == state.detail:
            return
        self._shown[key] = state.detail
        if self._status is None:
            log.info("loading", detail=self._line(replica, state.detail))
            return
        if separator:
            # Stages are there now, so what was said before of the engine as a whole is over.
            self._shown = {place: shown for place, shown in self._shown.items() if place != (replica, shown)}
        self._status.update(self.text)

    def _line(self, replica: int, detail: str) -> str:
        return f"Replica {replica}: {detail}" if self._is_numbered else detail
