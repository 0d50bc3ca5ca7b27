"""What is asked of a stage's threads beside the steps."""

from collections.abc import Callable
from concurrent.futures import Future


class StageTask:
    """A function that belongs to a thread of the stage; `done` ends when it does, with what it raised.

    One that runs `behind_all` is not run before all threads are done with the steps before it.
    """

    def __init__(self, function: Callable[[], None], done: "Future[None]", *, behind_all: bool = False) -> None:
        self._function = function
        self.done = done
        self.behind_all = behind_all

    def run(self) -> None:
        """Calls the function; raises nothing."""
        try:
            self._function()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)
