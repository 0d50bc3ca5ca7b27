"""The answers of /v1/chat/completions, as OpenAI's clients know them."""

from collections.abc import Iterator
from typing import Literal

import msgspec

from api.openai.answer_deltas import Delta, joined_deltas
from api.openai.answer_stream import AnswerWriter, Chunk
from api.openai.bodies import DONE_EVENT, ErrorBody, Usage, event
from api.openai.chat import ChatTurn
from api.openai.logprobs import ChatLogprobs, PromptLogprobs, joined_details
from api.openai.protocol import StreamOptions

ChatFinish = Literal["stop", "length", "tool_calls"]

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """The function that is called, with its arguments as JSON; in a stream, the name is in the first part alone."""

    name: str | Unset = UNSET
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call, or in a stream its next part: `index` says of which call, and `id` and `type` are in the first."""

    index: int | Unset = UNSET
    id: str | Unset = UNSET
    type: Literal["function"] | Unset = UNSET
    function: CalledFunction


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The message of an answer, or in a stream what is added to it.

    The thought is there under two names: vLLM's, and the one of DeepSeek's own API and of older clients.
    """

    role: Literal["assistant"] | Unset = UNSET
    content: str | Unset | None = UNSET
    reasoning: str | Unset = UNSET
    reasoning_content: str | Unset = UNSET
    tool_calls: list[ToolCall] | Unset = UNSET
    refusal: Unset | None = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. `stop_reason` is the stop string or the id of the stop token that ended it, None for EOS."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish
    stop_reason: int | str | None = None
    token_ids: list[int] | Unset = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The next part of one answer; only the last one has a `finish_reason`."""

    index: int
    delta: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish | None = None
    stop_reason: int | str | Unset | None = UNSET
    token_ids: list[int] | Unset = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/chat/completions. What belongs to the prompt is there where the client asked for it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | Unset = UNSET
    prompt_logprobs: PromptLogprobs | Unset = UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a streamed answer; chunks have `usage` only where the client asked for it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | Unset | None = UNSET
    prompt_token_ids: list[int] | Unset = UNSET


class MessageReader:
    """Reads the chunks of one choice as a message: what it adds to it, and how many tokens are thought."""

    def __init__(self, turn: ChatTurn) -> None:
        self._turn = turn
        self._parser = turn.parser()
        self._unsent = turn.echo
        self.reasoning_tokens = 0
        self.has_begun = False

    @property
    def calls(self) -> int:
        """The number of tool calls that the client gets."""
        return int(min(self._parser.calls, self._turn.calls_max))

    @property
    def is_thinking(self) -> bool:
        """Whether the message so far ends in its thought."""
        return self._parser.is_thinking

    def add(self, chunk: Chunk) -> list[Delta]:
        """Returns what the chunk adds to the message."""
        deltas = self._parser.add(chunk.text)
        if self._parser.is_thinking:
            self.reasoning_tokens = chunk.completion_tokens
        if chunk.finish_reason is not None:
            deltas += self._parser.finish()
        return [delta for delta in map(self._shown, self._echoed(deltas)) if delta != Delta()]

    def finish(self, reason: Literal["stop", "length"]) -> ChatFinish:
        """The reason of the message's end: the calls, where it ends with some that are complete."""
        return "tool_calls" if self.calls and reason == "stop" else reason

    def _echoed(self, deltas: list[Delta]) -> list[Delta]:
        if self._unsent:
            deltas, self._unsent = [Delta(content=self._unsent), *deltas], ""
        return deltas

    def _shown(self, delta: Delta) -> Delta:
        calls = tuple(call for call in delta.calls if call.index < self._turn.calls_max)
        reasoning = delta.reasoning if self._turn.shows_reasoning else ""
        return msgspec.structs.replace(delta, reasoning=reasoning, calls=calls)


