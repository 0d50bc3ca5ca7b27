"""The command line's options, made from the Structs that define them; see `api/settings/option.py`."""

import difflib
import itertools
import json
import os
from collections.abc import Callable, Collection, Mapping, Set
from pathlib import Path
from typing import Any, TypeAlias

import click
import msgspec
from msgspec import Meta

from actors.log import LEVEL_VARIABLE, LEVELS
from api.cli.parameters import JsonObject, LayerSplit, LoggedCommand, Milliseconds, Spellings, note
from api.errors import OptionError
from api.settings.environment import VAIN_OPTIONS, VainOption
from api.settings.option import Option, options_in

Command: TypeAlias = Callable[..., None]

DEFAULT_IN_WORDS = "  [default: {}]"
"""How a help text ends that says what happens where its option is not given."""

CONFIG = "--config"

TRACE_MODE = "trace_mode"

VAIN = "api.cli.vain"
"""The key in a context's `meta` of the options without effect that were given, each with the reason."""


def options_of(
    kind: type[msgspec.Struct],
    *,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    instead: Mapping[str, Meta] | None = None,
) -> Callable[[Command], Command]:
    """A decorator that adds the options of a Struct to a command, which gets their values by name.

    `api.settings.option.take` makes the Struct of them. `only` or `without` choose options by name; `instead` has
    annotations by name, for options that mean something else in this command.
    """
    chosen = [
        option for option in options_in(kind) if option.name not in without and (only is None or option.name in only)
    ]

    def add(command: Command) -> Command:
        for option in reversed(chosen):
            meta = (instead or {}).get(option.name, option.meta)
            command = _click_option(msgspec.structs.replace(option, meta=meta))(command)
        return command

    return add


def _click_option(option: Option) -> Callable[[Command], Command]:
    is_list = option.type in {list[str], list[Path]}
    words = option.extra.get("default") if option.default is None or is_list else None
    variables = option.extra.get("variables")
    shared: dict[str, Any] = {
        "help": f"{option.meta.description}{DEFAULT_IN_WORDS.format(words) if words else ''}",
        "envvar": variables,
        "show_envvar": bool(variables),
    }
    if option.type is bool:
        [flag] = option.flags
        has_off = option.default or "off" in option.extra
        flags = f"{flag}/--no-{flag.removeprefix('--')}" if has_off else flag
        return click.option(flags, option.name, is_flag=True, default=option.default, show_default=has_off, **shared)
    if option.default is not None and not is_list:
        shared |= {"default": option.default, "show_default": True}
    return click.option(*option.flags, option.name, type=_click_type(option), multiple=is_list, **shared)


def _click_type(option: Option) -> Any:
    meta = option.meta
    if option.values:
        return Spellings(option.values)
    if option.type in {int, float} and any(bound is not None for bound in (meta.ge, meta.gt, meta.le, meta.lt)):
        ranges: Any = click.IntRange if option.type is int else click.FloatRange
        return ranges(
            min=meta.ge if meta.gt is None else meta.gt,
            min_open=meta.gt is not None,
            max=meta.le if meta.lt is None else meta.lt,
            max_open=meta.lt is not None,
        )
    return _TYPES[option.type](option)


def _path(option: Option) -> click.Path:
    what = option.extra.get("path", "file")
    return click.Path(file_okay=what != "directory", dir_okay=what != "file", path_type=Path)


_TYPES: dict[Any, Callable[[Option], Any]] = {
    int: lambda _: int,
    str: lambda _: str,
    list[str]: lambda _: str,
    Path: _path,
    list[Path]: _path,
    list[int]: lambda _: LayerSplit(),
    list[float]: lambda _: Milliseconds(),
}


def _without_chip_settings(ctx: click.Context, _: click.Parameter, value: dict[str, object] | None) -> bool:
    """Whether decode steps are to be traced, the only setting that means something here; the log names the others."""
    given = value or {}
    if others := sorted(given.keys() - {TRACE_MODE}):
        note(ctx, "these keys of --override-tt-config have no effect", keys=others)
    return given.get(TRACE_MODE) is True


override_tt_config = click.option(
    "--override-tt-config",
    "trace_mode",
    type=JsonObject(),
    callback=_without_chip_settings,
    help="Settings of chips; '{\"trace_mode\": true}' is --enable-trace; no other applies to this device.",
)
"""An option of vLLM's TT server, which a command gets as `trace_mode`."""


