"""The answers of /v1/messages as Anthropic's clients know them: one message, or a stream of typed events."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from api.openai.answer_parts import Part, PartReader, Step
from api.openai.answer_stream import AnswerWriter, Chunk
from api.openai.anthropic.errors import anthropic_error_event
from api.openai.bodies import ErrorBody, Usage, named_event
from api.openai.chat import ChatTurn

StopReason = Literal["end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"]

SIGNATURE = "Z2FsYXh5bGluZQ=="
"""The signature of every thought. Clients want one that is not empty; thoughts are taken back with any."""

INVALID_JSON = "INVALID_JSON"
"""The key of the text of arguments that are not a JSON object, as Anthropic advises to wrap them."""

CHUNKS_WITHOUT_EVENT_MAX = 32
"""The chunks after which a client to which there is nothing to tell gets a ping, so that it does not give up."""


class ThinkingBlock(msgspec.Struct, frozen=True, kw_only=True, tag="thinking"):
    """A thought."""

    thinking: str
    signature: str = SIGNATURE


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """A text for the user."""

    text: str
    citations: None = None


class ToolUseBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_use"):
    """A tool that the client is to use. Its result names the `id`."""

    id: str
    name: str
    input: dict[str, Any]


Block = ThinkingBlock | TextBlock | ToolUseBlock


class OutputTokens(msgspec.Struct, frozen=True, kw_only=True):
    """The output's tokens by kind."""

    thinking_tokens: int


class AnthropicUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. Output tokens are all that were sampled, thoughts and the one that the answer stopped at too.

    Input tokens are without those that were read from the cache. What the answer adds to the cache is not counted, as
    nobody pays for it.
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int
    output_tokens_details: OutputTokens | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, usage: Usage, thinking_tokens: int) -> "AnthropicUsage":
        """The same counts under Anthropic's names."""
        return cls(
            input_tokens=usage.prompt_tokens - usage.cached_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokens(thinking_tokens=thinking_tokens),
        )


