"""A model's chat template, which turns messages into the text that the model was trained to read."""

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from api.errors import RequestError
from api.text.tokenizer import TextTokenizer
from weights.errors import CheckpointError

DEFAULT_NAME = "default"
"""The name of the template for plain conversations, where there are several."""


class ChatTemplate:
    """A template with the variables and functions of transformers' `apply_chat_template`, in a sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are texts by name, such as `bos_token`. Raises CheckpointError if it is not a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"The tokenizer's chat template is not a Jinja template: {error}.") from error
        self._special_tokens = special_tokens

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> "ChatTemplate":
        """Finds the template that comes with a tokenizer. Raises CheckpointError where there is none."""
        source = tokenizer.config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get(DEFAULT_NAME)
        if not isinstance(source, str):
            raise CheckpointError("The model's tokenizer has no chat template.")
        return cls(source, tokenizer.special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Renders messages, each with its `role` and `content`, up to where the answer begins. BOS is part of the text.

        Raises RequestError where the template does not accept them.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except (jinja2.TemplateError, TypeError) as error:
            raise RequestError(f"The model's chat template cannot take these messages: {error}.", "messages") from error


def _to_json(value: object, indent: int | None = None) -> str:
    """Encodes as JSON without escaping for HTML, as Jinja's own filter does: no model was trained on that."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
