"""The parts of one answer in their order: thoughts, texts and tool calls, each with a beginning and an end."""

import itertools
from collections.abc import Iterator
from typing import Literal

import msgspec

from api.openai.answer_stream import Chunk
from api.openai.chat import ChatTurn
from api.openai.chat_answer import ChatFinish, MessageReader
from api.openai.logprobs import ChatEntry

PartKind = Literal["thought", "text", "call"]


class Part(msgspec.Struct, kw_only=True):
    """One part of an answer, as far as it has come.

    A call has the `name` of its function, and `call` says which of the answer's calls it is. A text has the `logprobs`
    of its tokens, where they were asked for. A part with `is_cut` is the one in which the answer came to its limit.
    """

    place: int
    kind: PartKind
    call: int = 0
    name: str = ""
    pieces: list[str] = []
    logprobs: list[ChatEntry] = []
    is_whole: bool = False
    is_cut: bool = False

    @property
    def text(self) -> str:
        """The text so far; of a call, its arguments."""
        return "".join(self.pieces)


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to a part: it begins, gets more text, or ends."""

    part: Part
    kind: Literal["begin", "more", "end"]
    text: str = ""
    logprobs: list[ChatEntry] = []


class PartReader:
    """Reads the chunks of one answer as parts, of which one is open at a time, the last one."""

    def __init__(self, turn: ChatTurn, *, has_always_one: bool = False) -> None:
        """With `has_always_one`, an answer in which nothing is has an empty text."""
        self._has_always_one = has_always_one
        self._reader = MessageReader(turn)
        self._entries: list[ChatEntry] = []
        self._last: Chunk | None = None
        self.parts: list[Part] = []

    @property
    def last(self) -> Chunk:
        """The answer's last chunk so far. There must be one."""
        if self._last is None:
            raise ValueError("no chunk has come")
        return self._last

    @property
    def reasoning_tokens(self) -> int:
        """The number of tokens that are thought."""
        return self._reader.reasoning_tokens

    @property
    def finish_reason(self) -> ChatFinish:
        """The reason of the answer's end, when it has come: the calls, where it ends with some that are complete."""
        return self._reader.finish(self.last.finish_reason or "stop")

    def add(self, chunks: list[Chunk]) -> Iterator[Step]:
        """Gives what chunks do to parts; the last one ends them. Texts of a part that follow each other are joined."""
        held: Step | None = None
        for step in itertools.chain.from_iterable(map(self._add, chunks)):
            if held is not None and held.kind == step.kind == "more" and held.part is step.part:
                held = Step(
                    part=held.part, kind="more", text=held.text + step.text, logprobs=[*held.logprobs, *step.logprobs]
                )
                continue
            if held is not None:
                yield held
            held = step
        if held is not None:
            yield held

    def read(self, chunks: list[Chunk]) -> list[Part]:
        """Returns the parts of a whole answer."""
        for chunk in chunks:
            for _ in self._add(chunk):
                pass
        return self.parts

    def _add(self, chunk: Chunk) -> Iterator[Step]:
        self._last = chunk
        was_thinking = self._reader.is_thinking
        deltas = self._reader.add(chunk)
        self._keep_entries(chunk, is_dropped=was_thinking and not any(delta.content for delta in deltas))
        for delta in deltas:
            if delta.reasoning:
                yield from self._more("thought", delta.reasoning)
            if delta.content:
                yield from self._more("text", delta.content)
            for call in delta.calls:
                yield from self._more("call", call.arguments, call.index, call.name or "")
        if chunk.finish_reason is not None:
            if self._has_always_one and not self.parts:
                yield from self._more("text", "")
            yield from self._end(is_cut=chunk.finish_reason == "length")

    def _keep_entries(self, chunk: Chunk, is_dropped: bool) -> None:
        """Keeps entries until the text of their tokens comes; those of a thought and the tag behind it are dropped."""
        if is_dropped:
            self._entries = []
        elif chunk.details is not None and chunk.details.chat_logprobs is not None:
            self._entries = [*self._entries, *chunk.details.chat_logprobs.content]

    def _more(self, kind: PartKind, text: str, call: int = 0, name: str = "") -> Iterator[Step]:
        last = self.parts[-1] if self.parts else None
        if last is None or (last.kind, last.call) != (kind, call):
            yield from self._end()
            last = Part(place=len(self.parts), kind=kind, call=call, name=name)
            self.parts.append(last)
            yield Step(part=last, kind="begin")
        entries, self._entries = self._entries if kind == "text" else [], []
        if text:
            last.pieces.append(text)
            last.logprobs += entries
            yield Step(part=last, kind="more", text=text, logprobs=entries)

    def _end(self, *, is_cut: bool = False) -> Iterator[Step]:
        if self.parts and not self.parts[-1].is_whole:
            self.parts[-1].is_whole, self.parts[-1].is_cut = True, is_cut
            yield Step(part=self.parts[-1], kind="end")
