"""The thought before an answer: where it begins and ends among the answer's tokens, and the tokens that close it."""

from collections import deque
from typing import Literal

from stages.step import Thought

Phase = Literal["before", "inside", "after"]


class ThoughtState:
    """Where an answer stands: before its thought, inside, or after it; it follows from the answer's tokens alone."""

    def __init__(self, thought: Thought) -> None:
        self._thought = thought
        self.phase: Phase = "inside" if thought.is_open else "before"
        self._opened = 0
        self._length = 0
        self._latest: deque[int] = deque(maxlen=len(thought.closing))
        self._after_budget: list[int] = []

    def note(self, token: int) -> None:
        """Takes in the answer's next token."""
        if self.phase == "before":
            self._note_before(token)
        elif self.phase == "inside":
            self._note_inside(token)

    @property
    def opening_token(self) -> int | None:
        """The token that begins a thought, or goes on with its beginning; None where none can begin."""
        return self._thought.opening[self._opened] if self.phase == "before" else None

    @property
    def forbidden_token(self) -> int | None:
        """The token that would begin a thought where its budget is 0."""
        is_last = self._opened == len(self._thought.opening) - 1
        return self.opening_token if self._thought.budget == 0 and is_last else None

    @property
    def forced_token(self) -> int | None:
        """The token that has to come next, as the budget is used up."""
        if self.phase != "inside":
            return None
        if self._after_budget:
            return self._after_budget[0]
        budget = self._thought.budget
        if budget is None or self._length < budget:
            return None
        return self._thought.closing[self._closed]

    @property
    def _closed(self) -> int:
        """So many tokens of the closing the thought ends with."""
        closing, latest = self._thought.closing, list(self._latest)
        longest = min(len(closing) - 1, len(latest))
        return next((n for n in range(longest, 0, -1) if latest[-n:] == closing[:n]), 0)

    def _note_before(self, token: int) -> None:
        if token != self._thought.opening[self._opened]:
            self.phase = "after"
            return
        self._opened += 1
        if self._opened == len(self._thought.opening):
            self.phase = "inside"

    def _note_inside(self, token: int) -> None:
        if self._after_budget:
            del self._after_budget[0]
            if not self._after_budget:
                self.phase = "after"
            return
        self._length += 1
        self._latest.append(token)
        if list(self._latest) != self._thought.closing:
            return
        budget = self._thought.budget
        if budget is not None and self._length - len(self._thought.closing) >= budget and self._thought.after_budget:
            self._after_budget = list(self._thought.after_budget)
        else:
            self.phase = "after"
