"""The command line's options, made from the Structs that define them; see `api/settings/option.py`."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import click
import msgspec
import structlog
from msgspec import Meta

from api.cli.parameters import JsonObject, LayerSplit, Milliseconds
from api.settings.option import Option, options_in

Command: TypeAlias = Callable[..., None]

DEFAULT_IN_WORDS = "  [default: {}]"
"""How a help text ends that says what happens where its option is not given."""

TRACE_MODE = "trace_mode"

log = structlog.get_logger()


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
        return click.Choice(option.values)
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


def _without_chip_settings(_: click.Context, __: click.Parameter, value: dict[str, object] | None) -> bool:
    """Whether decode steps are to be traced, the only setting that means something here; the log names the others."""
    given = value or {}
    if others := sorted(given.keys() - {TRACE_MODE}):
        log.info("these keys of --override-tt-config have no effect", keys=others)
    return given.get(TRACE_MODE) is True


def _note_scheduler_steps(_: click.Context, __: click.Parameter, value: int | None) -> None:
    if value is not None:
        log.info("--num-scheduler-steps has no effect: each token is scheduled when its step returns", steps=value)


override_tt_config = click.option(
    "--override-tt-config",
    "trace_mode",
    type=JsonObject(),
    callback=_without_chip_settings,
    help="Settings of chips; '{\"trace_mode\": true}' is --enable-trace; no other applies to this device.",
)
"""An option of vLLM's TT server, which a command gets as `trace_mode`."""

num_scheduler_steps = click.option(
    "--num-scheduler-steps",
    type=click.IntRange(min=1),
    callback=_note_scheduler_steps,
    expose_value=False,
    help="An option of vLLM's TT server; without effect here.",
)
