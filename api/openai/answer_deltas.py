"""The parts of a chat message in the order in which they come: reasoning, content and tool calls."""

from typing import Literal

import msgspec


class CallDelta(msgspec.Struct, frozen=True):
    """The next part of tool call `index`. Only the first one of a call has its `name`."""

    index: int
    name: str | None
    arguments: str


class Delta(msgspec.Struct, frozen=True):
    """The next part of a message, of one kind: reasoning, content or one call."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()


class _Run(msgspec.Struct):
    kind: Literal["reasoning", "content", "call"]
    index: int
    name: str | None
    parts: list[str]


class DeltaCollector:
    """Collects the parts of a message, joins those of one kind that follow each other, and gives them as deltas."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self.calls = 0

    def add_reasoning(self, text: str) -> None:
        """Adds text of the thought."""
        self._add(_Run("reasoning", 0, None, [text]))

    def add_content(self, text: str) -> None:
        """Adds text of the answer."""
        self._add(_Run("content", 0, None, [text]))

    def begin_call(self, name: str) -> None:
        """Begins the next tool call."""
        self._runs.append(_Run("call", self.calls, name, []))
        self.calls += 1

    def add_arguments(self, text: str) -> None:
        """Adds to the arguments of the call that began last."""
        self._add(_Run("call", self.calls - 1, None, [text]))

    def take(self) -> list[Delta]:
        """Returns the deltas since the last time."""
        deltas = [_delta(run) for run in self._runs]
        self._runs.clear()
        return deltas

    def _add(self, run: _Run) -> None:
        if not run.parts[0]:
            return
        last = self._runs[-1] if self._runs else None
        if last is not None and (last.kind, last.index) == (run.kind, run.index):
            last.parts += run.parts
        else:
            self._runs.append(run)


def joined_deltas(deltas: list[Delta]) -> list[Delta]:
    """The same deltas, with those of one kind that follow each other joined."""
    joined: list[Delta] = []
    for delta in deltas:
        both = _both(joined[-1], delta) if joined else None
        if both is None:
            joined.append(delta)
        else:
            joined[-1] = both
    return joined


def _both(first: Delta, second: Delta) -> Delta | None:
    """Both deltas as one; None where they are not of one kind, or of two calls."""
    if first.reasoning and second.reasoning:
        return Delta(reasoning=first.reasoning + second.reasoning)
    if first.content and second.content:
        return Delta(content=first.content + second.content)
    if first.calls and second.calls and first.calls[0].index == second.calls[0].index:
        call = first.calls[0]
        return Delta(calls=(CallDelta(call.index, call.name, call.arguments + second.calls[0].arguments),))
    return None


def _delta(run: _Run) -> Delta:
    text = "".join(run.parts)
    if run.kind == "reasoning":
        return Delta(reasoning=text)
    if run.kind == "content":
        return Delta(content=text)
    return Delta(calls=(CallDelta(run.index, run.name, text),))
