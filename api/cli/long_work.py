"""Progress of work that takes its time: a bar in a terminal, lines of the log elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
