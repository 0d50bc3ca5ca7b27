"""What one rendering of a template may cost: time of the processor, and characters that its operations handle."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

RENDER_SECONDS = 1.0
"""The most time of the processor; a thousand long messages take a hundredth of it."""

STEPS_BETWEEN_CHECKS = 16

ITEMS_BETWEEN_CHECKS = 1 << 12

WORK_FACTOR = 8
"""The characters that all operations together may handle for each one that may be rendered."""

SLOT = 8
"""What a place in a list weighs, in characters."""


class TemplateCostError(jinja2.TemplateError):
    """A template needs too much time or memory."""


class Budget:
    """Counts the work of one rendering. Its methods raise TemplateCostError where it is too much."""

    def __init__(self, characters_max: int, seconds: float = RENDER_SECONDS) -> None:
        self._characters_max = characters_max
        self._left = WORK_FACTOR * characters_max
        self._steps = 0
        self._deadline = time.thread_time() + seconds

    def step(self) -> None:
        """Counts an operation: a pass through a loop, a call, a filter, a comparison."""
        self._steps += 1
        if self._steps % STEPS_BETWEEN_CHECKS == 0:
            self._check_time()

    def handle(self, characters: int) -> None:
        """Counts characters that an operation is about to read or to make."""
        self.step()
        self._left -= characters
        if self._left < 0 or characters > self._characters_max * SLOT:
            raise TemplateCostError("it makes too much of them")

    def handle_value(self, value: object) -> None:
        """Counts the characters of a value as text, with all that is in it."""
        self.handle(self._weight(value))

    def checked_output(self, pieces: Iterable[str]) -> Iterator[str]:
        """Gives pieces of output up to the most characters that may be rendered."""
        left = self._characters_max
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                raise TemplateCostError("the text would be too long")
            yield piece

    def _check_time(self) -> None:
        if time.thread_time() > self._deadline:
            raise TemplateCostError("it takes too long")

    def _weight(self, value: object) -> int:
        if isinstance(value, str):
            return len(value)
        weight = items = 0
        waiting = [value]
        while waiting and weight <= self._left:
            item = waiting.pop()
            weight += SLOT
            items += 1
            if items % ITEMS_BETWEEN_CHECKS == 0:
                self._check_time()
            if isinstance(item, str):
                weight += len(item)
            elif isinstance(item, int):
                weight += item.bit_length() // 3
            elif isinstance(item, Mapping):
                weight += SLOT * len(item)
                waiting += item
                waiting += item.values()
            elif isinstance(item, Sized) and isinstance(item, Iterable) and not isinstance(item, range | Undefined):
                # A list that holds one long text many times is longer than what it was made of.
                weight += SLOT * len(item)
                waiting += item
        return weight


_current: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def within(budget: Budget) -> Iterator[None]:
    """Makes a budget the one that templates spend."""
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)


def budget() -> Budget:
    """The budget of the rendering that goes on."""
    return _current.get()


INTEGER_BITS_MAX = 1 << 12


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Counts what an operator is about to make."""
    budget().step()
    if operator == "*" and isinstance(left, int) and not isinstance(right, int):
        left, right = right, left
    if isinstance(left, str | list | tuple):
        unit = 1 if isinstance(left, str) else SLOT
        if operator == "+" and isinstance(right, str | list | tuple):
            budget().handle(unit * (len(left) + len(right)))
        elif operator == "*" and isinstance(right, int):
            budget().handle(unit * len(left) * max(right, 0))
    elif isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
        if bits.get(operator, 0) > INTEGER_BITS_MAX:
            raise SecurityError("its numbers are too large")
