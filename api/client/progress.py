"""The progress of work that takes long: a bar or a line in a terminal, lines of the log elsewhere."""

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
    """Shows the engines' states while they load: the last of every stage in a terminal, lines of the log elsewhere."""

    def __init__(self, console: Console, replicas: int = 1) -> None:
        """Where there are several `replicas`, each line begins with the number of its own."""
        self._status = console.status("Starting the engine") if console.is_terminal else None
        self._is_numbered = replicas > 1
        # By replica and stage; the stage is None for what is said of an engine as a whole.
        self._shown: dict[tuple[int, int | None], str] = {}

    @property
    def text(self) -> str:
        """The states that are shown now, a line each."""
        lines = sorted(self._shown.items(), key=lambda line: line[0][0])
        return "\n".join(self._line(replica, sentence) for (replica, _), sentence in lines)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Keeps the states on the screen while the context is open."""
        if self._status is None:
            yield
            return
        with self._status:
            yield

    def update(self, state: EngineState, replica: int = 0) -> None:
        """Shows a new state, unless it is the same as the last one."""
        stage = None if state.progress is None else state.progress.stage
        sentence = state.sentence
        if state.phase != "loading" or not sentence or self._shown.get((replica, stage)) == sentence:
            return
        self._shown[replica, stage] = sentence
        if self._status is None:
            log.info("loading", detail=self._line(replica, sentence))
            return
        if stage is not None:
            # Stages are there now, so the engine as a whole has got beyond its last state.
            self._shown.pop((replica, None), None)
        self._status.update(self.text)

    def _line(self, replica: int, sentence: str) -> str:
        return f"Replica {replica}: {sentence}" if self._is_numbered else sentence
