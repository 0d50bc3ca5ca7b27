"""The items of answers of /v1/responses, and the events of its streams that are about one item."""

from typing import Literal

import msgspec

from api.openai.logprobs import ChatEntry

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, kw_only=True, tag="output_text"):
    """The text of a message, and the log-probabilities of its tokens where they were asked for."""

    text: str
    annotations: list[str] = []
    logprobs: list[ChatEntry] = []


class ReasoningText(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning_text"):
    """The text of a thought."""

    text: str


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """A thought. `summary` is empty, as the thought itself is there."""

    id: str
    summary: list[str] = []
    content: list[ReasoningText]
    encrypted_content: None = None
    status: ItemStatus


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """A text for the user."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True, tag="function_call"):
    """A function that the client is to call, with its arguments as JSON. Its result has the same `call_id`."""

    id: str
    call_id: str
    name: str
    namespace: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str
    status: ItemStatus


OutputItem = ReasoningItem | OutputMessage | FunctionCall


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; each has the next `sequence_number`."""

    sequence_number: int = 0


class OutputItemAdded(Event, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins."""

    output_index: int
    item: OutputItem


class OutputItemDone(Event, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item is whole."""

    output_index: int
    item: OutputItem


class ItemEvent(Event, frozen=True, kw_only=True):
    """An event about what is in an item."""

    item_id: str
    output_index: int


class PartEvent(ItemEvent, frozen=True, kw_only=True):
    """An event about the content of an item, of which there is one part."""

    content_index: int = 0


class ContentPartAdded(PartEvent, frozen=True, kw_only=True, tag="response.content_part.added"):
    """The content of an item begins."""

    part: OutputText | ReasoningText


class ContentPartDone(PartEvent, frozen=True, kw_only=True, tag="response.content_part.done"):
    """The content of an item is whole."""

    part: OutputText | ReasoningText


class TextDelta(PartEvent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """The next text of a message."""

    delta: str
    logprobs: list[ChatEntry] = []


class TextDone(PartEvent, frozen=True, kw_only=True, tag="response.output_text.done"):
    """The text of a message is whole."""

    text: str
    logprobs: list[ChatEntry] = []


class ReasoningTextDelta(PartEvent, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """The next text of a thought."""

    delta: str


class ReasoningTextDone(PartEvent, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """The text of a thought is whole."""

    text: str


class ArgumentsDelta(ItemEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """The next text of a call's arguments."""

    delta: str


class ArgumentsDone(ItemEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """The arguments of a call are whole."""

    name: str
    arguments: str


class ErrorEvent(Event, frozen=True, kw_only=True, tag="error"):
    """Why the stream ends early."""

    code: str
    message: str
    param: str | None
