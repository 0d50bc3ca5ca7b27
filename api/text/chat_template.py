"""A model's chat template, which turns messages into the text that the model was trained to read."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from api.errors import RequestError
from api.text.template_budget import RENDER_SECONDS, Budget, within
from api.text.template_messages import TEMPLATE_ERRORS, CallForm, Message, normalise_messages
from api.text.template_sandbox import BoundedEnvironment
from api.text.tokenizer import TextTokenizer
from weights.errors import CheckpointError
from weights.model_config import read_bounded
from weights.tokenizer_files import CONFIG_BYTES_MAX

DEFAULT_NAME = "default"
"""The name of the template for plain conversations, where there are several."""

TOOL_NAME = "tool_use"
"""The name of the template for conversations with tools, where there are several."""

RENDERED_CHARACTERS_MAX = 1 << 24
"""The most characters of a prompt, unless the model's length says otherwise."""

REQUEST_TEMPLATE_CHARACTERS_MAX = 1 << 15
"""The longest template of a request: known ones have half of that, and to compile this takes up to two seconds."""

MESSAGE_CHARACTERS_MAX = 300

TRIAL_SECONDS = RENDER_SECONDS / 4
"""The most time of each rendering that finds the form of tool calls."""

OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")
"""What the request's fields give to a template, and its chat_template_kwargs cannot."""

END_OF_FINAL = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where the final message ends. Its space shows whether the template trims: transformers does the same."""


class ChatTemplate:
    """A template with the variables and functions of transformers' `apply_chat_template`, bounded in time and size.

    Rendering takes up to a second of the processor: not for an event loop. Safe to use from several threads.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        characters_max: int = RENDERED_CHARACTERS_MAX,
    ) -> None:
        """`source` is a template or several by name, `special_tokens` texts by name, such as `bos_token`.

        A prompt has at most `characters_max` characters. Raises CheckpointError if it is not a template.
        """
        named = {DEFAULT_NAME: source} if isinstance(source, str) else source
        if DEFAULT_NAME not in named:
            raise CheckpointError(f"Of the tokenizer's chat templates none is called {DEFAULT_NAME!r}.")
        self._special_tokens = dict(special_tokens)
        self._characters_max = characters_max
        self._call_forms: dict[str, CallForm] = {}
        self.source = "\n".join(named.values())
        try:
            self._templates = {name: _compiled(text) for name, text in named.items()}
        except TemplateSyntaxError as error:
            raise CheckpointError(f"The tokenizer's chat template is not a Jinja template: {error}.") from error

    @classmethod
    def of(cls, tokenizer: TextTokenizer, *, characters_max: int = RENDERED_CHARACTERS_MAX) -> "ChatTemplate":
        """Finds the templates that come with a tokenizer. Raises CheckpointError where there is none."""
        source: Any = tokenizer.config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}
        texts = source.values() if isinstance(source, dict) else [source]
        if not all(isinstance(text, str) for text in texts):
            raise CheckpointError("The model's tokenizer has no chat template.")
        return cls(source, tokenizer.special_tokens, characters_max=characters_max)

    @classmethod
    def from_file(
        cls, path: Path, tokenizer: TextTokenizer, *, characters_max: int = RENDERED_CHARACTERS_MAX
    ) -> "ChatTemplate":
        """Reads the file of --chat-template. Raises CheckpointError if it is missing or not a template."""
        content = read_bounded(path, CONFIG_BYTES_MAX)
        if content is None:
            raise CheckpointError(f"The chat template {path} does not exist.")
        return cls(content.decode(errors="replace"), tokenizer.special_tokens, characters_max=characters_max)

    def replaced(self, source: str) -> "ChatTemplate":
        """The same with a request's own template. Raises RequestError if it is not one, or too long."""
        if len(source) > REQUEST_TEMPLATE_CHARACTERS_MAX:
            raise RequestError(
                f"chat_template has {len(source)} characters: at most {REQUEST_TEMPLATE_CHARACTERS_MAX} are allowed.",
                "chat_template",
            )
        try:
            return ChatTemplate(source, self._special_tokens, characters_max=self._characters_max)
        except CheckpointError as error:
            reason = str(error.__cause__)[:MESSAGE_CHARACTERS_MAX]
            raise RequestError(f"chat_template is not a Jinja template: {reason}.", "chat_template") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Renders messages up to where the answer begins, or up to the end of the final one. BOS is part of the text.

        Empty contents beside tool calls and the calls' arguments are given as the template wants them.
        Raises RequestError where the template does not accept something, or takes too much time or memory.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message goes with add_generation_prompt false only.", "continue_final_message"
            )
        if name := next((name for name in OWN_VARIABLES if name in template_kwargs), None):
            raise RequestError(f"chat_template_kwargs cannot change {name}.", "chat_template_kwargs")
        given = normalise_messages(messages)
        final = _mark_end(given) if continue_final_message else ""
        name = TOOL_NAME if tools is not None and TOOL_NAME in self._templates else DEFAULT_NAME
        try:
            if any(message.get("tool_calls") for message in given):
                given = self._call_form(name).apply(given)
            variables = {**template_kwargs, "messages": given, "add_generation_prompt": add_generation_prompt}
            text = self._rendered(name, {"tools": None if tools is None else list(tools), **variables}, RENDER_SECONDS)
        except TEMPLATE_ERRORS as error:
            reason = str(error).rstrip(".")[:MESSAGE_CHARACTERS_MAX]
            raise RequestError(
                f"The model's chat template cannot take these messages: {reason}.", "messages"
            ) from error
        return _cut_at_end(text, final) if continue_final_message else text

    def _rendered(self, name: str, variables: Mapping[str, Any], seconds: float) -> str:
        template = self._templates[name]
        budget = Budget(self._characters_max, seconds)
        with within(budget):
            context = template.new_context({**self._special_tokens, "documents": None, **variables})
            return "".join(budget.checked_output(template.root_render_func(context)))

    def _call_form(self, name: str) -> CallForm:
        def render(messages: list[Message]) -> str:
            variables = {"messages": messages, "tools": None, "add_generation_prompt": False}
            return self._rendered(name, variables, TRIAL_SECONDS)

        if name not in self._call_forms:
            self._call_forms[name] = CallForm.of(render)
        return self._call_forms[name]


class TemplateSyntaxError(Exception):
    """A text is not a template."""


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    try:
        return BoundedEnvironment().from_string(source)
    except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise TemplateSyntaxError(str(error).rstrip(".") or type(error).__name__) from error


def _mark_end(messages: list[Message]) -> str:
    """Puts the mark behind the final message's content, and returns that content."""
    final = messages[-1].get("content") if messages else None
    if not isinstance(final, str):
        raise RequestError("continue_final_message needs a final message with a content.", "continue_final_message")
    messages[-1] = {**messages[-1], "content": final + END_OF_FINAL}
    return final


def _cut_at_end(text: str, final: str) -> str:
    mark = END_OF_FINAL.strip()
    place = text.rfind(mark)
    if place < 0 or final.strip() not in text:
        raise RequestError(
            "continue_final_message: the chat template does not show the whole final message.", "continue_final_message"
        )
    is_kept = text.startswith(END_OF_FINAL, place)
    return text[:place] if is_kept else text[:place].rstrip()