class AnthropicMessage(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """The answer of /v1/messages."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


class MessageStart(msgspec.Struct, frozen=True, kw_only=True, tag="message_start"):
    """A message begins, without content."""

    message: AnthropicMessage


class BlockStart(msgspec.Struct, frozen=True, kw_only=True, tag="content_block_start"):
    """A block begins, without what is in it."""

    index: int
    content_block: Block


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag="text_delta"):
    """The next text of a text."""

    text: str


class ThinkingDelta(msgspec.Struct, frozen=True, kw_only=True, tag="thinking_delta"):
    """The next text of a thought."""

    thinking: str


class SignatureDelta(msgspec.Struct, frozen=True, kw_only=True, tag="signature_delta"):
    """The signature of a thought, when the thought is whole."""

    signature: str = SIGNATURE


class InputJsonDelta(msgspec.Struct, frozen=True, kw_only=True, tag="input_json_delta"):
    """The next text of a tool's arguments."""

    partial_json: str


class BlockDelta(msgspec.Struct, frozen=True, kw_only=True, tag="content_block_delta"):
    """What is added to a block."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class BlockStop(msgspec.Struct, frozen=True, kw_only=True, tag="content_block_stop"):
    """A block is whole."""

    index: int


class MessageEnd(msgspec.Struct, frozen=True, kw_only=True):
    """Why a message ends."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, kw_only=True, tag="message_delta"):
    """The end of a message, with its token counts."""

    delta: MessageEnd
    usage: AnthropicUsage


class MessageStop(msgspec.Struct, frozen=True, kw_only=True, tag="message_stop"):
    """The stream ends."""


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """The stream goes on."""


class AnthropicWriter(AnswerWriter):
    """Writes Anthropic's messages: one object, or a stream of events.

    The arguments of a tool are sent when they are whole, so that they are a JSON object in any case; those of `eager`
    tools are sent as they come.
    """

    def __init__(self, request_id: str, model: str, turn: ChatTurn, max_tokens: int, eager: frozenset[str]) -> None:
        self.id = f"msg_{request_id}"
        self._request_id = request_id
        self._model = model
        self._max_tokens = max_tokens
        self._eager = eager
        self._reader = PartReader(turn)
        self._silent = 0

    def whole(self, choices: list[list[Chunk]], usage: Usage) -> AnthropicMessage:
        """The message that consists of these chunks of the only choice."""
        parts = self._reader.read(choices[0])
        end = self._end()
        return AnthropicMessage(
            id=self.id,
            model=self._model,
            content=[self._block(part, part.text) for part in parts],
            stop_reason=end.stop_reason,
            stop_sequence=end.stop_sequence,
            usage=self._usage(usage),
        )

    def first_events(self, usage: Usage) -> Iterator[bytes]:
        """What tells the client that its request is taken, and how long it is."""
        message = AnthropicMessage(
            id=self.id,
            model=self._model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=AnthropicUsage(input_tokens=usage.prompt_tokens, output_tokens=0),
        )
        yield named_event(MessageStart(message=message))

    def events(self, chunks: list[Chunk], usage: Usage) -> Iterator[bytes]:
        """The events of chunks that came together."""
        self._silent += 1
        for step in self._reader.add(chunks):
            for event in self._step_events(step):
                self._silent = 0
                yield named_event(event)
        if self._silent == CHUNKS_WITHOUT_EVENT_MAX:
            self._silent = 0
            yield named_event(Ping())

    def last_events(self, usage: Usage) -> Iterator[bytes]:
        """What comes after the last chunk."""
        yield named_event(MessageDelta(delta=self._end(), usage=self._usage(usage)))
        yield named_event(MessageStop())

    def failure(self, body: ErrorBody) -> bytes:
        """The last event of a stream that ends early."""
        return anthropic_error_event(body)

    def _end(self) -> MessageEnd:
        last = self._reader.last
        sequence = last.stop_reason if isinstance(last.stop_reason, str) else None
        reason: StopReason = "end_turn"
        if sequence is not None:
            reason = "stop_sequence"
        elif last.finish_reason == "length":
            reason = "max_tokens" if last.completion_tokens >= self._max_tokens else "model_context_window_exceeded"
        elif self._reader.finish_reason == "tool_calls":
            reason = "tool_use"
        return MessageEnd(stop_reason=reason, stop_sequence=sequence)

    def _usage(self, usage: Usage) -> AnthropicUsage:
        return AnthropicUsage.of(usage, self._reader.reasoning_tokens)

    def _block(self, part: Part, text: str) -> Block:
        if part.kind == "thought":
            return ThinkingBlock(thinking=text)
        if part.kind == "text":
            return TextBlock(text=text)
        return ToolUseBlock(id=f"toolu_{self._request_id}_{part.call}", name=part.name, input=tool_input(text))

    def _step_events(self, step: Step) -> Iterator[msgspec.Struct]:
        part, index = step.part, step.part.place
        is_held = part.kind == "call" and part.name not in self._eager
        if step.kind == "begin":
            block = self._block(part, "")
            if isinstance(block, ThinkingBlock):
                block = ThinkingBlock(thinking="", signature="")
            yield BlockStart(index=index, content_block=block)
        elif step.kind == "end":
            if is_held and part.text:
                text = part.text if is_object(part.text) else json.dumps(tool_input(part.text), ensure_ascii=False)
                yield BlockDelta(index=index, delta=InputJsonDelta(partial_json=text))
            if part.kind == "thought":
                yield BlockDelta(index=index, delta=SignatureDelta())
            yield BlockStop(index=index)
        elif part.kind == "thought":
            yield BlockDelta(index=index, delta=ThinkingDelta(thinking=step.text))
        elif part.kind == "text":
            yield BlockDelta(index=index, delta=TextDelta(text=step.text))
        elif not is_held:
            yield BlockDelta(index=index, delta=InputJsonDelta(partial_json=step.text))


def tool_input(arguments: str) -> dict[str, Any]:
    """The arguments of a call as an object. A text that is none is kept under a key, for the model to see."""
    if not arguments.strip():
        return {}
    parsed = _parsed(arguments)
    return {INVALID_JSON: arguments} if parsed is None else parsed


def is_object(arguments: str) -> bool:
    """Whether the arguments of a call are a JSON object."""
    return _parsed(arguments) is not None


def _parsed(arguments: str) -> dict[str, Any] | None:
    try:
        parsed = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None
