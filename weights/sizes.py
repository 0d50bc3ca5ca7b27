"""Numbers of bytes as people read them."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def in_words(count: int) -> str:
    """Like "1.5 GiB": three digits or so, in the largest unit that gives a whole part."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} bytes" if unit == 0 else f"{value:.1f} {UNITS[unit]}"
