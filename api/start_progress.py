"""What a user sees while the stages load."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console

from api.messages import EngineState

log = structlog.get_logger()


class StartProgress:
    """Shows the engine's states: the last one of every stage in a terminal, else as lines of the log."""

    def __init__(self, console: Console) -> None:
        self._status = console.status("Starting the engine") if console.is_terminal else None
        self._shown: dict[str, str] = {}

    @property
    def text(self) -> str:
        """The states that are shown now."""
        return "\n".join(self._shown.values())

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The time in which the states are on the screen."""
        if self._status is None:
            yield
            return
        with self._status:
            yield

    def update(self, state: EngineState) -> None:
        """Shows a new state; one that says the same as the last is not shown again."""
        subject, separator, _ = state.detail.partition(":")
        if state.phase != "loading" or not state.detail or self._shown.get(subject) == state.detail:
            return
        self._shown[subject] = state.detail
        if self._status is None:
            log.info("loading", detail=state.detail)
            return
        if separator:
            # Stages are there now, so what was said before of the engine as a whole is over.
            self._shown = {name: shown for name, shown in self._shown.items() if name != shown}
        self._status.update(self.text)
