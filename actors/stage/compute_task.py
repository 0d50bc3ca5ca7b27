"""What a stage's compute thread is asked to do between two steps."""

from collections.abc import Callable
from concurrent.futures import Future


class ComputeTask:
    """A function that belongs to that thread; `done` has its end, or what it raised."""

    def __init__(self, function: Callable[[], None], done: "Future[None]") -> None:
        self._function = function
        self.done = done

    def run(self) -> None:
        """Calls the function; raises nothing."""
        try:
            self._function()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)
