"""What routes share whose requests become requests of chat."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from api.errors import RequestError
from api.openai.chat import ChatRequest, check_chat_request
from api.openai.generation import GenerationRequest
from api.openai.protocol import GenerationFields, validated

Refused = Mapping[str, tuple[tuple[object, ...], str]]
"""Fields that a route refuses, with the values that ask nothing, and what to do instead."""

NAME_CHARACTERS_MAX = 64
"""The most characters of a type that an error repeats."""


def refuse_elsewhere(request: object, refused: Refused) -> None:
    """Raises RequestError where a field asks for what a route does not serve, saying what to do instead."""
    for param, (neutral, instead) in refused.items():
        value = getattr(request, param)
        if value is not None and value not in neutral:
            raise RequestError(instead, param)


def shared_fields(request: GenerationFields) -> dict[str, Any]:
    """The fields that a request gives of those that all routes share."""
    given = set(GenerationFields.model_fields) & request.model_fields_set
    return request.model_dump(include=given)


def chat_request(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatRequest:
    """The request of chat with these fields, of which None is as good as absent.

    Raises RequestError naming the field at fault, by the names that the route's clients know.
    """
    with fields_named(names):
        chat = validated(ChatRequest, {name: value for name, value in fields.items() if value is not None})
        check_chat_request(chat)
    return chat


@contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Gives the fields in errors of chat the names that a route's clients know."""
    try:
        yield
    except RequestError as error:
        # What is behind a field's name counts messages of chat.
        field = re.split(r"[.\[]", error.param or "")[0]
        error.param = names.get(field, error.param)
        raise


def limited(generation: GenerationRequest, most: int | None) -> GenerationRequest:
    """The same with answers of up to `most` tokens, fewer where the model's length leaves no room for them.

    Clients of agents ask for as much as a model of their own can give, however long the prompt is.
    """
    default = generation.default_max_tokens if most is None else most
    return msgspec.structs.replace(generation, max_tokens=None, default_max_tokens=default)
