"""Questions to the engine that await their answers."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

from api.errors import EngineError

Answer = TypeVar("Answer")


class Questions(Generic[Answer]):
    """Those of one kind: the engine answers them in the order of asking."""

    def __init__(self) -> None:
        self._open: deque[asyncio.Future[Answer]] = deque()

    def ask(self) -> "asyncio.Future[Answer]":
        """The answer to come. Who does not want it any more cancels it."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._open.append(answer)
        return answer

    def answer(self, answer: Answer) -> None:
        """The oldest question is answered."""
        oldest = self._open.popleft()
        if not oldest.done():
            oldest.set_result(answer)

    def fail(self, error: EngineError) -> None:
        """No answer will come."""
        for question in self._open:
            if not question.done():
                question.set_exception(error)
        self._open.clear()
