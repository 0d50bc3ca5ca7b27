"""Options as fields of Structs: their help, bounds, values and environment variable stand in a field's annotation.

An option is a field `Annotated[type, msgspec.Meta(description=<help>, ge=..., extra={...})] = <default>`. A field whose
type is a Struct with options is a group, and groups may have groups. The command line (`api/cli/options.py`), the page
docs/options.md and the engine's options all come from there. `extra` may have:

- "flags": the option's flags, where they are not "--" and the field's name without a final "_s";
- "parameter": the option's name where the field's own would not be unique;
- "variables": environment variables that give the value, the first that is set;
- "default": what happens where the option is not given, in words;
- "values": the values to choose from, where the type allows more;
- "off": True for a flag that is off by default and has a flag beside it that turns it off;
- "path": "directory" or "any" for a path that is not a file's.
"""

import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from api.errors import OptionError

Options = TypeVar("Options", bound=msgspec.Struct)


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One option: a field of an options Struct.

    `type` is that of the field without None and annotations, `default` is None where the program decides.
    """

    name: str
    type: Any
    meta: Meta
    default: Any

    @property
    def extra(self) -> Mapping[str, Any]:
        """What the annotation has beside help and bounds; see the module."""
        return self.meta.extra or {}

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that the command line takes, the usual one first."""
        return self.extra.get("flags") or (f"--{self.name.removesuffix('_s').replace('_', '-')}",)

    @property
    def values(self) -> tuple[str, ...]:
        """The values that may be chosen; none where any value of the type may be given."""
        return self.extra.get("values") or (typing.get_args(self.type) if _is_literal(self.type) else ())


def spelt_as(values: Sequence[str], given: str) -> str:
    """The one of the values that is `given` with - or _, or in capitals; `given` itself where none is."""
    meant = _plain(given)
    return next((value for value in values if _plain(value) == meant), given)


def _plain(value: str) -> str:
    return value.casefold().replace("-", "_")


def options_in(kind: type[msgspec.Struct]) -> list[Option]:
    """All options of a Struct in the order of its fields, those of its groups included."""
    found: list[Option] = []
    for part in _parts(kind).values():
        if isinstance(part, Option):
            found.append(part)
        elif part is not None:
            found += options_in(part)
    return found


def option(kind: type[msgspec.Struct], name: str) -> Option:
    """The option of that name. Raises KeyError if there is none."""
    return {found.name: found for found in options_in(kind)}[name]


def again(kind: type[msgspec.Struct], name: str, help_text: str | None = None, default: str | None = None) -> Meta:
    """The annotation of an option that another Struct has already, with another help or default in words."""
    meta = option(kind, name).meta
    bounds = {bound: value for bound in ("ge", "gt", "le", "lt") if (value := getattr(meta, bound)) is not None}
    extra = {**(meta.extra or {}), **({} if default is None else {"default": default})}
    shared: dict[str, Any] = {"description": help_text or meta.description, "extra": extra, **bounds}
    return Meta(**shared)


def take(kind: type[Options], given: dict[str, Any]) -> Options:
    """Makes a Struct of the options in `given`, by name, and removes them from there.

    Groups and fields that are not options may be given whole, by the field's name. Paths may be strings. Raises
    OptionError for a value that an option cannot have.
    """
    try:
        return msgspec.convert(_take(kind, given), kind, dec_hook=_read_path)
    except msgspec.ValidationError as error:
        raise OptionError(f"An option cannot have this value: {error}.") from error


def changed(settings: Options, **changes: Any) -> Options:
    """The same options but for `changes`, by name.

    Raises OptionError for a value that an option cannot have, and for a name that is not an option's.
    """
    flat = _flat(settings)
    for name, value in changes.items():
        flat |= _flat(value) if _is_group(type(value)) else {name: value}
    return made(type(settings), flat)


def made(kind: type[Options], given: dict[str, Any]) -> Options:
    """Makes a Struct of the options in `given`, like `take`; a name that is not an option's raises OptionError too."""
    left = dict(given)
    options = take(kind, left)
    if left:
        raise OptionError(f"Unknown option: {' or '.join(sorted(left))}.")
    return options


def _take(kind: type[msgspec.Struct], given: dict[str, Any]) -> dict[str, Any]:
    taken: dict[str, Any] = {}
    for field, part in _parts(kind).items():
        if isinstance(part, Option):
            if part.name in given:
                value = given.pop(part.name)
                taken[field] = spelt_as(part.values, value) if isinstance(value, str) else value
        elif field in given:
            taken[field] = given.pop(field)
        elif part is not None:
            taken[field] = _take(part, given)
    return taken


def _flat(settings: msgspec.Struct) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field, part in _parts(type(settings)).items():
        value = getattr(settings, field)
        if isinstance(part, Option):
            flat[part.name] = value
        elif part is not None:
            flat |= _flat(value)
        else:
            flat[field] = value
    return flat


@functools.cache
def _parts(kind: type[msgspec.Struct]) -> dict[str, "Option | type[msgspec.Struct] | None"]:
    """What each field is: an option, a group of them, or neither."""
    hints = typing.get_type_hints(kind, include_extras=True)
    parts: dict[str, Option | type[msgspec.Struct] | None] = {}
    for field in msgspec.structs.fields(kind):
        bare, metas = _bare(hints[field.name])
        meta = next((meta for meta in metas if meta.description is not None), None)
        if meta is not None:
            name = (meta.extra or {}).get("parameter", field.name)
            parts[field.name] = Option(name=name, type=bare, meta=meta, default=_default(field))
        else:
            parts[field.name] = bare if _is_group(bare) else None
    return parts


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct) and bool(options_in(kind))


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return None if field.default is msgspec.NODEFAULT else field.default


def _bare(hint: Any) -> tuple[Any, list[Meta]]:
    """A type without None and annotations, and the annotations."""
    if typing.get_origin(hint) is Annotated:
        bare, metas = _bare(hint.__origin__)
        return bare, [*metas, *(meta for meta in hint.__metadata__ if isinstance(meta, Meta))]
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        others = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(others) == 1:
            return _bare(others[0])
    return hint, []


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal


def _read_path(kind: type, value: object) -> object:
    """Reads the one type of an option that msgspec does not know; objects that are made already stay as they are."""
    return value if isinstance(value, kind) else kind(value)
