"""The answers of /v1/responses as its clients know them: one object, or a stream of typed events."""

import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from api.openai.answer_parts import Part, PartKind, PartReader, Step
from api.openai.answer_stream import AnswerWriter, Chunk
from api.openai.bodies import ErrorBody, Usage, named_event
from api.openai.chat import ChatTurn
from api.openai.generation import GenerationRequest
from api.openai.logprobs import ChatEntry
from api.openai.responses.events import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartAdded,
    ContentPartDone,
    ErrorEvent,
    Event,
    FunctionCall,
    ItemStatus,
    OutputItem,
    OutputItemAdded,
    OutputItemDone,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    TextDelta,
    TextDone,
)
from api.openai.responses.input import CalledName
from api.openai.responses.request import ResponsesRequest

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """The input's tokens by where they came from."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """The output's tokens by kind."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. Output tokens are all that were sampled, thoughts and the one that the answer stopped at too."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage, reasoning_tokens: int) -> "ResponseUsage":
        """The same counts under the names of this route."""
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning_tokens),
            total_tokens=usage.total_tokens,
        )


class ResponseError(msgspec.Struct, frozen=True, kw_only=True):
    """Why no answer came."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    """How much the model was asked to think."""

    effort: str | None = None
    summary: str | None = None


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/responses, with what the request asked for. It is not stored."""

    id: str = ""
    object: Literal["response"] = "response"
    created_at: int = 0
    completed_at: int | None = None
    status: Status = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: None = None
    prompt_cache_key: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    background: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    user: str | None


class ResponseEvent(Event, frozen=True, kw_only=True):
    """An event that shows the whole answer as it is."""

    response: ResponseObject


class ResponseCreated(ResponseEvent, frozen=True, kw_only=True, tag="response.created"):
    """The stream begins."""


class ResponseInProgress(ResponseEvent, frozen=True, kw_only=True, tag="response.in_progress"):
    """The answer is being generated."""


class ResponseCompleted(ResponseEvent, frozen=True, kw_only=True, tag="response.completed"):
    """The answer is complete."""


class ResponseIncomplete(ResponseEvent, frozen=True, kw_only=True, tag="response.incomplete"):
    """The answer ended at its limit."""


class ResponseFailed(ResponseEvent, frozen=True, kw_only=True, tag="response.failed"):
    """No more of the answer will come."""


def response_draft(request: ResponsesRequest, generation: GenerationRequest, model: str) -> ResponseObject:
    """The answer to a request before it has an id and begins: what the request asked for."""
    text = {} if request.text is None else request.text.model_dump(by_alias=True, exclude_none=True)
    reasoning = request.reasoning
    return ResponseObject(
        model=model,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        prompt_cache_key=request.prompt_cache_key,
        reasoning=Reasoning() if reasoning is None else Reasoning(effort=reasoning.effort, summary=reasoning.summary),
        safety_identifier=request.safety_identifier,
        temperature=generation.sampling.temperature,
        text={"format": {"type": "text"}, **text},
        tool_choice=request.tool_choice or "auto",
        # Clients take these two as always there.
        tools=[{"parameters": None, "strict": None, **tool} for tool in request.tools or []],
        top_logprobs=request.top_logprobs or 0,
        top_p=generation.sampling.top_p,
        truncation=request.truncation or "disabled",
        user=request.user,
    )


