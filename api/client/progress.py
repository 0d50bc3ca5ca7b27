"""Progress of work that takes its time: a bar or a line in a terminal, lines of the log elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from api.messages.engine import EngineState

log = structlog.get_logger()


class LongWork:
    """Shows how many of so many steps are done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def steps(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """Gives a function to call with the name of each step that is done."""
        if not self._console.is_terminal:
            done = 0

            def note(name: str) -> None:
                nonlocal done
                done += 1
                log.info(what.lower(), done=name, count=done, total=total)

            yield note
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=total, last="")
            yield lambda name: progress.update(task, advance=1, last=name)


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
