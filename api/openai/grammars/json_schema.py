"""What can be said of a JSON schema before it is compiled: its size, its depth, and keywords that are not enforced."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from api.errors import RequestError

SCHEMA_BYTES_MAX = 1 << 16
"""The longest schema, regular expression or grammar, as JSON; published schemas of tools have a few kilobytes."""

DEPTH_MAX = 64
"""How deep objects and lists may be nested: half of what llguidance takes."""

ENFORCED = frozenset(
    [
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "const",
        "enum",
        "type",
        "items",
        "additionalItems",
        "prefixItems",
        "minItems",
        "maxItems",
        "properties",
        "additionalProperties",
        "patternProperties",
        "required",
        "minProperties",
        "maxProperties",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    ]
)
"""The keywords that llguidance enforces (parser/src/json/schema.rs, IMPLEMENTED)."""

SAID_ONLY = frozenset(
    [
        "$anchor",
        "$defs",
        "definitions",
        "$schema",
        "$id",
        "id",
        "$comment",
        "title",
        "description",
        "default",
        "readOnly",
        "writeOnly",
        "examples",
        "contentMediaType",
        "contentEncoding",
        "deprecated",
        "discriminator",
        "strict",
        "x-guidance",
    ]
)
"""Keywords that do not change what is valid, or not by themselves."""

NEUTRAL: tuple[tuple[str, object], ...] = (("uniqueItems", False), ("nullable", False))
"""Keywords with the value that changes nothing."""

FORMATS = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"]
)
"""The values of `format` that are enforced (parser/src/json/formats.rs)."""

_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SCHEMAS = ("items", "additionalItems", "additionalProperties")

_TOKEN = re.compile("[~/]")


def checked_schema(schema: Any, param: str) -> Any:
    """The schema without what llguidance does not know and need not know.

    Raises RequestError, naming the field `param` and the place in the schema, as a JSON pointer, where it cannot be
    enforced.
    """
    if not isinstance(schema, dict | bool):
        raise RequestError(f"{param} must have a JSON schema: an object, or true or false.", param)
    # Where it is too deep for that, the next line has the place.
    with contextlib.suppress(RecursionError):
        refuse_large(json.dumps(schema, ensure_ascii=False), param)
    _refuse_deep(schema, param)
    return _checked(schema, "", param)


def refuse_large(text: str, param: str) -> None:
    """Raises RequestError where a text has more than SCHEMA_BYTES_MAX bytes, or is not Unicode."""
    try:
        size = len(text) if len(text) > SCHEMA_BYTES_MAX else len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{param} has half a surrogate pair, which is not text.", param) from None
    if size > SCHEMA_BYTES_MAX:
        raise RequestError(f"{param} is longer than {SCHEMA_BYTES_MAX} bytes: make it smaller.", param)


def _refuse_deep(value: Any, param: str) -> None:
    """Raises RequestError where objects and lists are nested too deeply; names the place where that begins."""
    level: list[tuple[str, Any]] = [("", value)]
    for _ in range(DEPTH_MAX + 1):
        level = [child for place, parent in level for child in _children(place, parent)]
        if not level:
            return
    raise RequestError(f"{param} is nested more than {DEPTH_MAX} deep, at {level[0][0]}: make it flatter.", param)


def _children(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{place}/{_escaped(key)}", child) for key, child in value.items())
    elif isinstance(value, list):
        yield from ((f"{place}/{index}", child) for index, child in enumerate(value))


def _escaped(key: str) -> str:
    return _TOKEN.sub(lambda found: "~0" if found[0] == "~" else "~1", key)


def _checked(schema: Any, place: str, param: str) -> Any:
    if not isinstance(schema, dict):
        return schema
    checked: dict[str, Any] = {}
    for key, value in schema.items():
        here = f"{place}/{_escaped(key)}"
        if key in _OF_SCHEMAS and isinstance(value, dict):
            checked[key] = {name: _checked(one, f"{here}/{_escaped(name)}", param) for name, one in value.items()}
        elif key in _LISTS_OF_SCHEMAS and isinstance(value, list):
            checked[key] = [_checked(one, f"{here}/{index}", param) for index, one in enumerate(value)]
        elif key in _SCHEMAS:
            checked[key] = _checked(value, here, param)
        elif key in ENFORCED or key in {"$schema", "$id", "id", "$anchor"}:
            _refuse_value(key, value, here, param)
            checked[key] = value
        elif key not in SAID_ONLY and not key.startswith("x-") and (key, value) not in NEUTRAL:
            raise RequestError(f"{param} has the keyword {key!r} at {here}, which cannot be enforced.", param)
    return checked


def _refuse_value(key: str, value: Any, place: str, param: str) -> None:
    if key == "format" and not (isinstance(value, str) and value in FORMATS):
        raise RequestError(
            f"{param} has the format {value!r} at {place}, which cannot be enforced: leave it out, or use one of "
            f"{', '.join(sorted(FORMATS - {'unknown'}))}.",
            param,
        )
    if key == "$ref" and (not isinstance(value, str) or not value.startswith("#")):
        raise RequestError(f"{param} refers to another document at {place}: put it into $defs.", param)
