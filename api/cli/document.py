"""docs/options.md, made from the commands: `python -m api.cli.document` writes it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from api.cli.group import main
from api.cli.options import DEFAULT_IN_WORDS
from api.settings.environment import VAIN_OPTIONS, WITHOUT_EFFECT

OPTIONS_PAGE = Path("docs/options.md")

_INTRODUCTION = """\
# Options

Every option of `galaxyline`, by command. This page is made from the options' definitions: change those, then run
`make options-doc`. Options may be spelt with `-` or `_`. Where a default is an environment variable, an option given on
the command line goes before it.
"""


def options_page() -> str:
    """The text of docs/options.md."""
    parts = [_INTRODUCTION]
    for name, command in sorted(_leaves(main, "galaxyline")):
        arguments = " ".join(
            parameter.make_metavar(click.Context(command))
            for parameter in command.params
            if isinstance(parameter, click.Argument)
        )
        parts.append(f"## `{' '.join(part for part in (name, arguments) if part)}`\n\n{_help(command)}\n")
        rows = [_row(option) for option in command.params if isinstance(option, click.Option) and not option.hidden]
        if rows:
            parts.append("\n".join(["| Option | Value | Default | Meaning |", "|---|---|---|---|", *rows]) + "\n")
    parts.append(_vain_options())
    ignored = ", ".join(f"`{variable}`" for variable in WITHOUT_EFFECT)
    parts.append(
        "## Environment variables without effect\n\n"
        f"{ignored} are set for tt-metal's programs and vLLM; the log says so where one of them is set.\n"
    )
    return "\n".join(parts)


def _vain_options() -> str:
    rows = [
        f"| {', '.join(f'`{flag}`' for flag in option.flags)} | {_escaped(option.why)} |" for option in VAIN_OPTIONS
    ]
    return "\n".join(
        [
            "## Options of vLLM without effect\n",
            "`serve` takes these as they are pasted, and logs those that are given.\n",
            "| Option | Why |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _leaves(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for part, below in command.commands.items():
            yield from _leaves(below, f"{name} {part}")
    else:
        yield name, command


def _help(command: click.Command) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))


def _row(option: click.Option) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    meaning, _, in_words = (option.help or "").partition(DEFAULT_IN_WORDS.partition("{}")[0])
    cells = (flags, _value(option), in_words.removesuffix("]") or _default(option), meaning)
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _value(option: click.Option) -> str:
    kind: Any = option.type
    if option.is_flag:
        return ""
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, click.IntRange | click.FloatRange):
        return f"{kind.name.split()[0]}, {_bounds(kind)}"
    many = ", may be repeated" if option.multiple else ""
    return f"{kind.name}{many}"


def _bounds(kind: click.IntRange | click.FloatRange) -> str:
    lower = "" if kind.min is None else f"{'above' if kind.min_open else 'at least'} {kind.min:g}"
    upper = "" if kind.max is None else f"{'below' if kind.max_open else 'at most'} {kind.max:g}"
    return ", ".join(bound for bound in (lower, upper) if bound)


def _default(option: click.Option) -> str:
    default = option.to_info_dict()["default"]
    if option.required:
        return "required"
    if option.is_flag:
        return ("on" if default else "off") if option.secondary_opts else ""
    return "; ".join(part for part in (_variables(option.envvar), "" if default is None else f"`{default}`") if part)


def _variables(names: str | Iterable[str] | None) -> str:
    listed = [names] if isinstance(names, str) else names or []
    return ", ".join(f"`${name}`" for name in listed)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    OPTIONS_PAGE.write_text(options_page(), encoding="utf-8")
