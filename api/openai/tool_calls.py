"""Tool calls in the text of an answer, from the first tag of calls to the end."""

import re
from collections.abc import Callable
from re import Pattern

from api.openai.answer_deltas import DeltaCollector
from api.openai.answer_format import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR, TOOL_TAGS
from api.settings.chat import ToolCallParser

HEADER_CHARACTERS_MAX = 512
"""The most characters between the beginning of a call and its arguments; names of functions have at most 64."""

DEFAULT_KIND = "function"

NAME = r"([^\s{}<>\"`]+)"
FENCE = r"(?:```)?(?i:json)?"
NAME_ONLY = re.compile(rf"\s*{NAME}\s*")
FENCE_ONLY = re.compile(rf"\s*{FENCE}\s*")
NAME_AND_FENCE = re.compile(rf"\s*{NAME}(?:\s+{FENCE}|```(?i:json)?)?\s*")
SPACE_AND_FENCE = re.compile(r"[\s`]*")
LEADING_FENCE = re.compile(r"^\s*```")

IN_STRING = re.compile(r'["\\]')
OUTSIDE_STRING = re.compile(r'["{}\[\]]')


def plain_text(piece: str) -> str:
    """A tag of tools as text for people: the separator becomes a space, and the others nothing."""
    if piece == SEPARATOR:
        return " "
    return "" if piece in TOOL_TAGS else piece


class ToolCalls:
    """Reads calls from tags and texts as they come, and adds them to a message.

    A call begins once its name and the brace that opens its arguments are there. Before that, whatever else comes
    makes it malformed, and its text becomes content without tags. The arguments end where their braces do; what is
    wrong inside stays in them. White space between tags, before them and at the end belongs to the markup. Other text
    between and behind calls is content.
    """

    def __init__(self, tools: ToolCallParser, message: DeltaCollector) -> None:
        self._names_come_first = tools == "deepseek_v31"
        self._message = message
        self._state: Callable[[str], str] = self._between
        self._space: list[str] = []
        self._header: list[str] = []
        self._header_length = 0
        self._kind: str | None = None
        self._object = ObjectEnd()

    @property
    def is_between(self) -> bool:
        """Whether the text so far ends neither in the beginning of a call nor in its arguments."""
        return self._state in {self._between, self._behind_arguments}

    def add(self, piece: str) -> None:
        """Adds a tag or a text."""
        while piece:
            piece = self._state(piece)

    def finish(self) -> None:
        """Gives back the text of a call that did not come to its arguments."""
        if self._state == self._in_header:
            self._give_back()

    # Each state takes what it can of a piece, and returns the rest for the next state.

    def _between(self, piece: str) -> str:
        if piece == CALL:
            self._begin()
            return ""
        if piece in TOOL_TAGS and piece != SEPARATOR:
            self._space.clear()
            return ""
        text = plain_text(piece)
        if not text.isspace():
            end = len(text.rstrip())
            self._message.add_content("".join(self._space) + text[:end])
            self._space.clear()
            text = text[end:]
        self._space.append(text)
        return ""

    def _behind_arguments(self, piece: str) -> str:
        if piece in TOOL_TAGS:
            self._space.clear()
            self._state = self._between
            return piece
        if SPACE_AND_FENCE.fullmatch(piece):
            self._space.append(piece)
            return ""
        # The fence belongs to the markup even where a text follows it.
        text = LEADING_FENCE.sub("", "".join(self._space) + piece)
        self._space.clear()
        self._state = self._between
        return text

    def _begin(self) -> None:
        self._space.clear()
        self._header, self._header_length, self._kind = [], 0, None
        self._state = self._in_header

    def _in_header(self, piece: str) -> str:
        if piece == SEPARATOR and self._kind is None:
            self._kind = "".join(self._header)
            self._header = []
            return ""
        if piece in TOOL_TAGS:
            self._give_back()
            return piece
        brace = piece.find("{")
        text = piece if brace < 0 else piece[:brace]
        self._header.append(text)
        self._header_length += len(text)
        if self._header_length > HEADER_CHARACTERS_MAX:
            self._give_back()
            return piece[len(text) :]
        if brace < 0:
            return ""
        name = self._name()
        if name is None:
            self._give_back()
        else:
            self._message.begin_call(name)
            self._object = ObjectEnd()
            self._state = self._in_arguments
        return piece[brace:]

    def _name(self) -> str | None:
        """The function's name as either format writes it, as far as it cannot be taken for anything else."""
        if self._kind is None:
            return None
        rest = "".join(self._header)
        is_named_before = self._names_come_first or self._kind.strip() != DEFAULT_KIND
        if is_named_before and FENCE_ONLY.fullmatch(rest):
            return _matched(NAME_ONLY, self._kind)
        if self._names_come_first and self._kind.strip() != DEFAULT_KIND:
            return None
        return _matched(NAME_AND_FENCE, rest)

    def _give_back(self) -> None:
        self._state = self._between
        before = [] if self._kind is None else [self._kind, SEPARATOR]
        for piece in (*before, *self._header):
            self.add(piece)

    def _in_arguments(self, piece: str) -> str:
        if piece in TOOL_TAGS and not self._object.is_in_string:
            if piece in {CALL, CALLS, END_CALL, END_CALLS}:
                self._state = self._between
                return piece
            return ""
        end = self._object.find(piece)
        self._message.add_arguments(piece[:end])
        if end is None:
            return ""
        self._state = self._behind_arguments
        return piece[end:]


class ObjectEnd:
    """Finds the end of a JSON object in a text that arrives in chunks and begins with its brace."""

    def __init__(self) -> None:
        self.is_in_string = False
        self._is_escaped = False
        self._depth = 0

    def find(self, text: str) -> int | None:
        """The place in `text` behind the object's last character; None where that is still to come."""
        place = 0
        if self._is_escaped and text:
            self._is_escaped = False
            place = 1
        while found := (IN_STRING if self.is_in_string else OUTSIDE_STRING).search(text, place):
            place = found.end()
            match found.group():
                case '"':
                    self.is_in_string = not self.is_in_string
                case "\\":
                    self._is_escaped = place == len(text)
                    place += 1
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth == 0:
                        return place
        return None


def _matched(pattern: Pattern[str], text: str) -> str | None:
    found = pattern.fullmatch(text)
    return None if found is None else found.group(1)