class ChatWriter(AnswerWriter):
    """Writes chat completions: one object, or a stream of chunks."""

    def __init__(self, request_id: str, model: str, created: int, turn: ChatTurn, options: StreamOptions) -> None:
        self.id = f"chatcmpl-{request_id}"
        self._request_id = request_id
        self._model = model
        self._created = created
        self._turn = turn
        self._options = options
        self._readers: dict[int, MessageReader] = {}

    def whole(self, choices: list[list[Chunk]], usage: Usage) -> ChatCompletion:
        """The answer that consists of these chunks of each choice."""
        details = joined_details([chunk.details for chunk in choices[0] if chunk.details is not None])
        return ChatCompletion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[self._choice(chunks) for chunks in choices],
            usage=self._with_reasoning(usage),
            prompt_token_ids=UNSET if details is None else details.prompt_token_ids,
            prompt_logprobs=UNSET if details is None else details.prompt_logprobs,
        )

    def events(self, chunks: list[Chunk], usage: Usage) -> Iterator[bytes]:
        """The events of chunks: the role before a choice's first, then one for each part that they add."""
        last = chunks[-1]
        index, finish = last.index, last.finish_reason
        reader = self._reader(index)
        deltas = joined_deltas([delta for chunk in chunks for delta in reader.add(chunk)])
        details = joined_details([chunk.details for chunk in chunks if chunk.details is not None])
        if not reader.has_begun:
            reader.has_begun = True
            first = AnswerMessage(role="assistant", content="")
            tokens = UNSET if details is None else details.prompt_token_ids
            yield self._event(ChatChunkChoice(index=index, delta=first), usage, tokens)
        messages = [self._delta(delta, index) for delta in deltas]
        if not messages and (finish is not None or details is not None):
            messages = [AnswerMessage()]
        for position, message in enumerate(messages):
            # What belongs to the chunks' tokens goes with the first part, and the end with the last.
            own = details if position == 0 else None
            is_end = position == len(messages) - 1 and finish is not None
            choice = ChatChunkChoice(
                index=index,
                delta=message,
                logprobs=None if own is None else own.chat_logprobs,
                finish_reason=reader.finish(finish) if is_end and finish else None,
                stop_reason=last.stop_reason if is_end else UNSET,
                token_ids=UNSET if own is None else own.token_ids,
            )
            yield self._event(choice, usage)

    def last_events(self, usage: Usage) -> Iterator[bytes]:
        """What comes after the last chunk."""
        if self._options.include_usage:
            yield event(self._chunk([], self._with_reasoning(usage)))
        yield DONE_EVENT

    def failure(self, body: ErrorBody) -> bytes:
        """The last events of a stream that ends early."""
        return event(body) + DONE_EVENT

    def _choice(self, chunks: list[Chunk]) -> ChatChoice:
        index, last = chunks[0].index, chunks[-1]
        reader = self._reader(index)
        deltas = [delta for chunk in chunks for delta in reader.add(chunk)]
        reasoning = "".join(delta.reasoning for delta in deltas)
        content = "".join(delta.content for delta in deltas)
        calls = self._whole_calls(deltas, index)
        details = joined_details([chunk.details for chunk in chunks if chunk.details is not None])
        return ChatChoice(
            index=index,
            message=AnswerMessage(
                role="assistant",
                content=content or (None if calls or reasoning else ""),
                reasoning=reasoning or UNSET,
                reasoning_content=reasoning or UNSET,
                tool_calls=calls or UNSET,
                refusal=None,
            ),
            logprobs=None if details is None else details.chat_logprobs,
            finish_reason=reader.finish(last.finish_reason or "stop"),
            stop_reason=last.stop_reason,
            token_ids=UNSET if details is None else details.token_ids,
        )

    def _whole_calls(self, deltas: list[Delta], choice: int) -> list[ToolCall]:
        names: dict[int, str] = {}
        arguments: dict[int, list[str]] = {}
        for call in (call for delta in deltas for call in delta.calls):
            names[call.index] = names.get(call.index) or call.name or ""
            arguments.setdefault(call.index, []).append(call.arguments)
        return [
            ToolCall(
                id=self._call_id(choice, index),
                type="function",
                function=CalledFunction(name=name, arguments="".join(arguments[index])),
            )
            for index, name in names.items()
        ]

    def _delta(self, delta: Delta, choice: int) -> AnswerMessage:
        calls = [
            ToolCall(index=call.index, function=CalledFunction(arguments=call.arguments))
            if call.name is None
            else ToolCall(
                index=call.index,
                id=self._call_id(choice, call.index),
                type="function",
                function=CalledFunction(name=call.name, arguments=call.arguments),
            )
            for call in delta.calls
        ]
        return AnswerMessage(
            content=delta.content or UNSET,
            reasoning=delta.reasoning or UNSET,
            reasoning_content=delta.reasoning or UNSET,
            tool_calls=calls or UNSET,
        )

    def _call_id(self, choice: int, index: int) -> str:
        return f"call_{self._request_id}_{choice}_{index}"

    def _reader(self, index: int) -> MessageReader:
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = MessageReader(self._turn)
        return reader

    def _with_reasoning(self, usage: Usage) -> Usage:
        return usage.with_reasoning(sum(reader.reasoning_tokens for reader in self._readers.values()))

    def _event(self, choice: ChatChunkChoice, usage: Usage, prompt_token_ids: list[int] | Unset = UNSET) -> bytes:
        given: Usage | Unset | None = None if self._options.include_usage else UNSET
        if self._options.continuous_usage_stats:
            given = usage.with_reasoning(self._reader(choice.index).reasoning_tokens)
        return event(self._chunk([choice], given, prompt_token_ids))

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | Unset | None, prompt_token_ids: list[int] | Unset = UNSET
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt_token_ids,
        )
