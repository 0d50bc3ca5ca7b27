"""Rounding up, and numbers of bytes and of things as people read them."""

import re

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGTkmgt])(?:i?[bB])?)?")

SIZE_MAX = 1 << 60

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def ceil_div(value: int, divisor: int) -> int:
    """The quotient, rounded up: how many pieces of `divisor` hold `value`."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not less than `value`."""
    return ceil_div(value, multiple) * multiple


def counted(count: int, noun: str) -> str:
    """Returns a number with its noun, like "1 row" or "2 rows", "2 batches", "2 Galaxies"."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{count} {noun.removesuffix('y')}ies"
    return f"{count} {noun}{'es' if noun.endswith('ch') else 's'}"


def parse_size(text: str) -> int:
    """Reads a number of bytes: "4096", "512M", "20G" or "20 GiB", where K is 1024. Raises ValueError for all else."""
    match = _SIZE.fullmatch(text.strip())
    power = 0 if match is None or match[2] is None else 1 + "KMGT".index(match[2].upper())
    if match is None or float(match[1]) * 1024**power > SIZE_MAX:
        raise ValueError(f"{text!r} is not a number of bytes, like 512M or 20G")
    return int(float(match[1]) * 1024**power)


def in_words(count: int) -> str:
    """Returns a number of bytes like "1.5 GiB": three digits or so, in the largest unit that gives a whole part."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} bytes" if unit == 0 else f"{value:.1f} {UNITS[unit]}"
