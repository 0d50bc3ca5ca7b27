"""Templates are code of strangers: Jinja's sandbox, with bounds on time and memory besides.

Jinja's own sandbox keeps a template from the interpreter, but not from the processor: nested loops, `'a' * 10**9` or
a filter that pads to a billion characters need no attribute that is forbidden. Here every operation whose cost depends
on its operands counts against a budget. Loops, comparisons and `~` are changed to do so when a template is compiled;
operators, calls, filters and tests pass through the environment anyway; and methods and filters that are not listed
cannot be used at all. What is left costs a bounded time for each character of the template.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.environment import TemplateModule
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from api.text.template_budget import SLOT, budget, check_operation


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


STRING_METHODS = _names(
    "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit "
    "islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind "
    "rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
METHODS: dict[type, frozenset[str]] = {
    str: STRING_METHODS,
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}
"""The methods of values that templates may call: none of them makes more than it is given, except those below."""

OWN_TYPES = (LoopContext, Macro, Namespace, Cycler, Joiner, TemplateModule)
"""Jinja's own objects, whose public attributes are safe."""

LIGHT_FILTERS = _names("abs attr count d default first float int last length random round")
"""Filters whose cost does not depend on the size of their value."""

FILTERS = LIGHT_FILTERS | _names(
    "capitalize dictsort e escape forceescape format groupby indent items join list lower map max min reject "
    "rejectattr replace reverse safe select selectattr sort string striptags sum title tojson trim unique upper "
    "urlencode wordcount"
)

LAZY_FILTERS = _names("map reject rejectattr select selectattr")
"""Filters that handle the items of their value when they are asked for them, one by one."""

FORMAT_WIDTH = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\*|\d{4,}|\d*\.(?:\*|\d{4,}))")
FIELD_WIDTH = re.compile(r":[^{}]*(?:\d{4,}|\{)")
"""Widths in format strings that could pad a text without end."""

INDENT_MAX = 64
TIME_FORMAT_MAX = 64


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An environment with what transformers gives to templates. Render only within a budget."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=_counted,
            # Otherwise filters of constants would be run when a template is compiled.
            optimized=False,
        )
        self.filters = {name: _bounded_filter(name, self.filters[name]) for name in sorted(FILTERS)}
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: _bounded_test(test) for name, test in tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _make_dict,
            "namespace": _Namespace,
            "raise_exception": _refuse,
            "strftime_now": _time_now,
        }

    # What templates call and read, in the names that Jinja calls.

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Calls a function or a method for a template."""
        budget().step()
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            args = _checked_arguments(text, __obj.__name__, args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes an operator."""
        if operator == "%" and isinstance(left, str):
            _check_format(left, right, FORMAT_WIDTH, "%")
        check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute."""
        allowed = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        if allowed is not None:
            return attr in allowed
        return isinstance(obj, OWN_TYPES) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Replaces the method `format` of a text by a bounded one."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(text, [*args, kwargs], FIELD_WIDTH, "{")
            return wrapped(*args, **kwargs)

        return bounded

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins the pieces of a macro or a block."""
        held = list(pieces)
        budget().handle(sum(map(len, held)) + SLOT * len(held))
        return "".join(held)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _Counting().visit(template)
        template.set_environment(self)
        return template

    # What the changed nodes of templates call.

    def step(self) -> None:
        """Called in every pass through a loop; the call itself counts."""

    def weighed(self, value: Any) -> Any:
        """Counts an operand of a comparison, and returns it."""
        if not isinstance(value, int | float | None):
            budget().handle_value(value)
        return value

    def joined(self, *values: Any) -> str:
        """The operator `~`."""
        for value in values:
            budget().handle_value(value)
        return "".join(map(str, values))


