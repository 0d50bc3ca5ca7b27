"""The grammar of an answer that calls functions, in the formats that DeepSeek's models are trained on.

V3, R1 and R1-0528 write `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, the arguments in a
fence of Markdown, `<｜tool▁call▁end｜>`, further calls after a line break, and `<｜tool▁calls▁end｜>`. V3.1 leaves out
`function`, the fence and the line breaks: `NAME<｜tool▁sep｜>{...}`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from api.errors import RequestError
from api.openai.grammars.structured_output import ANY_TEXT, guided_schema, lark_grammar, lark_text
from stages.step import Grammar

TokenId = Callable[[str], int | None]
"""The id of the token that is written like this, such as `TextTokenizer.token_id`; None where there is none."""


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """A function that may be called. Without a schema of `parameters` it takes any object."""

    name: str
    parameters: Any = None
    strict: bool = False


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How calls are written: the tags around them, and what stands between tags, name and arguments.

    A call is `before_name`, the name, `before_arguments`, the arguments as JSON and `after_arguments`, where tags stand
    for themselves.
    """

    begin: str = "<｜tool▁calls▁begin｜>"
    end: str = "<｜tool▁calls▁end｜>"
    between_calls: str = ""
    before_name: Sequence[str]
    before_arguments: Sequence[str]
    after_arguments: Sequence[str]


_CALL_BEGIN, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

DEEPSEEK_V3 = ToolFormat(
    between_calls="\n",
    before_name=[_CALL_BEGIN, "function", _SEPARATOR],
    before_arguments=["\n```json\n"],
    after_arguments=["\n```", _CALL_END],
)

DEEPSEEK_V31 = ToolFormat(before_name=[_CALL_BEGIN], before_arguments=[_SEPARATOR], after_arguments=[_CALL_END])

Choice = Literal["auto", "required"] | Function
"""Whether functions may be called, have to be, or this one has to be."""


def tool_grammar(
    functions: Sequence[Function],
    choice: Choice,
    style: ToolFormat,
    token_id: TokenId,
    *,
    parallel: bool = True,
    only_strict: bool = False,
    param: str = "tools",
) -> Grammar | None:
    """The grammar of an answer that may, or has to, call functions; None where it is free.

    With "auto" text comes before the calls, or instead of them; the answer is free unless a function is strict. Else
    the answer begins with the calls. A chosen function is called once, others several times where they are `parallel`.
    The arguments follow the functions' schemas; those of functions that are not strict are any object where the schema
    cannot be enforced, and everywhere with `only_strict` (for one that the `GrammarChecker` refuses otherwise).

    Raises RequestError for a strict function whose schema cannot be enforced.
    """
    if choice == "auto" and not any(function.strict for function in functions):
        return None
    called = [choice] if isinstance(choice, Function) else list(functions)
    is_one = isinstance(choice, Function) or not parallel

    def term(text: str) -> str:
        found = token_id(text) if text.startswith("<") else None
        return lark_text(text) if found is None else f"<[{found}]>"

    def terms(texts: Sequence[str]) -> str:
        return " ".join(map(term, texts))

    rules = [
        f"function_{index}: {lark_text(function.name)} {terms(style.before_arguments)} "
        f"%json {json.dumps(_arguments(function, only_strict, param), ensure_ascii=False)}"
        for index, function in enumerate(called)
    ]
    any_function = " | ".join(f"function_{index}" for index in range(len(called)))
    between = f"{term(style.between_calls)} " if style.between_calls else ""
    more = "" if is_one else f" ({between}call)*"
    rules += [
        f"call: {terms(style.before_name)} ({any_function}) {terms(style.after_arguments)}",
        f"rest: call{more} {term(style.end)}",
    ]
    if choice != "auto":
        start = [f"start: {term(style.begin)} rest"]
    elif token_id(style.begin) is not None:
        start = [f"start: TEXT ({term(style.begin)} rest)?", f"TEXT: {ANY_TEXT}"]
    else:
        start = [
            "start: (begin rest)? | TEXT",
            f"begin[lazy]: TEXT {term(style.begin)}",
            f"TEXT: {ANY_TEXT}",
        ]
    return lark_grammar("\n".join([*start, *rules]), param)


def _arguments(function: Function, only_strict: bool, param: str) -> dict[str, Any]:
    schema = function.parameters
    if schema is None or (only_strict and not function.strict):
        return guided_schema({"type": "object"}, param)
    if isinstance(schema, dict) and not schema.keys() & {"type", "$ref", "anyOf", "allOf", "oneOf"}:
        schema = {"type": "object", **schema}
    try:
        return guided_schema(schema, param)
    except RequestError:
        if function.strict:
            raise
        return guided_schema({"type": "object"}, param)
