"""The fields of a request that say what its answer has to look like, and the grammar that they stand for.

Fields are vLLM's and OpenAI's: `response_format`, `structured_outputs`, and the older `guided_*`. All become one normal
form, a list of llguidance's grammars as JSON, so that the same wish is compiled once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from api.errors import RequestError
from api.openai.grammars.json_schema import checked_schema, refuse_large
from api.openai.protocol import GenerationFields
from api.text.served_model import ServedModel
from stages.step import Grammar

CHOICES_MAX = 10_000

WHITESPACE = r"\x20|\r?\n[\x20\t]{0,32}"
"""White space between the parts of a JSON answer: a space, or a new line and its indentation.

If any was allowed, as in JSON itself, weak models would write nothing else until `max_tokens`."""

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
OPTIONS = ("disable_any_whitespace", "whitespace_pattern", "disable_fallback", "disable_additional_properties")
GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}

ANY_TEXT = r"/(.|\n)*/"


class StructuralTag(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a text that has to follow a schema: what comes before it, and behind it."""

    begin: str
    schema: Any = {}
    end: str = ""


class StructuralTags(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a text that have to follow schemas; each begins with one of the `triggers`."""

    structures: Annotated[list[StructuralTag], msgspec.Meta(min_length=1)]
    triggers: list[str]


class Requested(NamedTuple):
    """A grammar, and the field of the request that stands for it."""

    grammar: Grammar
    param: str


def requested_grammar(
    response_format: Any = None, structured_outputs: Any = None, guided: Mapping[str, Any] | None = None
) -> Requested | None:
    """The grammar that the fields of a request stand for; None where they leave the answer free.

    `guided` has the older fields by name, such as "guided_json". Raises RequestError for what is malformed, too large
    or cannot be enforced, and where more than one is given. The grammar is not compiled: see `GrammarChecker`.
    """
    wishes: dict[str, Grammar] = {}
    if structured_outputs is not None:
        wishes["structured_outputs"] = _structured(structured_outputs)
    for param, value in (guided or {}).items():
        if value is not None:
            wishes[param] = _of_kind(GUIDED[param], value, {}, param)
    if response_format is not None and (grammar := _formatted(response_format)) is not None:
        wishes["response_format"] = grammar
    if len(wishes) > 1:
        first, second = list(wishes)[:2]
        raise RequestError(f"{first} and {second} both say what the answer has to be: give one of them.", second)
    return next((Requested(grammar, param) for param, grammar in wishes.items()), None)


def served_grammar(fields: GenerationFields, model: ServedModel) -> Grammar | None:
    """The grammar that the fields of a request stand for, tried out; None where they leave the answer free.

    Raises RequestError where it cannot be served.
    """
    requested = requested_grammar(fields.response_format, fields.structured_outputs, fields.guided)
    if requested is None:
        return None
    grammar, param = requested
    if fields.ignore_eos:
        raise RequestError(f"{param} with ignore_eos is not served, as no answer could end: leave one out.", param)
    if model.grammars is None:
        raise RequestError(f"{param} is not served with this model: leave it out.", param)
    model.grammars.check(grammar.source, param)
    return grammar


def schema_grammar(schema: Any, param: str, *, whitespace: str | None = WHITESPACE) -> Grammar:
    """The grammar of JSON that a schema describes; `whitespace` is a regular expression, None for none at all.

    Raises RequestError as `checked_schema` does, and where it is too large.
    """
    return _listed([{"json_schema": guided_schema(schema, param, whitespace=whitespace)}], param)


def guided_schema(schema: Any, param: str, *, whitespace: str | None = WHITESPACE) -> dict[str, Any]:
    """A schema as llguidance takes it, with its own options in it. Raises RequestError as `schema_grammar` does."""
    if isinstance(schema, str):
        refuse_large(schema, param)
        schema = _loaded(schema, param)
    checked = checked_schema(schema, param)
    if checked is False:
        raise RequestError(f"{param} has a schema that allows nothing.", param)
    options = {"whitespace_flexible": False} if whitespace is None else {"whitespace_pattern": whitespace}
    return {**({} if checked is True else checked), "x-guidance": options}


def lark_grammar(lark: str, param: str) -> Grammar:
    """The grammar that a text in llguidance's Lark syntax describes. Raises RequestError where it is too large."""
    return _listed([{"lark_grammar": lark}], param)


def lark_text(text: str) -> str:
    """A text as a Lark terminal that matches it, `""` for the empty one."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _structured(fields: Any) -> Grammar:
    param = "structured_outputs"
    if not isinstance(fields, dict):
        raise RequestError(f"{param} must be an object with one of {', '.join(KINDS)}.", param)
    given = {kind: fields[kind] for kind in KINDS if fields.get(kind) is not None}
    if given.get("json_object") is False:
        del given["json_object"]
    unknown = [key for key in fields if key not in KINDS and key not in OPTIONS and not key.startswith("_")]
    if unknown:
        raise RequestError(f"{param} has {unknown[0][:50]!r}, which is not served: leave it out.", param)
    if len(given) != 1:
        raise RequestError(f"{param} must have exactly one of {', '.join(KINDS)}, not {len(given)}.", param)
    [(kind, value)] = given.items()
    return _of_kind(kind, value, fields, param)


def _formatted(fields: Any) -> Grammar | None:
    param = "response_format"
    kind = fields.get("type") if isinstance(fields, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _of_kind("json_object", True, {}, param)
    if kind == "structural_tag":
        return _of_kind("structural_tag", fields, {}, param)
    if kind != "json_schema":
        raise RequestError(
            f'{param} must be an object whose "type" is "text", "json_object", "json_schema" or "structural_tag".',
            param,
        )
    described = fields.get("json_schema")
    if not isinstance(described, dict) or "schema" not in described:
        raise RequestError(f'{param} must have a "json_schema" with a "schema".', param)
    return schema_grammar(described["schema"], param)


def _of_kind(kind: str, value: Any, options: Mapping[str, Any], param: str) -> Grammar:
    if kind in {"json", "json_object"}:
        return schema_grammar({"type": "object"} if kind == "json_object" else value, param, whitespace=_space(options))
    if kind == "choice":
        return _choice(value, param)
    if kind == "structural_tag":
        return _structural_tag(value, param)
    if not isinstance(value, str):
        raise RequestError(f"{param} must have a {kind} that is a string.", param)
    refuse_large(value, param)
    if kind == "regex":
        # As in JavaScript, \d, \w and \s are those of ASCII: what they match is matched by every other dialect.
        return lark_grammar(f"start: /{regex_to_lark(value, 'dws')}/", param)
    try:
        return lark_grammar(any_to_lark(value), param)
    except Exception as error:  # the converter raises Exception itself, and others of Python's
        raise RequestError(f"{param} has a grammar that cannot be read: {error}"[:300], param) from None


def _space(options: Mapping[str, Any]) -> str | None:
    if options.get("disable_any_whitespace"):
        return None
    pattern = options.get("whitespace_pattern")
    if pattern is None:
        return WHITESPACE
    if not isinstance(pattern, str):
        raise RequestError("structured_outputs must have a whitespace_pattern that is a string.", "structured_outputs")
    return pattern


def _choice(value: Any, param: str) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise RequestError(f"{param} must have a choice that is a list of strings, at least one.", param)
    if len(value) > CHOICES_MAX:
        raise RequestError(f"{param} has {len(value)} choices, more than {CHOICES_MAX}.", param)
    return lark_grammar(f"start: {' | '.join(map(lark_text, dict.fromkeys(value)))}", param)


def _structural_tag(value: Any, param: str) -> Grammar:
    """vLLM's structural tags: free text in which each `begin` is followed by JSON of its schema, and its `end`."""
    if isinstance(value, str):
        refuse_large(value, param)
        value = _loaded(value, param)
    try:
        tags = msgspec.convert(value, StructuralTags)
    except msgspec.ValidationError as error:
        raise RequestError(
            f'{param} must have a structural_tag with "structures", each with a "begin", a "schema" and an "end", and '
            f'with "triggers": {error}'[:300],
            param,
        ) from None
    rules: list[str] = []
    for index, tag in enumerate(tags.structures):
        trigger = next((one for one in tags.triggers if one and tag.begin.startswith(one)), None)
        if trigger is None:
            raise RequestError(f"{param} has no trigger that {tag.begin[:50]!r} begins with.", param)
        schema = json.dumps(guided_schema(tag.schema, param), ensure_ascii=False)
        rest = lark_text(tag.begin[len(trigger) :])
        rules += [
            f"tag_{index}_trigger[lazy]: TEXT {lark_text(trigger)}",
            f"tag_{index}: tag_{index}_trigger {rest} %json {schema} {lark_text(tag.end)}",
        ]
    any_tag = " | ".join(f"tag_{index}" for index in range(len(tags.structures)))
    return lark_grammar("\n".join([f"start: ({any_tag})* last", "last: TEXT", f"TEXT: {ANY_TEXT}", *rules]), param)


def _listed(grammars: Sequence[Mapping[str, Any]], param: str) -> Grammar:
    source = json.dumps({"grammars": grammars}, ensure_ascii=False, separators=(",", ":"))
    refuse_large(source, param)
    return Grammar(source=source)


def _loaded(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"{param} must have a schema that is JSON.", param) from None
