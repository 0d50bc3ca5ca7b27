"""The options of chat: the template of prompts, and how the model writes thoughts and tool calls."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

ReasoningParser = Literal["deepseek_r1", "deepseek_v3", "deepseek_v31", "none"]
"""With deepseek_r1 the model may open a thought itself. With deepseek_v3 and deepseek_v31, which are the same, only the
prompt opens one, where `thinking` is asked for."""

ToolCallParser = Literal["deepseek_v3", "deepseek_v31", "none"]
"""V3's format with a type, a name line and a fence, which R1-0528 has too, or V3.1's."""

CHOSEN = "what fits the chat template"


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How conversations become prompts, and answers messages."""

    chat_template: Annotated[
        Path | None,
        Meta(description="A file with a Jinja template of prompts.", extra={"default": "the tokenizer's"}),
    ] = None
    reasoning_parser: Annotated[
        ReasoningParser | None,
        Meta(description="How the model marks its thoughts.", extra={"default": CHOSEN}),
    ] = None
    tool_call_parser: Annotated[
        ToolCallParser | None,
        Meta(description="How the model writes tool calls.", extra={"default": CHOSEN}),
    ] = None
