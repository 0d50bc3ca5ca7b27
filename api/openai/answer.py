"""The text of an answer, read as a chat message with its thought, its content and its tool calls."""

from collections.abc import Callable

from api.openai.answer_deltas import Delta, DeltaCollector
from api.openai.answer_format import CALL, CALLS, END_THINK, THINK, THOUGHT_TAGS, TOOL_TAGS, AnswerFormat, TagSplitter
from api.openai.tool_calls import ToolCalls, plain_text

NEWLINES_BEHIND_THOUGHT = 2
"""The newlines behind a thought that belong to the markup, as models write them: an empty line."""


class AnswerParser:
    """Reads one choice's text as it comes. What comes out depends on the text alone, and not on how it was cut.

    One newline at the beginning of a thought and one at its end belong to the markup, as do two behind it. Without
    any tag the whole text is the answer. A tool call inside a thought ends the thought. Where no tools may be called,
    the tags of tools are left out, and the text of a call is content.
    """

    def __init__(self, format: AnswerFormat, *, starts_in_thought: bool, has_tools: bool) -> None:  # noqa: A002
        """`starts_in_thought` tells that the prompt opened a thought, `has_tools` that there are tools to be called."""
        is_thoughtful = format.reasoning == "deepseek_r1" or (starts_in_thought and format.reasoning != "none")
        tags = (THOUGHT_TAGS if is_thoughtful else ()) + (TOOL_TAGS if format.tools != "none" else ())
        self._splitter = TagSplitter(tags)
        self._message = DeltaCollector()
        self._tools = ToolCalls(format.tools, self._message)
        self._plain = plain_text if format.tools != "none" else str
        self._has_tools = has_tools and format.tools != "none"
        self._starts_in_thought = is_thoughtful and starts_in_thought
        self._state: Callable[[str], None] = self._at_start if is_thoughtful else self._in_content
        self._held: list[str] = []
        self._newlines = 0
        self._is_left_open = False

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends inside the thought."""
        return self._state == self._in_thought or (self._starts_in_thought and self._state == self._at_start)

    @property
    def calls(self) -> int:
        """The number of tool calls so far."""
        return self._message.calls

    def add(self, text: str) -> list[Delta]:
        """Returns what can be told of the message now."""
        for piece in self._splitter.add(text):
            self._state(piece)
        return self._message.take()

    def finish(self) -> list[Delta]:
        """Returns what is still held back, when no more text will come. Call it once."""
        if rest := self._splitter.flush():
            self._state(rest)
        if self._state == self._at_start:
            self._leave_start("")
        if self._state == self._in_thought:
            self._message.add_reasoning("".join(self._held))
        self._tools.finish()
        return self._message.take()

    def _at_start(self, piece: str) -> None:
        """White space before a tag of thoughts or calls belongs to the markup; before anything else it is text."""
        if piece == THINK or (piece == END_THINK and not self._starts_in_thought):
            self._held.clear()
            if piece == THINK:
                self._enter_thought()
            else:
                self._close_thought()
        elif piece.isspace():
            self._held.append(piece)
        else:
            self._leave_start(piece)

    def _leave_start(self, piece: str) -> None:
        text = "" if self._begins_calls(piece) else "".join(self._held)
        self._held.clear()
        if self._starts_in_thought:
            self._enter_thought()
        else:
            self._state = self._in_content
        for part in filter(None, (text, piece)):
            self._state(part)

    def _enter_thought(self) -> None:
        self._newlines = 1
        self._state = self._in_thought

    def _in_thought(self, piece: str) -> None:
        if piece == END_THINK:
            self._close_thought()
            return
        if self._begins_calls(piece):
            self._held.clear()
            self._is_left_open = True
            self._in_content(piece)
            return
        text = self._without_newlines(self._plain(piece))
        if not text:
            return
        # The last newline is held back: it may stand before the end of the thought.
        self._message.add_reasoning("".join(self._held))
        self._held = ["\n"] if text.endswith("\n") else []
        self._message.add_reasoning(text[: len(text) - len(self._held)])

    def _close_thought(self) -> None:
        self._held.clear()
        self._newlines = NEWLINES_BEHIND_THOUGHT
        self._state = self._in_content

    def _in_content(self, piece: str) -> None:
        if self._begins_calls(piece):
            self._state = self._among_calls
            self._among_calls(piece)
            return
        self._message.add_content(self._without_newlines(self._plain(piece)))

    def _among_calls(self, piece: str) -> None:
        if piece == END_THINK and self._is_left_open and self._tools.is_between:
            # The thought that a call ended is closed too late.
            self._is_left_open = False
            return
        self._tools.add(piece)

    def _begins_calls(self, piece: str) -> bool:
        return self._has_tools and piece in {CALLS, CALL}

    def _without_newlines(self, text: str) -> str:
        """Leaves out the newlines that belong to the markup before this text."""
        if not self._newlines or not text:
            return text
        kept = text.lstrip("\n")
        dropped = min(len(text) - len(kept), self._newlines)
        self._newlines = self._newlines - dropped if dropped == len(text) else 0
        return text[dropped:]