def vain_options(command: Command) -> Command:
    """A decorator that has a command take vLLM's options without effect, and log those that are given."""
    for option in reversed(VAIN_OPTIONS):
        command = _vain_option(option)(command)
    return command


def _vain_option(option: VainOption) -> Callable[[Command], Command]:
    first, *others = option.flags
    flags = [f"{first}/--no-{first.removeprefix('--')}" if option.is_switch else first, *others]

    def note_use(ctx: click.Context, _: click.Parameter, value: object) -> None:
        if value is None:
            return
        if VAIN not in ctx.meta:
            ctx.meta[VAIN] = {}
            note(ctx, "these options have no effect here", options=ctx.meta[VAIN])
        ctx.meta[VAIN][first] = option.why

    return click.option(
        *flags, type=bool if option.is_switch else str, default=None, callback=note_use, expose_value=False, hidden=True
    )


def _set_level(_: click.Context, __: click.Parameter, value: str | None) -> None:
    if value is not None:
        # The engine and the stages read it too.
        os.environ[LEVEL_VARIABLE] = value


log_level = click.option(
    "--log-level",
    type=Spellings(LEVELS),
    callback=_set_level,
    expose_value=False,
    help=f"The least of what is logged.{DEFAULT_IN_WORDS.format(f'${LEVEL_VARIABLE}, then info')}",
)
"""What of all processes is logged."""


class ConfigCommand(LoggedCommand):
    """A command that reads options from the YAML file of --config too, as vLLM's `serve` does.

    The file maps names of options to values; what the command line gives goes before it.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Puts the file's options in front. Raises OptionError where they cannot be followed."""
        words = list(itertools.takewhile(lambda arg: arg != "--", args))
        given = {word.partition("=")[0].replace("_", "-") for word in words}
        # As everywhere, the last one counts where it is given twice.
        pairs = [] if ctx.resilient_parsing else reversed(list(itertools.pairwise([*words, ""])))
        for word, following in pairs:
            flag, _, value = word.partition("=")
            if flag == CONFIG and (value or following):
                args = [*config_arguments(self, Path(value or following), given), *args]
                break
        return super().parse_args(ctx, args)


def config_arguments(command: click.Command, path: Path, given: Set[str]) -> list[str]:
    """The options of a file as arguments of a command, without those that are `given` there by one of their flags.

    Raises OptionError where the file cannot be read, or names what is not an option.
    """
    flags = {
        flag: parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for flag in (*parameter.opts, *parameter.secondary_opts)
        if flag != CONFIG
    }
    arguments: list[str] = []
    for name, value in _read_config(path).items():
        flag = f"--{name.replace('_', '-').removeprefix('--')}"
        if flag not in flags:
            near = difflib.get_close_matches(flag, flags, 1)
            hint = f" Did you mean {near[0].removeprefix('--')}?" if near else ""
            raise OptionError(f"{CONFIG} '{path}': {name!r} is not an option of `{command.name}`.{hint}")
        option = flags[flag]
        if not given & {*option.opts, *option.secondary_opts}:
            arguments += _arguments(flag, option, value)
    return arguments


def _arguments(flag: str, option: click.Option, value: object) -> list[str]:
    if value is None:
        return []
    if option.is_flag or option.secondary_opts:
        if not isinstance(value, bool):
            raise OptionError(f"{CONFIG}: {flag.removeprefix('--')} is true or false, and not {value!r}.")
        on = value == (flag in option.opts)
        return [flags[0] for flags in [option.opts if on else option.secondary_opts] if flags]
    if isinstance(value, list):
        parts = [str(part) for part in value]
        return [word for part in parts for word in (flag, part)] if option.multiple else [flag, ",".join(parts)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = msgspec.yaml.decode(path.read_bytes())
    except OSError as error:
        raise OptionError(f"{CONFIG} '{path}' cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        first = str(error).partition("\n")[0]
        raise OptionError(f"{CONFIG} '{path}' is not YAML: {first}.") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise OptionError(f"{CONFIG} '{path}' does not map names of options to values, like `port: 8001`.")
    return content


config_file = click.option(
    CONFIG,
    type=click.Path(dir_okay=False),
    expose_value=False,
    help="A YAML file of options, like `port: 8001`; the command line goes before it.",
)
"""An option for commands that are `ConfigCommand`s."""