class _Counting(NodeTransformer):
    """Changes loops, comparisons and `~` so that they count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step", [], node.lineno), lineno=node.lineno))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call("weighed", [node], node.lineno)


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), arguments, [], None, None, lineno=line)


class _GenerationTag(Extension):
    """`{% generation %}`, which marks for trainers what a model wrote, and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """A namespace that keeps no private attributes, as transformers', and shows nothing of what is in it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` can be the name of an attribute.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a namespace cannot keep names with an underscore")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    budget().handle_value(args)
    return dict(*args, **kwargs)


def _refuse(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _time_now(form: str) -> str:
    if len(form) > TIME_FORMAT_MAX or re.search(r"\d{3}", form):
        raise SecurityError("the form of a time is too long")
    # A template means the time at the server, as in transformers.
    return datetime.now().astimezone().strftime(form)


@pass_context
def _counted(context: Context, value: Any) -> Any:  # with a context, no constants are counted beforehand
    if not isinstance(value, str):
        budget().handle_value(value)
    return value


def _check_format(text: str, values: Any, width: re.Pattern[str], mark: str) -> None:
    if width.search(text):
        raise SecurityError("a format pads a text too far")
    counter = budget()
    for _ in range(text.count(mark)):
        counter.handle_value(values)


def _checked_arguments(text: str, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Counts what a method of a text is about to make. An argument that can be read only once becomes a list."""
    if method == "join" and args:
        items = _listed(args[0])
        budget().handle(len(text) * len(items))
        budget().handle_value(items)
        return (items,)
    if method == "replace" and len(args) > 1:
        _check_replacement(text, args[0], args[1])
    budget().handle(SLOT * len(text))
    return args


def _check_replacement(text: object, old: object, new: object) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        budget().handle(len(text) + text.count(old) * len(new))


def _listed(value: Any) -> list[Any]:
    items = []
    for item in value:
        budget().step()
        items.append(item)
    return items


Filter = Callable[..., Any]


def _bounded_filter(name: str, original: Filter) -> Filter:
    check = CHECKS.get(name)
    function = _to_json if name == "tojson" else original
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def bounded(context: Context, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        budget().step()
        if name not in LIGHT_FILTERS and name not in LAZY_FILTERS:
            if not isinstance(value, str | dict | list | tuple) and hasattr(value, "__next__"):
                value = _listed(value)
            budget().handle_value(value)
        if check is not None:
            check(value, *args, **kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        return function(first[kind], value, *args, **kwargs) if kind else function(value, *args, **kwargs)

    return bounded


def _check_join(value: Any, d: Any = "", *_: Any, **__: Any) -> None:
    if isinstance(d, str) and hasattr(value, "__len__"):
        budget().handle(len(d) * len(value))


def _check_replace(value: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    _check_replacement(str(value), str(old), str(new))


def _check_indent(value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    size = len(width) if isinstance(width, str) else width
    if size > INDENT_MAX:
        raise SecurityError("an indent is too wide")
    budget().handle(len(value) + value.count("\n") * size)


def _check_sum(value: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("only numbers have a sum")


def _check_format_filter(value: Any, *args: Any, **kwargs: Any) -> None:
    _check_format(str(value), [*args, kwargs], FORMAT_WIDTH, "%")


CHECKS: dict[str, Callable[..., None]] = {
    "join": _check_join,
    "replace": _check_replace,
    "indent": _check_indent,
    "sum": _check_sum,
    "format": _check_format_filter,
}


def _bounded_test(original: Filter) -> Filter:
    kind = getattr(getattr(original, "jinja_pass_arg", None), "name", None)

    @pass_context
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget().step()
        if args:
            budget().handle_value([value, *args])
        return original(context.environment, value, *args, **kwargs) if kind else original(value, *args, **kwargs)

    return bounded


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Encodes as JSON without escaping for HTML, as Jinja's own filter does: no model was trained on that."""
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    if (len(indent) if isinstance(indent, str) else indent) > INDENT_MAX:
        raise SecurityError("an indent is too wide")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    parts = []
    for part in encoder.iterencode(value):
        budget().handle(len(part))
        parts.append(part)
    return "".join(parts)