class ResponseWriter(AnswerWriter):
    """Writes responses: one object, or a stream of events that are numbered from 0."""

    def __init__(
        self,
        request_id: str,
        created: int,
        draft: ResponseObject,
        turn: ChatTurn,
        names: Mapping[str, CalledName] = MappingProxyType({}),
    ) -> None:
        """`names` are the client's of functions that have others in chat."""
        self.id = f"resp_{request_id}"
        self._request_id = request_id
        self._draft = msgspec.structs.replace(draft, id=self.id, created_at=created)
        self._reader = PartReader(turn, has_always_one=True)
        self._names = names
        self._number = 0

    def whole(self, choices: list[list[Chunk]], usage: Usage) -> ResponseObject:
        """The answer that consists of these chunks of its only choice."""
        self._reader.read(choices[0])
        return self._ended(usage)

    def first_events(self, usage: Usage) -> Iterator[bytes]:
        """What tells the client that its request is taken."""
        yield self._event(ResponseCreated(response=self._draft))
        yield self._event(ResponseInProgress(response=self._draft))

    def events(self, chunks: list[Chunk], usage: Usage) -> Iterator[bytes]:
        """The events of chunks that came together."""
        for step in self._reader.add(chunks):
            yield from map(self._event, self._step_events(step))

    def last_events(self, usage: Usage) -> Iterator[bytes]:
        """What comes after the last chunk: the whole answer."""
        answer = self._ended(usage)
        yield self._event(
            ResponseCompleted(response=answer) if answer.status == "completed" else ResponseIncomplete(response=answer)
        )

    def failure(self, body: ErrorBody) -> bytes:
        """The last events of a stream that ends early. Some clients look for one of the two, some for the other."""
        first = b"" if self._number else self._event(ResponseCreated(response=self._draft))
        code = "rate_limit_exceeded" if body.error.code == 429 else "server_error"
        error = self._event(ErrorEvent(code=code, message=body.error.message, param=body.error.param))
        failed = msgspec.structs.replace(
            self._draft,
            status="failed",
            error=ResponseError(code=code, message=body.error.message),
            output=[self._item(part, "completed" if part.is_whole else "incomplete") for part in self._reader.parts],
        )
        return first + error + self._event(ResponseFailed(response=failed))

    def _ended(self, usage: Usage) -> ResponseObject:
        is_complete = self._reader.finish_reason != "length"
        return msgspec.structs.replace(
            self._draft,
            status="completed" if is_complete else "incomplete",
            completed_at=int(time.time()) if is_complete else None,
            incomplete_details=None if is_complete else IncompleteDetails(),
            output=[self._item(part, _status_at_end(part)) for part in self._reader.parts],
            usage=ResponseUsage.of(usage, self._reader.reasoning_tokens),
        )

    def _item(self, part: Part, status: ItemStatus) -> OutputItem:
        """The item of a part: without what is in it as long as it is in progress."""
        begins = status == "in_progress"
        if part.kind == "thought":
            thought = [] if begins else [ReasoningText(text=part.text)]
            return ReasoningItem(id=self._id(part), status=status, content=thought)
        if part.kind == "text":
            content = [] if begins else [OutputText(text=part.text, logprobs=part.logprobs)]
            return OutputMessage(id=self._id(part), status=status, content=content)
        call_id = f"call_{self._request_id}_{part.call}"
        called = self._called(part)
        return FunctionCall(
            id=self._id(part),
            call_id=call_id,
            name=called.name,
            namespace=called.namespace or msgspec.UNSET,
            arguments="" if begins else part.text,
            status=status,
        )

    def _called(self, part: Part) -> CalledName:
        return self._names.get(part.name) or CalledName(part.name)

    def _id(self, part: Part) -> str:
        prefix = {"thought": "rs", "text": "msg", "call": "fc"}[part.kind]
        return f"{prefix}_{self._request_id}_{part.place}"

    def _step_events(self, step: Step) -> Iterator[Event]:
        part = step.part
        item_id, index = self._id(part), part.place
        if step.kind == "begin":
            yield OutputItemAdded(output_index=index, item=self._item(part, "in_progress"))
            if part.kind != "call":
                yield ContentPartAdded(item_id=item_id, output_index=index, part=_content(part.kind, "", []))
        elif step.kind == "end":
            yield self._done(part)
            if part.kind != "call":
                content = _content(part.kind, part.text, part.logprobs)
                yield ContentPartDone(item_id=item_id, output_index=index, part=content)
            yield OutputItemDone(output_index=index, item=self._item(part, _status_at_end(part)))
        elif part.kind == "thought":
            yield ReasoningTextDelta(item_id=item_id, output_index=index, delta=step.text)
        elif part.kind == "text":
            yield TextDelta(item_id=item_id, output_index=index, delta=step.text, logprobs=step.logprobs)
        else:
            yield ArgumentsDelta(item_id=item_id, output_index=index, delta=step.text)

    def _done(self, part: Part) -> Event:
        item_id, index, text = self._id(part), part.place, part.text
        if part.kind == "thought":
            return ReasoningTextDone(item_id=item_id, output_index=index, text=text)
        if part.kind == "text":
            return TextDone(item_id=item_id, output_index=index, text=text, logprobs=part.logprobs)
        return ArgumentsDone(item_id=item_id, output_index=index, name=self._called(part).name, arguments=text)

    def _event(self, event: Event) -> bytes:
        numbered = msgspec.structs.replace(event, sequence_number=self._number)
        self._number += 1
        return named_event(numbered)


def _status_at_end(part: Part) -> ItemStatus:
    return "incomplete" if part.is_cut else "completed"


def _content(kind: PartKind, text: str, logprobs: list[ChatEntry]) -> OutputText | ReasoningText:
    return ReasoningText(text=text) if kind == "thought" else OutputText(text=text, logprobs=logprobs)
