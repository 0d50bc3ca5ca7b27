"""A line chart as SVG, over the number of stages."""

from collections.abc import Mapping, Sequence
from math import log2
from xml.sax.saxutils import escape  # nosec B406 # it writes XML and reads none

Points = Sequence[tuple[int, float]]

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 60, 40, 220, 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Colours of Okabe and Ito, which colour-blind people can tell apart."""


def line_chart(title: str, lines: Mapping[str, Points], top: float = 1.1) -> str:
    """Makes an SVG document: x is the number of stages on a logarithmic scale, and y from 0 to `top`, clipped there."""
    stages = sorted({x for points in lines.values() for x, _ in points})
    low, high = log2(stages[0]), max(log2(stages[-1]), log2(stages[0]) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (log2(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - min(y, top) / top * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_text(LEFT, TOP - 16, title)]
    for tenth in range(0, int(top * 10) + 1, 2):
        _, y = at(stages[0], tenth / 10)
        parts.append(
            f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>{_text(LEFT - 34, y + 4, f"{tenth / 10:g}")}'
        )
    parts += [_text(at(x, 0)[0] - 6, HEIGHT - BOTTOM + 20, str(x)) for x in stages]
    parts.append(_text(LEFT, HEIGHT - 10, "stages"))
    for place, (name, points) in enumerate(lines.items()):
        colour = COLOURS[place % len(COLOURS)]
        places = [at(x, y) for x, y in points]
        path = "L".join(f"{x} {y}" for x, y in places)
        parts.append(f'<path d="M{path}" stroke="{colour}" fill="none" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in places]
        parts.append(_text(WIDTH - RIGHT + 14, TOP + 20 * place + 10, name, colour))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif"'
    return f'{head} font-size="13"><rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"


def _text(x: float, y: float, text: str, colour: str = "black") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}">{escape(text)}</text>'
