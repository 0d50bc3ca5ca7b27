"""From the body of a request to its fields, or to one sentence of bounded length that says what is wrong with it."""

from typing import TypeVar

import pydantic

from api.errors import RequestError

MESSAGE_CHARACTERS_MAX = 300
"""A message never echoes more of a request than this."""

Fields = TypeVar("Fields", bound=pydantic.BaseModel)

_VALUE_ERROR = "Value error, "


def parse_body(kind: type[Fields], body: bytes) -> Fields:
    """Reads a JSON body. Validators of `kind` raise ValueError with what their field must be.

    Raises RequestError naming the field at fault.
    """
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _request_error(error) from None


def _request_error(error: pydantic.ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    said = first["msg"]
    location = [str(part) for part in first["loc"]]
    if not location:
        return RequestError(f"The body is no request of this kind: {said}."[:MESSAGE_CHARACTERS_MAX])
    param = location[0]
    if said.startswith(_VALUE_ERROR):
        return RequestError(f"{param} must be {said.removeprefix(_VALUE_ERROR)}.", param)
    return RequestError(f"{param}: {said}."[:MESSAGE_CHARACTERS_MAX], param[:MESSAGE_CHARACTERS_MAX])
