"""The answers of the chaos benchmark's clients as far as they have come: tokens, and messages as one text each."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from benchmarks.chaos.typed_events import parts_of


class Transcript(msgspec.Struct):
    """A message as one text that only grows while it comes: thought, content, calls and the reason of its end.

    A streamed message has the same one whichever chunks it came in; one that was left is the beginning of the whole.
    """

    text: str = ""
    _kind: str = ""

    def add(self, kind: str, text: str) -> None:
        """Adds the next text of a kind, which has a line of its own."""
        if kind != self._kind:
            self._kind = kind
            self.text += f"\n{kind}: "
        self.text += text


class Answer(msgspec.Struct):
    """An answer as far as it has come: tokens and transcripts by choice, and log-probabilities if they were asked for.

    Routes that do not tell the tokens have transcripts alone.
    """

    tokens: list[list[int]]
    transcripts: list[Transcript] = []
    logprobs: list[float] = []
    is_whole: bool = False

    @classmethod
    def of(cls, choices: int) -> "Answer":
        """An answer of which nothing has come."""
        return cls([[] for _ in range(choices)], [Transcript() for _ in range(choices)])

    @property
    def token_count(self) -> int:
        """The number of tokens of all choices."""
        return sum(map(len, self.tokens))

    @property
    def texts(self) -> list[str]:
        """The transcripts' texts."""
        return [transcript.text for transcript in self.transcripts]

    def add_event(self, event: Mapping[str, Any]) -> bool:
        """Adds a whole answer, or an event of a stream, of any route; returns whether it tells of tokens."""
        for kind, text in [] if "choices" in event else parts_of(event):
            self.transcripts[0].add(kind, text)
        return sum(map(self.add, event.get("choices", []))) > 0

    def add(self, choice: Mapping[str, Any]) -> bool:
        """Adds a choice, or a chunk of one, of completions or chat; returns whether it has tokens."""
        index, tokens = choice["index"], choice.get("token_ids") or []
        self.tokens[index] += tokens
        if choice.get("logprobs"):
            self.logprobs += _logprobs(choice["logprobs"])
        for kind, text in _parts(choice):
            self.transcripts[index].add(kind, text)
        return bool(tokens)


def _logprobs(logprobs: Mapping[str, Any]) -> list[float]:
    if "content" in logprobs:
        return [entry["logprob"] for entry in logprobs["content"]]
    return list(logprobs["token_logprobs"])


def _parts(choice: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The kinds and texts of what a choice adds to its transcript; a completion has nothing but its text."""
    message = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    for kind in ("reasoning", "content"):
        if message.get(kind):
            yield kind, message[kind]
    for place, call in enumerate(message.get("tool_calls") or []):
        number, function = call.get("index", place), call["function"]
        if "name" in function:
            yield f"call {number}", function["name"]
        yield f"arguments {number}", function["arguments"]
    if choice.get("finish_reason"):
        yield "end", choice["finish_reason"]
